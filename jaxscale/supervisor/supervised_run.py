"""What the training loop talks to in a supervised worker: restore, snapshots into memory and the durable tier, metrics.

Read next: `memory_restore.py`, `../checkpoint/memory.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxscale.checkpoint.cover import Location, Source
from jaxscale.checkpoint.layout import is_sealed, step_folder
from jaxscale.checkpoint.slot import SlotError
from jaxscale.config import Config
from jaxscale.recipe import Hooks
from jaxscale.supervisor.inventory import OWN
from jaxscale.supervisor.jobs import WorkerJob
from jaxscale.supervisor.mailbox import Mailbox
from jaxscale.supervisor.records import VERDICTS, TornRecord, VerdictRecord, Verdicts
from jaxscale.supervisor.world_stop import HANDOVER, WorldStop
from jaxscale.train.protocols import MetricsSink, Record, Snapshot, Start, World
from jaxscale.world import gather_text

if TYPE_CHECKING:
    from jaxscale.retry import Change
    from jaxscale.supervisor.ahead import CompileAhead
    from jaxscale.track.jsonl import JsonlMetrics


PERSISTED_SECONDS = 60.0
"""How long the last save waits for persisters that are about the same step."""
POLL_SECONDS = 0.02


class SupervisedRun:
    """Restore, snapshot and metrics of one worker under an agent."""

    def __init__(
        self,
        job: WorkerJob,
        config: Config,
        world: World,
        directory: Any,
        mailbox: Mailbox,
        stop: WorldStop,
        hooks: Hooks,
    ) -> None:
        import jax

        from jaxscale.checkpoint.due import Apart
        from jaxscale.checkpoint.tier import DurableTier
        from jaxscale.supervisor.programs import StoredPrograms, program_identity

        self._job, self._config, self._world, self._directory = job, config, world, directory
        self._mailbox, self._stop, self._hooks = mailbox, stop, hooks
        self._tiers: list[Snapshot] = []
        self._memory: Snapshot | None = None
        self._plain: Callable[[], int] = lambda: 0
        """From which step on workers save into the durable tier themselves; -1: persisters do it, from memory."""
        self._sinks: list[MetricsSink] = []
        self._being_persisted: Callable[[], int] = lambda: -1
        self._restored: int | None = None
        self._tier = DurableTier(directory.path, config, world, job.owner, directory.event, is_owner=False)
        checkpoint = config.checkpoint
        self._apart = Apart(world, checkpoint.apart, directory.event) if checkpoint.every == "auto" else None
        self._kept = ""
        """Tier that took the last state."""
        identity = program_identity(config, world.processes, jax.devices())
        self.programs = StoredPrograms(Path(job.programs), identity)
        self._ahead: CompileAhead | None = None

    def restore(self, abstract: Mapping[str, Any]) -> tuple[dict[str, Any], Record] | None:
        """From the memory of the hosts, as the coordinator chose; else the newest durable checkpoint, or None."""
        if self._job.choice is not None:
            from jaxscale.supervisor.memory_restore import restore_from_memory

            state, record, sources = restore_from_memory(self._job, abstract, self._rejected, self._changed)
            self._restored = None
        else:
            found = self._tier.restore(abstract)
            if found is None:
                return None
            (state, record), sources = found, {"durable": len(abstract)}
            self._restored = record.step
        self._mailbox.say("restored", {"step": record.step, "sources": sources})
        return state, record

    def begin(self, start: Start) -> None:
        from jaxscale.checkpoint.durable import DurableCheckpoints
        from jaxscale.checkpoint.memory import MemorySnapshots
        from jaxscale.track.jsonl import JsonlMetrics
        from jaxscale.track.sinks import check_trackers, make_sinks

        config, directory, job, world = self._config, self._directory, self._job, self._world
        journal: JsonlMetrics | None = None
        if world.is_writer:
            check_trackers(config)
        directory.begin(start.environment)
        if world.is_writer:
            self._sinks = make_sinks(config, directory.path)
            journal = next(sink for sink in self._sinks if isinstance(sink, JsonlMetrics))
            if start.tokenizer is not None:
                start.tokenizer.save(directory.tokenizer)
            journal.ensure_line(start.metrics_line)
        if job.every:
            verdicts = VerdictRecord(Path(job.folder) / VERDICTS)

            def decided() -> tuple[int, int]:
                found = verdicts.read()
                return found.committed, found.decided

            def told() -> Verdicts:
                try:
                    return verdicts.read()
                except TornRecord:  # the agent died amid a change; the next one writes it anew
                    return Verdicts(-1, -1)

            def cadence() -> tuple[int, int]:
                found = told()
                return found.since, found.every

            memory = MemorySnapshots(
                Path(job.folder) / OWN,
                job=job.job,
                host=job.host,
                rank=job.rank,
                epoch=job.epoch,
                every=job.every,
                generations=job.generations,
                verdicts=decided,
                cadence=cadence,
                also=0 if config.checkpoint.every == "auto" else config.checkpoint.every,
                kept=lambda: told().keep,
                notify=self._mailbox.say,
            )
            self._plain, self._being_persisted = lambda: told().plain, lambda: told().keep
            self._memory = memory
            self._tiers.append(memory)
        self._tiers.append(
            DurableCheckpoints(
                directory.checkpoints,
                config.checkpoint.every,
                config.checkpoint.keep,
                apart=self._apart,
                milestones=config.checkpoint.milestones,
                since=self._plain,
                restored=self._restored,
                refused=self._tier.refused,
                event=directory.event,
                before_seal=lambda: self._before_seal(journal),
                before_save=self._tier.check,
            )
        )
        if job.smaller is not None:
            from jaxscale.supervisor.ahead import CompileAhead

            self._ahead = CompileAhead(config, self._hooks, Path(job.programs), job.smaller)
            self._ahead.start(start.summary.resumed_from)
        self._mailbox.say("begun", {"summary": start.summary.parameters, "flops_per_token": start.flops_per_token})

    def _before_seal(self, journal: JsonlMetrics | None) -> None:
        if journal is not None:
            journal.commit()
        self._tier.check_patiently()

    # Snapshot
    def wants(self, step: int) -> bool:
        return any(tier.wants(step) for tier in self._tiers)

    def offer(self, step: int, state: Mapping[str, Any], record: Record, *, final: bool = False) -> None:
        """The last state of an epoch goes into memory where the run goes on at once, else into the durable tier."""
        if not final:
            for tier in [tier for tier in self._tiers if tier.wants(step)]:
                self._try(tier, step, state, record, final=False)
            return
        self._kept = "memory" if self._stop.agreed == HANDOVER and self._hand_over(step, state, record) else "durable"
        if self._kept == "durable" and not self._is_durable(step):
            for tier in [tier for tier in self._tiers if tier is not self._memory]:
                tier.offer(step, state, record, final=True)

    def _is_durable(self, step: int) -> bool:
        """Whether persisters have made this very step durable; waits for them where they are about it."""
        is_there = False
        if self._world.is_writer:
            deadline = time.monotonic() + PERSISTED_SECONDS
            while self._being_persisted() == step and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            is_there = is_sealed(step_folder(self._directory.checkpoints, step))
            is_there = is_there and step not in (self._restored, *self._tier.refused)
        return gather_text(self._world, "there" if is_there else "")[0] == "there"

    def _hand_over(self, step: int, state: Mapping[str, Any], record: Record) -> bool:
        """Whether every process has its part in memory; if one has not, all of them save into the durable tier."""
        mine = self._memory is not None and self._try(self._memory, step, state, record, final=True)
        return all(said == "kept" for said in gather_text(self._world, "kept" if mine else "none"))

    def _try(self, tier: Snapshot, step: int, state: Mapping[str, Any], record: Record, *, final: bool) -> bool:
        try:
            tier.offer(step, state, record, final=final)
        except SlotError as error:
            self._without_memory(step, error)
            return False
        return True

    def _without_memory(self, step: int, error: SlotError) -> None:
        """Losing a memory checkpoint never stops training: it is said once, and the durable tier remains."""
        detail = f"{self._job.host}, step {step}: no memory checkpoints from here on: {error}"
        self._mailbox.say("alarm", {"what": "memory checkpoint failed", "detail": detail})
        self._tiers = [tier for tier in self._tiers if tier is not self._memory]
        self._memory = None

    # MetricsSink
    def write(self, line: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(line)

    def close(self) -> None:
        """Raises what failed in the background."""
        if self._ahead is not None:
            self._ahead.close()
        for tier in self._tiers:
            tier.close()
        if self._apart is not None:
            self._apart.close()
        if self._kept:
            self._mailbox.say("kept", {"tier": self._kept})
        for sink in self._sinks:
            sink.close()

    def _rejected(self, source: Source, location: Location, reason: str) -> None:
        where = {"holder": location.holder, "file": location.file, "path": source.path, "box": source.box}
        self._mailbox.say("rejected", {**where, "reason": reason})

    def _changed(self, change: Change) -> None:
        self._mailbox.say("alarm", {"what": "breaker", "detail": f"{self._job.host}: {change}"})
