"""Does the quickstart keep its promises? Twelve runs from nothing: three budgets, seeds 0-2 locally, seed 0 over SSH.

Every run is a fresh `edgeprune quickstart` in a fresh folder: it trains, profiles, prunes, compiles and deploys. A cell that
is done is not run again, so the script can be stopped at any time; what is missing is printed. edgeprune must be installed.

    python benchmarks/quickstart.py                  # all twelve, into benchmarks/results/quickstart/
    python benchmarks/quickstart.py --only 50%       # one budget
    python benchmarks/quickstart.py --table          # only print what is there

Use a machine that does nothing else meanwhile. The latency in the table is the interleaved ratio to the dense engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quickstart"
BUDGETS = ("70%", "50%", "35%")
PATHS = {"table", "plan", "artifact", "report", "files", "next"}
"""Answers that name files of a folder that is gone by then."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    budget: str
    board: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.board}-{self.budget.rstrip('%')}-seed{self.seed}"

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.name}.json"


CELLS = [Cell(budget, "local", seed) for seed in range(3) for budget in BUDGETS]
CELLS += [Cell(budget, "ssh", 0) for budget in BUDGETS]


@contextlib.contextmanager
def ssh_board(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """This machine over a real OpenSSH server on loopback: name of the board and environment that knows it."""
    from edgeprune.testing.sshd import OpenSshServer

    with OpenSshServer(folder) as server:
        environment = {**os.environ, "EDGEPRUNE_CONFIG": str(folder / "boards.toml")}
        key = subprocess.run(
            ["ssh-keygen", "-lf", str(server.known_hosts)], capture_output=True, text=True, check=True
        ).stdout.split()[1]
        command = ["device", "add", "loopback", "--ssh", f"{server.user}@{server.host}:{server.port}"]
        options = ["--identity", str(server.identity), "--host-key", key, "--python", sys.executable]
        edgeprune([*command, *options, "--root", str(folder / "root")], environment)
        yield "loopback", environment


def edgeprune(arguments: list[str], environment: dict[str, str]) -> str:
    """Run the command line; its own words on failure."""
    call = "import sys; from edgeprune.cli.main import run; sys.argv[0] = 'edgeprune'; sys.exit(run())"
    done = subprocess.run(
        [sys.executable, "-c", call, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"edgeprune {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def run(cell: Cell) -> dict[str, Any]:
    """One cell from nothing."""
    folder = Path(tempfile.mkdtemp(prefix="edgeprune-benchmark-"))
    try:
        arguments = [
            "quickstart",
            "--latency",
            cell.budget,
            "--seed",
            str(cell.seed),
            "--out",
            str(folder / "out"),
            "--json",
        ]
        if cell.board == "ssh":
            with ssh_board(folder) as (board, environment):
                text = edgeprune([*arguments, "--board", board], environment)
        else:
            text = edgeprune(arguments, {**os.environ, "EDGEPRUNE_ROOT": str(folder / "root")})
        found = json.loads(text)
        figures = {name: value for name, value in found.items() if name not in PATHS}
        return {"cell": cell.name, "host": host(), **figures}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def host() -> dict[str, Any]:
    """What it ran on."""
    import onnxruntime
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def judge(cell: Cell, found: dict[str, Any]) -> dict[str, Any]:
    """The row of one cell."""
    wanted = float(cell.budget.rstrip("%")) / 100
    share = found["pruned_ratio"] / wanted
    error = found["pruned_predicted_ms"] / found["pruned_measured_ms"] - 1
    drop = 100 * (found["dense_accuracy"] - found["pruned_accuracy"])
    return {
        "cell": cell.name,
        "dense ms": f"{found['dense_ms']:.3f}",
        "of budget": f"{share:.1%}",
        "in 80-105 %": "yes" if 0.8 <= share <= 1.05 else "NO",
        "predicted": f"{error:+.1%}",
        "within 15 %": "yes" if abs(error) <= 0.15 else "NO",
        "accuracy dense/uniform/pruned": " ".join(
            f"{100 * found[f'{name}_accuracy']:.2f}" for name in ("dense", "uniform", "pruned")
        ),
        "uniform ratio": f"{found['uniform_ratio']:.3f}",
        "right: only ours, only uniform": f"{found['only_pruned_right']}, {found['only_uniform_right']}",
        "within 3 points of dense": "yes" if drop <= 3 else "NO",
        "seconds": f"{found['seconds']:.0f}",
    }


def against_uniform(runs: list[dict[str, Any]]) -> str:
    """Whether ours is below uniform on the test images, by the exact sign test on those that only one of the two gets right.

    A single image of the 360 is 0.28 points, so which of the two is ahead in one run says nothing. Source: McNemar, 1947, in
    its exact binomial form.
    """
    ours = sum(found["only_pruned_right"] for found in runs)
    uniform = sum(found["only_uniform_right"] for found in runs)
    below = sum(math.comb(ours + uniform, count) for count in range(ours + 1)) / 2 ** (ours + uniform)
    verdict = "NO: below uniform" if below < 0.05 else "not below uniform"
    return (
        f"{len(runs)} runs, {ours} test images that only ours gets right, {uniform} that only uniform does: {verdict} "
        f"(p = {below:.2f})"
    )


def table(cells: list[Cell]) -> None:
    """Print what is there, and what is missing."""
    found = {cell: json.loads(cell.path.read_text()) for cell in cells if cell.path.exists()}
    rows = [judge(cell, figures) for cell, figures in found.items()]
    missing = [cell.name for cell in cells if not cell.path.exists()]
    if rows:
        print("| " + " | ".join(rows[0]) + " |")
        print("|" + "---|" * len(rows[0]))
        for row in rows:
            print("| " + " | ".join(row.values()) + " |")
        inside = sum(row["in 80-105 %"] == "yes" for row in rows)
        predicted = sum(row["within 15 %"] == "yes" for row in rows)
        for budget in BUDGETS:
            print(f"at {budget}: {against_uniform([found[cell] for cell in found if cell.budget == budget])}")
        print(f"\n{inside} of {len(rows)} in 80-105 % of the budget; {predicted} of {len(rows)} predicted within 15 %")
    print(f"missing: {', '.join(missing) or 'nothing'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="run cells whose name or budget contains this")
    parser.add_argument("--table", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    cells = [cell for cell in CELLS if not arguments.only or arguments.only in f"{cell.name} {cell.budget}"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    for cell in cells if not arguments.table else []:
        if cell.path.exists():
            continue
        print(f"running {cell.name}", flush=True)
        try:
            found = run(cell)
        except RuntimeError as error:
            print(error, flush=True)
            continue
        partial = cell.path.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(cell.path)
    table(cells)


if __name__ == "__main__":
    main()
