"""How good are allocations, what is proven of them, and what does it take?

Made instances (a cost in stairs over linear forms of widths, `edgeprune.testing.additive`), seeded:

- ``resnet50``: 36 groups, 16 widths each, 51 layers between two groups: gap and seconds, beside all other allocators;
- ``front``: 20 budgets of such an instance in one call;
- ``large``: 200 groups; ``three``: the same with three budgets at once (latency, parameters, a second latency);
- ``brute``: 200 chains, 50 DenseNet-like and 50 attention-like instances, small enough to try every combination.

Real networks, latencies predicted from a measured table (that of the tests: convolutions, no matrix products; what it lacks
is judged by its memory traffic, which is as good for comparing allocators): ``real``. There the plan is looked up once more, by
a cost model that has seen nothing, and the bound stands beside how far the tables are off.

Seconds are CPU seconds of one process. What is done is not done again; what is missing is printed.

    python benchmarks/allocation.py                    # everything, into benchmarks/results/allocation/
    python benchmarks/allocation.py --only resnet50    # cells whose name begins so
    python benchmarks/allocation.py --table            # only print what is there
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from edgeprune.allocation import registry
from edgeprune.allocation._base import Allocation, Certificate
from edgeprune.allocation.exact import Exact
from edgeprune.allocation.proving import Prepared
from edgeprune.allocation.terms import Limit
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.testing.additive import (
    LayeredCost,
    LayeredInstance,
    LayeredParameters,
    attention,
    chain,
    densenet,
    residual,
)

RESULTS = Path(__file__).parent / "results" / "allocation"
TABLE = Path(__file__).parents[1] / "tests" / "data" / "onnxruntime_avx512_kernels.parquet"
SHARES = (0.6, 0.4, 0.2)
LARGE = (25, 25, 24, 24)
"""Blocks per stage: 4 + 2 * 98 = 200 groups."""
KINDS = {"chain": (chain, 200), "densenet": (densenet, 50), "attention": (attention, 50)}
FAMILIES = ("resnet", "mobilenetv2", "vgg", "densenet", "vit", "resnet50")
REAL_SHARES = (0.7, 0.5, 0.3)
OTHERS = ("global_threshold", "greedy", "knapsack", "uniform")
"""Allocators of widths that stand beside exact; blockdrop is none, and there are no blocks to drop here."""
_AT_ONCE = 25


def figures(certificate: Certificate, cpu_s: float) -> dict[str, Any]:
    """What is written of one allocation."""
    return {**asdict(certificate), "gap": certificate.gap, "cpu_s": cpu_s}


def timed(allocate: Callable[[], Allocation]) -> dict[str, Any]:
    """One allocation with its CPU seconds, or that the budget was out of its reach."""
    begun = time.process_time()
    try:
        certificate = allocate().certificate
    except BudgetInfeasibleError as error:
        return {"infeasible": str(error), "cpu_s": time.process_time() - begun}
    return figures(certificate, time.process_time() - begun)


def resnet50(seed: int, share: float) -> dict[str, Any]:
    """One instance, one budget, every allocator."""
    made = residual(seed)
    budget_ms = made.between_ms(share)
    found = {"groups": len(made.groups), "between_groups": sum(_two_groups(made))}
    for name in ("exact", *OTHERS):
        allocator = registry.get(name)
        found[name] = timed(partial(allocator.allocate, made.groups, made.damage, made.cost, budget_ms))
    return found


def _two_groups(made: LayeredInstance) -> list[bool]:
    return [bool(layer.source.terms) and bool(layer.target.terms) for layer in made.cost.layers]


def front(seed: int) -> dict[str, Any]:
    """Twenty budgets in one call."""
    made = residual(seed)
    begun = time.process_time()
    points = Exact().front(made.groups, made.damage, made.cost, 20)
    cpu_s = time.process_time() - begun
    return {"cpu_s": cpu_s, "points": [figures(point.certificate, 0.0) for point in points]}


def large(seed: int, share: float) -> dict[str, Any]:
    """200 groups, one budget."""
    made = residual(seed, LARGE)
    budget_ms = made.between_ms(share)
    found = timed(partial(Exact().allocate, made.groups, made.damage, made.cost, budget_ms))
    return {"groups": len(made.groups), "exact": found}


def three(seed: int, share: float) -> dict[str, Any]:
    """200 groups; latency, parameters and a latency elsewhere, each at the same share between smallest and dense."""
    made = residual(seed, LARGE)
    elsewhere = residual(seed + 1_000, LARGE).cost
    other = LayeredCost(made.cost.sizes, made.cost.steps, elsewhere.layers)
    smallest = {name: steps[-1] for name, steps in made.cost.steps.items()}
    limits = []
    for name, cost in (("parameters", LayeredParameters(made.cost)), ("latency elsewhere", other)):
        least = cost.value(smallest)
        limits.append(Limit(name, cost, least + share * (cost.value({}) - least)))
    budget_ms = made.between_ms(share)
    exact = Exact()
    found = timed(partial(exact.allocate, made.groups, made.damage, made.cost, budget_ms, limits=limits))
    return {"groups": len(made.groups), "budgets": 1 + len(limits), "exact": found}


def brute(kind: str, start: int) -> dict[str, Any]:
    """Some instances beside every combination of their widths."""
    make, count = KINDS[kind]
    rows = []
    for seed in range(start, min(start + _AT_ONCE, count)):
        made = make(seed)
        budget_ms = made.between_ms((0.15, 0.3, 0.5, 0.7, 0.85)[seed % 5])
        best = made.best_damage(budget_ms)
        allocation = Exact(gap=0.0).allocate(made.groups, made.damage, made.cost, budget_ms)
        certificate = allocation.certificate
        rows.append(
            {
                "seed": seed,
                "best": best,
                "damage": certificate.damage,
                "bound": certificate.bound,
                "within": made.cost.ms(allocation.widths) <= budget_ms,
                "equal": abs(certificate.damage - best) <= 1e-6 * max(best, 1e-12),
                "bound_holds": certificate.bound is not None and certificate.bound <= best * (1 + 1e-6),
            }
        )
    return {"instances": rows}


@lru_cache(maxsize=1)
def _predictor() -> Any:
    import torch

    from edgeprune.latency.fitting import fit
    from edgeprune.latency.table import LatencyTable

    torch.set_num_threads(1)
    return fit(LatencyTable.load(TABLE))


def real(family: str) -> dict[str, Any]:
    """A real network, exact beside greedy at three budgets; plans looked up again by a cost model that has seen nothing."""
    from predictor_networks import families

    import edgeprune
    from edgeprune.allocation.cost import CostModel
    from edgeprune.criteria.damage import damage_curves
    from edgeprune.surgery.magnitude import l2_norms

    predictor = _predictor()
    model, inputs = families.resnet50() if family == "resnet50" else families.build(family)
    graph = edgeprune.trace(model, inputs)
    with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder:
        lowered = edgeprune.lower(graph, device=predictor.table.header["identity"], workdir=Path(folder))
        damage = damage_curves(l2_norms(graph), "log_share")
        cost = CostModel(lowered, predictor)
        begun = time.process_time()
        candidates = {group.name: len(cost.candidates(group.name)) for group in graph.groups}
        stairs_s = time.process_time() - begun
        begun = time.process_time()
        exact = Exact()
        prepared = Prepared(graph.groups, damage, cost, None, (), exact.settings)
        found: dict[str, Any] = {
            "groups": len(graph.groups),
            "candidates": sum(candidates.values()),
            "dense_ms": cost.dense_ms,
            "stairs_s": stairs_s,
            "tables_s": time.process_time() - begun,
            "table_error": prepared.error,
            "lookups": prepared.lookups,
            "budgets": {},
        }
        for share in REAL_SHARES:
            budget_ms = share * cost.dense_ms
            row = {}
            allocators: Mapping[str, Callable[[], Allocation]] = {
                "exact": partial(prepared.within, budget_ms),
                **{
                    name: partial(registry.get(name).allocate, graph.groups, damage, fresh, budget_ms)
                    for name, fresh in (
                        ("greedy", CostModel(lowered, predictor)),
                        ("knapsack", CostModel(lowered, predictor)),
                        ("global_threshold", CostModel(lowered, predictor)),
                        ("uniform", CostModel(lowered, predictor)),
                    )
                },
            }
            for name, allocate in allocators.items():
                begun = time.process_time()
                try:
                    allocation = allocate()
                except BudgetInfeasibleError as error:
                    row[name] = {"infeasible": str(error), "cpu_s": time.process_time() - begun}
                    continue
                row[name] = figures(allocation.certificate, time.process_time() - begun)
                again_ms = predictor.network(lowered.at({**graph.widths(), **allocation.widths}))[0]
                row[name]["again_ms"] = again_ms
                row[name]["within"] = again_ms <= budget_ms * (1 + 1e-12)
            found["budgets"][f"{share:.0%}"] = row
    return found


def cells() -> dict[str, Callable[[], dict[str, Any]]]:
    """Name to what makes it, quick ones first."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for seed in range(3):
        for share in SHARES:
            found[f"resnet50-{share:.0%}-seed{seed}"] = partial(resnet50, seed, share)
    for seed in range(2):
        found[f"front-seed{seed}"] = partial(front, seed)
    for kind, (_, count) in KINDS.items():
        for start in range(0, count, _AT_ONCE):
            found[f"brute-{kind}-{start:03d}"] = partial(brute, kind, start)
    for seed in range(2):
        for share in SHARES:
            found[f"large-{share:.0%}-seed{seed}"] = partial(large, seed, share)
            found[f"three-{share:.0%}-seed{seed}"] = partial(three, seed, share)
    for family in FAMILIES:
        found[f"real-{family}"] = partial(real, family)
    return found


def read(name: str) -> dict[str, Any] | None:
    """A cell that is there."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def ratio(one: Mapping[str, Any], exact: Mapping[str, Any]) -> str:
    """Damage relative to the exact one's."""
    if "infeasible" in one:
        return "not reachable"
    return f"{one['damage'] / exact['damage']:.3f}" if exact["damage"] else "-"


def table() -> str:
    """What is there, as Markdown, and what is missing."""
    names = list(cells())
    there = {name: found for name in names if (found := read(name)) is not None}
    lines = [*_single(there), *_brute(there), *_real(there)]
    missing = [name for name in names if name not in there]
    return "\n".join([*lines, "", f"missing: {', '.join(missing) or 'nothing'}"])


def _single(there: Mapping[str, dict[str, Any]]) -> list[str]:
    lines = ["| instance | budgets | largest gap | CPU seconds (median, largest) | goal |", "|---|---|---|---|---|"]
    goals = {"resnet50": "1 %, 3 s", "large": "2 %, 30 s", "three": "5 %"}
    for prefix, goal in goals.items():
        rows = [found["exact"] for name, found in there.items() if name.startswith(f"{prefix}-")]
        if rows:
            seconds = [row["cpu_s"] for row in rows]
            gap = max(row["gap"] for row in rows)
            lines.append(f"| {prefix} | {len(rows)} | {gap:.2%} | {median(seconds):.2f}, {max(seconds):.2f} | {goal} |")
    for name, found in there.items():
        if name.startswith("front-"):
            gap = max(point["gap"] for point in found["points"])
            lines.append(f"| {name} | {len(found['points'])} | {gap:.2%} | {found['cpu_s']:.2f} in all | 30 s |")
    rows = [found for name, found in there.items() if name.startswith("resnet50-")]
    if rows:
        lines += [
            "",
            "Damage over that of exact on the same instances (median, largest), and CPU seconds (median):",
            "",
        ]
        lines += [f"| {' | '.join(['', *OTHERS])} |", "|---|" + "---|" * len(OTHERS)]
        ratios: dict[str, Sequence[float]] = {
            name: [row[name]["damage"] / row["exact"]["damage"] for row in rows if "damage" in row[name]]
            for name in OTHERS
        }
        lines.append("| damage | " + " | ".join(f"{median(r):.3f}, {max(r):.3f}" for r in ratios.values()) + " |")
        times = [f"{median([row[name]['cpu_s'] for row in rows]):.2f}" for name in OTHERS]
        lines.append("| seconds | " + " | ".join(times) + " |")
    return lines


def _brute(there: Mapping[str, dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "| small instances | tried | equal to every combination | bound holds | budget holds |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        rows = [row for name, found in there.items() if name.startswith(f"brute-{kind}-") for row in found["instances"]]
        if rows:
            counts = [sum(row[key] for row in rows) for key in ("equal", "bound_holds", "within")]
            lines.append(f"| {kind} | {len(rows)} | " + " | ".join(str(count) for count in counts) + " |")
    return lines


def _real(there: Mapping[str, dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "| network | groups | tables: s, error | budget | gap | exact, s | greedy: damage, s | knapsack | threshold | uniform |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in there.items():
        if not name.startswith("real-"):
            continue
        for share, row in found["budgets"].items():
            exact = row["exact"]
            if "infeasible" in exact:
                lines.append(f"| {name[5:]} | {found['groups']} | | {share} | not reachable | | | | | |")
                continue
            gap = "no bound" if exact["gap"] is None else f"{exact['gap']:.2%}"
            greedy = f"{ratio(row['greedy'], exact)}, {row['greedy']['cpu_s']:.1f}"
            others = [ratio(row[other], exact) for other in ("knapsack", "global_threshold", "uniform")]
            lines.append(
                f"| {name[5:]} | {found['groups']} | {found['tables_s']:.1f}, {found['table_error']:.1%} | {share} | {gap} "
                f"| {exact['cpu_s']:.1f} | {greedy} | " + " | ".join(others) + " |"
            )
    return lines


def main() -> None:
    """Make what is missing, print what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose name begins so")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, make in cells().items():
        if arguments.table or not name.startswith(arguments.only) or read(name) is not None:
            continue
        print(f"{name} ...", flush=True)
        found = make()
        path = RESULTS / f"{name}.json"
        path.with_suffix(".part").write_text(json.dumps(found, indent=1) + "\n")
        path.with_suffix(".part").replace(path)
    print(table())


if __name__ == "__main__":
    main()
