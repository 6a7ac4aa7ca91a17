"""`python paced_run.py SECONDS LAST RECIPE flags`: trains like `jaxscale train`, but so slowly that a kill hits a step.

It takes SECONDS more in every section of the loop, and before step LAST it waits for the kill.
"""

import sys
import time

from jaxscale.cli import main
from jaxscale.train.display import Display

seconds, last = float(sys.argv[1]), int(sys.argv[2])


def enter(display, section, at):
    original(display, section, at)
    time.sleep(600 if (section, at) == ("step", last - 1) else seconds)


original = Display.enter
Display.enter = enter
sys.exit(main(["train", *sys.argv[3:]]))
