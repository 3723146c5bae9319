"""From tables, predictors, plans and kernels to the plain data of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeprune.report.data import FrozenGroup, GroupChoice, Layer, Prediction, Staircase

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGraph, ChannelGroup
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
    # Stored tables have their keys sorted, which puts "after" before "before".
    for name, value in sorted(conditions.items(), key=lambda entry: entry[0] != "before"):
        if name in ("context", "boot"):
            continue  # of one moment of one process; by themselves they say nothing
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
    that very kernel. Groups whose dense kernels cost most come first; only those that are shown are swept.

    Args:
        kernel_graph: The lowered model.
        predictor: Fitted on a table of the board.
        chosen: Widths that were chosen.
        most: How many to return.
    """
    from edgeprune.report.layer_names import LayerNames  # imports torch

    graph = kernel_graph.graph
    names = LayerNames(graph)
    dense = graph.widths()
    edges = predictor.report().edges
    measured = {key: measurement.median_ms for key, measurement in predictor.table.measurements.items()}

    def maker(group: ChannelGroup, kernels: Sequence[Kernel]) -> Kernel | None:
        made = zip(kernels, names.contractions(kernels), strict=True)
        return next((kernel for kernel, node in made if node is not None and node in group.nodes), None)

    kernels = kernel_graph.at(dense)
    makers = [(group, kernel) for group in graph.groups if (kernel := maker(group, kernels)) is not None]
    costs = predictor.kernel_ms([kernel for _, kernel in makers]).tolist() if makers else []
    ranked = sorted(zip(costs, makers, strict=True), key=lambda entry: entry[0], reverse=True)
    found = []
    for _, (group, widest_kernel) in ranked[:most]:
        swept = {group.size: widest_kernel}
        for width in range(1, group.size):
            kernel = maker(group, kernel_graph.at({**dense, group.name: width}))
            if kernel is not None:
                swept[width] = kernel
        swept = dict(sorted(swept.items()))
        times = predictor.kernel_ms(list(swept.values())).tolist()
        # Widths on one step of the stairs may run one and the same kernel, padded: it is shown once, at the widest.
        widest = {kernel.key: width for width, kernel in swept.items()}
        points = {width: measured[key] for key, width in widest.items() if key in measured}
        found.append(
            Staircase(
                title=f"{group.name} · {describe_kernel(swept[group.size])}",
                x_title=f"units kept of {group.name}",
                widths=tuple(sorted(points)),
                measured_ms=tuple(points[width] for width in sorted(points)),
                predicted=tuple(zip(swept, times, strict=True)),
                dense=group.size,
                chosen=chosen.get(group.name, group.size),
                edges=tuple(sorted({int(edge["width"]) for edge in edges if edge["group"] == group.name})),
            )
        )
    return tuple(found)


def layers(kernel_graph: KernelGraph, predictor: Predictor, before: Widths, after: Widths) -> tuple[Layer, ...]:
    """Milliseconds per layer at two choices of widths, in order of execution; kernels of one layer are summed."""
    from edgeprune.report.layer_names import LayerNames  # imports torch

    names = LayerNames(kernel_graph.graph)
    sums: dict[str, list[float | None]] = {}
    for column, widths in enumerate((before, after)):
        kernels = kernel_graph.at(widths)
        times = predictor.kernel_ms(kernels).tolist()
        for name, ms in zip(names.names(kernels), times, strict=True):
            row = sums.setdefault(name, [None, None])
            row[column] = (row[column] or 0.0) + ms
    return tuple(Layer(name, row[0], row[1]) for name, row in sums.items())


def latency_shares(kernel_graph: KernelGraph, predictor: Predictor) -> dict[str, float]:
    """Share of the dense latency per program node: a fused kernel's time is that of its convolution or matrix product.

    Kernels without one count for the last node that they compute. Kernels of no node at all (layout changes at the
    model's ends) are in the whole and nowhere else, so the shares add up to at most 1.
    """
    from edgeprune.report.layer_names import LayerNames  # imports torch

    kernels = kernel_graph.at(kernel_graph.graph.widths())
    times = predictor.kernel_ms(kernels)
    shares: dict[str, float] = {}
    for kernel, made, share in zip(
        kernels, LayerNames(kernel_graph.graph).contractions(kernels), (times / times.sum()).tolist(), strict=True
    ):
        node = made or (kernel.origin[-1] if kernel.origin else None)
        if node is not None:
            shares[node] = shares.get(node, 0.0) + share
    return shares


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


def sentinels(header: Mapping[str, Any]) -> tuple[float, ...]:
    """What the sentinel took over the run that began a table, milliseconds; empty where the table does not tell."""
    return tuple(float(value) for value in header.get("drift", {}).get("sentinels_ms", ()))


def disturbances(header: Mapping[str, Any]) -> tuple[str, ...]:
    """What could have disturbed the runs of a table, and what did, each once."""
    runs = (header, *(header.get("runs") or ()))
    told = [(run.get("fingerprint") or {}).get("disturbances") or () for run in runs]
    told += [run.get("disturbances") or () for run in runs]
    return tuple(dict.fromkeys(str(sentence) for sentences in told for sentence in sentences))


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
