"""Do engines compute what the modules compute? Twenty networks cut to random widths, and trained ones, on ONNX Runtime and TVM.

Networks: four draws from each of five families, with random weights. Each is compiled, and its engine is run on the golden
inputs (32 random samples and the edge cases): on this machine, or with `--board` on that board, by deploying it. What is kept is
the largest difference as a share of the output's scale and the smallest signal-to-noise ratio; fp32 asks for 1e-4 and 80 dB.

Trained networks: top-1 of the engine and of the module on the same 1 000 test images. Nothing is timed, so neighbors do not
matter. A row that is done is not made again; remove the file to begin anew.

    python benchmarks/parity.py                                         # this machine, into benchmarks/results/parity.json
    python benchmarks/parity.py --data cifar10 --weights resnet20.safetensors ...
    python benchmarks/parity.py --board ssh://root@localhost:2222       # and there; an emulated board's rows say so
    python benchmarks/parity.py --table                                 # only print what is there

Data and weights are those of `benchmarks/damage_curves.py`. TVM's rows need the extra ``tvm``, and for a board of another
architecture its cross compiler.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from damage_curves import images, load_model
from lowering import drawn
from predictor_networks import families
from quickstart import host

import edgeprune
from edgeprune.backends import registry
from edgeprune.boards.board import Board
from edgeprune.errors import BackendUnavailableError
from edgeprune.files import write_text
from edgeprune.surgery.plan import make_plan

RESULT = Path(__file__).parent / "results" / "parity.json"
DRAWS, TEST_IMAGES = 4, 1_000


def cut_network(family: str, number: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """One of the networks; the same each time."""
    model, x = families.build(family)
    torch.manual_seed(number)
    alive(model)
    graph = edgeprune.trace(model, x)
    dice = random.Random(f"parity/{family}/{number}")
    widths = {group.name: drawn(group.size, number % 3 == 0, dice) for group in graph.groups}
    plan = make_plan(graph, {name: range(width) for name, width in widths.items()}, allow_empty=True)
    model = edgeprune.apply(model, plan)
    # Norms as training would leave them: else what a deep network computes is its last bias.
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        model.train()(torch.randn(8, *x.shape[1:]))
    return model.eval(), x


def alive(model: torch.nn.Module) -> None:
    """Weights that keep numbers of one size from layer to layer (He et al. 2015)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                torch.nn.init.normal_(module.bias, std=0.1)


def figures(parity: Any) -> dict[str, Any]:
    """What a parity check found."""
    names = ("passed", "cases", "relative", "snr_db", "top1_agreement")
    return {name: parity[name] if isinstance(parity, dict) else getattr(parity, name) for name in names}


def row(model: torch.nn.Module, x: torch.Tensor, backend: str, board: str | None, **options: Any) -> dict[str, Any]:
    """One network with one backend, here or on a board."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder:
        if board is None:
            made = edgeprune.compile(model, x, Path(folder) / "artifact", backend=backend, **options)
            return {"where": "this machine", **figures({"passed": True, **made.manifest.host_parity})}
        with Board.open(board) as opened:
            found = opened.probe()
            made = edgeprune.compile(
                model, x, Path(folder) / "artifact", backend=backend, fingerprint=found, board=opened, **options
            )
            parity = edgeprune.deploy(made, opened).parity
        emulated = " (emulated)" if found.facts.get("emulated") else ""
        return {"where": f"{found.architecture}{emulated}", **figures(parity)}


def table(rows: dict[str, dict[str, Any]]) -> None:
    """Print what is there: one line per backend and place, of the cut networks and of the trained ones."""
    print(
        "| networks | backend | where | how many | largest difference, of the scale | smallest SNR, dB | equal top-1 |"
    )
    print("|---|---|---|---|---|---|---|")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, found in rows.items():
        groups.setdefault((key.split("/")[0], found["backend"], found["where"]), []).append(found)
    for (kind, backend, where), found in sorted(groups.items()):
        ratios = [one["snr_db"] for one in found if one["snr_db"] is not None]
        agreements = [one["top1_agreement"] for one in found if one["top1_agreement"] is not None]
        print(
            f"| {kind} | {backend} | {where} | {sum(one['passed'] for one in found)} of {len(found)} pass "
            f"| {max(one['relative'] for one in found):.1e} | {min(ratios):.0f} "
            f"| {f'{min(agreements):.2%}' if agreements else '-'} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="*", default=["onnxruntime", "tvm"], help="of which backends")
    parser.add_argument("--board", help="a board to deploy to, instead of this machine")
    parser.add_argument("--data", type=Path, help="folder with the test images")
    parser.add_argument("--weights", type=Path, nargs="*", default=[], help="checkpoints of trained networks")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"host": host(), "rows": {}}
    rows = found["rows"]

    def note(key: str, model: torch.nn.Module, x: torch.Tensor, backend: str, **options: Any) -> None:
        rows[key] = {"backend": backend, **row(model, x, backend, arguments.board, **options)}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        write_text(RESULT, json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(f"{key}: {rows[key]['relative']:.1e}", flush=True)

    for backend in [] if arguments.table else arguments.backends:
        try:
            registry.get(backend)
        except BackendUnavailableError as error:
            print(error)
            continue
        place = "here" if arguments.board is None else arguments.board
        for family in families.FAMILIES:
            for number in range(DRAWS):
                key = f"cut/{family}-{number}/{backend}/{place}"
                if key not in rows:
                    note(key, *cut_network(family, number), backend)
        for weights in arguments.weights:
            key = f"trained/{weights.stem}/{backend}/{place}"
            if key not in rows and arguments.data is not None:
                samples, _ = images(arguments.data / "test.parquet", TEST_IMAGES)
                note(key, load_model(weights), torch.zeros(1, 3, 32, 32), backend, golden_inputs=samples)
    table(rows)


if __name__ == "__main__":
    main()
