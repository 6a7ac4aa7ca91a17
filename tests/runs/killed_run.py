"""`python killed_run.py WHERE:STEP RECIPE flags`: trains like `jaxscale train`, and kills itself with SIGKILL there.

WHERE is a section of the loop, or `written`, when a checkpoint's arrays are on the disk but the step is not sealed.
"""

import os
import signal
import sys
from unittest import mock

from jaxscale.checkpoint import layout
from jaxscale.cli import main
from jaxscale.train.display import Display


def die():
    os.kill(os.getpid(), signal.SIGKILL)


where, _, step = sys.argv[1].partition(":")


def enter(_, section, at):
    if (section, at) == (where, int(step)):
        die()


def seal(path, record, *more):
    if record.step >= int(step):
        die()
    return original_seal(path, record, *more)


original_seal = layout.seal
patch = mock.patch.object(layout, "seal", seal) if where == "written" else mock.patch.object(Display, "enter", enter)
with patch:
    sys.exit(main(["train", *sys.argv[2:]]))
