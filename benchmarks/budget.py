"""Does a pruned model take the milliseconds that were asked for? Fifty seeded pairs of a network and a budget.

Each network is profiled once over a real OpenSSH server on this machine; then the closed loop of `edgeprune.prune` runs for
budgets drawn uniformly between 1.15 times the smallest latency that it finds and 0.9 times the dense one. What it hands over is
measured again, independently: in fresh processes, to the precision of the loop's own rounds. Latencies are ratios to the dense
engine in the same rounds. Latency does not depend on the values of weights, so they are random and nothing is tuned.

A pair that uses less of its budget than the window is listed apart where the solver proves that there is nothing to gain: that
no candidate widths whose corrected prediction lies within the window have less damage, by more than 1 %.

What is done is not done again; what is missing is printed, and a pair that fails says why and is left out. Use a machine that
does nothing else meanwhile. edgeprune must be installed, with ONNX Runtime, and sshd.

    python benchmarks/budget.py                   # all fifty, into benchmarks/results/budget/
    python benchmarks/budget.py --only vit        # the pairs of one network
    python benchmarks/budget.py --table           # only print what is there
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
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
from edgeprune.errors import EdgepruneError, RemoteError
from edgeprune.files import write_text
from edgeprune.loop.aiming import Seen, aim_ms
from edgeprune.loop.dense import dense_latency
from edgeprune.loop.planning import Planner
from edgeprune.loop.result import PruningRound, Result
from edgeprune.loop.verification import PRECISION, measure_ratio

RESULTS = Path(__file__).parent / "results" / "budget"
PAIRS = 50
LOW, HIGH, WORST = -0.03, 0.005, 0.01
"""Of the budget: the window that at least `SHARE` of the pairs must lie in, and what none may exceed."""
SHARE, MOST_LISTED = 0.95, 0.1
"""Of the pairs: in the window, of those that are not listed apart; and listed, at most."""
NOTHING = 0.01
"""Share of the damage below which less of it is nothing to gain."""
ROUNDS = 24
"""Of each independent measurement, and of each that is added where one was not precise enough."""
REPEATS = 8
"""Independent measurements of the first pair of each network; of the others there is one."""

MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "cifar_resnet20": families.cifar_resnet20,
    "cifar_resnet56": families.cifar_resnet56,
    "vgg": lambda: families.build("vgg"),
    "mobilenetv2": lambda: families.build("mobilenetv2"),
    "densenet": lambda: families.build("densenet"),
    "efficientnet": families.efficientnet,
    "vit": lambda: families.build("vit"),
}
KINDS: tuple[tuple[str, ...], ...] = (
    ("cifar_resnet20", "cifar_resnet56"),
    ("vgg",),
    ("mobilenetv2",),
    ("densenet",),
    ("efficientnet",),
    ("vit",),
)
"""Each is as likely as any other, and each network of one."""


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
    return [Pair(number, dice.choice(dice.choice(KINDS)), dice.random()) for number in range(PAIRS)]


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
        least_ms = planner.front(2)[0].predicted_ms
        for pair in wanted:
            low_ms, high_ms = 1.15 * least_ms, 0.9 * dense_ms
            budget = edgeprune.Budget(latency_ms=low_ms + pair.place * (high_ms - low_ms))
            started = time.monotonic()
            try:
                found = one(pair, board, planner, x, budget, REPEATS if pair == repeated else 1)
            except EdgepruneError as error:
                print(f"{pair.path.stem} failed: {type(error).__name__}: {error}", flush=True)
                continue
            found |= {"dense_ms": dense_ms, "least_ms": least_ms, "minutes": minutes, "host": host()}
            found["seconds"] = time.monotonic() - started
            write_text(pair.path, json.dumps(found, indent=1, allow_nan=False) + "\n")
            print(f"{pair.path.stem}: {describe(found)}", flush=True)


def one(
    pair: Pair, board: Board, planner: Planner, x: Tensor, budget: edgeprune.Budget, repeats: int
) -> dict[str, Any]:
    """One pair: the closed loop, and what it handed over measured independently."""
    result = edgeprune.prune(planner.model, x, budget, board, planner=planner)
    if result.measured is None or any(turn.measured is None for turn in result.rounds):
        raise RemoteError(f"the board must answer in every round, found that it was lost: {' '.join(result.notes)}")
    again = [
        measure_ratio(
            board,
            planner.kernel_graph,
            None if result.unchanged else result.module,
            threads=1,
            rounds=ROUNDS,
            precision=PRECISION,
            # By which disturbed rounds are told; it has no part in the ratio.
            level_ms=result.measured.level_ms,
        )
        for _ in range(repeats)
    ]
    found = {
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
    if off(found) < LOW:
        found["window"] = window(planner, result)
    return found


def rounded(turn: PruningRound, dense_ms: float, budget_ms: float) -> dict[str, float]:
    """The figures of one round; shares are of the budget."""
    return {
        "aim_ms": turn.aim_ms,
        "predicted_ms": turn.predicted_ms,
        "of_budget": turn.measured_ms(dense_ms) / budget_ms,
        "high_of_budget": turn.high_ms(dense_ms) / budget_ms,
        "damage": turn.certificate.damage,
    }


def window(planner: Planner, result: Result) -> dict[str, Any]:
    """What the solver says of all candidate widths up to the upper end of the window, predictions corrected by all rounds."""
    seen = [Seen(result.dense_predicted_ms, result.dense_ms)]
    seen += [Seen(turn.predicted_ms, turn.measured_ms(result.dense_ms)) for turn in result.rounds]
    aim = aim_ms((1 + HIGH) * result.budget_ms, seen)
    own = planner.about(result.dense_predicted_ms * result.budget_ms / result.dense_ms)
    certificate = own.propose(aim).allocation.certificate
    return {
        "aim_ms": aim,
        "damage": certificate.damage,
        "bound": certificate.bound,
        "table_error": certificate.table_error,
        "taken": result.certificate.damage,
    }


def off(found: dict[str, Any]) -> float:
    """How far the first independent measurement lies from the budget, as a share of it."""
    return float(found["again"][0]["of_budget"]) - 1


def nothing_to_gain(found: dict[str, Any]) -> bool:
    """Whether less of the budget is used because it is proven that no candidate widths in the window have less damage."""
    proof = found.get("window")
    if off(found) >= LOW or proof is None or proof["bound"] is None:
        return False
    return bool(proof["bound"] >= (1 - NOTHING) * proof["taken"])


def describe(found: dict[str, Any]) -> str:
    rounds = ", ".join(f"{turn['of_budget'] - 1:+.1%}" for turn in found["rounds"])
    return f"budget {found['budget_ms']:.3f} ms, rounds {rounds}; measured again {off(found):+.2%}"


def met_after(found: dict[str, Any], count: int) -> bool:
    """Whether what would be taken after `count` rounds lies in the window as the rounds themselves measured it.

    After none it is the first plan too: by its prediction alone.
    """
    first = found["rounds"][: max(1, count)]
    sure = [turn for turn in first if turn["high_of_budget"] <= 1]
    met = sure or [turn for turn in first if turn["of_budget"] <= 1]
    best = min(met, key=lambda turn: turn["damage"]) if met else min(first, key=lambda turn: turn["of_budget"])
    return bool(LOW <= best["of_budget"] - 1 <= HIGH)


def judged(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Figures beside what they are to be."""
    listed = sum(nothing_to_gain(found) for found in rows)
    left = len(rows) - listed
    inside = sum(LOW <= off(found) <= HIGH for found in rows)
    above = sum(off(found) > WORST for found in rows)
    shares = [f"{sum(met_after(found, count) for found in rows) / len(rows):.0%}" for count in range(4)]
    spreads = [spread(found) for found in rows if len(found["again"]) > 1]
    lines = [
        f"in the window [{LOW:.1%}, {HIGH:+.1%}]: {inside} of {left} that are not listed ({inside / max(1, left):.0%}; to be at "
        f"least {SHARE:.0%})",
        f"listed, nothing to gain: {listed} of {len(rows)} ({listed / len(rows):.0%}; at most {MOST_LISTED:.0%})",
        f"above {WORST:+.0%}: {above} (none)",
        f"in the window by the rounds' own measurement after 0 (predicted only), 1, 2, 3 rounds: {', '.join(shares)}",
    ]
    if spreads:
        lines.append(
            f"standard deviation of {REPEATS} measurements of one plan: {statistics.mean(spreads):.2%} in the mean, "
            f"{max(spreads):.2%} at most, of the budget"
        )
    return lines


def spread(found: dict[str, Any]) -> float:
    """Standard deviation of the independent measurements of one plan, as a share of the budget."""
    return statistics.stdev(check["of_budget"] for check in found["again"])


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
        print("\n" + "\n".join(judged(list(rows.values()))))
        for pair, found in rows.items():
            if not LOW <= off(found) <= HIGH:
                why = " ".join(note for note in found["notes"] if "left unused" in note or "No further" in note)
                kind = "listed" if nothing_to_gain(found) else "outside"
                print(f"{kind}: {pair.path.stem}: {describe(found)}; {why}")
    print(f"missing: {', '.join(missing) or 'nothing'}")


def row(name: str, part: Sequence[dict[str, Any]]) -> str:
    """One line of the table."""
    offs = [off(found) for found in part]
    spreads = [spread(found) for found in part if len(found["again"]) > 1]
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
    for name in MODELS if not arguments.table else ():
        RESULTS.mkdir(parents=True, exist_ok=True)
        part = [pair for pair in wanted if pair.model == name]
        left = [pair for pair in part if not pair.path.exists()]
        if left:
            run(name, left, part[0], arguments.minutes)
    table(wanted)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
