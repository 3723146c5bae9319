"""Does a pruned model take the milliseconds that were asked for? Fifty seeded pairs of a network and a budget.

Each network is profiled once over a real OpenSSH server on this machine; then the closed loop of `edgeprune.prune` runs for
budgets drawn uniformly between 1.15 times the smallest latency that it finds and 0.9 times the dense one. What it hands over is
measured again, independently, in fresh processes. Latencies are ratios to the dense engine in the same rounds. Latency does not
depend on the values of weights, so they are random and nothing is tuned.

What is done is not done again; what is missing is printed. Use a machine that does nothing else meanwhile. edgeprune must be
installed, with ONNX Runtime, and sshd.

    python benchmarks/budget.py                   # all fifty, into benchmarks/results/budget/
    python benchmarks/budget.py --only vit        # the pairs of one network
    python benchmarks/budget.py --table           # only print what is there
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from predictor_board import loopback
from predictor_networks import families
from quickstart import host
from torch import Tensor, nn

import edgeprune
from edgeprune.boards.board import Board
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.loop.dense import dense_latency
from edgeprune.loop.planning import Planner
from edgeprune.loop.result import PruningRound
from edgeprune.loop.verification import measure_ratio

RESULTS = Path(__file__).parent / "results" / "budget"
PAIRS = 50
LOW, HIGH, WORST = -0.03, 0.005, 0.01
"""Of the budget: the window that at least 95 % of the pairs must lie in, and what none may exceed."""
ROUNDS = 24
"""Of each independent measurement."""
REPEATS = 8
"""Independent measurements of the first pair of each network; of the others there is one."""

MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "cifar_resnet56": families.cifar_resnet56,
    "vgg": lambda: families.build("vgg"),
    "mobilenetv2": lambda: families.build("mobilenetv2"),
    "densenet": lambda: families.build("densenet"),
    "efficientnet": families.efficientnet,
    "vit": lambda: families.build("vit"),
}


@dataclass(frozen=True)
class Pair:
    """A network and where between the smallest and the largest budget it is asked for."""

    number: int
    model: str
    place: float

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.number:02d}-{self.model}.json"


def pairs() -> list[Pair]:
    """The fifty, always the same."""
    dice = random.Random("budget/2026")
    return [Pair(number, dice.choice(sorted(MODELS)), dice.random()) for number in range(PAIRS)]


def run(name: str, wanted: Sequence[Pair], repeated: Pair, minutes: float) -> None:
    """All pairs of one network, on one table."""
    model, x = MODELS[name]()
    path = RESULTS / f"{name}.parquet"
    with loopback() as board, tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder:
        graph = edgeprune.trace(model, x)
        lowered = edgeprune.lower(graph, model=model, device=board.probe(), workdir=Path(folder))
        if path.exists():
            table = edgeprune.LatencyTable.load(path)
        else:
            print(f"{name}: profiling, {minutes:g} min", flush=True)
            table = edgeprune.profile(model, x, board, minutes=minutes, out=path, graph=graph, kernel_graph=lowered)
        planner = Planner(model, lowered, edgeprune.fit(table))
        dense_ms = dense_latency(planner.predictor, lowered).ms
        least_ms = smallest_ms(planner)
        for pair in wanted:
            low_ms, high_ms = 1.15 * least_ms, 0.9 * dense_ms
            budget = edgeprune.Budget(latency_ms=low_ms + pair.place * (high_ms - low_ms))
            found = one(pair, board, planner, x, budget, REPEATS if pair == repeated else 1)
            found |= {"dense_ms": dense_ms, "least_ms": least_ms, "minutes": minutes, "host": host()}
            partial = pair.path.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
            partial.replace(pair.path)
            print(f"{pair.path.stem}: {describe(found)}", flush=True)


def smallest_ms(planner: Planner) -> float:
    """The smallest predicted latency that allocation finds, milliseconds."""
    try:
        return planner.propose(1e-9).predicted_ms
    except BudgetInfeasibleError as error:
        return error.best_ms


def one(
    pair: Pair, board: Board, planner: Planner, x: Tensor, budget: edgeprune.Budget, repeats: int
) -> dict[str, Any]:
    """One pair: the closed loop, and what it handed over measured independently."""
    result = edgeprune.prune(planner.model, x, budget, board, planner=planner)
    if any(turn.measured is None for turn in result.rounds):
        raise RuntimeError(f"the board was lost: {' '.join(result.notes)}")
    again = [
        measure_ratio(
            board, planner.kernel_graph, None if result.unchanged else result.module, threads=1, rounds=ROUNDS
        )
        for _ in range(repeats)
    ]
    return {
        "model": pair.model,
        "place": pair.place,
        "budget_ms": result.budget_ms,
        "said_met": result.budget_met,
        "chosen": result.chosen,
        "rounds": [rounded(turn, result.dense_ms, result.budget_ms) for turn in result.rounds],
        "again": [{**asdict(check), "of_budget": check.ratio * result.dense_ms / result.budget_ms} for check in again],
        "gap": result.certificate.gap,
        "notes": list(result.notes),
    }


def rounded(turn: PruningRound, dense_ms: float, budget_ms: float) -> dict[str, float]:
    """The figures of one round; shares are of the budget."""
    return {
        "aim_ms": turn.aim_ms,
        "predicted_ms": turn.predicted_ms,
        "of_budget": turn.measured_ms(dense_ms) / budget_ms,
        "high_of_budget": turn.high_ms(dense_ms) / budget_ms,
        "damage": turn.certificate.damage,
    }


def off(found: dict[str, Any]) -> float:
    """How far the first independent measurement lies from the budget, as a share of it."""
    return float(found["again"][0]["of_budget"]) - 1


def nothing_to_gain(found: dict[str, Any]) -> bool:
    """Whether less of the budget is used because it is proven that no candidate widths within it have less damage."""
    proven = found["gap"] is not None and found["gap"] <= 0.01
    return off(found) < LOW and proven and any("no plan with less damage" in note for note in found["notes"])


def describe(found: dict[str, Any]) -> str:
    rounds = ", ".join(f"{turn['of_budget'] - 1:+.1%}" for turn in found["rounds"])
    return f"budget {found['budget_ms']:.3f} ms, rounds {rounds}; measured again {off(found):+.2%}"


def met_after(found: dict[str, Any], count: int) -> bool:
    """Whether the best of the first `count` rounds lay in the window as the rounds themselves measured it."""
    first = found["rounds"][:count]
    sure = [turn for turn in first if turn["high_of_budget"] <= 1]
    best = min(sure, key=lambda turn: turn["damage"]) if sure else min(first, key=lambda turn: turn["of_budget"])
    return bool(LOW <= best["of_budget"] - 1 <= HIGH)


def table(wanted: Sequence[Pair]) -> None:
    """Print what is there, and what is missing."""
    rows = {pair: json.loads(pair.path.read_text()) for pair in wanted if pair.path.exists()}
    missing = [pair.path.stem for pair in wanted if pair not in rows]
    if rows:
        print(
            "| network | pairs | in the window | below, nothing to gain | below | above +0.5 % | above +1 % | rounds | "
            "repeats, sd |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for name in [*MODELS, "all"]:
            part = [found for pair, found in rows.items() if name in ("all", pair.model)]
            if part:
                print(row(name, part))
        every = list(rows.values())
        shares = [f"{sum(met_after(found, count) for found in every) / len(every):.0%}" for count in (1, 2, 3)]
        print(f"\nin the window by the rounds' own measurement, after 1, 2, 3 rounds: {', '.join(shares)}")
        for pair, found in rows.items():
            if not LOW <= off(found) <= HIGH:
                why = " ".join(note for note in found["notes"] if "left unused" in note or "No further" in note)
                print(f"outside: {pair.path.stem}: {describe(found)}; {why}")
    print(f"missing: {', '.join(missing) or 'nothing'}")


def row(name: str, part: Sequence[dict[str, Any]]) -> str:
    """One line of the table."""
    offs = [off(found) for found in part]
    spreads = [
        statistics.stdev(check["of_budget"] for check in found["again"]) for found in part if len(found["again"]) > 1
    ]
    cells = [
        name,
        str(len(part)),
        f"{sum(LOW <= value <= HIGH for value in offs)} of {len(part)}",
        str(sum(nothing_to_gain(found) for found in part)),
        str(sum(value < LOW for value in offs) - sum(nothing_to_gain(found) for found in part)),
        str(sum(value > HIGH for value in offs)),
        str(sum(value > WORST for value in offs)),
        f"{statistics.mean(len(found['rounds']) for found in part):.1f}",
        f"{statistics.mean(spreads):.2%}" if spreads else "-",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(MODELS), help="the pairs of one network")
    parser.add_argument("--minutes", type=float, default=2.0, help="of profiling each network (default: 2)")
    parser.add_argument("--table", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    wanted = [pair for pair in pairs() if arguments.only in (None, pair.model)]
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in MODELS if not arguments.table else ():
        part = [pair for pair in wanted if pair.model == name]
        left = [pair for pair in part if not pair.path.exists()]
        if left:
            run(name, left, part[0], arguments.minutes)
    table(wanted)


if __name__ == "__main__":
    main()
