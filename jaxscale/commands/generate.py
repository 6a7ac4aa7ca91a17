"""`jaxscale generate RUN --prompt TEXT`: continues a text with a trained run. Read next: `generate/load.py`.

Standard output has the prompt and the continuation and nothing else; the text appears as it is generated.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jaxscale.commands.parse import UsageError, parse
from jaxscale.config import ConfigError, MeshConfig
from jaxscale.terminal import visible
from jaxscale.train.logs import quiet_terminal

if TYPE_CHECKING:
    from jaxscale.generate.load import LoadedRun

EXAMPLES = """\
  jaxscale generate runs/quickstart --prompt "ROMEO."
  jaxscale generate runs/quickstart --prompt "ROMEO." --temperature 0             the likeliest text
  jaxscale generate runs/quickstart --prompt "ROMEO." --top-k 40 --seed 7
  jaxscale generate runs/quickstart --prompt "" --samples 3                       three documents from their start
  jaxscale generate runs/quickstart --prompt-file letter.txt --devices 8 --mesh.tensor 4"""


@dataclass(frozen=True)
class GenerateCommand:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Run directory."""
    prompt: str = ""
    """Text to continue; an empty one starts a document."""
    prompt_file: str = ""
    """File with the text to continue, `-` for standard input."""
    max_tokens: int = 200
    """Tokens to add; less where the document ends before."""
    temperature: float = 0.8
    """Divides the logits; 0 = always the likeliest token."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 = from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability; 1 = from all."""
    samples: int = 1
    """Continuations of the prompt, each drawn independently."""
    seed: int = 0
    """Another one draws another text."""
    step: int | None = None
    """Checkpoint to use; none = the newest."""
    devices: int = 0
    """Emulate this many CPU devices; 0 = what there is (or what `on` says)."""
    on: str = ""
    """Mesh file: a name in meshes/ or a path; empty: the devices there are."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Not that of the training: any mesh can load any checkpoint."""


def run_generate(args: Sequence[str], prog: str | None = None) -> int:
    """Runs `jaxscale generate ARGS`, prints the text and returns the exit code. Raises ConfigError on bad input."""
    command = read(args, prog or "jaxscale generate")
    prompt = _prompt(command, args)
    quiet_terminal()
    import jax  # heavy, as all below; only now that the command line is known to be right

    from jaxscale.generate.load import find_step, load_run
    from jaxscale.generate.text import stream_text

    run = Path(command.run)
    loaded = load_run(run, find_step(run, command.step), on=command.on, devices=command.devices, mesh=command.mesh)
    with jax.set_mesh(loaded.mesh):
        pieces = stream_text(
            loaded.task,
            loaded.params,
            loaded.tokenizer,
            [prompt] * command.samples,
            tokens=command.max_tokens,
            temperature=command.temperature,
            top_k=command.top_k,
            top_p=command.top_p,
            seed=command.seed,
        )
        _warn_of_length(command, loaded, prompt)
        texts = [""] * command.samples
        start = time.perf_counter()
        count = 0
        if command.samples == 1:
            _print(prompt)
        for new in pieces:
            count += 1
            texts = [text + piece for text, piece in zip(texts, new, strict=True)]
            if command.samples == 1:
                _print(new[0])
        seconds = time.perf_counter() - start
    _print("\n" if command.samples == 1 else "\n".join(f"{prompt}{text}\n" for text in texts))
    if sys.stderr.isatty():
        print(f"step {loaded.step}, {count} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
    return 0


def read(args: Sequence[str], prog: str = "jaxscale generate") -> GenerateCommand:
    """The flags of `generate`. Raises UsageError, and SystemExit(0) after `--help`."""
    command = parse(
        GenerateCommand,
        args,
        prog=prog,
        description="Continues a text with the newest checkpoint of a run.",
        examples=EXAMPLES,
        default=GenerateCommand(),
    )
    given = [flag for flag in ("--prompt", "--prompt-file") if any(_flag(arg) == flag for arg in args)]
    if not given:
        raise UsageError(f"missing: --prompt TEXT (or --prompt-file FILE); see `{prog} --help`")
    if given == ["--prompt-file"] and not command.prompt_file:
        raise UsageError("--prompt-file is empty; name a file, or - for standard input")
    if len(given) == 2:
        raise UsageError("--prompt and --prompt-file are both given; give one of the two")
    for name, least in (("samples", 1), ("max_tokens", 1)):
        if getattr(command, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(command, name)}; use {least} or more")
    return command


def _flag(argument: str) -> str:
    return argument.partition("=")[0].replace("_", "-")


def _prompt(command: GenerateCommand, args: Sequence[str]) -> str:
    if not any(_flag(arg) == "--prompt-file" for arg in args):
        return command.prompt
    try:
        raw = sys.stdin.buffer.read() if command.prompt_file == "-" else Path(command.prompt_file).read_bytes()
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"--prompt-file {command.prompt_file!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt-file {command.prompt_file!r} is not UTF-8 (byte {error.start})") from error


def _warn_of_length(command: GenerateCommand, loaded: LoadedRun, prompt: str) -> None:
    """A row longer than any the model was trained on is generated, but the text may go astray."""
    config = loaded.config
    trained = max([config.data.sequence, *(phase.sequence for phase in config.phases)])
    (ids,) = loaded.tokenizer.encode_batch([prompt])
    if len(ids) + command.max_tokens > trained:
        print(
            f"note: {len(ids)} token{'s' if len(ids) != 1 else ''} of prompt and up to {command.max_tokens} more; "
            f"the model was trained on rows of {trained} tokens and may go astray beyond",
            file=sys.stderr,
        )


def _print(text: str) -> None:
    try:
        print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the terminal's encoding {sys.stdout.encoding} cannot show the text; set PYTHONIOENCODING=utf-8"
        ) from error
