"""Where copies go: any r hosts may be lost, and a whole slice first of all."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscale.supervisor.placement import buddies


def world(*sizes):
    members, slices = [], {}
    for index, count in enumerate(sizes):
        for _ in range(count):
            name = f"host-{len(members)}"
            members.append(name)
            slices[name] = index
    return members, slices


def test_the_first_copy_is_in_another_slice_at_the_same_place():
    members, slices = world(2, 2)
    assert [buddies(m, members, slices, 1) for m in members] == [("host-2",), ("host-3",), ("host-0",), ("host-1",)]


def test_the_second_copy_is_in_another_slice_too():
    members, slices = world(2, 2)
    assert buddies("host-0", members, slices, 3) == ("host-2", "host-3", "host-1")


def test_in_one_slice_it_is_the_next_host():
    members, slices = world(4)
    assert [buddies(m, members, slices, 1) for m in members] == [("host-1",), ("host-2",), ("host-3",), ("host-0",)]


def test_there_are_no_more_copies_than_others():
    members, slices = world(2)
    assert buddies("host-0", members, slices, 3) == ("host-1",)
    assert buddies("host-0", ["host-0"], {"host-0": 0}, 3) == ()
    assert buddies("host-0", members, slices, 0) == ()


WORLDS = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(WORLDS, st.integers(0, 4))
def test_copies_are_at_as_many_other_hosts_as_possible(sizes, replicas):
    members, slices = world(*sizes)
    for host in members:
        found = buddies(host, members, slices, replicas)
        assert len(found) == len(set(found)) == min(replicas, len(members) - 1)
        assert host not in found


@given(WORLDS.filter(lambda sizes: len(sizes) > 1), st.integers(1, 3))
def test_losing_a_whole_slice_loses_no_shard(sizes, replicas):
    members, slices = world(*sizes)
    for lost in set(slices.values()):
        for host in members:
            if slices[host] == lost:
                assert any(slices[buddy] != lost for buddy in buddies(host, members, slices, replicas))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_in_an_even_world_every_host_keeps_as_many_copies_as_it_gives(count, size, replicas):
    members, slices = world(*[size] * count)
    kept = Counter(buddy for host in members for buddy in buddies(host, members, slices, replicas))
    assert set(kept.values()) <= {min(replicas, len(members) - 1)}


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (3, 1), (2, 2, 2)])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_any_so_many_hosts_may_be_lost_at_once(sizes, replicas):
    slices = {f"host-{number}-{place}": number for number, size in enumerate(sizes) for place in range(size)}
    members = list(slices)
    holders = {host: {host, *buddies(host, members, slices, replicas)} for host in members}
    for lost in itertools.combinations(members, min(replicas, len(members) - 1)):
        assert all(holders[host] - set(lost) for host in members), lost
