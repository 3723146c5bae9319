"""How well does the predictor know networks that it has never seen, end to end? This machine as a board over loopback SSH.

Per family (ResNet, MobileNetV2, VGG, DenseNet, ViT-like) a dense network is profiled once, as a user would. Then pruned
networks are drawn that the table does not hold: half with a share of 10 to 100 % drawn for each group by itself, half from
plans of the allocators at 1.2 to 4 times the speed; a third has widths that are no multiples of 4. Each is timed interleaved
with the dense network, so what is compared is a ratio. Then the table is extended by a second network of the family in 40 % of
the minutes, and half as many pruned networks of that one are predicted and timed in the same way. At last all of it is timed
a second time: what two measurements of one network agree to is the ceiling for any predictor. The second comes some minutes
after the first, as the first comes after profiling, since a machine that is shared changes meanwhile.

What is done is not done again; what is missing is printed. Use a machine that does nothing else meanwhile; the whole takes
about an hour and a half at ten minutes per family. edgeprune must be installed, with ONNX Runtime, and sshd.

    python benchmarks/predictor_board.py                     # everything, into benchmarks/results/predictor_board/
    python benchmarks/predictor_board.py --only vit          # one family
    python benchmarks/predictor_board.py --only vit --minutes 1 --networks 8 --out trial     # a trial
    python benchmarks/predictor_board.py --threads 2 --out two-threads           # with more threads inside one operation
    python benchmarks/predictor_board.py --again             # predict again from the tables that were kept, time nothing
    python benchmarks/predictor_board.py --table             # only print what is there
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from predictor_networks import families, figures
from quickstart import ssh_board

import edgeprune
from edgeprune.allocation.cost import CostModel
from edgeprune.allocation.greedy import Greedy
from edgeprune.allocation.knapsack import Knapsack
from edgeprune.allocation.uniform import Uniform
from edgeprune.boards.board import Board
from edgeprune.criteria.damage import damage_curves
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.files import write_text
from edgeprune.latency.features import Machine, features
from edgeprune.latency.predictor import Predictor
from edgeprune.loop.dense import dense_latency
from edgeprune.lowering.kernel_graph import KernelGraph
from edgeprune.profiling.comparing import Comparison, compare
from edgeprune.spec import Kernel
from edgeprune.surgery.constraints import resolve
from edgeprune.surgery.magnitude import l2_norms

RESULTS = Path(__file__).parent / "results"
SECOND_SHARE = 0.4
"""Of the minutes of a family's first network: what the second one gets."""


@contextlib.contextmanager
def loopback() -> Iterator[Board]:
    """This machine, over a real OpenSSH server."""
    with (
        tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder,
        ssh_board(Path(folder)) as (name, environment),
    ):
        os.environ["EDGEPRUNE_CONFIG"] = environment["EDGEPRUNE_CONFIG"]
        with Board.open(name) as board:
            yield board


@dataclass(frozen=True)
class Case:
    """A network to predict the pruned versions of: the first of its family, or the second, which extends the first's table."""

    family: str
    second: bool

    @property
    def name(self) -> str:
        return f"{self.family}{figures.SECOND}" if self.second else self.family

    def table_path(self, results: Path) -> Path:
        return results / f"{self.name}.parquet"

    def path(self, results: Path) -> Path:
        return results / f"{self.name}.json"


def run(case: Case, results: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One network: profile, fit, draw, time."""
    model, x = families.build(case.family, case.second)
    path = case.table_path(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    minutes = arguments.minutes * (SECOND_SHARE if case.second else 1)
    base = edgeprune.LatencyTable.load(Case(case.family, False).table_path(results)) if case.second else None
    with loopback() as board, tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder:
        fingerprint = board.probe()
        graph = edgeprune.trace(model, x)
        lowered = edgeprune.lower(graph, model=model, device=fingerprint, workdir=Path(folder))
        begun, kept = time.monotonic(), path.exists()
        if kept:
            table = edgeprune.LatencyTable.load(path)
        else:
            table = edgeprune.profile(
                model,
                x,
                board,
                minutes=minutes,
                table=base,
                threads=arguments.threads,
                out=path,
                graph=graph,
                kernel_graph=lowered,
            )
        # Of a table that was kept nobody knows here how long it took.
        profiled_s = None if kept else time.monotonic() - begun
        predictor = edgeprune.fit(table)
        drawn = draw(lowered, predictor, arguments.networks // (2 if case.second else 1), table)
        rows = [{"widths": widths, "kind": kind, **predicted(lowered, predictor, widths)} for kind, widths in drawn]
        found = timed(board, lowered, rows, "first", arguments)
        earlier = {row.name for row in base.networks} if base is not None else set()
        return {
            "family": case.name,
            "host": fingerprint.cpu_model,
            "runtime": fingerprint.runtimes["onnxruntime"].get("version"),
            "threads": arguments.threads,
            "minutes": minutes,
            "profiled_s": profiled_s,
            "kernels_measured": len(table.kernels) - (len(base.kernels) if base is not None else 0),
            "networks_measured": len(table.networks) - len(earlier),
            "dense": predicted(lowered, predictor, {}),
            "dense_ms": dense_latency(predictor, lowered).ms,
            "calibration": calibration_rows(predictor, earlier),
            "level_ms": found.level_ms,
            "first_at": time.time(),
            "networks": rows,
        }


def run_again(case: Case, results: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The rows of a network with what a second measurement says of them."""
    document: dict[str, Any] = json.loads(case.path(results).read_text())
    model, x = families.build(case.family, case.second)
    with loopback() as board, tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder:
        lowered = edgeprune.lower(edgeprune.trace(model, x), model=model, device=board.probe(), workdir=Path(folder))
        timed(board, lowered, document["networks"], "second", arguments, document["level_ms"])
    return {**document, "second_after_s": time.time() - document["first_at"]}


def timed(
    board: Board,
    lowered: KernelGraph,
    rows: list[dict[str, Any]],
    turn: str,
    arguments: argparse.Namespace,
    level_ms: float | None = None,
) -> Comparison:
    """Time the networks of some rows, and write the ratios into them.

    All in the same rounds: a neighbor who fills the shared cache for half a minute is some rounds of every network then, and
    not every round of some.
    """
    engines: dict[str, bytes | Path] = {
        f"network{index}": lowered.network_engine(row["widths"]) for index, row in enumerate(rows)
    }
    engines["dense"] = lowered.network_engine({})
    with board.hold("benchmark"):
        found = compare(board, engines, "dense", threads=arguments.threads, rounds=arguments.rounds, level_ms=level_ms)
    for index, row in enumerate(rows):
        ratio = found.ratios[f"network{index}"]
        row[turn] = {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high}
    dense_ms = found.measurements["dense"].median_ms
    print(
        f"{turn} measurement: {found.disturbed} rounds disturbed, the dense network takes {dense_ms:.3f} ms", flush=True
    )
    return found


def complete(path: Path) -> bool:
    """Whether a network's rows are there, and were timed twice."""
    return path.exists() and all("second" in row for row in json.loads(path.read_text())["networks"])


def predict_again(case: Case, results: Path) -> dict[str, Any]:
    """The rows of a network, with what this version of the package predicts from its table; what was measured stays."""
    document: dict[str, Any] = json.loads(case.path(results).read_text())
    model, x = families.build(case.family, case.second)
    with Board.open("local") as board, tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder:
        lowered = edgeprune.lower(edgeprune.trace(model, x), model=model, device=board.probe(), workdir=Path(folder))
        predictor = edgeprune.fit(edgeprune.LatencyTable.load(case.table_path(results)))
        rows = [{**row, **predicted(lowered, predictor, row["widths"])} for row in document["networks"]]
        return {**document, "dense": predicted(lowered, predictor, {}), "networks": rows}


def draw(
    lowered: KernelGraph, predictor: Predictor, count: int, table: edgeprune.LatencyTable
) -> list[tuple[str, dict[str, int]]]:
    """Width vectors with where they come from; none of them runs the kernels of a network that the table holds."""
    graph = lowered.graph
    dice = random.Random(f"versions of another day/{graph.signature}")
    taken = {tuple(kernels) for kernels in held_kernels(table)}
    found: list[tuple[str, dict[str, int]]] = []
    rules = resolve(edgeprune.Constraints(), graph)
    cost = CostModel(lowered, predictor, rules=rules)
    damage = damage_curves(l2_norms(graph), "log_share")
    while len(found) < count:
        number = len(found)
        odd = number % 3 == 0
        if number % 2:
            budget_ms = cost.dense_ms / dice.uniform(1.2, 4.0)
            allocator = (Greedy(), Uniform(), Knapsack())[number // 2 % 3]
            try:
                widths = dict(allocator.allocate(graph.groups, damage, cost, budget_ms, rules).widths)
            except BudgetInfeasibleError:
                continue
            kind = allocator.name
        else:
            widths = {group.name: max(1, round(group.size * dice.uniform(0.1, 1.0))) for group in graph.groups}
            kind = "random"
        sizes = graph.widths()
        widths = {name: fitted(width, sizes[name], odd, dice) for name, width in widths.items()}
        kernels = tuple(sorted(kernel.key for kernel in lowered.at(widths)))
        if kernels not in taken:
            taken.add(kernels)
            found.append((kind, widths))
    return found


def fitted(width: int, size: int, odd: bool, dice: random.Random) -> int:
    """No multiple of 4 where `odd` says so, a multiple of 4 otherwise, wherever the group is large enough."""
    if size < 8:
        return width
    if odd:
        return min(size - 1, width - width % 4 + dice.choice((1, 2, 3))) if width < size else width
    return min(size, max(4, round(width / 4) * 4))


def held_kernels(table: edgeprune.LatencyTable) -> list[list[str]]:
    """Keys of the kernels of each network in a table, repeats included."""
    return [sorted(row.kernels.elements()) for row in table.networks]


def predicted(lowered: KernelGraph, predictor: Predictor, widths: dict[str, int]) -> dict[str, float]:
    """What is said of a network before it is timed: ours, and what a simpler rule would go by."""
    kernels = lowered.at(widths)
    ms, low, high = predictor.network(kernels)
    matrix = features(kernels, Machine.from_header(predictor.table.header))
    return {
        "ms": ms,
        "low_ms": low,
        "high_ms": high,
        "sum_ms": float(predictor.kernel_ms(kernels).sum()),
        "macs": float(np.exp(matrix.column("log_macs")).sum()),
    }


def calibration_rows(predictor: Predictor, earlier: set[str]) -> list[dict[str, float]]:
    """Networks that the table holds, without those of the network it was extended from: simple rules are fitted to them."""
    machine = Machine.from_header(predictor.table.header)
    rows = []
    for row in predictor.table.networks:
        if row.name in earlier:
            continue
        kernels = [Kernel.from_key(key) for key in row.kernels.elements()]
        macs = float(np.exp(features(kernels, machine).column("log_macs")).sum())
        rows.append({"measured_ms": row.measurement.median_ms, "macs": macs})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(families.FAMILIES), help="one family instead of all")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument(
        "--again", action="store_true", help="predict again from the tables that are there, and time nothing"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of profiling the first network of each family")
    parser.add_argument("--networks", type=int, default=40, help="per family, of its first network")
    parser.add_argument("--rounds", type=int, default=40, help="of each comparison")
    parser.add_argument("--threads", type=int, default=1, help="inside one operation")
    parser.add_argument("--out", default="predictor_board", help="folder in benchmarks/results")
    arguments = parser.parse_args()
    results = RESULTS / arguments.out
    names = [arguments.only] if arguments.only else list(families.FAMILIES)
    cases = [Case(name, second) for name in names for second in (False, True)]
    for case in cases if arguments.again else []:
        if complete(case.path(results)) and case.table_path(results).exists():
            write_text(case.path(results), json.dumps(predict_again(case, results), indent=1) + "\n")
    for name in [] if arguments.table or arguments.again else names:
        family = [case for case in cases if case.family == name]
        for case in family:
            if not case.path(results).exists():
                print(f"running {case.name}", flush=True)
                write_text(case.path(results), json.dumps(run(case, results, arguments), indent=1) + "\n")
        for case in family:
            if not complete(case.path(results)):
                print(f"running {case.name} again", flush=True)
                write_text(case.path(results), json.dumps(run_again(case, results, arguments), indent=1) + "\n")
    for second in (False, True):
        there = [case.path(results) for case in cases if case.second == second and complete(case.path(results))]
        if there:
            print(f"{'second' if second else 'first'} networks of each family\n")
            print(figures.markdown([json.loads(path.read_text()) for path in there]) + "\n")
    missing = [case.name for case in cases if not complete(case.path(results))]
    print(f"missing: {', '.join(missing) or 'nothing'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
