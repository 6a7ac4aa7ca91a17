"""What a checkpoint is on disk: which steps exist, which files each must have.

`checkpoints/<step>/` holds Orbax's own files (`state/` ..., `commit_success.txt` last) and beside them `record.json`,
`config.json`, `environment.json` and, written after everything else, `manifest.json` (`manifest.py`) with size and
digest of every file and of every array's shards. A step without commit file and manifest does not exist.
`checkpoints/<step>.saving` is there from before the first byte until the manifest: it tells a save that a kill cut
short from one that lost its manifest later. Read next: `durable.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from jaxscale.checkpoint import manifest as manifests
from jaxscale.checkpoint.manifest import Arrays, DamagedCheckpoint, FileEntry, Manifest
from jaxscale.checkpoint.written import Part, file_digests, remove_process_files
from jaxscale.config_tree import tree_hash
from jaxscale.track import lines
from jaxscale.train.protocols import Record

COMMIT_FILE = "commit_success.txt"
MANIFEST = "manifest.json"
SAVING = ".saving"
PARTIAL = ".partial"
FETCHING = ".fetching"
STATE_ITEM = "state"
RECORD = ("record.json", "config.json", "environment.json")
"""Files that a record is made of."""
MOST_DIGITS = 20


def step_folder(folder: Path, step: int) -> Path:
    """Where a step lies."""
    return folder / str(step)


def numbered(folder: Path) -> list[int]:
    """Every step that has a folder, finished or not, in growing order."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if is_step_name(entry.name) and entry.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(map(int, names))


def is_step_name(name: str) -> bool:
    """Whether a folder of this name is a step's."""
    return name.isascii() and name.isdigit() and len(name) < MOST_DIGITS and str(int(name)) == name


def list_steps(folder: Path) -> list[int]:
    """Steps that were committed completely, in growing order. Reads no array; `check_files` looks closer."""
    return [step for step in numbered(folder) if is_sealed(step_folder(folder, step))]


def newest_step(folder: Path) -> int | None:
    """The newest committed step, or None where there is none."""
    steps = list_steps(folder)
    return steps[-1] if steps else None


def made_at(folder: Path, step: int) -> float | None:
    """When a sealed step came to exist, in seconds since 1970; None where it was deleted just now."""
    try:
        return os.stat(step_folder(folder, step) / MANIFEST).st_mtime
    except OSError:
        return None


def committed(folder: Path) -> list[int]:
    """Steps whose save was finished once, in growing order; one that has lost its manifest since is among them."""
    return [step for step in numbered(folder) if is_finished(step_folder(folder, step))]


def is_finished(path: Path) -> bool:
    """Whether a save came to its end here: the commit file is there, and no kill came before the manifest."""
    return (path / COMMIT_FILE).is_file() and (is_sealed(path) or not _mark(path).exists())


def is_sealed(path: Path) -> bool:
    """Whether both the commit file and the manifest are there."""
    return (path / COMMIT_FILE).is_file() and (path / MANIFEST).is_file()


def is_marked(path: Path) -> bool:
    """Whether a save of this step is under way, or was cut short by a kill."""
    return _mark(path).exists()


def begin(path: Path) -> None:
    """Marks a step as being saved, until `seal`. Raises OSError."""
    _mark(path).touch()


def seal(path: Path, record: Record, arrays: Arrays, part: Part, mesh: Mapping[str, int], *, commit: str = "") -> int:
    """Writes record, config, environment and last the manifest into a step that Orbax has committed. Returns its bytes.

    `part`: what all processes together have written. `commit`: text of the commit file, where Orbax has not written it;
    it then comes after the manifest. Raises OSError where the disk does not take it, and
    DamagedCheckpoint where a file cannot be read back; the step then does not exist, and this may be called again.
    """
    for name in (COMMIT_FILE, MANIFEST) if commit else (MANIFEST,):
        (path / name).unlink(missing_ok=True)  # of an attempt that failed behind it
    for left in path.rglob("*" + PARTIAL):
        left.unlink()
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    config, environment = fields.pop("config"), fields.pop("environment")
    write_json(path / "config.json", config)
    write_json(path / "environment.json", environment)
    write_json(path / "record.json", fields | {name: lines.mark(fields[name]) for name in ("metrics_line", "best")})
    files = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.is_file() and not (file.parent == path and name.startswith("process-")):
            files[name] = part.files.get(name) or file_digests(file, 0)[1]
    if commit:
        files[COMMIT_FILE] = FileEntry(len(commit.encode()), xxhash.xxh3_128_hexdigest(commit.encode()))
    facts = {
        "config_hash": tree_hash(config),
        "epoch": record.epoch,
        "row": record.row,
        "data": record.data,
        "mesh": mesh,
        "versions": environment.get("packages", {}),
        "time": time.time(),
    }
    manifest = Manifest(record.step, files, arrays, part.shards, facts)
    write_json(path / MANIFEST, manifests.encode(manifest))
    if commit:
        write_text(path / COMMIT_FILE, commit)
    remove_process_files(path)
    _mark(path).unlink(missing_ok=True)
    return manifest.nbytes


def read_manifest(path: Path) -> Manifest:
    """Raises DamagedCheckpoint where it is missing, unreadable, of another format or of another step."""
    manifest = manifests.decode(_read_json(path / MANIFEST), str(path / MANIFEST))
    if str(manifest.step) != path.name:
        raise DamagedCheckpoint(f"{path} says in its manifest that it is step {manifest.step}; it was moved or copied")
    return manifest


def read_record(path: Path) -> Record:
    """The record of a step. Raises DamagedCheckpoint where it cannot be read."""
    fields, config, environment = (_read_json(path / name) for name in RECORD)
    return record_of(fields, config, environment, path)


def record_of(fields: dict[str, Any], config: dict[str, Any], environment: dict[str, Any], path: Path) -> Record:
    """The record that the files of RECORD hold; `path` is for messages. Raises DamagedCheckpoint."""
    try:
        fields |= {name: lines.unmark(fields[name]) for name in ("metrics_line", "best")}
        record = Record(**fields, config=config, environment=environment)
    except (TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path / 'record.json'} does not hold what a record holds ({error})") from error
    if str(record.step) != path.name or not isinstance(record.row, int):
        raise DamagedCheckpoint(f"{path / 'record.json'} is the record of step {record.step}, row {record.row}")
    return record


def check_files(path: Path) -> Manifest:
    """Checks that a step is sealed, that every file has its size, and that those without arrays have their digest.

    Returns its manifest. Files with arrays are verified by who reads them (`load_files.py`), or all at once
    (`verify.py`). Raises DamagedCheckpoint and names the file.
    """
    try:
        is_finished = (path / COMMIT_FILE).is_file()
    except OSError as error:
        raise DamagedCheckpoint(f"{path / COMMIT_FILE} cannot be read ({error.strerror})") from error
    if not is_finished:
        raise DamagedCheckpoint(f"{path} has no {COMMIT_FILE}: its save was never finished")
    manifest = read_manifest(path)
    with_arrays = {shard.file for shards in manifest.shards.values() for shard in shards}
    for name, entry in manifest.files.items():
        try:
            found = (path / name).stat().st_size
        except OSError as error:
            raise DamagedCheckpoint(f"{path / name} is missing ({error.strerror})") from error
        if found != entry.nbytes:
            raise DamagedCheckpoint(f"{path / name} has {found} bytes; it was written with {entry.nbytes}")
        if name not in with_arrays:
            check_file(path / name, entry)
    return manifest


def check_file(path: Path, entry: FileEntry) -> None:
    """Raises DamagedCheckpoint where a file has not the bytes that it was written with."""
    found = file_digests(path, 0)[1]
    if found.nbytes != entry.nbytes:
        raise DamagedCheckpoint(f"{path} has {found.nbytes} bytes; it was written with {entry.nbytes}")
    if found.digest != entry.digest:
        raise DamagedCheckpoint(f"{path} is damaged: its digest does not fit")


def delete_step(path: Path) -> None:
    """Deletes a step so that a kill in between leaves nothing that looks like one. Raises OSError.

    A link in its place goes, and what it leads to stays; a file goes.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        uncommit(path)
        shutil.rmtree(path, ignore_errors=True)
    _mark(path).unlink(missing_ok=True)


def uncommit(path: Path) -> None:
    """From now on the folder is no step; what it holds is litter. Nothing that a link leads to is touched."""
    if path.is_dir() and not path.is_symlink():
        if is_sealed(path):
            with contextlib.suppress(OSError):  # so that what a kill leaves is litter, and no damaged step
                begin(path)
        for name in (COMMIT_FILE, MANIFEST):
            (path / name).unlink(missing_ok=True)


def sweep(folder: Path) -> list[str]:
    """Deletes what saves left that a crash cut short. Returns the names of their folders.

    A finished step that has lost its manifest stays: it holds a whole state, and the next save of its step replaces it.
    """
    left = [p for p in (step_folder(folder, step) for step in numbered(folder)) if not is_finished(p)]
    for path in left:
        delete_step(path)
    for mark in folder.glob("*" + SAVING):
        mark.unlink(missing_ok=True)
    return [path.name for path in left]


def litter(folder: Path) -> list[str]:
    """Names that only a kill can have left, where nobody saves: marks without a save, fetches that were cut short."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    ours = [(name, name.partition(".")[0]) for name in names if name.endswith((SAVING, FETCHING))]
    begun = {step for _, step in ours if (folder / step).is_dir() and not is_sealed(folder / step)}
    return [name for name, step in ours if is_step_name(step) and not (name.endswith(SAVING) and step in begun)]


def write_json(path: Path, value: Any) -> None:
    """Writes a file so that it is there wholly or not at all, also after a power loss. Raises OSError.

    Only a kill leaves something beside it, `<name>.partial`, which the next one to write the file writes over.
    """
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """A JSON value as the files here hold it."""
    return json.dumps(value, indent=1, default=dict, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """As `write_json`, of a text."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _mark(path: Path) -> Path:
    return path.with_name(path.name + SAVING)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{path} holds a {type(value).__name__} where an object belongs")
    return value
