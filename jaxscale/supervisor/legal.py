"""On which meshes a model can be laid out: the audit knows, but it needs JAX, so a process of its own is asked once.

    python -m jaxscale.supervisor.legal RECIPE [overrides] < [{"data": 2, ...}, ...]      prints [true, ...]

Read next: `worlds.py`, which plans only worlds of legal meshes.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

Sizes = Mapping[str, int]

ASK_SECONDS = 120.0

logger = logging.getLogger(__name__)


class LegalMeshes:
    """Whether a mesh of these sizes is legal; until the answer is there, every mesh is thought to be."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[str, int], ...], bool] = {}

    def __call__(self, sizes: Sizes) -> bool:
        return self._known.get(_key(sizes), True)

    def ask(self, recipe: str, overrides: Sequence[str], meshes: Sequence[Sizes]) -> None:
        """Asks the audit about all of them, in a thread. Where it cannot answer, that is logged."""
        arguments = (recipe, tuple(overrides), [dict(mesh) for mesh in meshes])
        threading.Thread(target=self._ask, args=arguments, name="legal-meshes", daemon=True).start()

    def _ask(self, recipe: str, overrides: Sequence[str], meshes: Sequence[dict[str, int]]) -> None:
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
            logger.warning("nobody knows on which smaller meshes this model fits: %s", *last or ["no answer"])
            return
        self._known = {_key(mesh): bool(answer) for mesh, answer in zip(meshes, answers, strict=True)}


def _key(sizes: Sizes) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(sizes.items()))


def main(arguments: list[str]) -> int:
    """Answers on stdout."""
    from jaxscale.audit import AuditError, audit
    from jaxscale.commands.train import read

    _, command = read(arguments)
    config = command.config
    parameters = config.model.task(config).parameters

    def is_legal(sizes: Sizes) -> bool:
        try:
            audit(parameters, sizes, config)
        except AuditError:
            return False
        return True

    print(json.dumps([is_legal(sizes) for sizes in json.load(sys.stdin)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
