"""Analytic features of kernels: work, traffic, padding, tiles and remainders, all known before anything is measured.

Latency is a staircase in the channel counts because runtimes pad: a vector unit of 16 floats computes 59 channels as
64, and a tile of four vectors computes 68 channels almost as 128. So beside the plain counts there are counts after
padding, and remainders, from which a regression can learn where the steps are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.latency.arrays import Floats, padded
from edgeprune.latency.tiles import TILE_UNITS, tile_columns
from edgeprune.spec import Kernel

VECTOR_BITS = (("avx512f", 512), ("avx2", 256), ("avx", 256), ("asimd", 128), ("neon", 128), ("sse2", 128))
"""Instruction set flag to vector width, widest first."""

ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}

_WEIGHTS = 7
"""Place of the elements of weights among what `_counts` finds."""

SAME_SET_BYTES = 4096
"""Addresses this far apart share a set of a first-level cache of 32 KiB and 8 ways, or 64 KiB and 16."""

UNITS: Mapping[str, str] = {
    "log_macs": "log multiply-accumulates",
    "log_work": "log multiply-accumulates, output channels padded to whole vectors",
    "log_work_16": "log multiply-accumulates, channels padded to 16",
    "log_work_64": "log multiply-accumulates, output channels padded to 64",
    "log_bytes_in": "log bytes",
    "log_bytes_out": "log bytes",
    "log_bytes_weights": "log bytes",
    "log_bytes": "log bytes of all tensors",
    "log_intensity": "log multiply-accumulates per byte",
    "log_footprint_l1": "log bytes per byte of first-level cache",
    "log_footprint_l2": "log bytes per byte of second-level cache",
    "log_weights_l1": "log bytes of weights per byte of first-level cache",
    "in_channels": "channels",
    "out_channels": "channels",
    **{f"in_mod_{size}": "channels" for size in (4, 8, 16, 32, 64)},
    **{f"out_mod_{size}": "channels" for size in (4, 8, 16, 32, 64)},
    "in_vectors": "vectors of channels",
    "out_vectors": "vectors of channels",
    "out_vectors_mod_4": "vectors of channels",
    "log_pixels": "log output positions",
    "out_width": "positions",
    "out_width_mod_6": "positions",
    "kernel_area": "taps",
    "stride": "positions",
    "dilation": "positions",
    "log_groups": "log groups",
    "depthwise": "0 or 1",
    "residual": "0 or 1",
    "activation": "0 or 1",
    "bias": "0 or 1",
    "operands": "tensors",
}
"""Every feature and its unit, in column order. On a GPU `TILE_UNITS` follow, then one 0-or-1 column per operation of the
table, then, where a table is corrected on top of another device's predictor, `SOURCE_COLUMN`."""

SOURCE_COLUMN = "log_source_ms"
"""Log milliseconds that another device's predictor says."""


@dataclass(frozen=True)
class Machine:
    """What features need to know of a device.

    Attributes:
        vector_bits: Width of a vector register, bits.
        l1_bytes: First-level data cache; 0 when unknown.
        l2_bytes: Second-level cache; 0 when unknown.
        multiprocessors: Of a GPU; 0 for anything else.
    """

    vector_bits: int = 128
    l1_bytes: int = 0
    l2_bytes: int = 0
    multiprocessors: int = 0

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Machine:
        """Read the instruction set and the caches from the header of a latency table, of a GPU its multiprocessors.

        A board may have a GPU that the table's runtime does not use: what was probed counts where the runtime runs on one.
        """
        fingerprint = header.get("fingerprint") or {}
        isa = fingerprint.get("isa") or header.get("identity", {}).get("isa") or ()
        caches = {str(name).upper(): int(size) for name, size in (fingerprint.get("caches_bytes") or {}).items()}
        probed = (fingerprint.get("facts") or {}) if "runtime_gpu" in header.get("identity", {}) else {}
        multiprocessors = fingerprint.get("multiprocessors", probed.get("multiprocessors", 0))
        return cls(
            vector_bits(isa),
            caches.get("L1D", caches.get("L1", 0)),
            caches.get("L2", 0),
            multiprocessors if isinstance(multiprocessors, int) and multiprocessors > 0 else 0,
        )


def vector_bits(isa: Iterable[str]) -> int:
    """Width of the widest vector register that the flags promise, bits; 128 when they say nothing."""
    flags = {flag.lower() for flag in isa}
    return next((bits for flag, bits in VECTOR_BITS if flag in flags), 128)


@dataclass(frozen=True)
class FeatureMatrix:
    """Features of some kernels.

    Attributes:
        values: Shape (kernels, columns); what the columns are is in `names`, their units in `UNITS` and `TILE_UNITS`.
        work: Shape (kernels,): multiply-accumulates of whole vectors, or elements touched where nothing is multiplied.
        traffic: Shape (kernels,): bytes of inputs, outputs and weights.
        slow_traffic: Shape (kernels,): bytes that cost more than others: the unfolded input that a convolution without
            blocked layout writes, and a layout change between planes that fall into the same cache sets.
        ops: Operations with a 0-or-1 column.
        tiled: Whether the features of tiles are there.
        source: Shape (kernels,): log milliseconds that another device's predictor says, which is then the last column too.
    """

    values: Floats
    work: Floats
    traffic: Floats
    slow_traffic: Floats
    ops: tuple[str, ...] = field(default=())
    tiled: bool = False
    source: Floats | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Column names of `values`."""
        tiles = tuple(TILE_UNITS) if self.tiled else ()
        source = () if self.source is None else (SOURCE_COLUMN,)
        return (*UNITS, *tiles, *(f"op_{op}" for op in self.ops), *source)

    def take(self, rows: NDArray[np.intp]) -> FeatureMatrix:
        """The same features of some of the kernels."""
        return FeatureMatrix(
            self.values[rows],
            self.work[rows],
            self.traffic[rows],
            self.slow_traffic[rows],
            self.ops,
            self.tiled,
            None if self.source is None else self.source[rows],
        )

    def with_source(self, log_ms: Floats) -> FeatureMatrix:
        """The same features and what another device's predictor says, log milliseconds of shape (kernels,)."""
        values = np.concatenate([self.values, log_ms[:, None]], axis=1)
        return replace(self, values=values, source=log_ms)

    def without_source(self) -> FeatureMatrix:
        """The same features without what another device's predictor says."""
        return self if self.source is None else replace(self, values=self.values[:, :-1], source=None)

    def column(self, name: str) -> Floats:
        """One column of `values` by name."""
        return self.values[:, self.names.index(name)]


def features(kernels: Sequence[Kernel], machine: Machine, ops: Sequence[str] = ()) -> FeatureMatrix:
    """Features of kernels on a machine.

    Args:
        kernels: Any kernels, families mixed.
        machine: Vector width and caches of the device.
        ops: Operations that get a 0-or-1 column, in this order.
    """
    raw = np.array([_counts(kernel) for kernel in kernels], dtype=np.float64).reshape(-1, 21).T
    (macs, cin, cout, pixels, width, elements_in, elements_out, elements_weights, area, slow) = raw[:10]
    (stride, dilation, groups, depthwise, residual, activation, bias, operands, size, blocked, family) = raw[10:]
    lanes = machine.vector_bits / 32
    is_conv, is_gemm = family == 1, family == 2
    # Whole vectors of output channels are computed, whatever the layout; blocked kernels come with padded shapes.
    work = macs * np.where(is_conv | is_gemm, padded(cout, lanes) / cout, 1.0)
    weights = elements_weights * size
    traffic = (elements_in + elements_out) * size + weights
    columns: dict[str, Floats] = {
        "log_macs": np.log(macs),
        "log_work": np.log(work),
        "log_work_16": np.log(macs * padded(cin, 16) / cin * padded(cout, 16) / cout),
        "log_work_64": np.log(work / padded(cout, lanes) * padded(cout, 64)),
        "log_bytes_in": np.log(elements_in * size),
        "log_bytes_out": np.log(elements_out * size),
        "log_bytes_weights": np.log1p(elements_weights * size),
        "log_bytes": np.log(traffic),
        "log_intensity": np.log(work / traffic),
        "log_footprint_l1": np.log(traffic / (machine.l1_bytes or 1)),
        "log_footprint_l2": np.log(traffic / (machine.l2_bytes or 1)),
        "log_weights_l1": np.log1p(weights) - math.log(machine.l1_bytes or 1),
        "in_channels": cin,
        "out_channels": cout,
        **{f"in_mod_{step}": cin % step for step in (4, 8, 16, 32, 64)},
        **{f"out_mod_{step}": cout % step for step in (4, 8, 16, 32, 64)},
        "in_vectors": padded(cin, lanes) / lanes,
        "out_vectors": padded(cout, lanes) / lanes,
        "out_vectors_mod_4": padded(cout, lanes) / lanes % 4,
        "log_pixels": np.log(pixels),
        "out_width": width,
        "out_width_mod_6": width % 6,
        "kernel_area": area,
        "stride": stride,
        "dilation": dilation,
        "log_groups": np.log(groups),
        "depthwise": depthwise,
        "residual": residual,
        "activation": activation,
        "bias": bias,
        "operands": operands,
    }
    tiled = machine.multiprocessors > 0
    if tiled:
        product = is_conv | is_gemm
        depth = np.where(product, macs / np.maximum(elements_out, 1), 1.0)
        pixels_in = np.maximum(elements_in / cin, 1.0)
        columns |= tile_columns(pixels, cout, np.maximum(depth, 1.0), cin, pixels_in, machine.multiprocessors)
    stacked = [columns[name] for name in (*UNITS, *(TILE_UNITS if tiled else ()))]
    values = np.zeros((len(kernels), len(stacked) + len(ops)))
    values[:, : len(stacked)] = np.stack(stacked, axis=1)
    place = {op: len(stacked) + index for index, op in enumerate(ops)}
    for row, kernel in enumerate(kernels):
        if kernel.op in place:
            values[row, place[kernel.op]] = 1.0
    slow = np.where(is_conv, np.where(blocked > 0, 0.0, slow), slow * traffic)
    return FeatureMatrix(values, work, traffic, slow, tuple(ops), tiled)


def channels_of(family: str, shape: Sequence[int]) -> int:
    """Channels of a tensor: behind the batch in images, last in tokens and in what a linear layer reads and makes."""
    if not shape:
        return 1
    behind_batch = len(shape) > 1 and (family in ("conv", "pool", "layout") or len(shape) > 3)
    return shape[1 if behind_batch and family != "gemm" else -1]


def weight_bytes(kernel: Kernel) -> int:
    """Bytes of the weights of a kernel that it reads, 0 where it has none."""
    return int(_counts(kernel)[_WEIGHTS]) * ELEMENT_BYTES[kernel.precision]


@lru_cache(maxsize=1 << 16)
def _counts(kernel: Kernel) -> tuple[float, ...]:
    attributes = dict(kernel.attributes)
    first = kernel.inputs[0] if kernel.inputs else kernel.output
    elements_out = max(math.prod(kernel.output), 1)
    elements_in = max(sum(math.prod(shape) for shape in kernel.inputs), 1)
    groups = int(attributes.get("groups", 1) or 1)  # type: ignore[arg-type]
    area = math.prod(_pair(attributes.get("kernel", 1)))
    residual = bool(attributes.get("residual", False))
    weights, slow, family = 0, 0, 0
    if kernel.family == "gemm":
        cin = first[-2] if attributes.get("transA") else channels_of(kernel.family, first)
        cout = channels_of(kernel.family, kernel.output)
        pixels = width = max(elements_out // max(cout, 1), 1)
        macs, family = elements_out * cin, 2
        if len(kernel.inputs) == 1:
            weights = cin * cout
    else:
        cin, cout = channels_of(kernel.family, first), channels_of(kernel.family, kernel.output)
        pixels = max(elements_out // max(cout, 1), 1)
        width = kernel.output[-1] if len(kernel.output) > 2 else 1
        if kernel.family == "conv":
            weights = cout * (cin // groups or 1) * area
            macs, family = elements_out * (cin // groups or 1) * area, 1
            slow = 0 if area == 1 else pixels * cin * area * ELEMENT_BYTES[kernel.precision]
            if residual and len(kernel.inputs) == 1:
                elements_in += elements_out
        else:
            macs = max(elements_in, elements_out * area)
            plane_bytes = math.prod(first[2:]) * ELEMENT_BYTES[kernel.precision]
            slow = int(kernel.family == "layout" and plane_bytes % SAME_SET_BYTES == 0)
    return (
        max(macs, 1), max(cin, 1), max(cout, 1), pixels, width, elements_in, elements_out, weights, area, slow,
        max(_pair(attributes.get("stride", 1))), max(_pair(attributes.get("dilation", 1))), groups,
        groups > 1 and groups == cin, residual, attributes.get("activation", "") not in ("", None, False),
        bool(attributes.get("bias", False)), len(kernel.inputs), ELEMENT_BYTES[kernel.precision],
        kernel.op.startswith("nchwc."), family,
    )  # fmt: skip


def _pair(value: object) -> tuple[int, ...]:
    return tuple(int(item) for item in value) if isinstance(value, (tuple, list)) else (int(value),)  # type: ignore[call-overload]
