"""What `trace` returns, and what it leaves alone."""

from __future__ import annotations

import copy
import time
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgeprune.errors import InputError, PlanError, TraceError
from edgeprune.graph.tracing import trace
from edgeprune.surgery.checking import check
from edgeprune.surgery.plan import uniform_plan

X = torch.randn(1, 3, 16, 16)

WIDTHS = {
    "ResNet": {
        "stem.0 (+2 layers)": 8,
        "layer1.0.conv1": 8,
        "layer1.1.conv1": 8,
        "layer2.0.downsample.0 (+2 layers)": 16,
        "layer2.0.conv1": 16,
        "layer2.1.conv1": 16,
    },
    "OptionA": {
        "conv1 (+4 layers)": 8,
        "layers.0.conv1": 8,
        "layers.1.conv1": 16,
        "layers.1.conv2 (+2 layers)": 8,
        "layers.2.conv1": 16,
        "layers.3.conv1": 32,
        "layers.3.conv2": 16,
    },
    "VGG": {"features.0": 8, "features.3": 12, "classifier.1": 20},
    "DenseNet": {"stem": 8, "convs.0": 4, "convs.1": 4, "convs.2": 4},
    "Inverted": {"stem.0 (+1 layer)": 8, "expand.0 (+1 layer)": 24, "squeeze": 6},
    "Shuffle": {"stem.0[0:8] (+1 layer)": 8, "stem.0[8:16]": 8, "branch.0.0": 8, "head": 12},
    "Grouped": {"stem.0 (+1 layer)": 8, "reduce.0": 4, "grouped.0": 4},
    "UNet": {"down1": 8, "down2": 12, "up": 8, "fuse": 8, "wide": 4},
    "Gated": {"conv": 8},
    "Attended": {"conv": 8},
    "Tied": {"stem (+2 layers)": 8},
}


@pytest.mark.parametrize("name", WIDTHS)
def test_groups_have_the_expected_names_and_sizes(nets: ModuleType, name: str) -> None:
    model = getattr(nets, name)()
    graph = trace(model, X)
    assert graph.widths() == WIDTHS[name]
    shapes = graph.shapes({})
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert {n: shapes[n] for n in tensors} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert [axis.reason for axis in graph.frozen if axis.op == "output"] == ["an output of the model keeps its size"]


def test_balanced_conv_groups_are_named_as_the_unit(nets: ModuleType) -> None:
    graph = trace(nets.Grouped(), X)
    assert [group.unit for group in graph.groups] == ["channel", "conv-group channel", "conv-group channel"]
    weight = next(m for m in graph.group("reduce.0").members if m.parameter == "grouped.0.weight")
    assert (weight.axis, weight.role, weight.indices) == (1, "input", ((0,), (1,), (2,), (3,)))
    rows = next(m for m in graph.group("grouped.0").members if m.parameter == "grouped.0.weight")
    assert rows.indices == tuple((i, i + 4, i + 8, i + 12) for i in range(4))


@pytest.mark.parametrize("train", [True, False])
def test_the_model_is_untouched(nets: ModuleType, train: bool) -> None:
    model = nets.ResNet().train(train)
    model.layer1.eval()
    seen: list[int] = []
    handle = model.fc.register_forward_hook(lambda *_: seen.append(1))
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    trace(model, X)
    assert [module.training for module in model.modules()] == modes
    assert [id(p) for p in model.parameters()] == parameters
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert len(model.fc._forward_hooks) == 1
    handle.remove()


def test_shapes_are_those_of_a_smaller_model(nets: ModuleType) -> None:
    graph = trace(nets.DenseNet(), torch.randn(2, 3, 16, 16))
    shapes = graph.shapes({"stem": 5, "convs.1": 1})
    assert shapes["cat"] == (2, 9, 16, 16)
    assert shapes["cat_2"] == (2, 14, 16, 16)
    assert shapes["head.weight"] == (5, 14)
    assert shapes["norms.1.running_mean"] == (9,)
    assert shapes["convs.2.weight"] == (4, 10, 3, 3)
    forms = graph.size_forms()
    assert forms["cat_2"][1].terms == ((("convs.0",), 1), (("convs.1",), 1), (("convs.2",), 1), (("stem",), 1))
    assert forms["cat_2"][1].at({"stem": 5, "convs.0": 4, "convs.1": 1, "convs.2": 4}) == 14


def test_flatten_has_a_coefficient(nets: ModuleType) -> None:
    forms = trace(nets.VGG(), X).size_forms()
    assert forms["classifier.1.weight"][1].terms == ((("features.3",), 16),)
    assert forms["classifier.1.weight"][1].constant == 0


def test_shapes_are_fast_enough_for_allocation(nets: ModuleType) -> None:
    graph = trace(nets.ResNet(), X)
    widths = {name: size - 1 for name, size in graph.widths().items()}
    graph.shapes(widths)
    start = time.perf_counter()
    for _ in range(50):
        graph.shapes(widths)
    assert (time.perf_counter() - start) / 50 < 0.005


def test_widths_must_name_groups_and_be_in_range(nets: ModuleType) -> None:
    graph = trace(nets.VGG(), X)
    with pytest.raises(PlanError, match=r"must be one of the model's 3 groups, found 'nope'\. Try: one of "):
        graph.shapes({"nope": 3})
    with pytest.raises(PlanError, match=r"the width of 'features\.0' must lie between 1 and 8, found 9\."):
        graph.shapes({"features.0": 9})
    with pytest.raises(PlanError, match=r"found 'feature\.0'\. Try: one of 'features\.0'"):
        graph.group("feature.0")


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.b.weight / self.b.weight.sum((1, 2, 3), keepdim=True)
        return self.c(F.conv2d(self.a(x), weight))


def test_a_weight_that_forward_computes_is_cut_where_it_comes_from() -> None:
    graph = trace(Computed(), X)
    assert graph.widths() == {"a": 8, "b": 8}
    assert {(m.parameter, m.axis) for m in graph.group("a").members} == {
        ("a.weight", 0),
        ("a.bias", 0),
        ("b.weight", 1),
    }
    assert {(m.parameter, m.axis) for m in graph.group("b").members} == {("b.weight", 0), ("c.weight", 1)}
    assert check(graph.model, uniform_plan(graph, 0.5), X) < 1e-9


class Unlayered(nn.Module):
    """Weights that are parameters of their own, some of them with another axis for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 24), nn.Linear(24, 2)
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(24, 4, size)) for size in (6, 6, 5))
        self.wo = nn.Parameter(torch.randn(4, 5, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        q, k, v = (torch.einsum("btd,dhe->bhte", x, weight) for weight in (self.wq, self.wk, self.wv))
        scores = torch.einsum("bhte,bhse->bhts", q, k).softmax(-1)
        return self.head(x + torch.einsum("bhts,bhse,hed->btd", scores, v, self.wo))


def test_groups_that_no_layer_makes_have_the_names_of_their_weights() -> None:
    graph = trace(Unlayered(), torch.randn(2, 5, 6))
    assert graph.widths() == {
        "stem (+1 layer)": 24,
        "wq heads (+2 layers)": 4,
        "wq head dimensions (+1 layer)": 6,
        "wv": 5,
    }


def test_weights_of_one_layer_tell_its_groups_apart() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(24, 4, kdim=9, vdim=7, batch_first=True), nn.Linear(24, 2)

        def forward(self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return self.head(self.attention(x, key, value)[0])

    graph = trace(Apart(), (torch.randn(2, 5, 24), torch.randn(2, 6, 9), torch.randn(2, 6, 7)))
    assert [name for name in graph.widths() if name.startswith("attention")] == [
        "attention heads",
        "attention.q_proj_weight head dimensions",
        "attention.v_proj_weight head dimensions",
        "attention.out_proj",
    ]


def test_weights_that_are_also_read_along_what_stays_are_told() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(6, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(F.relu(self.encoder(x)), self.encoder.weight.t())

    graph = trace(Autoencoder(), torch.randn(2, 6))
    assert graph.widths() == {"encoder": 16}
    decoded = next(axis for axis in graph.frozen if axis.size == 6 and axis.op != "input")
    assert decoded.reason == "its weights are also read along an axis that keeps its size"
    assert check(graph.model, uniform_plan(graph, 0.5), torch.randn(2, 6)) < 1e-9


def test_a_region_that_stays_one_operation_has_the_line_of_its_first() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x).relu()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.b(x)
            return self.c(x.float())

    model = nn.Sequential(nn.Linear(6, 6), Cast())
    graph = trace(model, torch.randn(2, 6))
    frozen = next(axis for axis in graph.frozen if axis.name == "1.a")
    assert frozen.reason.endswith("wrap_with_autocast has no rule")
    assert frozen.source.rpartition(":")[0] == __file__


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.extra = nn.Conv2d(3, 8, 1), nn.Linear(4, 8)
        self.one, self.two = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, image: torch.Tensor, extra: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.image(image).mean((2, 3)) + self.extra(extra)
        return {"one": self.one(x), "two": self.two(x)}


@pytest.mark.parametrize("as_dict", [True, False])
def test_several_inputs_and_outputs(as_dict: bool) -> None:
    image, extra = torch.randn(1, 3, 8, 8), torch.randn(1, 4)
    inputs = {"image": image, "extra": extra} if as_dict else (image, extra)
    graph = trace(Several(), inputs)
    assert graph.input_names == ("image", "extra")
    assert [tuple(t.shape) for t in graph.example_inputs] == [(1, 3, 8, 8), (1, 4)]
    assert graph.dynamic_batch
    assert graph.widths() == {"image (+1 layer)": 8}
    assert {axis.name for axis in graph.frozen if axis.op == "output"} == {"one", "two"}


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).reshape(1, 8, 16, 16))


def test_a_model_for_one_batch_falls_back_and_says_so() -> None:
    graph = trace(FixedBatch(), X)
    assert not graph.dynamic_batch
    assert "does not work for every batch" in graph.note
    assert "batch fixed at 1" in graph.explain()
    assert graph.widths() == {"a": 8}


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


def test_control_flow_on_values_is_a_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        TraceError, match=r"the model must be exportable with torch\.export, found at .*test_trace\.py:\d+"
    ):
        trace(Branching(), X)
    assert capsys.readouterr().err == "", "torch prints the graph that it has so far"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("image.png", "example inputs must be a tensor, a tuple or a dict, found str."),
        ({"x": 3}, "example inputs must hold at least one tensor, found none."),
    ],
)
def test_inputs_that_are_none(nets: ModuleType, inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace(nets.VGG(), inputs)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (torch.randn(1, 4, 8, 8), "takes batch x 3 x height x width"),
        ((torch.randn(1, 3, 9, 9),), "takes 144 features last, which comes of another size of the input"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_told_as_the_command_line_does(inputs: Any, said: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(InputError, match=r"must run on its example inputs, with input 1x\dx\dx\d it raised ") as caught:
        trace(net, inputs)
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("example_inputs=torch.randn(1, 3, 32, 32); the")
    assert caught.value.hint.endswith(said)


def test_what_is_no_module_is_told() -> None:
    with pytest.raises(InputError, match=r"the model must be a torch\.nn\.Module, found str\."):
        trace("resnet50", X)  # type: ignore[arg-type]


def test_an_output_of_an_unknown_class_is_told() -> None:
    class Holder:
        pass

    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Holder]:
            return self.b(self.a(x)), Holder()

    with pytest.raises(
        TraceError, match=r"Holder'> in output, which is not a known type Try: return tensors in tuples"
    ):
        trace(Holding(), X)


def test_what_was_compiled_or_scripted_is_told_apart(nets: ModuleType) -> None:
    model = nets.VGG().eval()
    with pytest.raises(InputError, match=r"must be a Python module, found one of TorchScript .* Try: the module"):
        trace(torch.jit.trace(model, X), X)
    with pytest.raises(InputError, match=r"found what torch\.compile made of it\. Try: model\._orig_mod"):
        trace(torch.compile(model), X)


class HeadsFromOutside(nn.Module):
    """What is added to the scores has an entry per head and is an input, so the heads stay; their dimensions do not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2) * 0.4 + bias).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).flatten(2))


def test_heads_that_stay_while_their_dimensions_can_go_are_told() -> None:
    graph = trace(HeadsFromOutside().eval(), (torch.randn(2, 9, 24), torch.randn(2, 4, 9, 9)))
    assert any(group.size == 6 for group in graph.groups)
    heads = next(axis for axis in graph.frozen if axis.name == "q heads")
    assert heads.size == 4
    assert "keeps its size" in heads.reason
