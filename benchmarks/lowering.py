"""Are the kernels of a candidate those that ONNX Runtime runs for the cut model? Random widths, five families of networks, and
three that cut channels up (`chunk`, `split`), whose parts are pruned apart.

Per family 50 width vectors are drawn (a third without multiples of 4). The model is cut to each, exported and optimized by the
real ONNX Runtime, and the kernels of that graph are compared with `edgeprune.lower(graph).at(widths)`, which compiles nothing.
Nothing is timed, so neighbors do not matter. A network that is done is not run again; remove a family's file to begin anew.

    PYTHONPATH=. python benchmarks/lowering.py                   # everything, into benchmarks/results/lowering/
    PYTHONPATH=. python benchmarks/lowering.py --only densenet   # one family
    PYTHONPATH=. python benchmarks/lowering.py --table           # only print what is there
    PYTHONPATH=. python benchmarks/lowering.py --precision int8  # of quantized models, into results/lowering-int8/
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import lowering_networks
import onnxruntime
from predictor_networks import families

import edgeprune
from edgeprune.files import write_text
from edgeprune.lowering.trained_form import in_trained_form
from edgeprune.spec import Kernel, Precision
from edgeprune.surgery.plan import make_plan

RESULTS = Path(__file__).parent / "results"


def results(precision: Precision) -> Path:
    return RESULTS / ("lowering" if precision == "fp32" else f"lowering-{precision}")


def run(family: str, count: int, precision: Precision) -> None:
    """Agreement of one family, written after every network; goes on from what is there."""
    path = results(precision) / f"{family}.json"
    row: dict[str, Any] = {"family": family, "runtime": onnxruntime.__version__, "networks": 0, "differences": {}}
    row |= dict.fromkeys(("without_a_difference", "kernels_told", "kernels_run", "kernels_agreed"), 0)
    if path.exists():
        row = json.loads(path.read_text())
    if row["networks"] >= count:
        return
    model, x = lowering_networks.build(family) if family in lowering_networks.CUT_UP else families.build(family)
    graph = edgeprune.trace(model, x)
    dice = random.Random(f"lowering/{family}")
    wrong = Counter(row["differences"])
    with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder:
        lowered = edgeprune.lower(graph, model=model, precision=precision, workdir=Path(folder))
        for number in range(count):
            widths = {group.name: drawn(group.size, number % 3 == 0, dice) for group in graph.groups}
            if number < row["networks"]:
                continue
            plan = make_plan(graph, {name: range(width) for name, width in widths.items()}, allow_empty=True)
            engine = Path(folder) / "cut.onnx"
            lowered.backend.export(in_trained_form(edgeprune.apply(model, plan)), graph.example_inputs, engine)
            real = Counter(kernel.key for kernel in lowered.backend.parse_engine(engine))
            ours = Counter(kernel.key for kernel in lowered.at(widths))
            for name, more in (
                ("networks", 1),
                ("without_a_difference", int(real == ours)),
                ("kernels_told", ours.total()),
                ("kernels_run", real.total()),
                ("kernels_agreed", (real & ours).total()),
            ):
                row[name] += more
            for side, left in (("ours", ours - real), ("theirs", real - ours)):
                for key, times in left.items():
                    wrong[f"{side}: {Kernel.from_key(key).op}"] += times
            row["differences"] = dict(wrong.most_common())
            write_text(path, json.dumps(row, indent=1) + "\n")
            print(f"{family}: {number + 1} of {count}", flush=True)


def drawn(size: int, odd: bool, dice: random.Random) -> int:
    """A width between an eighth and all of a group; no multiple of 4 where `odd` says so and the group is large enough."""
    width = dice.randint(max(1, size // 8), size)
    if odd and size >= 8 and width % 4 == 0:
        return width - 1
    return width if odd or size < 8 else max(4, width - width % 4)


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line per family; agreement counts kernels that only one side has against the larger of both."""
    lines = [
        "| family | cut networks | without a difference | kernels run | agreement | what differs |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        most = max(row["kernels_run"], row["kernels_told"])
        what = ", ".join(f"{name} {times}" for name, times in list(row["differences"].items())[:4]) or "nothing"
        lines.append(
            f"| {row['family']} | {row['networks']} | {row['without_a_difference']} | {row['kernels_run']} "
            f"| {row['kernels_agreed'] / most:.2%} | {what} |"
        )
    return "\n".join(lines)


def main() -> None:
    every = [*families.FAMILIES, *lowering_networks.CUT_UP]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=every, help="one family instead of all")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--networks", type=int, default=50, help="per family")
    parser.add_argument("--precision", choices=("fp32", "int8"), default="fp32", help="of the engines")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else every
    folder = results(arguments.precision)
    folder.mkdir(parents=True, exist_ok=True)
    for name in [] if arguments.table else names:
        run(name, arguments.networks, arguments.precision)
    there = [name for name in names if (folder / f"{name}.json").exists()]
    print(markdown([json.loads((folder / f"{name}.json").read_text()) for name in there]))
    done = {
        name: json.loads((folder / f"{name}.json").read_text())["networks"] if name in there else 0 for name in names
    }
    if missing := [f"{arguments.networks - done[name]} of {name}" for name in names if done[name] < arguments.networks]:
        print(f"missing: {', '.join(missing)}")


if __name__ == "__main__":
    main()
