"""Lines of events.jsonl and metrics.jsonl as a supervised run writes them, for tests of what people are shown."""

import json

START = 1000.0
"""Of the clock of these tests, in seconds since 1970."""


def event(at, kind, epoch=1, **fields):
    return {"time": START + at, "mono": at, "epoch": epoch, "source": "coordinator", "kind": kind, **fields}


def state(at, before, after, reason="", epoch=1):
    return event(at, "state", epoch, **{"from": before, "to": after, "reason": reason})


def metrics(at, step, epoch=1):
    fields = {"loss": 2.0, "grad_norm": 1.0, "tokens": 512, "step_seconds": 0.1}
    return {"step": step, "epoch": epoch, "row": 8 * step, "rows": 8, "time": START + at, **fields}


def workers(at, epoch, hosts=2):
    return [event(at, "worker_started", epoch, pid=100 * epoch + i, host=f"host-{i}", rank=i) for i in range(hosts)]


def began(at=0.0, pid=1, hosts=2):
    """A first epoch that runs, with agents of the pids 10, 11, ..."""
    return [
        event(at, "coordinator_started", pid=pid, host="vm", address="127.0.0.1:1"),
        *(event(at + 0.1, "agent_started", pid=10 + i, host=f"host-{i}", slice=i) for i in range(hosts)),
        state(at + 0.2, "WAITING", "DECIDING", "enough hosts are there"),
        state(at + 0.2, "DECIDING", "FORMING", f"epoch 1 of {hosts} hosts from step 0"),
        state(at + 0.3, "FORMING", "RESTORING", "all workers are forked"),
        *workers(at + 0.4, 1, hosts),
        state(at + 0.5, "RESTORING", "WARMING", "all workers have their state"),
        state(at + 0.6, "WARMING", "RUNNING", "all workers have done a step"),
    ]


KILLED = "worker of host-1 was ended by SIGKILL in step after 20 updates"


def exited(host="host-1", step=20, epoch=1):
    return {"kind": "worker_exit", "host": host, "epoch": epoch, "signal": 9, "section": "step", "step": step}


def fault(at, cause=KILLED, fault_class="recoverable", evidence=(), epoch=1):
    evidence = list(evidence) or [exited(epoch=epoch)]
    return [
        state(at, "RUNNING", "SUSPECT", cause, epoch),
        event(
            at + 0.2, "fault", epoch, **{"class": fault_class, "cause": cause, "host": "host-1", "evidence": evidence}
        ),
    ]


def recovery(at, epoch, step, hosts=2, sources=(("memory", 9),)):
    """From the decision to RUNNING; the caller adds the lines of metrics."""
    return [
        state(at, "DECIDING", "FORMING", f"epoch {epoch} of {hosts} hosts from step {step}", epoch),
        event(at + 0.1, "restored", epoch, step=step, sources=dict(sources), seconds=1.0),
        *workers(at + 0.2, epoch, hosts),
        state(at + 0.3, "RESTORING", "WARMING", "all workers have their state", epoch),
        state(at + 0.4, "WARMING", "RUNNING", "all workers have done a step", epoch),
    ]


def write(run, lines):
    """Appends lines to the files they belong to; events have a `kind`."""
    run.mkdir(exist_ok=True)
    for name, is_event in (("events.jsonl", True), ("metrics.jsonl", False)):
        with open(run / name, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines if ("kind" in line) == is_event)
