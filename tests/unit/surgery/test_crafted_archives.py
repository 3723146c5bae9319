"""Archives of torch that would run code when they are unpickled: nothing of ours opens them."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from edgeprune.errors import PlanError
from edgeprune.graph.tracing import trace
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import PruningPlan, uniform_plan
from edgeprune.surgery.storage import load, save

X = torch.randn(1, 3, 16, 16)


class Creates:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, Path]:
    """An exported program among whose members is one that `torch.export.load` unpickles, and the file that it would create."""
    target, harmful = tmp_path / "created", tmp_path / "harmful.pt"
    torch.save({"a": Creates(target)}, harmful)
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    original, crafted = tmp_path / "original.pt2", tmp_path / "crafted.pt2"
    torch.export.save(program, original)
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(crafted, "w") as made:
        for member in source.namelist():
            replaced = member.endswith(".pt")
            made.writestr(member, harmful.read_bytes() if replaced else source.read(member))
    return crafted, target


def test_torch_itself_would_create_the_file(archive: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    crafted, target = archive
    # torch's own warning about what it did cannot be formatted.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    torch.export.load(crafted)
    assert target.exists()


@pytest.mark.parametrize("place", ["weights.safetensors", "model.json", "plan.json"])
def test_an_archive_in_the_place_of_a_file_is_refused(
    nets: ModuleType, archive: tuple[Path, Path], tmp_path: Path, place: str
) -> None:
    crafted, target = archive
    model = nets.OptionA()
    plan = uniform_plan(trace(model, X), 0.5)
    save(apply(model, plan), tmp_path / "saved", plan)
    (tmp_path / "saved" / place).write_bytes(crafted.read_bytes())
    for original in (None, nets.OptionA()):
        with pytest.raises(PlanError):
            load(tmp_path / "saved", original)
    assert not target.exists()


def test_an_archive_is_neither_a_saved_model_nor_a_plan(archive: tuple[Path, Path], tmp_path: Path) -> None:
    crafted, target = archive
    with pytest.raises(PlanError, match=r"a saved model must have model\.json and weights\.safetensors"):
        load(crafted)
    with pytest.raises(PlanError, match="a plan must be a readable JSON file"):
        PruningPlan.load(crafted)
    assert not target.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "1"}, "must have schema 1 or older, found '1'"),
        ({"aliases": ["a"]}, "other names of tied tensors must be those of stored ones"),
        ({"aliases": {"a": "nowhere"}}, "other names of tied tensors must be those of stored ones"),
        ({"program": [1]}, "the program of a saved model must be a JSON object, found list"),
    ],
)
def test_a_damaged_description_is_refused(
    nets: ModuleType, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model = nets.VGG()
    plan = uniform_plan(trace(model, X), 0.5)
    save(apply(model, plan), tmp_path, plan)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PlanError, match=message):
        load(tmp_path)
