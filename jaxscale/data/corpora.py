"""All corpora of a run and its tokenizer, open, with the identity that a resume checks.

Read next: `loader.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxscale.config import Config
from jaxscale.data.corpus import Corpus, open_corpus
from jaxscale.data.ensure import ensure_built
from jaxscale.data.errors import DataError
from jaxscale.data.position import Phase, phases
from jaxscale.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

    from jaxscale.data.batches import StepRows
    from jaxscale.data.evaluation import HeldOut
    from jaxscale.task import Task


@dataclass(frozen=True)
class Corpora:
    """What a run of a language model reads; a `Source`. Opening it maps files into memory, hardly reading any."""

    tokenizer: Tokenizer
    by_address: Mapping[str, Corpus]
    held_out_documents: int
    table: tuple[Phase, ...] = ()
    """The phases of the run."""

    def identity(self) -> dict[str, Any]:
        """What decides which tokens a row has, apart from the config; JSON-safe, equal on all hosts."""
        corpora = {corpus.content: address for address, corpus in self.by_address.items()}
        return {
            "tokenizer": {"name": self.tokenizer.name, "hash": self.tokenizer.hash},
            "held_out_documents": self.held_out_documents,
            "corpora": corpora,
            "places": {
                str(phase.start): [self.by_address[source.path].content for source in phase.sources]
                for phase in self.table
            },
        }

    def check_identity(self, saved: Mapping[str, Any], step: int = 1) -> None:
        """Raises DataError naming what differs from the `identity()` of a checkpoint of `step` updates.

        A corpus may lie elsewhere than it did, and more of them may have come in (in a later phase); none may be gone.
        In each phase that has begun the same content must be at each place of the mixture: rows are dealt out by place.
        """
        now = self.identity()
        problems = []
        if saved["tokenizer"]["hash"] != now["tokenizer"]["hash"]:
            old, new = saved["tokenizer"], now["tokenizer"]
            problems.append(f"tokenizer: {old['name']} ({old['hash'][:8]}) -> {new['name']} ({new['hash'][:8]})")
        if saved["held_out_documents"] != now["held_out_documents"]:
            problems.append(f"held-out documents: {saved['held_out_documents']} -> {now['held_out_documents']}")
        for content, address in saved["corpora"].items():
            if content not in now["corpora"]:
                here = [new for new, other in now["corpora"].items() if other == address]
                problems.append(f"corpus {address}: content {content[:8]} -> {here[0][:8] if here else 'not there'}")
        for start, contents in saved.get("places", {}).items():  # checkpoints of older versions have none
            here = now["places"].get(start, contents)  # a phase that is gone is refused with the order of the rows
            if int(start) < step and contents != here and set(contents) <= now["corpora"].keys():
                names = {**now["corpora"], **saved["corpora"]}
                old, new = (", ".join(f"{names[c]} ({c[:8]})" for c in order) for order in (contents, here))
                problems.append(f"corpora from step {start} on, in order: {old} -> {new}")
        if problems:
            raise DataError(
                f"this is not the data that the checkpoint was trained on ({'; '.join(problems)}), so its position "
                "means nothing here; give the data and tokenizer of the run, or start another run with --init-from"
            )

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raises DataError when the tokenizer has ids that a model with this vocabulary does not."""
        if self.tokenizer.vocabulary > vocabulary:
            raise DataError(
                f"tokenizer {self.tokenizer.name} has token ids up to {self.tokenizer.vocabulary - 1}, beyond the "
                f"model's vocabulary of {vocabulary}; set model.vocabulary to at least {self.tokenizer.vocabulary}"
            )

    def check_task(self, task: Task) -> None:
        self.check_vocabulary(task.vocabulary)

    def length(self, phase: Phase) -> int:
        return sum(self.by_address[source.path].train.length for source in phase.sources)

    # What comes later in the order of reading is imported where it is wanted.
    def step_rows(self, config: Config, mesh: Mesh, devices: Collection[jax.Device]) -> StepRows:
        from jaxscale.data.batches import StepRows

        return StepRows(config, self.by_address, mesh, devices)

    def held_out(self) -> HeldOut:
        from jaxscale.data.evaluation import held_out

        return held_out(self)

    def evaluation_batches(self, config: Config, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
        from jaxscale.data.evaluation import evaluation_batches

        return evaluation_batches(config, self, mesh)

    def summarise(self, totals: Mapping[str, Any]) -> dict[str, float]:
        from jaxscale.train.evaluate import summarise

        return summarise(totals, self.held_out().bytes_per_token)


def open_corpora(config: Config) -> Corpora:
    """Builds what is not built yet and opens every corpus of every phase. Safe in many processes at once.

    Raises DataError for missing, damaged or too short data, and for corpora that hold the same tokens.
    """
    data = config.data
    if not data.sources:
        raise DataError("the run has no data; set --data.path to a file, a folder or a built token folder")
    tokenizer = load_tokenizer(data.tokenizer, data.end_of_document)
    by_address: dict[str, Corpus] = {}
    by_content: dict[str, str] = {}
    for phase in phases(config):
        for source in phase.sources:
            address = source.path
            if address not in by_address:
                file = ensure_built(address, tokenizer, data.cache, data.text_field)
                by_address[address] = open_corpus(address, file, data.held_out_documents)
                twin = by_content.setdefault(by_address[address].content, address)
                if twin != address:
                    raise DataError(
                        f"corpora {twin} and {address} hold the same tokens; name one, with the sum of the weights"
                    )
            by_address[address].check_sequence(phase.sequence)
        paths = [source.path for source in phase.sources]
        if len(set(paths)) < len(paths):
            raise DataError(
                f"the mixture from step {phase.start} on names a corpus twice ({', '.join(paths)}); add the weights"
            )
    return Corpora(tokenizer, by_address, data.held_out_documents, phases(config))
