"""Tokenising on every core, in processes of our own.

Each worker is a fresh interpreter (`python -m jaxscale.data.workers`) that speaks frames over its pipes: nothing is
forked, the caller's main module is not imported again, and a worker whose parent is killed sees the end of its input
and leaves. Read next: `build.py`, which puts the results on disk.
"""

from __future__ import annotations

import collections
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from jaxscale.data.blocks import Block
from jaxscale.data.errors import DataError
from jaxscale.data.selection import Selection, from_text
from jaxscale.data.tokenise import Tokenised, tokenise_block
from jaxscale.data.tokenizer import Tokenizer, load_tokenizer

_LENGTH = struct.Struct("<Q")


def tokenise_all(
    blocks: Iterable[Block], tokenizer: Tokenizer, folder: Path, selection: Selection, workers: int
) -> Iterator[Tokenised]:
    """Results in the order of the blocks, at most two blocks in memory per worker.

    `folder`: where the tokenizer is saved, for the workers to load; `workers`: 1 = in this process.
    """
    if workers == 1:
        for block in blocks:
            yield tokenise_block(block, tokenizer, selection)
        return
    idle: SimpleQueue[_Worker] = SimpleQueue()
    started = [_Worker(folder, selection) for _ in range(workers)]
    for worker in started:
        idle.put(worker)

    def task(block: Block) -> Tokenised:
        worker = idle.get()
        try:
            return worker.tokenise(block)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    pending: collections.deque[Future[Tokenised]] = collections.deque()
    try:
        for block in blocks:
            pending.append(pool.submit(task, block))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for worker in started:
            worker.close()
        pool.shutdown()


class _Worker:
    """One worker process, used by one thread at a time."""

    def __init__(self, folder: Path, selection: Selection) -> None:
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        # One process per core already: the library's own threads would only fight over the cores.
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-P", "-m", "jaxscale.data.workers", str(folder), selection.text()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def tokenise(self, block: Block) -> Tokenised:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _send(self._process.stdin, block)
            answer = _receive(self._process.stdout)
        except (BrokenPipeError, EOFError) as error:
            code = self._process.wait()
            raise DataError(
                f"a tokenising process ended early (exit status {code}); if memory is short, use fewer workers"
            ) from error
        if isinstance(answer, str):
            raise DataError(answer)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was still buffered for a dead process is lost on purpose
                assert pipe is not None
                pipe.close()


def _send(pipe: IO[bytes], message: Any) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    size = _LENGTH.unpack(head)[0]
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)  # only ever from our own child or parent, over an inherited pipe


def main() -> None:
    """The worker: answers frames until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which closes the pipe
    folder, selection = sys.argv[1], from_text(sys.argv[2])
    # What a library prints must not get between the frames.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tokenizer = load_tokenizer(folder)
    while True:
        try:
            block = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Tokenised | str = tokenise_block(block, tokenizer, selection)
        except DataError as error:
            answer = str(error)
        try:
            _send(answers, answer)
        except BrokenPipeError:  # the parent is gone; so is the reason to be here
            return


if __name__ == "__main__":
    main()
