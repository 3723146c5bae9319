"""Three tasks on one trunk: limits per task, and what the ways to choose widths leave of each metric at one latency.

A network of `multitask_problems.py` is trained once per seed on rendered scenes, pruned to a share of its latency in each way of
`multitask_ways.py`, and tuned equally. Metrics are those of test scenes that neither training nor search nor tuning saw.
Latencies are predicted with the latency table that is given; with `--board` each cut model is timed there beside the dense one,
and its predicted share moved until the measured one is met within 2 %. A cell that is done is not run again; one that cannot be
reached is done too. What is missing is printed. Torch-Pruning must be installed for its rows.

    python benchmarks/multitask.py --latency-table tests/data/onnxruntime_avx512_kernels.parquet --seeds 0 1 2
    python benchmarks/multitask.py --latency-table ... --problem detector
    python benchmarks/multitask.py --table                                             # only print what is there
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from multitask_problems import PROBLEMS, Problem, Samples, count, multiply_accumulates, worst
from multitask_ways import OURS, SCRATCH, Cut, Setting, from_scratch, ways
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

import edgeprune
from edgeprune.files import replacing, write_text
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import FineTuning, fine_tune
from edgeprune.tasks.task import Task

RESULTS = Path(__file__).parent / "results" / "multitask"
VALIDATION, TEST, BATCH = 200, 500, 50
RECOVERY, LEARNING_RATE = 1, 3e-3
LIMIT = "25%"
"""Of every task, where no other is given: in PAGCP before recovery, with a curve per task as unit. Metrics are those after it."""
NEAR, TURNS = 0.02, 5
"""How near a measured share must be to the one that is asked for, and how often a cut is made anew for that."""


def dense(problem: Problem, width: int, seed: int, task: Task, path: Path, epochs: int) -> nn.Module:
    """The trained network; its weights are kept in a file."""
    torch.manual_seed(seed)
    model = problem.network(width)
    if path.is_file():
        model.load_state_dict(load_file(path))
    else:
        fine_tune(model, task, epochs=epochs, lr=LEARNING_RATE, seed=seed, progress=None)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            save_file(model.state_dict(), draft)
    return model.eval()


class Cells:
    """The cells of one problem and size, one file each.

    Args:
        arguments: Of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.problem = PROBLEMS[arguments.problem]
        self.ways = ways(self.problem.tasks)
        # The widths of ours are trained from scratch when they are there.
        asked = sorted(arguments.ways or self.ways, key=lambda name: name == SCRATCH)
        self.wanted = [(seed, share, way) for seed in arguments.seeds for share in arguments.shares for way in asked]

    def path(self, seed: int, share: float, way: str) -> Path:
        """Where a cell is kept."""
        it = self.arguments
        other = "" if it.limit == LIMIT else f"limit-{it.limit}-"
        name = f"{it.problem}-{it.size}-{it.width}-{seed}-{share:g}-{other}{re.sub(r'[^A-Za-z0-9]+', '-', way)}.json"
        return Path(it.results) / name.replace("%", "")

    def read(self, seed: int, share: float, way: str) -> dict[str, Any] | None:
        """A cell, or None."""
        path = self.path(seed, share, way)
        return json.loads(path.read_text()) if path.is_file() else None

    def run(self) -> None:
        """What is missing."""
        it = self.arguments
        missing = [cell for cell in self.wanted if self.read(*cell) is None]
        print(f"{len(self.wanted) - len(missing)} of {len(self.wanted)} cells are there", flush=True)
        predictor = edgeprune.fit(edgeprune.LatencyTable.load(it.latency_table))
        loaders = [
            DataLoader(Samples(self.problem, number, it.size, seed), batch_size=BATCH, shuffle=seed == 1)
            for number, seed in ((it.train, 1), (VALIDATION, 2), (TEST, 3))
        ]
        task, test = (self.problem.task(loaders[0], held, it.limit) for held in loaders[1:])
        settings: dict[int, Setting] = {}
        began = time.monotonic()
        with ExitStack() as stack:
            board = stack.enter_context(edgeprune.Board.open(it.board)) if it.board else None
            for done, (seed, share, way) in enumerate(missing):
                if seed not in settings:
                    path = it.weights / f"{it.problem}-{it.size}-{it.width}-{it.train}-{it.epochs}-{seed}.safetensors"
                    model = dense(self.problem, it.width, seed, task, path, it.epochs or self.problem.epochs)
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                    settings = {seed: Setting(self.problem, it.size, model, task, predictor, folder)}
                    print(f"seed {seed}: {evaluate(model, test)}", flush=True)
                row = self.cell(settings[seed], seed, share, way, test, board)
                if row is None:
                    continue
                path = self.path(seed, share, way)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps(row, indent=1) + "\n")
                left = (time.monotonic() - began) / (done + 1) * (len(missing) - done - 1)
                told = row.get("infeasible") or row["pruned"]
                print(f"{done + 1} of {len(missing)}, {left:.0f} s left: {way}: {told}", flush=True)

    def cell(
        self, setting: Setting, seed: int, share: float, way: str, test: Task, board: Any
    ) -> dict[str, Any] | None:
        """One way and seed; None where it needs a cell that is not there."""
        began, found = time.monotonic(), {"way": way, "seed": seed, "share": share}
        torch.manual_seed(seed)
        try:
            cut, measured = self._met(setting, seed, share, way, board)
        except edgeprune.errors.BudgetInfeasibleError as error:
            return {**found, "infeasible": error.message}
        if cut is None:
            return None
        if cut.epochs:
            fine_tune(cut.module, setting.task, epochs=cut.epochs, lr=LEARNING_RATE, seed=seed)
        before = evaluate(cut.module, test)
        fine_tune(cut.module, setting.task, FineTuning(epochs=RECOVERY, lr=LEARNING_RATE, seed=seed))
        return {
            **found,
            "predicted_share": cut.share,
            "measured_share": measured,
            "parameters_share": count(cut.module) / count(setting.model),
            "multiply_accumulates_share": multiply_accumulates(cut.module, setting.size)
            / multiply_accumulates(setting.model, setting.size),
            "dense": evaluate(setting.model, test),
            "before_recovery": before,
            "pruned": evaluate(cut.module, test),
            "seconds": time.monotonic() - began,
            **cut.details,
        }

    def _met(self, setting: Setting, seed: int, share: float, way: str, board: Any) -> tuple[Cut | None, float | None]:
        """A cut model, and its measured share where there is a board."""
        it, make = self.arguments, self.ways[way]
        if make is None:
            ours = self.read(seed, share, OURS)
            if ours is None or "infeasible" in ours:
                return None, None
            fresh = self.problem.network(it.width).eval()
            epochs = it.epochs or self.problem.epochs
            return from_scratch(setting, ours, fresh, epochs), ours.get("measured_share")
        if board is None:
            return make(setting, share), None
        from edgeprune.loop.verification import measure_ratio

        best: tuple[Cut | None, float | None] = (None, None)
        asked = share
        for _ in range(TURNS):
            cut = make(setting, asked)
            ratio = measure_ratio(board, setting.kernels, cut.module, threads=1, rounds=12, precision=0.01).ratio
            if best[1] is None or abs(ratio - share) < abs(best[1] - share):
                best = cut, ratio
            if abs(ratio / share - 1) <= NEAR:
                break
            asked *= share / ratio
        return best

    def table(self) -> None:
        """Print what is there, per way its mean over the seeds, and what is missing."""
        names = list(self.problem.tasks)
        print(f"| share | way | seed | predicted | measured | parameters | MACs | {' | '.join(names)} | worst | s |")
        print("|---" * (len(names) + 9) + "|")
        rows = {cell: self.read(*cell) for cell in self.wanted}
        for (seed, share, way), row in rows.items():
            if row is None:
                continue
            if "infeasible" in row:
                print(f"| {share:.0%} | {way} | {seed} | {row['infeasible']} |")
                continue
            figures = " | ".join(f"{row['dense'][name]:.4f} → {row['pruned'][name]:.4f}" for name in names)
            measured = "" if row.get("measured_share") is None else f"{row['measured_share']:.1%}"
            macs = f"{row['multiply_accumulates_share']:.0%}" if "multiply_accumulates_share" in row else ""
            print(
                f"| {share:.0%} | {way} | {seed} | {row['predicted_share']:.1%} | {measured} | {row['parameters_share']:.0%} | "
                f"{macs} | {figures} | {worst(self.problem, row['dense'], row['pruned']):.1%} | {row['seconds']:.0f} |"
            )
        for share in self.arguments.shares:
            for way in dict.fromkeys(way for _, _, way in self.wanted):
                found = [rows[cell] for cell in self.wanted if cell[1:] == (share, way)]
                losses = [worst(self.problem, one["dense"], one["pruned"]) for one in found if one and "pruned" in one]
                if len(losses) > 1:
                    print(f"{share:.0%}, {way}: worst task {statistics.mean(losses):.1%}, mean of {len(losses)} seeds")
        missing = [f"{way} at {share:.0%}, seed {seed}" for (seed, share, way), row in rows.items() if row is None]
        print(f"missing: {'; '.join(missing) or 'nothing'}")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-table", type=Path, help="of the board that latencies are predicted for")
    parser.add_argument(
        "--board", help="where cut models are timed beside the dense one; predicted latencies only without it"
    )
    parser.add_argument("--problem", default="scenes", choices=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5], help="of the dense latency")
    parser.add_argument("--ways", nargs="+", help="all when not given")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--limit", default=LIMIT, help="of every task")
    parser.add_argument("--size", type=int, default=64, help="pixels of an edge")
    parser.add_argument("--train", type=int, default=1000, help="scenes to train on")
    parser.add_argument("--epochs", type=int, help="of dense training; those of the problem when not given")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--weights", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-multitask")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    cells = Cells(parser.parse_args())
    unknown = set(cells.arguments.ways or ()) - set(cells.ways)
    if unknown:
        parser.error(f"--ways must be among {', '.join(cells.ways)}; found {', '.join(sorted(unknown))}")
    if not cells.arguments.table:
        if cells.arguments.latency_table is None:
            parser.error("--latency-table is needed to run anything")
        torch.set_num_threads(1)
        cells.run()
    cells.table()


if __name__ == "__main__":
    main()
