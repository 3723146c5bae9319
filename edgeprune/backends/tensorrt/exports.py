"""Reading trtexec's exports: pure functions from text to data.

The formats are not documented, and they move: only a few keys are read, each may be missing, and what is unknown is kept as it
is. What cannot be read at all is one `BackendError`, whatever the damage.

Source: NVIDIA/TensorRT, samples/common/sampleReporting.cpp (``exportJSONTrace``, ``Profiler::exportJSONProfile``,
``exportJSONOutput``) at v8.6.1, v10.3.0 and v11.1, and exports of a TensorRT of the 10.x series.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeprune.errors import BackendError

_SEPARATORS = re.compile("[\x1e\x1f]")
_NODE = re.compile(r"\[ONNX Layer: (.*)\]", re.DOTALL)


@dataclass(frozen=True)
class Tensor:
    """One input or output of a layer.

    Attributes:
        name: As TensorRT names it.
        shape: Dimensions.
        format: Layout and type in TensorRT's words, e.g. ``"Channel major FP16 format where channel % 8 == 0"``.
    """

    name: str
    shape: tuple[int, ...]
    format: str = ""


@dataclass(frozen=True)
class Layer:
    """One layer of an engine: what is launched as one.

    Attributes:
        name: As in the profile.
        kind: ``LayerType``, e.g. ``"CaskConvolution"``, ``"kgen"``; empty where only names were exported.
        inputs: Tensors read.
        outputs: Tensors written.
        nodes: Names of the ONNX nodes that it computes, of ``Metadata``; none for what TensorRT put in between.
        fields: Everything else that was told, as it was told.
    """

    name: str
    kind: str = ""
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    nodes: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class LayerTime:
    """One row of a profile.

    Attributes:
        name: Of the layer.
        average_ms: Mean over all passes.
        median_ms: None in exports of releases that do not tell it. A multiple of the timer's tick, about 1 us: for short
            layers the mean is finer.
    """

    name: str
    average_ms: float
    median_ms: float | None


@dataclass(frozen=True)
class Profile:
    """Times of an engine's layers, taken layer by layer, which adds some microseconds to each.

    Attributes:
        passes: Number of passes.
        rows: Layers in the order in which they run.
    """

    passes: int
    rows: tuple[LayerTime, ...]


@dataclass(frozen=True)
class QueryTimes:
    """Times of single queries of a whole engine.

    Attributes:
        latency_ms: From the first to the last thing that a query does on the device, with transfers where there are any.
        compute_ms: Of the kernels alone.
    """

    latency_ms: tuple[float, ...]
    compute_ms: tuple[float, ...]

    def percentile_ms(self, percent: float) -> float:
        """Smallest latency that `percent` of the queries do not exceed (nearest rank), milliseconds."""
        ordered = sorted(self.latency_ms)
        return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def read_layers(text: str) -> tuple[Layer, ...]:
    """Read what ``--exportLayerInfo`` wrote.

    Where an engine was built without detailed verbosity, layers are names and nothing else.

    Raises:
        BackendError: It is no such export.
    """
    what = "the layers that trtexec exports"
    found = _loaded(text, what)
    if not isinstance(found, dict) or not isinstance(found.get("Layers"), list):
        raise _damaged(what, "no list 'Layers'")
    return tuple(_layer(entry, what) for entry in found["Layers"])


def read_profile(text: str) -> Profile:
    """Read what ``--exportProfile`` wrote.

    Raises:
        BackendError: It is no such export.
    """
    what = "the profile that trtexec exports"
    found = _loaded(text, what)
    if not isinstance(found, list) or not found or not isinstance(found[0], dict) or "count" not in found[0]:
        raise _damaged(what, "no list that begins with a count")
    passes = found[0]["count"]
    if not isinstance(passes, int) or isinstance(passes, bool) or passes < 0:
        raise _damaged(what, f"the count {str(passes)[:40]!r}")
    rows = []
    for entry in found[1:]:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise _damaged(what, "a row without a name")
        median = entry.get("medianMs")
        rows.append(
            LayerTime(
                entry["name"],
                _milliseconds(entry.get("averageMs"), what),
                None if median is None else _milliseconds(median, what),
            )
        )
    return Profile(passes, tuple(rows))


def read_times(text: str) -> QueryTimes:
    """Read what ``--exportTimes`` wrote.

    Raises:
        BackendError: It is no such export, or holds no query.
    """
    what = "the times that trtexec exports"
    found = _loaded(text, what)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise _damaged(what, "no list of queries")
    if not found:
        raise _damaged(what, "no query")
    return QueryTimes(
        tuple(_milliseconds(entry.get("latencyMs"), what) for entry in found),
        tuple(_milliseconds(entry.get("computeMs"), what) for entry in found),
    )


def nodes_of(metadata: str) -> tuple[str, ...]:
    """Names of the ONNX nodes in a layer's ``Metadata``, each once, in order.

    Nodes are separated by 0x1E, within what TensorRT's own code generator fused also by 0x1F.
    """
    parts = (_NODE.fullmatch(part.strip()) for part in _SEPARATORS.split(metadata))
    return tuple(dict.fromkeys(match[1] for match in parts if match))


def occurrences(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name with how often it came before: names of layers can repeat, and exports list them in one order."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        found.append((name, seen.get(name, 0)))
        seen[name] = seen.get(name, 0) + 1
    return found


def _layer(entry: Any, what: str) -> Layer:
    if isinstance(entry, str):
        return Layer(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("Name"), str):
        raise _damaged(what, "a layer without a name")
    known = ("Name", "LayerType", "Inputs", "Outputs", "Metadata")
    return Layer(
        name=entry["Name"],
        kind=_text(entry.get("LayerType")),
        inputs=_tensors(entry.get("Inputs"), what),
        outputs=_tensors(entry.get("Outputs"), what),
        nodes=nodes_of(_text(entry.get("Metadata"))),
        fields={key: value for key, value in entry.items() if key not in known},
    )


def _tensors(entries: Any, what: str) -> tuple[Tensor, ...]:
    if entries is None:
        return ()
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _damaged(what, "tensors that are no list of objects")
    return tuple(
        Tensor(_text(entry.get("Name")), integers(entry.get("Dimensions")), _text(entry.get("Format/Datatype")))
        for entry in entries
    )


def integers(value: Any) -> tuple[int, ...]:
    """A list of whole numbers as a tuple; anything else is empty."""
    if isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return tuple(value)
    return ()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _milliseconds(value: Any, what: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        # An integer of many digits has no float.
        with_limit = float(value) if abs(value) < 1e300 else math.inf
        if math.isfinite(with_limit) and with_limit >= 0:
            return with_limit
    raise _damaged(what, f"the time {str(value)[:40]!r}")


def _loaded(text: str, what: str) -> Any:
    try:
        # Names are written as they are: a control character in one is no damage.
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise _damaged(what, f"what is no JSON ({' '.join(str(error).split())[:120]})") from error


def _damaged(what: str, found: str) -> BackendError:
    return BackendError(
        f"{what} must be readable, found {found}.", hint="compile again; a run that was cut short leaves half a file"
    )
