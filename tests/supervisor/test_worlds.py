"""The next world: who is in it, in which order, on which mesh; smaller, larger, or with a spare."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.axes import AXES, batch_shards, padded_batch
from jaxscale.supervisor.worlds import (
    Host,
    ImpossibleRequest,
    PlannedWorld,
    Request,
    grown,
    next_smaller,
    plan,
    replacements,
)


def sizes(**given):
    return {axis: given.get(axis, 1) for axis in AXES}


def hosts(slices, per_slice, devices=1):
    return [Host(f"host-{i}", i // per_slice, devices) for i in range(slices * per_slice)]


def request_of(slices=2, per_slice=2, devices=1, legal=None, **axes):
    axes = axes or {"data": slices, "fsdp": per_slice * devices}
    more = {} if legal is None else {"legal": legal}
    return Request(slices, per_slice, devices, sizes(**axes), **more)


def without(there, *names):
    return [host for host in there if host.name not in names]


def powers_of_two(wanted):
    """Weights of width 128: what the audit would say."""
    return 128 % wanted["fsdp"] == 0


def test_the_full_world_is_the_requested_one_in_rank_order():
    there = hosts(2, 6)
    world = plan(request_of(2, 6), there[::-1])
    assert world.names == tuple(f"host-{i}" for i in range(12))  # host-2 before host-10
    assert world.sizes == sizes(data=2, fsdp=6)
    assert tuple(world.sizes) == AXES
    assert world.slices == (0, 1)
    assert world.rank("host-7") == 7


def test_a_lost_slice_shortens_the_data_axis_only():
    request = request_of(4, 2, data=8, fsdp=1, tensor=1)
    full = plan(request, hosts(4, 2))
    smaller = plan(request, without(hosts(4, 2), "host-2", "host-3"), full)
    assert smaller.names == ("host-0", "host-1", "host-4", "host-5", "host-6", "host-7")
    assert smaller.sizes == sizes(data=6)
    assert smaller.slices == (0, 2, 3)


def test_one_lost_host_takes_its_slice_along_while_another_slice_is_whole():
    request = request_of(2, 4)
    smaller = plan(request, without(hosts(2, 4), "host-1"))
    assert smaller.names == ("host-4", "host-5", "host-6", "host-7")
    assert smaller.sizes == sizes(data=1, fsdp=4)


def test_in_one_slice_hosts_are_left_out_and_fsdp_gets_shorter():
    smaller = plan(request_of(1, 4), without(hosts(1, 4), "host-2"))
    assert smaller.names == ("host-0", "host-1", "host-3")
    assert smaller.sizes == sizes(fsdp=3)


def test_four_to_three_hosts_where_three_shards_are_not_legal():
    smaller = plan(request_of(1, 4, 2, powers_of_two), without(hosts(1, 4, 2), "host-0"))
    assert smaller.names == ("host-1", "host-2", "host-3")
    assert smaller.sizes == sizes(data=3, fsdp=2)  # the rows are padded, the weights need not be
    # The batch stays: 8 rows in 2 microbatches, each padded to the 6 shards.
    assert padded_batch(8, 2, batch_shards(smaller.sizes)) == 12


def test_other_axes_are_kept_and_hosts_left_idle_where_they_do_not_fit():
    request = request_of(1, 4, 2, tensor=4, fsdp=2)
    smaller = plan(request, without(hosts(1, 4, 2), "host-3"))
    assert smaller.names == ("host-0", "host-1")  # 6 devices are no multiple of tensor 4
    assert smaller.sizes == sizes(tensor=4)
    assert plan(request, hosts(1, 4, 2)[:1]) is None


def test_without_a_whole_slice_each_gives_the_same_number_of_hosts():
    smaller = plan(request_of(2, 3), without(hosts(2, 3), "host-0", "host-4"))
    assert smaller.names == ("host-1", "host-2", "host-3", "host-5")
    assert smaller.sizes == sizes(data=2, fsdp=2)


def test_no_world_is_smaller_than_the_least():
    request = dataclasses.replace(request_of(1, 4), least_hosts=3)
    assert plan(request, hosts(1, 4)[:3]) is not None
    assert plan(request, hosts(1, 4)[:2]) is None
    assert plan(request, []) is None


def test_spares_stand_in_their_own_slice_first_then_those_that_float():
    request = request_of(2, 2)
    full = plan(request, hosts(2, 2))
    anywhere, fixed = Host("spare-0", None), Host("spare-1", 1)
    assert replacements(full, ["host-2"], [anywhere, fixed]) == (("host-2", "spare-1"),)
    assert replacements(full, ["host-0"], [anywhere, fixed]) == (("host-0", "spare-0"),)
    assert replacements(full, ["host-0", "host-1"], [anywhere, fixed]) == ()  # not one for each
    assert replacements(full, ["host-0"], [Host("spare-0", None, devices=2)]) == ()
    left = [*without(hosts(2, 2), "host-0"), anywhere]
    world = plan(request, left, full)
    assert world.names == ("host-1", "spare-0", "host-2", "host-3")
    assert world.members[1] == Host("spare-0", 0)
    # The spare keeps its place, also when the lost host is back.
    assert plan(request, [*hosts(2, 2), anywhere], world).names == world.names


def test_a_floating_spare_makes_the_slice_whole_that_lacks_least():
    left = [*without(hosts(2, 3), "host-0", "host-1", "host-5"), Host("spare-0", None)]
    world = plan(request_of(2, 3), left)
    assert world.names == ("host-3", "host-4", "spare-0")
    assert world.slices == (1,)


def test_grows_back_when_hosts_return():
    request = request_of(2, 2)
    small = plan(request, hosts(2, 2)[:2])
    assert grown(request, hosts(2, 2)[:3], small) is None  # half a slice is of no use
    large = grown(request, hosts(2, 2), small)
    assert large == plan(request, hosts(2, 2))
    assert grown(request, hosts(2, 2), large) is None


def test_the_next_smaller_world_has_the_program_of_any_one_loss():
    request = request_of(2, 2)
    full = plan(request, hosts(2, 2))
    ahead = next_smaller(request, full)
    for lost in full.names:
        real = plan(request, without(hosts(2, 2), lost), full)
        assert (real.axes, len(real.members)) == (ahead.axes, len(ahead.members))
    single = next_smaller(request, ahead)
    assert single.sizes == sizes()
    assert next_smaller(request, single) is None


@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.data())
def test_every_planned_world_is_legal_and_fits_its_devices(slices, per_slice, devices, tensor, data):
    inner = per_slice * devices
    tensor = tensor if inner % tensor == 0 else 1
    request = request_of(slices, per_slice, devices, powers_of_two, data=slices * inner // tensor, tensor=tensor)
    there = hosts(slices, per_slice, devices)
    usable = data.draw(st.lists(st.sampled_from(there), unique=True))
    full = plan(request, there)
    world = plan(request, usable, full)
    if world is None:
        # Only where not even one host can be used.
        assert not usable or all(n * devices % tensor for n in range(1, max(_per_slice(usable)) + 1))
        return
    assert set(world.members) <= set(usable)
    assert len(set(world.members)) == len(world.members)
    assert [m.slice for m in world.members] == sorted(m.slice for m in world.members)
    assert math.prod(world.sizes.values()) == len(world.members) * devices
    assert powers_of_two(world.sizes)
    assert world.sizes["tensor"] == tensor
    assert world.sizes["data"] % len(world.slices) == 0
    assert len(set(_per_slice(world.members))) == 1
    whole = sum(count == per_slice for count in _per_slice(usable))
    assert len(world.members) >= whole * per_slice
    assert plan(request, usable[::-1], full) == world  # the order of the question does not matter


def _per_slice(members):
    return [sum(m.slice == s for m in members) for s in {m.slice for m in members}]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data": 2, "fsdp": 3}, "mesh data 2 x fsdp 3 = 6 does not match 2 slices x 2 hosts x 1 devices = 4"),
        ({"data": 1, "fsdp": 4}, "mesh axis 'data' (1) is not a multiple of the 2 slices"),
    ],
)
def test_an_impossible_request_is_refused_with_its_numbers(wrong, message):
    with pytest.raises(ImpossibleRequest) as error:
        request_of(2, 2, **wrong)
    assert message in str(error.value)


def test_a_world_is_data():
    assert PlannedWorld((Host("a", 0),), (("data", 1),)) == PlannedWorld((Host("a", 0),), (("data", 1),))
