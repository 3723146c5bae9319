"""Layers of engines that TensorRT has built as a latency table: read from what was recorded, nothing is measured here.

Sources of the times are the records that `edgeprune compile` leaves beside engines (``tensorrt.json``), or the exports of
``trtexec`` itself (``--exportLayerInfo``, ``--exportProfile``, ``--exportTimes``). Layers are timed one by one, which adds some
microseconds to each, so their sum is above what the engine takes; with the times of whole engines a fit learns by how much.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.backends.tensorrt import exports
from edgeprune.backends.tensorrt.building import RECORD_FORMAT, RECORD_NAME
from edgeprune.backends.tensorrt.kernels import timed_kernels
from edgeprune.errors import BackendError, ConfigError, TableFileMissingError, TableFormatError
from edgeprune.latency.csv_import import repeated
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import SHORTEST_MS, check_kernel, kernel_row, network_row
from edgeprune.near_files import near_files
from edgeprune.spec import Kernel, Measurement

logger = logging.getLogger("edgeprune.backends.tensorrt")


@dataclass(frozen=True)
class Recorded:
    """What is recorded of one engine.

    Attributes:
        name: For a person.
        layers: What it launches, in order, with the mean time of each, milliseconds.
        whole: Times of single queries: median, 90th percentile and, where known, least, milliseconds; None without them.
        identity: What the record says of where it was built.
        sha256: Of each file that was read.
    """

    name: str
    layers: tuple[tuple[Kernel, float | None], ...]
    whole: tuple[float, float, float] | None
    identity: Mapping[str, str]
    sha256: Mapping[str, str]


def layer_table(
    sources: Sequence[str | Path], *, device: str, version: str | None = None, facts: Mapping[str, Any] | None = None
) -> LatencyTable:
    """Make a latency table of recorded engines; its header says ``label: imported``, the files and their SHA-256.

    Layers that are the same in several engines, tactic and layouts included, count as rounds of one measurement. What takes no
    time, or whose sizes are not recorded, is left out and counted.

    Args:
        sources: Each an artifact's folder, its ``tensorrt.json``, or exports of one engine: ``LAYERS,PROFILE`` or
            ``LAYERS,PROFILE,TIMES``, three paths with commas between them.
        device: What they were measured on.
        version: Release of TensorRT, where no record says it.
        facts: What is known of the device, see `LatencyTable.from_csv`; ``multiprocessors`` helps predictions most.

    Raises:
        ConfigError: There are no sources, or they are of several devices or releases.
        TableFileMissingError: There is no such file.
        BackendError: A file is no such export or record.
        TableFormatError: No layer has a time.
    """
    if not sources:
        raise ConfigError("there must be at least one engine to take layers of, found none.")
    if not device.strip():
        raise ConfigError(
            "an imported table must name the device it was measured on, found none.", hint='device="orin"'
        )
    engines = [_recorded(str(source)) for source in sources]
    identity = _identity(engines, device, version)
    times: dict[Kernel, list[float]] = {}
    kept: list[list[Kernel]] = []
    for engine in engines:
        usable = [(kernel, ms) for kernel, ms in engine.layers if _usable(kernel, ms)]
        kept.append([kernel for kernel, _ in usable])
        for kernel, ms in usable:
            times.setdefault(kernel, []).append(float(ms or 0.0))
    if not times:
        raise TableFormatError(
            "engines must have at least one layer with sizes and a time, found none.",
            hint="trtexec --profilingVerbosity=detailed when building; TensorRT 8.6 or newer",
        )
    rows = [kernel_row(kernel, repeated(values)) for kernel, values in times.items()]
    names = _names(engine.name for engine in engines)
    precisions = Counter(kernel.precision for kernel in times)
    precision = precisions.most_common(1)[0][0]
    for name, engine, kernels in zip(names, engines, kept, strict=True):
        if engine.whole is not None and kernels:
            rows.append(network_row(name, kernels, _whole(engine.whole), precision=precision))
    header = {
        "identity": identity,
        "fingerprint": dict(facts or {}),
        "board": device,
        "runtime": "tensorrt",
        "threads": 1,
        "precision": precision,
        "label": "imported",
        "protocol": "layers timed one by one by trtexec, means; networks by single queries, medians of device times",
        "imported": [
            {
                "source": engine.name,
                "sha256": ", ".join(engine.sha256.values()),
                "kernel": "layers of an engine",
                "latency": {"ms": "averageMs"},
                "rows": len(kernels),
                "left_out": len(engine.layers) - len(kernels),
            }
            for engine, kernels in zip(engines, kept, strict=True)
        ],
    }
    return LatencyTable.from_rows(header, rows)


def _usable(kernel: Kernel, ms: float | None) -> bool:
    if ms is None or ms < SHORTEST_MS or not kernel.output:
        return False
    problem = check_kernel(kernel)
    if problem is not None:
        logger.debug("%s is left out: %s", kernel.op, problem)
    return problem is None


def _whole(whole: tuple[float, float, float]) -> Measurement:
    median, p90, least = whole
    return Measurement(
        median_ms=median, p90_ms=max(p90, median), min_ms=least, spread=0.0, rounds_ms=(median,), samples=1
    )


def _names(names: Iterable[str]) -> list[str]:
    """Names that are different."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def _identity(engines: Sequence[Recorded], device: str, version: str | None) -> dict[str, str]:
    identity = {"device": device, "runtime": "tensorrt"}
    if version is not None:
        identity["runtime_version"] = version
    for engine in engines:
        for field, value in engine.identity.items():
            if identity.setdefault(field, value) != value:
                raise ConfigError(
                    f"engines of one table must have the same {field}, found {identity[field]} and, of {engine.name}, {value}.",
                    hint="one table for each",
                )
    return identity


def _recorded(source: str) -> Recorded:
    if "," in source:
        return _of_exports([Path(part.strip()) for part in source.split(",")])
    path = Path(source)
    if path.is_dir():
        path = path / RECORD_NAME
    text, digest = _read(path)
    try:
        record = json.loads(text)
    except ValueError as error:
        raise _no_record(path) from error
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT:
        raise _no_record(path)
    try:
        layers = tuple(
            (Kernel.from_key(entry["kernel"]), _ms(entry["average_ms"])) for entry in record["kernels"] or ()
        )
        latency, whole = record["latency"], None
        if latency is not None:
            # The least of them is not in a record: the median stands for it.
            whole = float(latency["median_ms"]), float(latency["p90_ms"]), float(latency["median_ms"])
    except (KeyError, TypeError, ValueError) as error:
        raise _no_record(path) from error
    told = {"runtime_version": record.get("tensorrt"), "gpu": record.get("gpu")}
    identity = {field: str(value) for field, value in told.items() if value is not None}
    return Recorded(path.parent.name or path.name, layers, whole, identity, {path.name: digest})


def _of_exports(paths: Sequence[Path]) -> Recorded:
    if len(paths) not in (2, 3):
        raise ConfigError(
            f"exports of an engine must be LAYERS,PROFILE or LAYERS,PROFILE,TIMES, found {len(paths)} paths."
        )
    texts = [_read(path) for path in paths]
    joined = timed_kernels(exports.read_layers(texts[0][0]), exports.read_profile(texts[1][0]))
    whole = None
    if len(paths) == 3:
        times = exports.read_times(texts[2][0])
        whole = (times.percentile_ms(50), times.percentile_ms(90), min(times.latency_ms))
    name = paths[0].name.partition(".")[0]
    digests = {path.name: digest for path, (_, digest) in zip(paths, texts, strict=True)}
    return Recorded(name, tuple((one.kernel, one.average_ms) for one in joined), whole, {}, digests)


def _read(path: Path) -> tuple[str, str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TableFileMissingError(
            f"there must be a record of an engine at {path}, found none ({error.strerror}).",
            hint=near_files(path, ".json"),
        ) from error
    return content.decode("utf-8", "replace"), hashlib.sha256(content).hexdigest()


def _ms(value: Any) -> float | None:
    return None if value is None else float(value)


def _no_record(path: Path) -> BackendError:
    return BackendError(
        f"{path} must be a record that compile leaves beside an engine of TensorRT, found something else.",
        hint="exports of trtexec are given as LAYERS,PROFILE,TIMES",
    )
