"""Outputs that are classes with named fields: the class where it is known, a mapping with the same fields elsewhere."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import edgeprune
from edgeprune.errors import PlanError
from edgeprune.nesting import NamedOutput, read_nesting

# The square root makes `apply` return the cut program.
MODEL_FILE = """
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass
class Detection:
    boxes: Tensor
    scores: Tensor | None = None
    classes: Tensor | None = None


torch.export.register_dataclass(Detection, serialized_type_name="net.Detection")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.boxes, self.classes = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Detection:
        y = torch.relu(self.body(x)) / math.sqrt(self.body.weight.shape[0])
        return Detection(self.boxes(y), classes=self.classes(y))
"""

ELSEWHERE = """
import sys
import torch, edgeprune
torch.manual_seed(0)
pruned = edgeprune.load(sys.argv[1])
out = pruned(torch.ones(2, 6))
assert "net" not in sys.modules
print(type(out).__name__, list(out), tuple(out.boxes.shape), torch.equal(out["classes"], out[1]))
torch.save([out.boxes, out.classes], sys.argv[2])
"""


def test_a_class_of_named_fields_comes_back_where_it_is_known_and_as_a_mapping_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.py").write_text(MODEL_FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import net  # type: ignore[import-not-found]

    model = net.Net().eval()
    x = torch.ones(2, 6)
    graph = edgeprune.trace(model, x)
    assert [group.size for group in graph.groups] == [8]
    plan = edgeprune.uniform_plan(graph, 0.5)
    assert edgeprune.check(model, plan, x) < 1e-5
    pruned = edgeprune.apply(model, plan)
    here = pruned(x)
    assert isinstance(here, net.Detection)
    assert here.scores is None

    folder = tmp_path / "saved"
    edgeprune.save(pruned, folder)
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(tmp_path / "outputs.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "NamedOutput ['boxes', 'classes'] (2, 4) True"
    boxes, classes = torch.load(tmp_path / "outputs.pt")
    torch.testing.assert_close(boxes, here.boxes)
    torch.testing.assert_close(classes, here.classes)


def test_a_named_output_is_read_by_name_and_by_position() -> None:
    output = NamedOutput(logits=1, hidden=2)
    assert (output.logits, output["hidden"], output[0], output[1:]) == (1, 2, 1, (2,))
    with pytest.raises(AttributeError, match="outputs are logits, hidden, found no 'loss'"):
        output.loss  # noqa: B018


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '[1, {"type": "os.system", "context": "ls", "children_spec": []}]',
        '[1, {"type": "builtins.dict", "context": "[\\"a\\"]", "children_spec": []}]',
    ],
)
def test_a_nesting_that_cannot_be_read_is_a_plan_error(text: str) -> None:
    with pytest.raises(PlanError):
        read_nesting(text)


class Pair(NamedTuple):
    boxes: torch.Tensor
    scores: torch.Tensor


@dataclass
class Found:
    pair: Pair
    note: torch.Tensor | None = None


class NamingOutputs(torch.nn.Module):
    """Classes that nobody has told torch of; the scale makes `apply` return the cut program."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.boxes, self.scores = (torch.nn.Linear(*sizes) for sizes in ((6, 8), (8, 4), (8, 3)))

    def forward(self, x: torch.Tensor) -> dict[str, Found]:
        y = torch.relu(self.body(x)) / math.sqrt(self.body.weight.shape[0])
        return {"found": Found(Pair(self.boxes(y), self.scores(y)))}


def test_dataclasses_and_named_tuples_of_the_user_need_no_registration(tmp_path: Path) -> None:
    model, x = NamingOutputs().eval(), torch.ones(2, 6)
    graph = edgeprune.trace(model, x)
    assert graph.widths() == {"body": 8}
    plan = edgeprune.uniform_plan(graph, 0.5)
    assert edgeprune.check(model, plan, x) < 1e-9
    pruned = edgeprune.apply(model, plan)
    edgeprune.save(pruned, tmp_path)
    for program in (pruned, edgeprune.load(tmp_path)):
        assert type(program).__name__ == "ProgramModule"
        out = program(x)["found"]
        assert isinstance(out, Found)
        assert isinstance(out.pair, Pair)
        assert (out.pair.boxes.shape, out.note) == ((2, 4), None)


def test_a_named_tuple_that_this_process_does_not_know_is_a_tuple() -> None:
    leaf = {"type": None, "context": None, "children_spec": []}
    written = {"type": "collections.namedtuple", "context": "elsewhere.Pair", "children_spec": [leaf, leaf]}
    nesting = read_nesting(json.dumps([1, written]))
    assert torch.utils._pytree.tree_unflatten([1, 2], nesting) == (1, 2)
