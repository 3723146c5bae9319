"""`edgeprune prune --tiles`: from a trained transformer to a compiled artifact, and what it says to bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from edgeprune.cli.commands import root
from edgeprune.cli.loading import load_model, load_task
from edgeprune.cli.record import PruningRecord
from edgeprune.errors import EdgepruneError
from edgeprune.loop import tile_stages
from edgeprune.recovery.evaluation import evaluate
from edgeprune.recovery.fine_tuning import fine_tune
from edgeprune.surgery.block_sparse import BlockSparseLinear
from edgeprune.surgery.plan import PruningPlan
from edgeprune.surgery.storage import load

NET = """
import torch
from torch import nn
from torch.nn import functional as F

class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(8, 32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.fc1, self.fc2, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.fc2(F.gelu(self.fc1(self.norm2(x))))).mean(1))

def convolutions():
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""
TASK = """
import edgeprune, torch

def batches(count, seed, shape, place):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        targets, tokens = torch.randint(0, 4, (32,), generator=draw), torch.randn(32, *shape, generator=draw) * 0.5
        place(tokens, targets, draw)
        yield tokens, targets

def one_token(tokens, targets, draw):
    tokens[torch.arange(32), torch.randint(0, 16, (32,), generator=draw), targets] += 4

def task(shape=(16, 8), place=one_token):
    return edgeprune.Task.single(train=list(batches(16, 0, shape, place)), validation=list(batches(8, 1, shape, place)),
        loss=torch.nn.functional.cross_entropy, name="accuracy",
        metric=lambda outputs, targets: (outputs.argmax(1) == targets).float().mean().item())

def images():
    return task((8, 6, 6), lambda tokens, targets, draw: None)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a transformer that was trained briefly."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("tiles")
    (path / "net.py").write_text(NET)
    (path / "task.py").write_text(TASK)
    model, task = load_model(f"{path}/net.py:Transformer", None), load_task(f"{path}/task.py:task")
    fine_tune(model, task, epochs=6, lr=3e-3)
    save_file(model.state_dict(), path / "weights.safetensors")
    return path


def prune(folder: Path, *options: str, model: str = "Transformer", task: str | None = "task") -> list[str]:
    shape = "1x16x8" if model == "Transformer" else "1x8x6x6"
    name = "x" if model == "Transformer" else "input"
    given = ["prune", f"{folder}/net.py:{model}", "--input", f"{name}={shape}:float32", *options]
    return given if task is None else [*given, "--task", f"{folder}/task.py:{task}"]


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command line in this process, and reads its answer."""

    def runs(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        root().main([*arguments, "--json"], standalone_mode=False)
        answer: dict[str, Any] = json.loads(capsys.readouterr().out)
        return answer

    return runs


def refused(*arguments: str) -> str:
    with pytest.raises(EdgepruneError) as found:
        root().main(list(arguments), standalone_mode=False)
    return str(found.value)


def test_from_a_trained_transformer_to_an_artifact_that_computes_the_same(folder: Path, run: Run) -> None:
    out = folder / "pruned"
    weights = ("--weights", str(folder / "weights.safetensors"))
    answer = run(*prune(folder, *weights, "--tiles", "8x16", "--macs", "60%", "--epochs", "1", "--out", str(out)))
    assert answer["share"] <= 0.6
    assert answer["metrics_before"]["accuracy"] > 0.9
    assert answer["metrics_after"]["accuracy"] > 0.8
    assert answer["parameters_after"] < answer["parameters_before"]
    assert answer["dense"]["head.weight"] == "its output is an output of the model"
    assert answer["notes"][-1] == "The latency is unverified: it is not known, no board was given to measure it on."
    assert {Path(file["path"]).name for file in answer["files"]} == {path.name for path in out.iterdir()}

    record = PruningRecord.load(out)
    assert record.options.tiles == (8, 16)
    assert record.tiles["fc1.weight"][1] == 16
    module = load(out / "model", load_model(f"{folder}/net.py:Transformer", None))
    assert any(isinstance(layer, BlockSparseLinear) for layer in module.modules())
    assert evaluate(module, load_task(f"{folder}/task.py:task")) == answer["metrics_after"]

    compiled = run("compile", str(out), "--out", str(out / "artifact"), "--dense", str(out / "dense"))
    assert compiled["host_parity"]["max_abs"] < 1e-4
    manifest = json.loads((out / "artifact" / "manifest.json").read_text())
    assert manifest["plan_hash"] == answer["plan_hash"]
    assert compiled["next"].split()[1] == "deploy"

    run("report", str(out))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "qkv.weight (tiles)" in page
    assert "its output is an output of the model" in page
    assert "latency unverified" in page

    assert "a run that removed tiles is measured by compiling and deploying it" in refused(
        "prune", "--resume", "--out", str(out), "--board", "local"
    )


def test_an_interrupted_tuning_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "interrupted"
    given = ("--weights", str(folder / "weights.safetensors"), "--tiles", "8x16", "--macs", "60%", "--epochs", "1")
    with monkeypatch.context() as patch:

        def stopped(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(tile_stages, "fine_tune", stopped)
        assert root().main(prune(folder, *given, "--out", str(out)), standalone_mode=False) == 130
    assert [path.name for path in out.iterdir()] == ["tuning"]
    plan = PruningPlan.load(out / "tuning" / "model" / "plan.json")
    capsys.readouterr()
    root().main(["prune", "--resume", "--out", str(out)], standalone_mode=False)
    assert f"going on with the interrupted run in {out}" in capsys.readouterr().out
    found = json.loads((out / "prune.json").read_text())
    assert found["plan_hash"] == plan.hash == PruningPlan.load(out / "plan.json").hash
    assert [step["step"] for step in found["recovery"]] == ["cut", "tile_reconstruction", "fine_tuning"]
    assert found["tiles"]["fc1.weight"][1] == 16
    assert not (out / "tuning").exists()


def test_tiles_and_channels_in_one_run(folder: Path, run: Run) -> None:
    out = folder / "both"
    given = ("--weights", str(folder / "weights.safetensors"), "--tiles", "8x16", "--channels", "--keep", "fc1")
    answer = run(*prune(folder, *given, "--macs", "60%", "--epochs", "0", "--out", str(out)))
    assert answer["share"] <= 0.6
    record = PruningRecord.load(out)
    assert record.options.channels
    assert record.widths["fc1"] == (64, 64)
    assert any(kept < size for kept, size in record.widths.values())
    compiled = run("compile", str(out), "--out", str(out / "artifact"), "--dense", str(out / "dense"))
    assert compiled["host_parity"]["max_abs"] < 1e-4
    run("report", str(out))
    assert "qkv head" in (out / "report.html").read_text(encoding="utf-8")
    assert "which has no use for --soft-masking" in refused(
        *prune(folder, *given, "--macs", "60%", "--out", str(folder / "never"), "--soft-masking", "1")
    )
    assert "--channels needs --tiles" in refused(*prune(folder, "--channels", "--macs", "60%", "--table", "none"))


def test_options_that_do_not_go_together_are_refused(folder: Path) -> None:
    tiles = ("--tiles", "8x16", "--macs", "50%", "--out", str(folder / "never"))
    assert "leaves channels as they are, found --keep, --soft-masking too" in refused(
        *prune(folder, *tiles, "--keep", "fc1", "--soft-masking", "1")
    )
    assert "found --params too" in refused(*prune(folder, *tiles, "--params", "50%"))
    assert "--tiles needs a task" in refused(*prune(folder, *tiles, task=None))
    assert "one of --macs, --latency, --energy, found --macs and --latency" in refused(
        *prune(folder, *tiles, "--latency", "50%")
    )
    assert "--energy needs --table" in refused(*prune(folder, "--tiles", "8x16", "--energy", "50%"))
    assert "share a budget of --macs or --latency, found --energy" in refused(
        *prune(folder, "--tiles", "8x16", "--channels", "--energy", "50%")
    )
    assert "--tiles auto chooses sizes by predicted latency, which the budget must bound" in refused(
        *prune(folder, "--tiles", "auto", "--macs", "50%")
    )
    assert "--power-weight weighs power where tiles alone are chosen" in refused(
        *prune(folder, *tiles, "--channels", "--power-weight", "1")
    )
    assert "--latency needs --table" in refused(*prune(folder, "--tiles", "8x16", "--latency", "50%"))
    assert "goes with --distill logits alone, found features" in refused(
        *prune(folder, *tiles, "--distill", "features")
    )
    for text in ("8", "0x8", "8x-1"):
        assert "--tiles must be ROWSxCOLUMNS" in refused(*prune(folder, "--tiles", text, "--macs", "50%"))
    assert "--tiles must be ROWSxCOLUMNS" in refused("profile", f"{folder}/net.py:Transformer", "--tiles", "auto")
    assert "found no --table" in refused(*prune(folder, "--macs", "50%")), "channels still need a table"


def test_what_tiles_cannot_do_is_said_and_leaves_nothing(folder: Path) -> None:
    out = folder / "never"
    convolutions = prune(
        folder, "--tiles", "8x16", "--macs", "50%", "--out", str(out), model="convolutions", task="images"
    )
    assert "must have a linear layer besides its classifier to be cut into tiles" in refused(*convolutions)
    little = prune(folder, "--tiles", "8x16", "--macs", "1%", "--out", str(out))
    assert "the smallest plan reaches" in refused(*little)
    assert not out.exists()
    assert not list(folder.glob(".never*"))
