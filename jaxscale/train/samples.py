"""Text generated during training, a line of samples.jsonl each time. Read next: `generate/text.py`."""

from __future__ import annotations

import json
from collections.abc import Callable

from jaxscale.config import Config
from jaxscale.data.tokenizer import Tokenizer
from jaxscale.task import Params, Task
from jaxscale.train.protocols import Sinks, World


class Sampler:
    """Does nothing unless the recipe sets `sample.every`."""

    def __init__(self, config: Config, task: Task, tokenizer: Tokenizer | None, sinks: Sinks, world: World) -> None:
        self._sample, self._seed, self._task, self._tokenizer = config.sample, config.seed, task, tokenizer
        self._sinks, self._world = sinks, world

    def after(self, done: int, params: Params, watch: Callable[[], None]) -> None:
        """Generates and writes a sample where one is due after `done` updates. All processes call it.

        watch: called before each token, and may raise; then nothing is written.
        """
        sample = self._sample
        if not sample.every or done % sample.every:
            return
        assert self._tokenizer is not None, "samples of a model that is not of text are refused at the start"
        from jaxscale.generate.text import stream_text

        text = ""
        watch()
        for (piece,) in stream_text(
            self._task,
            params,
            self._tokenizer,
            [sample.prompt],
            tokens=sample.tokens,
            temperature=sample.temperature,
            top_k=0,
            top_p=1.0,
            seed=self._seed,
        ):
            watch()
            text += piece
        if self._world.is_writer:
            with (self._sinks.directory / "samples.jsonl").open("a") as file:
                file.write(json.dumps({"step": done, "prompt": sample.prompt, "text": text}) + "\n")
            self._sinks.message(f"step {done} sample: {sample.prompt}{text}")
