"""Mesh files and chip facts: TOML data of `jaxscale/meshes/`, read into frozen dataclasses and checked.

A mesh file names a machine (chip, slices, hosts) for `--on NAME`; `chips.toml` holds what a chip can do, each figure
with its source. Nothing here touches jax. Read next: `mesh.py`, which makes a mesh of it.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from jaxscale.config import ConfigError, MeshConfig

FOLDER = "meshes"
CHIPS = "chips"
COUNTS = ("slices", "hosts_per_slice", "devices_per_host")
AXES = tuple(MeshConfig.__dataclass_fields__)


class MeshFileError(ConfigError):
    """A mesh file or chip that does not exist or contradicts itself."""


class Device(Protocol):
    """What is read of a `jax.Device`."""

    device_kind: str
    platform: str


@dataclass(frozen=True)
class Figure:
    """A number and the public document it is from."""

    value: float
    source: str


@dataclass(frozen=True)
class Chip:
    """What one device can do. Bandwidths are bytes/s in one direction; peaks are FLOP/s (integer dtypes: operations/s).

    One *device* is what `jax.devices()` lists: a TPU v4 or v5p chip (its two cores are one megacore device), a TPU v7x
    core (a chip is two devices), a GPU. All figures are per device, so that they can be multiplied by a device count.
    """

    name: str
    platform: str
    """`tpu`, `gpu` or `cpu`, as in `jax.Device.platform`."""
    device_kinds: tuple[str, ...]
    """Values of `jax.Device.device_kind` that mean this chip; a `*` at the end matches any ending."""
    peak: Mapping[str, Figure]
    """FLOP/s by dtype, dense (without sparsity). Empty: measured when a run starts."""
    hbm_bytes: Figure
    hbm_bandwidth: Figure
    fast_link_bandwidth: Figure
    """One fast link (TPU: one ICI link; GPU: one NVLink link)."""
    fast_links: Figure
    """Fast links of one device."""
    fast_domain: Figure
    """Devices that reach each other over fast links at most (TPU: the largest slice; GPU: the NVLink domain)."""
    dcn_bandwidth: Figure
    """Network between slices or nodes, per device."""
    devices_per_host: Figure

    @property
    def is_measured(self) -> bool:
        """Whether the peak is measured at run time instead of published (CPU)."""
        return not self.peak

    def is_kind(self, device_kind: str) -> bool:
        """Whether a `jax.Device.device_kind` means this chip."""
        return any(
            device_kind.startswith(kind[:-1]) if kind.endswith("*") else device_kind == kind
            for kind in self.device_kinds
        )

    def peak_flops(self, dtype: str) -> float:
        """Peak FLOP/s of matmuls whose inputs are `dtype` arrays.

        A TPU has no float32 matrix unit: at JAX's default matmul precision float32 inputs go through it as bfloat16, so
        bfloat16's peak is the one to compare with. Raises MeshFileError for a dtype without a figure.
        """
        if dtype == "float32" and dtype not in self.peak and self.platform == "tpu":
            dtype = "bfloat16"
        if dtype not in self.peak:
            known = ", ".join(self.peak) or "none: its peak is measured at run time"
            raise MeshFileError(f"chip {self.name!r} has no peak for {dtype}; chips.toml has {known}")
        return self.peak[dtype].value


@dataclass(frozen=True)
class MeshFile:
    """A machine to run on: how many devices of which chip, in which slices, and the axis sizes that suit it."""

    name: str
    chip: str
    slices: int
    """Groups of devices joined by fast links; between them is the data-center network."""
    hosts_per_slice: int
    devices_per_host: int
    topology: str = ""
    """Name of one slice for `jax.experimental.topologies` (`v5e:16x16`); empty where there is none."""
    axes: Mapping[str, int] = field(default_factory=dict)
    """Default sizes of mesh axes; `--mesh.AXIS` overrides them."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables set before the backend starts, unless the user has set them."""

    @property
    def devices_per_slice(self) -> int:
        return self.hosts_per_slice * self.devices_per_host

    @property
    def devices(self) -> int:
        return self.slices * self.devices_per_slice

    @property
    def hosts(self) -> int:
        return self.slices * self.hosts_per_slice


def mesh_names() -> tuple[str, ...]:
    """Names that `--on` knows."""
    names = (entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))
    return tuple(sorted(name for name in names if name != CHIPS))


def load_mesh_file(name_or_path: str) -> MeshFile:
    """A mesh file of the package by name (`v5e-256`), or any TOML file by path. Raises MeshFileError."""
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.parent != Path():
        if not path.is_file():
            raise MeshFileError(
                f"there is no mesh file {name_or_path!r}; give a path that exists or one of {_listed()}"
            )
        return _mesh_file(path.stem, name_or_path, path.read_bytes())
    if name_or_path not in mesh_names():
        nearest = difflib.get_close_matches(name_or_path, mesh_names(), n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise MeshFileError(f"unknown mesh {name_or_path!r}; {hint}--on takes {_listed()}, or the path of a .toml file")
    entry = _folder() / f"{name_or_path}.toml"
    return _mesh_file(name_or_path, f"{FOLDER}/{entry.name}", entry.read_bytes())


@cache
def load_chips() -> Mapping[str, Chip]:
    """All chips of chips.toml by name. Raises MeshFileError when a figure is missing or has no source."""
    table = _parse(f"{FOLDER}/{CHIPS}.toml", (_folder() / f"{CHIPS}.toml").read_bytes())
    return MappingProxyType({name: _chip(name, entry) for name, entry in table.items()})


def load_chip(name: str) -> Chip:
    """Facts of a chip by its name in chips.toml. Raises MeshFileError with the nearest name."""
    chips = load_chips()
    if name not in chips:
        nearest = difflib.get_close_matches(name, chips, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise MeshFileError(f"unknown chip {name!r}; {hint}chips.toml has {', '.join(chips)}")
    return chips[name]


def chip_of(device: Device) -> Chip | None:
    """Facts of a `jax.Device` by its `device_kind`; None where chips.toml does not know it (then there is no MFU)."""
    return next((chip for chip in load_chips().values() if chip.is_kind(device.device_kind)), None)


def _folder() -> Traversable:
    return files("jaxscale") / FOLDER


def _listed() -> str:
    return ", ".join(mesh_names())


def _parse(where: str, text: bytes) -> dict[str, Any]:
    try:
        return tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MeshFileError(f"{where} is not valid TOML: {error}") from error


def _mesh_file(name: str, where: str, text: bytes) -> MeshFile:
    table = _parse(where, text)
    known = tuple(field for field in MeshFile.__dataclass_fields__ if field != "name")
    _check_keys(where, table, known, required=("chip", *COUNTS))
    axes, environment = table.get("axes", {}), table.get("environment", {})
    _check_keys(f"{where} [axes]", axes, AXES)
    counts = {key: table[key] for key in COUNTS} | {f"axes.{axis}": n for axis, n in axes.items()}
    for key, value in counts.items():
        if type(value) is not int or value < 1:
            raise MeshFileError(f"{where}: {key} is {value!r}; it is a whole number of at least 1")
    if not isinstance(table.get("topology", ""), str):
        raise MeshFileError(f'{where}: topology is {table["topology"]!r}; it is a string such as "v5e:16x16"')
    for key, value in environment.items():
        if not isinstance(value, str):
            raise MeshFileError(f"{where} [environment]: {key} is {value!r}; environment variables are strings")
    load_chip(table["chip"])
    return MeshFile(
        **{"name": name, **table, "axes": MappingProxyType(axes), "environment": MappingProxyType(environment)}
    )


def _chip(name: str, entry: dict[str, Any]) -> Chip:
    where = f"{FOLDER}/{CHIPS}.toml [{name}]"
    known = tuple(field for field in Chip.__dataclass_fields__ if field != "name")
    _check_keys(where, entry, known, required=known)
    peak = {dtype: _figure(f"{where} peak.{dtype}", figure) for dtype, figure in entry["peak"].items()}
    plain = {"platform", "device_kinds", "peak"}
    figures = {key: _figure(f"{where} {key}", entry[key]) for key in known if key not in plain}
    return Chip(name, entry["platform"], tuple(entry["device_kinds"]), MappingProxyType(peak), **figures)


def _figure(where: str, figure: Any) -> Figure:
    if not isinstance(figure, dict) or figure.keys() != {"value", "source"} or not figure["source"]:
        raise MeshFileError(f"{where} is {figure!r}; write {{ value = NUMBER, source = DOCUMENT }}")
    return Figure(float(figure["value"]), figure["source"])


def _check_keys(where: str, table: Mapping[str, Any], known: tuple[str, ...], required: tuple[str, ...] = ()) -> None:
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise MeshFileError(f"{where}: unknown key {key!r}; {hint}the keys are {', '.join(known)}")
    missing = [key for key in required if key not in table]
    if missing:
        raise MeshFileError(f"{where}: {', '.join(missing)} missing")
