"""The order to work that each member gets, and the run that a new coordinator finds from such orders."""

import json

from jaxscale.supervisor.budget import Mark
from jaxscale.supervisor.commits import MemoryCommits
from jaxscale.supervisor.facts import Epoch, Host, Settings, World
from jaxscale.supervisor.limits import Kind, Pace
from jaxscale.supervisor.orders import work_orders
from jaxscale.supervisor.takeover import find_epoch, memo_of

NAMES = ("host-0", "host-1", "host-2", "host-3")
SLICES = {"host-0": 0, "host-1": 0, "host-2": 1, "host-3": 1}
SETTINGS = Settings(steps=100, every=10, generations=2, replicas=1)


class Memory:
    """A judge that remembers something."""

    def to_json(self):
        return {"strikes": 3}


def epoch_of(number=4, names=NAMES, choice=None):
    world = World(names, {name: SLICES[name] for name in names}, {"data": 2, "fsdp": 2}, 4)
    return Epoch(number, world, 40, choice, names[0], MemoryCommits(names, 1), address="127.0.0.1:5")


def hosts_of(connected=NAMES):
    names = (*NAMES, "spare-0")
    return {name: Host(name, SLICES.get(name, -1), 1, f"{name}:7", is_connected=name in connected) for name in names}


STEP = Kind("step", world=4)
PACE = Pace(durations={STEP: tuple(0.1 + n / 1000 for n in range(100)), Kind("data", world=4, first=True): (2.0,)})


def orders(**more):
    memo = memo_of(epoch_of(), Memory(), [(1, 0), (4, 40)], Mark(57, 3.5), PACE)
    smaller = more.pop("smaller", None)
    return work_orders(epoch_of(**more), hosts_of(more.pop("connected", NAMES)), SETTINGS, smaller, memo)


def through_json(message):
    return json.loads(json.dumps(message))


def test_each_member_has_its_rank_and_the_same_world():
    found = orders()
    assert [(tell.host, tell.message["rank"]) for tell in found] == list(zip(NAMES, range(4), strict=True))
    shared = [{k: v for k, v in tell.message.items() if k not in ("rank", "copies_to")} for tell in found]
    assert all(message == shared[0] for message in shared)
    assert shared[0]["do"] == "work"
    assert (shared[0]["epoch"], shared[0]["address"], shared[0]["members"]) == (4, "127.0.0.1:5", list(NAMES))
    assert (shared[0]["every"], shared[0]["generations"], shared[0]["devices"]) == (10, 2, 4)


def test_orders_are_json():
    for tell in orders(choice={"step": 40}):
        assert through_json(tell.message) == tell.message


def test_copies_go_to_hosts_whose_addresses_are_in_the_order():
    """A member whose stream is broken just now is still somebody's buddy; its agent would look it up in vain."""
    epoch, settings = epoch_of(), SETTINGS
    hosts = hosts_of(connected=("host-0", "host-1", "host-2"))
    for tell in work_orders(epoch, hosts, settings, None, {}):
        assert set(tell.message["copies_to"]) <= set(tell.message["peers"])


def test_shards_may_come_from_hosts_that_are_no_members():
    hosts = hosts_of((*NAMES, "spare-0"))
    (first, *_) = work_orders(epoch_of(), hosts, SETTINGS, None, {})
    assert first.message["peers"]["spare-0"] == "spare-0:7"
    hosts["spare-0"].is_connected = False
    (first, *_) = work_orders(epoch_of(), hosts, SETTINGS, None, {})
    assert "spare-0" not in first.message["peers"]


def test_the_next_smaller_world_is_told_for_compiling_ahead():
    smaller = World(("host-0", "host-1"), {"host-0": 0, "host-1": 0}, {"data": 1, "fsdp": 2}, 2)
    told = [tell.message["smaller"] for tell in orders(smaller=smaller)]
    assert told == [{"mesh": {"data": 1, "fsdp": 2}, "devices": 2, "processes": 2}] * 4
    assert {tell.message["smaller"] for tell in orders()} == {None}


# What a new coordinator makes of them


def running(epoch_number=4, names=NAMES, **more):
    tells = orders(number=epoch_number, names=names, **more)
    return {tell.host: Host(tell.host, 0, 1, work=through_json(tell.message)) for tell in tells}


def test_everything_is_found_again():
    found = find_epoch(running().values())
    assert found.there == frozenset(NAMES)
    epoch = found.epoch
    assert (epoch.number, epoch.address, epoch.start_step, epoch.service) == (4, "127.0.0.1:5", 40, "host-0")
    assert epoch.world == epoch_of().world
    assert epoch.started == epoch.begun == epoch.warmed == set(NAMES)
    assert found.lineage == ((1, 0), (4, 40))
    assert found.reached == Mark(57, 3.5)
    assert found.judge == {"strikes": 3}
    assert found.pace.durations[STEP] == PACE.durations[STEP][-16:]
    assert found.pace.durations.keys() == PACE.durations.keys()


def test_one_member_is_enough_to_find_the_epoch():
    hosts = running()
    found = find_epoch([hosts["host-2"], Host("spare-0", -1, 1)])
    assert found.there == {"host-2"}
    assert found.epoch.world.members == NAMES


def test_a_worker_of_an_older_epoch_is_not_taken_for_a_member():
    """On a host that was cut off when the epoch after was formed."""
    old, new = running(3), running(4, names=NAMES[2:])
    found = find_epoch([old["host-0"], old["host-1"], *new.values()])
    assert found.epoch.number == 4
    assert found.there == {"host-2", "host-3"}
    assert found.epoch.world.members == NAMES[2:]


def test_commits_of_a_found_epoch_need_as_many_copies_as_before():
    commits = find_epoch(running().values()).epoch.commits
    for name in NAMES:
        commits.sealed(name, 60)
    assert commits.committed == -1
    for name in NAMES:
        commits.copied(name, 60, "elsewhere")
    assert commits.committed == 60
