"""Device types: one TOML file each, facts with their sources. A new device type is a new file and no code."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StringConstraints, model_validator

from edgeprune.boards.toml_files import read_toml
from edgeprune.errors import DeviceFileError
from edgeprune.spec import DeviceSpec

_Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


class _PowerMode(BaseModel):
    """One selectable power mode."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: _Text
    id: Annotated[int, Field(ge=0)] | None = None
    cores_online: PositiveInt | None = None
    cpu_max_khz: PositiveInt | None = None
    gpu_max_khz: PositiveInt | None = None


class _Facts(BaseModel):
    """Facts with a known meaning; a file may state others beside them."""

    model_config = ConfigDict(extra="allow", strict=True)
    cpu: _Text | None = None
    cores: PositiveInt | None = None
    vector_bits: PositiveInt | None = None
    isa: list[_Text] | None = None
    caches_bytes: dict[str, PositiveInt] | None = None
    cpu_max_khz: PositiveInt | None = None
    gpu: _Text | None = None
    compute_capability: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+$")] | None = None
    power_modes: list[_PowerMode] | None = None
    power_rails: list[_Text] | None = None
    total_power_rail: _Text | None = None
    summed_power_rails: Annotated[list[_Text], Field(min_length=2)] | None = None
    sensor_paths: list[Annotated[str, StringConstraints(pattern=r"^/")]] | None = None
    set_up: list[_Text] | None = None
    clock_locks: list[Literal["nvpmodel", "jetson_clocks", "nvidia_smi", "cpufreq"]] | None = None
    notes: list[_Text] | None = None

    @model_validator(mode="after")
    def _total_is_no_part(self) -> _Facts:
        """A total is never summed with its parts, so a device has one rail that is all, or rails that add up, or neither."""
        rails, total, summed = self.power_rails or [], self.total_power_rail, self.summed_power_rails or []
        if total is not None and summed:
            raise ValueError("total_power_rail and summed_power_rails must not both be given: a total holds its parts")
        for rail in [*([] if total is None else [total]), *summed]:
            if rail not in rails:
                raise ValueError(f"total_power_rail and summed_power_rails must be among power_rails, {rail!r} is not")
        if len(set(summed)) < len(summed):
            raise ValueError("summed_power_rails must name each rail once")
        return self


class _DeviceFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", strict=True)
    title: _Text
    architecture: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")]
    backends: Annotated[list[Literal["onnxruntime", "tvm", "tensorrt"]], Field(min_length=1)]
    sources: Annotated[list[_Text], Field(min_length=1)]
    facts: _Facts = _Facts()


def devices_folder() -> Path:
    """Where the files are: inside an installed package, else beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    packed = package / "_data" / "devices"
    return packed if packed.is_dir() else package.parent / "devices"


def read_device_file(path: Path) -> DeviceSpec:
    """Read one device type; its name is the stem of the file's.

    Raises:
        DeviceFileError: The file is missing or not valid; the message names file, key and rule.
    """
    content = read_toml(path, _DeviceFile, DeviceFileError)
    facts: dict[str, Any] = content.facts.model_dump(exclude_none=True)
    return DeviceSpec(
        name=path.stem,
        title=content.title,
        architecture=content.architecture,
        backends=tuple(content.backends),
        facts=facts,
        sources=tuple(content.sources),
    )


@cache
def _shipped(folder: Path) -> dict[str, DeviceSpec]:
    return {path.stem: read_device_file(path) for path in sorted(folder.glob("*.toml"))}


def device_types() -> list[DeviceSpec]:
    """All device types, sorted by name.

    Raises:
        DeviceFileError: A file is not valid, or there is none at all.
    """
    folder = devices_folder()
    found = _shipped(folder)
    if not found:
        raise DeviceFileError(
            f"{folder} must hold the device types, found no TOML file.",
            hint="reinstall edgeprune: pip install edgeprune",
        )
    return list(found.values())


def device_type(name: str) -> DeviceSpec:
    """One device type by name.

    Raises:
        DeviceFileError: There is none of that name; the message lists those that there are.
    """
    known = {spec.name: spec for spec in device_types()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise DeviceFileError(
            f"the device type must be one of {', '.join(known)}, found {name!r}.",
            hint=f"--type {near[0]}" if near else "edgeprune device list --types",
        )
    return known[name]
