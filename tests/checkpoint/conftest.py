"""Lets the checkpoint tests import `states`, also from the processes they start."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from kept_runs import _made, _run, _s3  # noqa: F401 - fixtures
