"""From tables, predictors, plans and kernels to the plain data of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeprune.report.data import FrozenGroup, GroupChoice, Layer, Prediction, Staircase

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.latency.fit_report import FitReport
    from edgeprune.latency.predictor import Predictor
    from edgeprune.lowering.kernel_graph import KernelGraph
    from edgeprune.spec import Fingerprint, Kernel
    from edgeprune.surgery.plan import PruningPlan

Widths = Mapping[str, int]

LAYER_SOURCE = (
    "Each kernel's latency as the predictor sees it alone; measured where the table holds the kernel. The sum differs from "
    "the latency of the whole network, which is calibrated."
)
MOST_STAIRCASES = 6
_FEWEST_POINTS = 3
_ERROR_COLUMNS = (
    ("n", "measured"),
    ("median_error_percent", "median error, %"),
    ("noise_median_percent", "measurements repeat to, %"),
    ("within_10_percent", "within 10 %, %"),
    ("coverage_percent", "inside the interval, %"),
)


def board_facts(fingerprint: Fingerprint) -> dict[str, str]:
    """A fingerprint for a person: property to text."""
    runtimes = [f"{name} {found.get('version', '')}".strip() for name, found in sorted(fingerprint.runtimes.items())]
    caches = [f"{name} {size // 1024} KiB" for name, size in fingerprint.caches_bytes.items()]
    return {
        "cpu": f"{fingerprint.cpu_model} ({fingerprint.architecture}, {fingerprint.cores} cores)",
        "isa": " ".join(fingerprint.isa) or "unknown",
        "caches": ", ".join(caches) or "unknown",
        "memory": f"{fingerprint.memory_bytes / 2**30:.1f} GiB",
        "os": f"{fingerprint.os}, kernel {fingerprint.kernel}, {fingerprint.libc}",
        "python": fingerprint.python,
        "runtimes": ", ".join(runtimes) or "none",
        "power mode": fingerprint.power_mode or "not told",
        "governor": fingerprint.governor or "not told",
        "free disk": f"{fingerprint.free_disk_bytes / 2**30:.1f} GiB",
        "load": f"{fingerprint.load:.2f}",
        "sensors": ", ".join(fingerprint.sensors) or "none",
    }


def flat_conditions(conditions: Mapping[str, Any]) -> dict[str, str]:
    """Nested conditions as ``"before: load"`` to text."""
    flat: dict[str, str] = {}
    for name, value in conditions.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}: {inner}": text for inner, text in flat_conditions(value).items()}
        elif isinstance(value, list | tuple):
            flat[name] = ", ".join(str(item) for item in value) or "none"
        else:
            flat[name] = "not told" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return flat


def staircases(
    kernel_graph: KernelGraph, predictor: Predictor, chosen: Widths, *, most: int = MOST_STAIRCASES
) -> tuple[Staircase, ...]:
    """Latency of the kernel that makes a group's channels, over that group's width; all other groups dense.

    The kernels are swept as the runtime would run them, layout changes included; a point is *measured* where the table holds
    that very kernel. Groups whose kernels cost most come first, among those with measured points.

    Args:
        kernel_graph: The lowered model.
        predictor: Fitted on a table of the board.
        chosen: Widths that were chosen.
        most: How many to return.
    """
    dense = kernel_graph.graph.widths()
    measured = {key: measurement.median_ms for key, measurement in predictor.table.measurements.items()}
    found: list[tuple[bool, float, Staircase]] = []
    for group in kernel_graph.graph.groups:
        producer = _producer(kernel_graph.at(dense), group.nodes)
        if producer is None:
            continue
        swept = {
            width: kernel
            for width in range(1, group.size + 1)
            if (kernel := _producer(kernel_graph.at({**dense, group.name: width}), group.nodes)) is not None
        }
        times = predictor.kernel_ms(list(swept.values())).tolist()
        points = {width: measured[kernel.key] for width, kernel in swept.items() if kernel.key in measured}
        staircase = Staircase(
            title=f"{group.name} · {describe_kernel(producer)}",
            x_title=f"units kept of {group.name}",
            widths=tuple(points),
            measured_ms=tuple(points.values()),
            predicted=tuple(zip(swept, times, strict=True)),
            dense=group.size,
            chosen=chosen.get(group.name, group.size),
        )
        found.append((len(points) >= _FEWEST_POINTS, max(times), staircase))
    found.sort(key=lambda entry: entry[:2], reverse=True)
    return tuple(staircase for _, _, staircase in found[:most])


def _producer(kernels: Sequence[Kernel], nodes: Sequence[str]) -> Kernel | None:
    """The costliest-looking kernel that computes one of the nodes: the contraction where there is one."""
    making = [kernel for kernel in kernels if set(kernel.origin) & set(nodes)]
    heavy = [kernel for kernel in making if kernel.family in ("conv", "gemm")]
    return next(iter(heavy or making), None)


def layers(kernel_graph: KernelGraph, predictor: Predictor, before: Widths, after: Widths) -> tuple[Layer, ...]:
    """Milliseconds per layer at two choices of widths, in order of execution; kernels of one layer are summed."""
    paths = _module_paths(kernel_graph.graph)
    sums: dict[str, list[float | None]] = {}
    for column, widths in enumerate((before, after)):
        kernels = kernel_graph.at(widths)
        for kernel, ms in zip(kernels, predictor.kernel_ms(kernels).tolist(), strict=True):
            row = sums.setdefault(_layer_name(kernel, paths), [None, None])
            row[column] = (row[column] or 0.0) + ms
    return tuple(Layer(name, row[0], row[1]) for name, row in sums.items())


def _module_paths(graph: ChannelGraph) -> dict[str, str]:
    from edgeprune.graph.capture import module_path

    return {node.name: module_path(node) for node in graph.program.graph_module.graph.nodes}


def _layer_name(kernel: Kernel, paths: Mapping[str, str]) -> str:
    for node in kernel.origin:
        if paths.get(node):
            return paths[node]
    return kernel.origin[0] if kernel.origin else f"{kernel.family} ({kernel.op})"


def describe_kernel(kernel: Kernel) -> str:
    """One kernel for a person: ``3x3 conv 16→64, 32x32``."""
    channels = f"{kernel.inputs[0][1]}→{kernel.output[1]}" if kernel.inputs and len(kernel.output) > 1 else ""
    window = kernel.attribute("kernel")
    shape = "x".join(str(size) for size in window) if isinstance(window, tuple) else ""
    pixels = "x".join(str(size) for size in kernel.output[2:])
    return f"{shape} {kernel.family} {channels}".strip() + (f", {pixels}" if pixels else "")


def held_out_predictions(predictor: Predictor) -> tuple[tuple[Prediction, ...], tuple[Prediction, ...]]:
    """Kernels and networks as predicted by fits that had not seen them."""
    from edgeprune.spec import Kernel

    kernels, networks = predictor.held_out()
    return (
        tuple(
            Prediction(describe_kernel(Kernel.from_key(row.name)), row.measured_ms, row.predicted_ms) for row in kernels
        ),
        tuple(Prediction(row.name, row.measured_ms, row.predicted_ms) for row in networks),
    )


def error_table(report: FitReport) -> dict[str, dict[str, str]]:
    """The predictor's error table: family to column to text."""
    return {row["family"]: {title: _figure(row[key]) for key, title in _ERROR_COLUMNS} for row in report.rows()}


def _figure(value: Any) -> str:
    return "–" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def group_choices(plan: PruningPlan) -> tuple[GroupChoice, ...]:
    """Widths before and after, per channel group."""
    return tuple(GroupChoice(name, int(group["size"]), len(group["kept"])) for name, group in plan.groups.items())


def frozen_groups(graph: ChannelGraph) -> tuple[FrozenGroup, ...]:
    """Axes that were left alone, equal ones counted once."""
    counted = Counter((axis.name, axis.size, axis.reason) for axis in graph.frozen)
    return tuple(FrozenGroup(name, size, reason) for name, size, reason in counted)
