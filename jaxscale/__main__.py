"""`python -m jaxscale` is the `jaxscale` command. Read next: `cli.py`."""

import sys

from jaxscale.cli import main

sys.exit(main())
