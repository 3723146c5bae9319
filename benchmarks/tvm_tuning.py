"""What does tuning bring TVM? Two pruned CIFAR ResNet-20s, on one thread of this machine, which tunes with all its cores.

The first is tuned step by step; after each step its engine is timed beside torch eager (one thread, inference mode) and ONNX
Runtime, interleaved in one process after a warm-up: the curve of trials against milliseconds. The second, of other widths, then
uses the database of the first with a tenth of its trials, and the time until its engine is there is taken. Outputs are compared
with eager's. Weights are random: they do not change the time. What is done is not done again, also after Ctrl-C; what is
missing is printed. Use a machine that does nothing else meanwhile. Needs the extras ``onnxruntime`` and ``tvm``.

    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/tvm_tuning.py                        # about 30 minutes
    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/tvm_tuning.py --table                # only print what is there
    PYTHONPATH=. OMP_NUM_THREADS=1 python benchmarks/tvm_tuning.py --minutes 1 --steps 2 --out trial.json --state trial
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from predictor_networks import families
from quickstart import host
from tvm_untuned import REFERENCE, timed

import edgeprune
import edgeprune.boards.onboard
from edgeprune.backends import registry
from edgeprune.backends.tvm import tuning_database
from edgeprune.backends.tvm.backend import Tvm
from edgeprune.backends.tvm.tuning import Tuning
from edgeprune.files import write_text
from edgeprune.surgery.constraints import Constraints

RESULT = Path(__file__).parent / "results" / "tvm_tuning.json"
STATE = Path(tempfile.gettempdir()) / "edgeprune-tvm-tuning"
# Share of the channels that is cut from the first network and from the second.
FIRST, SECOND = 0.25, 0.45
SECOND_S = 100.0
"""Of searching, so that two minutes are kept with export and compilation."""
SHARE = 0.1
SEED = 0


def network(ratio: float) -> tuple[torch.nn.Module, torch.Tensor]:
    """A ResNet-20 of which that share of the channels of each group is cut, to multiples of two."""
    torch.manual_seed(SEED)
    model, x = families.cifar_resnet20()
    plan = edgeprune.uniform_plan(edgeprune.trace(model, x), ratio=ratio, constraints=Constraints(multiple_of={"*": 2}))
    return edgeprune.apply(model, plan).eval(), x


def export(model: torch.nn.Module, x: torch.Tensor, path: Path, tuning: Tuning | None) -> tuple[float, list[str]]:
    """Write an engine of TVM with what the database knows; returns seconds, and what tuning said."""
    said: list[str] = []
    backend = Tvm() if tuning is None else Tvm(tuning=replace(tuning, told=said.append))
    begun = time.perf_counter()
    backend.for_deployment().export(model, (x,), path)
    return time.perf_counter() - begun, said


def measured(
    model: torch.nn.Module, x: torch.Tensor, paths: dict[str, Path], rounds: int, sample_ms: float
) -> dict[str, Any]:
    """Milliseconds of eager and of engines (name to path, ``.onnx`` or ``.so``), and ratios to eager of the same round."""
    import engines

    torch.set_num_threads(1)
    with torch.inference_mode():
        want = model(x).numpy()

    def eager(times: int) -> None:
        for _ in range(times):
            model(x)

    runs: dict[str, Callable[[int], None]] = {REFERENCE: eager}
    apart: dict[str, float] = {}
    for name, path in paths.items():
        runtime = "tvm" if path.suffix == ".so" else "onnxruntime"
        engine = engines.load({"blob": path.name}, str(path.parent), runtime, 1)
        (have,) = engine.compute({engine.inputs[0][0]: x.numpy()}).values()
        apart[name] = float(np.abs(have - want).max() / np.abs(want).max())
        runs[name] = engine.run
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for number in range(-2, rounds):
            names = list(runs)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                once = timed(runs[name], 1)
                each = timed(runs[name], max(1, int(sample_ms / once)))
                if number >= 0:
                    times[name].append(each)
    return {
        name: {
            "median_ms": round(median(values), 4),
            "times_eager": round(median(a / b for a, b in zip(values, times[REFERENCE], strict=True)), 4),
            **({"max_abs_of_scale": apart[name]} if name in apart else {}),
        }
        for name, values in times.items()
    }


class Benchmark:
    """What is there of a result, and how the next part of it is made.

    Args:
        arguments: Of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.path = arguments, arguments.out
        self.result: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {"curve": []}

    def missing(self) -> list[str]:
        """What has not been done."""
        steps = range(len(self.result["curve"]), self.arguments.steps + 1)
        return [*(f"step {number} of {self.arguments.steps}" for number in steps), *self._second_missing()]

    def _second_missing(self) -> list[str]:
        return [] if "second" in self.result else ["the second network"]

    def run(self) -> None:
        """Do what is missing."""
        begun = {
            "measured_on": host(),
            "versions": {name: metadata.version(name) for name in ("torch", "onnxruntime", "apache-tvm")},
            "minutes": self.arguments.minutes,
        }
        self.result = {**begun, **self.result}
        with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as name:
            if len(self.result["curve"]) <= self.arguments.steps:
                self._curve(Path(name))
            if self._second_missing():
                self.result["second"] = self._second(Path(name))
                self._save()

    def _curve(self, folder: Path) -> None:
        model, x = network(FIRST)
        registry.get("onnxruntime").export(model, (x,), folder / "other.onnx")
        each_s = 60 * self.arguments.minutes / self.arguments.steps
        while (number := len(self.result["curve"])) <= self.arguments.steps:
            # The first point is what the rule makes without any trial.
            tuning = Tuning(each_s, seed=SEED + number, progress=tell) if number else None
            seconds, said = export(model, x, folder / f"step{number}.so", tuning)
            database = tuning_database.found(Tvm().target)
            self.result["curve"].append(
                {
                    "trials": 0 if database is None else len(database.records),
                    "tuning_s": round(number * each_s),
                    "compile_s": round(seconds, 1),
                    "said": said,
                    "found": self._measured(model, x, folder, f"step{number}.so"),
                }
            )
            self._save()

    def _second(self, folder: Path) -> dict[str, Any]:
        model, x = network(SECOND)
        registry.get("onnxruntime").export(model, (x,), folder / "other.onnx")
        first = self.result["curve"][-1]["trials"]
        export(model, x, folder / "before.so", None)
        before = self._measured(model, x, folder, "before.so")
        allowed = max(1, int(SHARE * first))
        seconds, said = export(model, x, folder / "second.so", Tuning(SECOND_S, allowed, seed=SEED, progress=tell))
        database = tuning_database.found(Tvm().target)
        return {
            "trials": 0 if database is None else len(database.records) - first,
            "of_first": first,
            "seconds": round(seconds, 1),
            "said": said,
            "before": before,
            "found": self._measured(model, x, folder, "second.so"),
        }

    def _measured(self, model: torch.nn.Module, x: torch.Tensor, folder: Path, engine: str) -> dict[str, Any]:
        paths = {"onnxruntime": folder / "other.onnx", "tvm": folder / engine}
        return measured(model, x, paths, self.arguments.rounds, self.arguments.sample_ms)

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.result, indent=1) + "\n")


def tell(done: int, total: int, left_s: float, message: str) -> None:
    """A line of progress."""
    print(f"{done} of {total or '?'} trials, about {left_s:.0f} s left: {message}", file=sys.stderr, flush=True)


def markdown(result: dict[str, Any]) -> str:
    """The curve, and the second network."""
    lines = [
        "| trials | tuned for, s | tvm, ms | onnxruntime, ms | torch eager, ms | tvm / eager | tvm / onnxruntime |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["curve"]:
        lines.append(f"| {row['trials']} | {row['tuning_s']} | {figures(row['found'])} |")
    if "second" in result:
        second = result["second"]
        lines += [
            "",
            f"second network: {second['trials']} trials, {second['trials'] / max(1, second['of_first']):.1%} of the first's; "
            f"{second['seconds']:.0f} s until its engine was there",
            "",
            "| | tvm, ms | onnxruntime, ms | torch eager, ms | tvm / eager | tvm / onnxruntime |",
            "|---|---|---|---|---|---|",
            f"| with what the first has left | {figures(second['before'])} |",
            f"| tuned | {figures(second['found'])} |",
        ]
    return "\n".join([f"measured on {result.get('measured_on')}", "", *lines])


def figures(found: dict[str, Any]) -> str:
    """Cells of one measurement."""
    tvm, other, eager = found["tvm"], found["onnxruntime"], found[REFERENCE]
    ratio = tvm["times_eager"] / other["times_eager"]
    times = " | ".join(f"{one['median_ms']:.3f}" for one in (tvm, other, eager))
    return f"{times} | {tvm['times_eager']:.2f} | {ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--minutes", type=float, default=20.0, help="of searching for the first network")
    parser.add_argument("--steps", type=int, default=5, help="points of the curve, beside the untuned one")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sample-ms", type=float, default=100.0)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--state", type=Path, default=STATE, help="folder of the tuning database")
    arguments = parser.parse_args()
    os.environ["EDGEPRUNE_STATE"] = str(arguments.state.resolve())
    benchmark = Benchmark(arguments)
    if not arguments.table:
        # The runner's own code loads and calls the engines, as on a board.
        sys.path.insert(0, str(Path(edgeprune.boards.onboard.__file__).parent))
        benchmark.run()
    print(markdown(benchmark.result))
    for part in benchmark.missing():
        print(f"missing: {part}")


if __name__ == "__main__":
    main()
