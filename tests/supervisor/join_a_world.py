"""What a test forks as one process of a world: joins it by the private calls, and says so; then waits to be ended.

join_a_world.py serve PROCESSES            prints the address
join_a_world.py connect ADDRESS PROCESSES RANK
join_a_world.py add ADDRESS PROCESSES RANK HOST    adds the ranks up (from 1), by collectives that listen at HOST
"""

import sys

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from jaxscale import jax_private
from jaxscale.supervisor.zygote import free_port


def main(arguments):
    jax.config.update("jax_platforms", "cpu")
    if arguments[0] == "serve":
        port = free_port("127.0.0.1")
        held = jax_private.serve(f"127.0.0.1:{port}", int(arguments[1]))
        print(f"127.0.0.1:{port}", flush=True)
        sys.stdin.read()
        del held
        return
    address, processes, rank = arguments[1], int(arguments[2]), int(arguments[3])
    assert not jax_private.has_backend()
    jax_private.connect(address, processes, rank)
    assert not jax_private.has_backend()
    if arguments[0] == "add":
        jax_private.gloo_at(arguments[4])
        total = multihost_utils.process_allgather(jnp.array(rank + 1)).sum()
        print(f"the sum is {total}", flush=True)
        sys.stdin.read()
        return
    client = jax._src.distributed.global_state.client
    client.key_value_set(f"name/{rank}", f"rank {rank}")
    others = [client.blocking_key_value_get(f"name/{other}", 20_000) for other in range(processes)]
    print(", ".join(others), flush=True)
    for line in sys.stdin:  # each line is a key to wait for and to set
        client.key_value_set(line.strip(), f"set by {rank}")
        print(client.blocking_key_value_get(line.strip(), 20_000), flush=True)


main(sys.argv[1:])
