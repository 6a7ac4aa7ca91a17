"""A process that pushes a slot at a crawl, for a test that kills it in the middle: ADDRESS JOB PATH."""

import sys
from pathlib import Path

from jaxscale.supervisor.job_token import read_token
from jaxscale.supervisor.peer_client import PeerClient
from jaxscale.supervisor.rate import TokenBucket

address, job, path = sys.argv[1:]
PeerClient(address, job, read_token(), "host-0").push(
    Path(path), "host-0", 0, 1, 1, seconds=600, rate=TokenBucket(50_000)
)
