"""Cut models: what they are, that they train, and that they can be saved and loaded."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

from edgeprune.errors import PlanError, SurgeryError, TraceError
from edgeprune.graph.rules.table import FAMILIES
from edgeprune.graph.tracing import trace
from edgeprune.surgery.checking import check
from edgeprune.surgery.cutting import apply, described
from edgeprune.surgery.operations import operation
from edgeprune.surgery.plan import PruningPlan, make_plan, uniform_plan
from edgeprune.surgery.plan_format import content_sha256
from edgeprune.surgery.program_module import ProgramModule
from edgeprune.surgery.storage import load, save

X = torch.randn(1, 3, 16, 16)
NAMES = ["ResNet", "OptionA", "VGG", "DenseNet", "Inverted", "Shuffle", "Grouped", "UNet", "Gated", "Attended", "Tied"]


@pytest.mark.parametrize("name", NAMES)
def test_the_cut_model_equals_the_masked_one_and_its_predicted_shapes(nets: ModuleType, name: str) -> None:
    model = getattr(nets, name)()
    before = copy.deepcopy(model.state_dict())
    graph = trace(model, X)
    plan = uniform_plan(graph, 0.4)
    pruned = apply(model, plan)
    assert pruned.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert isinstance(pruned, ProgramModule) == (name == "OptionA")
    assert check(model, plan, X, tolerance=1e-9) < 1e-9
    shapes = graph.shapes(plan.widths())
    for key, tensor in [*pruned.named_parameters(), *pruned.named_buffers()]:
        assert shapes[key] == tuple(tensor.shape)
    removed = 1 - sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters())
    assert removed > 0.2


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_model_copies_reloads_and_trains(nets: ModuleType, name: str) -> None:
    model = getattr(nets, name)()
    pruned = apply(model, uniform_plan(trace(model, X), 0.5))
    twin = copy.deepcopy(pruned)
    twin.load_state_dict(pruned.state_dict())
    pruned.eval()
    twin.eval()
    for batch in (1, 3, 8):
        x = torch.randn(batch, 3, 16, 16)
        assert torch.equal(pruned(x), twin(x))
    pruned.train()
    if name == "VGG":
        assert not torch.equal(pruned(x), pruned(x)), "dropout must be on in train form"
    images, losses = torch.randn(8, 3, 16, 16), []
    target = torch.randn_like(pruned(images)).detach()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.05)
    for _ in range(20):
        loss = (pruned(images) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), twin.eval().parameters(), strict=True))


def test_the_program_module_keeps_batch_norm_like_the_original(nets: ModuleType) -> None:
    model = nets.Inverted()
    model.stem[1].momentum = None
    plan = uniform_plan(trace(model, X), 0.5)
    reference = apply(model, plan).train()
    program = ProgramModule.of(copy.deepcopy(reference), plan.program).train()
    for _ in range(3):
        x = torch.randn(4, 3, 16, 16) + 1
        program(x)
        reference(x)
    buffers = dict(program.named_buffers())
    assert buffers["stem.1.num_batches_tracked"] == 3
    for name, expected in reference.named_buffers():
        assert torch.allclose(buffers[name], expected, atol=1e-6), name
    assert torch.allclose(program.eval()(x), reference.eval()(x), atol=1e-6)


def test_widths_of_one_are_not_squeezed_away(nets: ModuleType) -> None:
    for name in ("Grouped", "OptionA", "Shuffle"):
        model = getattr(nets, name)()
        graph = trace(model, X)
        plan = make_plan(graph, {group.name: [group.size - 1] for group in graph.groups})
        assert set(plan.widths().values()) == {1}
        assert check(model, plan, X) < 1e-9


class Reshaping(nn.Module):
    """forward spells out the channels, and a constant that is too large to be written down."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8 * 256, 2)
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x) * torch.tensor([0.5] * 16).repeat(self.size)[:16]
        x = x + torch.tensor([[0.1] * 16] * self.size).mean()
        return self.b(x.reshape(-1, 8 * 256))


def test_spelled_out_sizes_become_a_program(nets: ModuleType) -> None:
    model = Reshaping(2)
    plan = uniform_plan(trace(model, X), 0.5)
    assert [item["from"] for item in plan.rewrites] == [{"shape": [-1, 2048]}]
    assert plan.rewrites[0]["to"] == {"op": "aten.reshape.default", "shape": [-1, 1024]}
    assert plan.rewrites[0]["source"].startswith(__file__)
    pruned = apply(model, plan)
    assert isinstance(pruned, ProgramModule)
    words = r"the cut program around your weights \(ProgramModule\): .* works with .*aten\.reshape\.default at .*test_cutting"
    assert re.match(words, described(pruned, plan))
    assert check(model, plan, X) < 1e-9


def test_what_can_neither_run_nor_be_written_down_names_the_line(nets: ModuleType) -> None:
    model = Reshaping(400)
    plan = uniform_plan(trace(model, X), 0.5)
    assert plan.program is None
    with pytest.raises(SurgeryError, match=r"found aten\.reshape\.default at .*test_cutting\.py:\d+; constant .* text"):
        apply(model, plan)


def test_a_program_module_exports(nets: ModuleType) -> None:
    model = nets.OptionA()
    pruned = apply(model, uniform_plan(trace(model, X), 0.5)).eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        pruned, (torch.randn(2, 3, 16, 16),), dynamic_shapes=((({0: batch},)),), strict=False
    )
    x = torch.randn(5, 3, 16, 16)
    assert torch.allclose(exported.module()(x), pruned(x), atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "x", "attribute", "left"),
    [
        ([nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 4, 1)], X, "num_groups", 2),
        ([nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)], torch.randn(2, 5, 6), "normalized_shape", (8,)),
        ([nn.Linear(6, 16), nn.RMSNorm(16), nn.Linear(16, 4)], torch.randn(2, 5, 6), "normalized_shape", (8,)),
    ],
    ids=["group", "layer", "rms"],
)  # fmt: skip
def test_norms_follow_their_channels_in_the_users_own_class(
    layers: list[nn.Module], x: torch.Tensor, attribute: str, left: Any
) -> None:
    model = nn.Sequential(*layers).eval()
    plan = uniform_plan(trace(model, x), 0.5)
    pruned = apply(model, plan)
    assert type(pruned) is nn.Sequential
    assert getattr(pruned[1], attribute) == left
    assert check(model, plan, x) < 1e-9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("computed", ["weight_norm", "spectral_norm", "old weight_norm", "masked"])
def test_layers_whose_weight_is_computed_follow(computed: str) -> None:
    def made(layer: nn.Module) -> nn.Module:
        if computed == "masked":
            return l1_unstructured(layer, "weight", 0.3)
        old = computed.startswith("old")
        return getattr(nn.utils if old else nn.utils.parametrizations, computed.removeprefix("old "))(layer)

    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1)]
    model = nn.Sequential(
        made(layers[0]), nn.ReLU(), made(layers[1]), nn.ReLU(), made(layers[2]), nn.Flatten(), nn.Linear(6 * 144, 2)
    )
    if computed in ("old weight_norm", "masked"):
        with pytest.raises(TraceError, match=r"copyable with copy\.deepcopy, found: .* Try: run the model once under"):
            trace(model, X)
    with torch.no_grad():
        model.eval()(X)
    plan = uniform_plan(trace(model, X), 0.5)
    pruned = apply(model, plan)
    assert type(pruned) is nn.Sequential
    sizes = [(pruned[at].in_channels, pruned[at].out_channels, pruned[at].groups) for at in (0, 2, 4)]
    assert sizes == [(3, 4, 1), (4, 4, 4), (4, 3, 1)]
    assert check(model, plan, X) < 1e-9


def test_tied_parameters_stay_tied(nets: ModuleType) -> None:
    model = nets.Tied()
    pruned = apply(model, uniform_plan(trace(model, X), 0.5))
    assert pruned.first.weight is pruned.second.weight
    assert pruned.shared.weight.shape == (4, 4, 3, 3)
    model.first.weight.requires_grad_(False)
    assert not apply(model, uniform_plan(trace(model, X), 0.5)).second.weight.requires_grad


@pytest.mark.parametrize("name", ["ResNet", "OptionA", "Tied", "Inverted"])
def test_saved_models_reload_with_and_without_their_class(nets: ModuleType, name: str, tmp_path: Path) -> None:
    model = getattr(nets, name)()
    plan = uniform_plan(trace(model, X), 0.5)
    pruned = apply(model, plan)
    pruned(torch.randn(4, 3, 16, 16))
    pruned.eval()
    save(pruned, tmp_path, plan)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "plan.json", "weights.safetensors"]
    alone, again = load(tmp_path), load(tmp_path, getattr(nets, name)()).eval()
    assert isinstance(alone, ProgramModule)
    assert type(again) is type(pruned)
    x = torch.randn(3, 3, 16, 16)
    assert torch.equal(again(x), pruned(x))
    assert torch.allclose(alone(x), pruned(x), atol=1e-6)
    save(alone, tmp_path / "program")
    assert torch.equal(load(tmp_path / "program")(x), alone(x))
    if name == "Tied":
        assert alone.first.weight is alone.second.weight


def test_saved_models_that_do_not_fit(nets: ModuleType, tmp_path: Path) -> None:
    model = nets.VGG()
    plan = uniform_plan(trace(model, X), 0.5)
    with pytest.raises(PlanError, match="a model must be saved with the plan that cut it"):
        save(model, tmp_path / "a", plan)
    with pytest.raises(PlanError, match=r"a saved model must have model\.json and weights\.safetensors"):
        load(tmp_path / "nothing")
    save(apply(model, plan), tmp_path / "b", plan)
    with pytest.raises(PlanError, match="a plan must be applied to the model that it was made for"):
        load(tmp_path / "b", nets.ResNet())
    (tmp_path / "b" / "plan.json").unlink()
    with pytest.raises(PlanError, match="needs its original class, found none"):
        load(tmp_path / "b")
    with pytest.raises(PlanError, match=r"saved weights must fit the model: 'features\.0\.weight'"):
        load(tmp_path / "b", nets.VGG())
    weights = tmp_path / "b" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(PlanError, match="a saved model must have"):
        load(tmp_path / "b", nets.VGG())


def _craft(path: Path, change: Callable[[dict[str, Any]], object]) -> PruningPlan:
    """A plan file whose program someone changed, hash and all."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps({**values, "content_sha256": content_sha256(values)}))
    return PruningPlan.load(path)


@pytest.mark.parametrize(
    "op", ["os.system", "operator.methodcaller", "aten.__class__.mro", "prims.add.default", "aten.no_such.default"]
)
def test_a_program_can_only_name_aten_operations(nets: ModuleType, tmp_path: Path, op: str) -> None:
    model = nets.VGG()
    plan = uniform_plan(trace(model, X), 0.5)
    save(apply(model, plan), tmp_path, plan)
    _craft(tmp_path / "plan.json", lambda values: values["program"]["nodes"][1].update(op=op))
    with pytest.raises(PlanError, match="a program may only name operations of ATen"):
        load(tmp_path)


@pytest.mark.parametrize(
    "op",
    [
        "aten.from_file.default",
        "aten._print.default",
        "aten.set_.source_Tensor",
        "aten._cufft_clear_plan_cache.default",
    ],
)
def test_a_program_can_only_name_operations_that_compute(op: str) -> None:
    with pytest.raises(PlanError, match=f"a program may only name operations that compute on tensors, found '{op}'"):
        operation(op)


def test_a_program_may_name_every_operation_that_has_a_rule() -> None:
    for family in FAMILIES:
        for name in family.TABLE:
            assert callable(operation(name))


def test_a_crafted_plan_cannot_write_files(nets: ModuleType, tmp_path: Path) -> None:
    model = nets.OptionA()
    target = tmp_path / "made by a plan"
    uniform_plan(trace(model, X), 0.5).save(tmp_path / "plan.json")
    node = {
        "name": "x",
        "op": "aten.from_file.default",
        "args": {"filename": str(target), "shared": True, "size": 16, "dtype": {"dtype": "float32"}},
    }
    plan = _craft(tmp_path / "plan.json", lambda values: values["program"]["nodes"].insert(0, node))
    with pytest.raises(PlanError, match=r"operations that compute on tensors, found 'aten\.from_file\.default'"):
        apply(model, plan)
    assert not target.exists()


def test_a_crafted_plan_cannot_import_modules(
    nets: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nets.OptionA()
    (tmp_path / "imported_by_a_plan.py").write_text("class Nest:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    uniform_plan(trace(model, X), 0.5).save(tmp_path / "plan.json")
    spec = json.dumps([1, {"type": "imported_by_a_plan.Nest", "context": "null", "children_spec": []}])
    plan = _craft(tmp_path / "plan.json", lambda values: values["program"].update(out_spec=spec))
    with pytest.raises(PlanError, match=r"classes with named fields, found imported_by_a_plan\.Nest"):
        apply(model, plan)
    assert "imported_by_a_plan" not in sys.modules


@pytest.mark.parametrize("field", ["inputs", "nodes", "outputs", "in_spec", "out_spec"])
def test_a_damaged_program_is_a_plan_error(nets: ModuleType, tmp_path: Path, field: str) -> None:
    model = nets.OptionA()
    uniform_plan(trace(model, X), 0.5).save(tmp_path / "plan.json")
    plan = _craft(tmp_path / "plan.json", lambda values: values["program"].pop(field))
    with pytest.raises(PlanError, match="a program must be complete, found one that cannot be read"):
        apply(model, plan)


def test_attributes_of_modules_that_are_not_there_are_refused(nets: ModuleType, tmp_path: Path) -> None:
    model = nets.ResNet()
    uniform_plan(trace(model, X), 0.5).save(tmp_path / "plan.json")
    plan = _craft(tmp_path / "plan.json", lambda values: values["attributes"].update({"layer9": {"groups": 1}}))
    with pytest.raises(PlanError, match=r"must change attributes that 'layer9' has \(groups\), found no such module"):
        apply(model, plan)
    plan = _craft(tmp_path / "plan.json", lambda values: values.update(attributes={"fc": {"groups": 1}}))
    with pytest.raises(PlanError, match=r"must change attributes that 'fc' has \(groups\), found groups"):
        apply(model, plan)


def test_a_plan_applies_where_nothing_can_be_traced(nets: ModuleType, tmp_path: Path) -> None:
    for name in ("ResNet", "OptionA"):
        model = getattr(nets, name)()
        plan = uniform_plan(trace(model, X), 0.5)
        save(apply(model, plan), tmp_path / name, plan)
    code = """
import sys
sys.modules["edgeprune.graph"] = None
sys.path.insert(0, sys.argv[1])
import torch, nets
from edgeprune.surgery.plan import PruningPlan
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.storage import load
for name in ("ResNet", "OptionA"):
    folder = f"{sys.argv[2]}/{name}"
    model = getattr(nets, name)()
    apply(model, PruningPlan.load(folder + "/plan.json"))
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(load(folder, model).eval()(x), load(folder)(x), atol=1e-5)
print("applied")
"""
    arguments = [sys.executable, "-c", code, str(Path(__file__).parents[1] / "graph"), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.stdout == "applied\n", done.stderr


def test_loading_a_plan_twice_gives_the_same_cut(nets: ModuleType, tmp_path: Path) -> None:
    model = nets.UNet()
    plan = uniform_plan(trace(model, X), 0.3)
    plan.save(tmp_path / "plan.json")
    one, two = apply(model, plan), apply(model, PruningPlan.load(tmp_path / "plan.json"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_program_module_exports_to_onnx_with_a_free_batch(nets: ModuleType, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = nets.OptionA()
    pruned = apply(model, uniform_plan(trace(model, X), 0.5)).eval()
    path = tmp_path / "model.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(pruned, (torch.randn(2, 3, 16, 16),), path, dynamo=True, dynamic_shapes=(shapes,), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 16, 16)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), pruned(x), atol=1e-5)
