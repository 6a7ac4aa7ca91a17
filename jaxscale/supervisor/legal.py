"""On which meshes a model can be laid out: the audit knows, but it needs JAX, so a process of its own is asked once.

    python -m jaxscale.supervisor.legal RECIPE [overrides] < [{"data": 2, ...}, ...]      prints ["", ...]

An empty answer is a legal mesh, any other says what is wrong with it.

Read next: `worlds.py`, which plans only worlds of legal meshes.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

Sizes = Mapping[str, int]

ASK_SECONDS = 60.0

logger = logging.getLogger(__name__)


class LegalMeshes:
    """Whether a mesh of these sizes is legal; until the answer is there, every mesh is thought to be."""

    def __init__(self) -> None:
        self._wrong: dict[tuple[tuple[str, int], ...], str] = {}
        self.is_answered = False
        """Whether the audit has answered, or nobody waits for it any more."""

    def __call__(self, sizes: Sizes) -> bool:
        return not self.why(sizes)

    def why(self, sizes: Sizes) -> str:
        """What is wrong with a mesh, in the audit's words; nothing of one that is legal or unknown."""
        return self._wrong.get(_key(sizes), "")

    def ask(
        self,
        recipe: str,
        overrides: Sequence[str],
        meshes: Sequence[Sizes],
        unknown: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Asks the audit about all of them, in a thread. `unknown`: told there why it could not answer."""
        arguments = (recipe, tuple(overrides), [dict(mesh) for mesh in meshes], unknown)
        threading.Thread(target=self._ask, args=arguments, name="legal-meshes", daemon=True).start()

    def _ask(
        self,
        recipe: str,
        overrides: Sequence[str],
        meshes: Sequence[dict[str, int]],
        unknown: Callable[[str], None] = lambda _: None,
    ) -> None:
        try:
            self._wrong = self._answers(recipe, overrides, meshes)
        except ValueError as error:
            text = f"nobody knows on which meshes this model fits: {error}"
            logger.warning("%s", text)
            unknown(text)
        finally:
            self.is_answered = True

    def _answers(
        self, recipe: str, overrides: Sequence[str], meshes: Sequence[dict[str, int]]
    ) -> dict[tuple[tuple[str, int], ...], str]:
        """Raises ValueError where there is no answer."""
        command = [sys.executable, "-m", "jaxscale.supervisor.legal", recipe, *overrides]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}  # it makes no backend, and must not touch a TPU
        told = json.dumps(meshes).encode()
        try:
            done = subprocess.run(
                command, input=told, capture_output=True, env=environment, timeout=ASK_SECONDS, check=False
            )
            said, errors = done.stdout, done.stderr
        except (OSError, subprocess.TimeoutExpired) as error:
            said, errors = b"", str(error).encode()
        try:
            answers = json.loads(said)
        except ValueError:
            last = errors.decode(errors="replace").strip().splitlines()[-1:]
            raise ValueError(*last or ["no answer"]) from None
        return {_key(mesh): str(answer) for mesh, answer in zip(meshes, answers, strict=True)}


def _key(sizes: Sizes) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(sizes.items()))


def main(arguments: list[str]) -> int:
    """Answers on stdout."""
    from jaxscale.audit import AuditError, audit
    from jaxscale.commands.train import read

    _, command = read(arguments)
    config = command.config
    parameters = config.model.task(config).parameters

    def wrong(sizes: Sizes) -> str:
        try:
            audit(parameters, sizes, config)
        except AuditError as error:
            return str(error)
        return ""

    print(json.dumps([wrong(sizes) for sizes in json.load(sys.stdin)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
