"""The law of lowering for networks of tokens: attention, norms, what the exporter puts in between."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import edgeprune
from edgeprune.backends import registry
from edgeprune.backends._base import Operator
from edgeprune.backends.onnxruntime.shapes import inferred
from edgeprune.lowering.trained_form import in_trained_form
from edgeprune.spec import Kernel
from edgeprune.surgery.plan import make_plan


class SelfAttention(nn.Module):
    """Fused projection and torch's own attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class BiasedAttention(nn.Module):
    """Separate projections, written by hand, with a learned bias per head."""

    def __init__(self, width: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(heads, tokens, tokens))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1) * 0.25 + self.bias).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), attention, nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Patches, a class token, positions, two layers."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))
        self.layers = nn.Sequential(
            Layer(SelfAttention(width, heads), width), Layer(BiasedAttention(width, heads, 17), width)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], 1) + self.pos
        return self.head(self.norm(self.layers(tokens))[:, 0])


class Text(nn.Module):
    """Embeddings of words, torch's encoder layer, a mean over the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
        self.head = nn.Linear(32, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.layer(self.words(words)).mean(1))


class Mixed(nn.Module):
    """Convolutions, a gate by pooling, then tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, 2, 1), nn.InstanceNorm2d(32, affine=True)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 8, 1), nn.SiLU(), nn.Conv2d(8, 32, 1))
        self.down = nn.Conv2d(32, 48, 3, 2, 1)
        self.layer = Layer(SelfAttention(48, 4), 48)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.silu(self.norm(self.stem(x)))
        y = self.down(y * self.gate(y).sigmoid())
        return self.head(self.layer(y.flatten(2).transpose(1, 2)).mean(1))


class GroupNormed(nn.Module):
    """Of the first norm whole groups go, of the second as many channels of each group, of the third just channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(2, 32), nn.SiLU()),
            *(nn.Conv2d(32, 24, 1), nn.GroupNorm(1, 24), nn.ReLU()),
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3))).softmax(1)


NETS = {
    "vit": (Vit, torch.randn(1, 3, 16, 16)),
    "text": (Text, torch.randint(0, 100, (1, 11))),
    "group norms": (GroupNormed, torch.randn(1, 3, 32, 32)),
    "mixed": (Mixed, torch.randn(1, 3, 32, 32)),
}


@pytest.fixture(scope="module", params=NETS)
def lowered(request, tmp_path_factory):
    torch.manual_seed(0)
    make, x = NETS[request.param]
    model = make().eval()
    return model, edgeprune.lower(
        edgeprune.trace(model, x), model=model, workdir=tmp_path_factory.mktemp(request.param)
    )


def random_widths(graph, seed):
    """Any width; a single head is drawn as often as any other number of heads."""
    generator = torch.Generator().manual_seed(seed)
    step = 2 if seed % 2 else 1
    return {
        group.name: min(group.size, step * int(torch.randint(1, group.size // step + 1, (), generator=generator)))
        for group in graph.groups
    }


def single_heads(graph):
    """What is left to a matrix product when its axis of heads has length one."""
    return {group.name: 1 for group in graph.groups if group.name.endswith("heads")}


def smallest_widths(graph):
    """One unit of each group: a single head, a single head dimension."""
    return {group.name: 1 for group in graph.groups}


def test_dense_kernels_are_those_of_the_dense_engine(lowered):
    _, kernels = lowered
    executed = Counter(kernel.key for kernel in kernels.backend.parse_engine(kernels.dense_engine))
    assert Counter(kernel.key for kernel in kernels.at({})) == executed


WIDTHS = [*(lambda graph, seed=seed: random_widths(graph, seed) for seed in range(3)), single_heads, smallest_widths]


@pytest.mark.parametrize("widths", WIDTHS)
def test_kernels_of_a_candidate_are_those_of_the_cut_model(lowered, tmp_path, widths):
    model, kernels = lowered
    widths = widths(kernels.graph)
    plan = make_plan(kernels.graph, {name: range(width) for name, width in widths.items()}, allow_empty=True)
    engine = tmp_path / "cut.onnx"
    kernels.backend.export(in_trained_form(edgeprune.apply(model, plan)), kernels.graph.example_inputs, engine)
    predicted = Counter(kernel.key for kernel in kernels.at(widths))
    executed = Counter(kernel.key for kernel in kernels.backend.parse_engine(engine))
    left, right = (sorted((a - b).elements()) for a, b in ((predicted, executed), (executed, predicted)))
    assert predicted == executed, "\n".join([str(widths), *left, "instead of", *right])


@pytest.mark.parametrize("widths", [lambda graph: random_widths(graph, 3), single_heads, smallest_widths])
def test_the_network_that_is_timed_runs_the_kernels_that_are_priced(lowered, tmp_path, widths):
    """Its weights mean nothing, but no two layers have the same: of two equal ones on one input only one would run."""
    _, kernels = lowered
    engine = tmp_path / "network.onnx"
    engine.write_bytes(kernels.network_engine(widths(kernels.graph)))
    executed = Counter(kernel.key for kernel in kernels.backend.parse_engine(engine))
    assert executed == Counter(kernel.key for kernel in kernels.at(widths(kernels.graph)))


def test_every_kernel_and_the_network_run_alone(lowered):
    """What the board would be sent loads and runs here, integer inputs and all."""
    _, kernels = lowered
    options = onnxruntime.SessionOptions()
    for widths in (random_widths(kernels.graph, 11), smallest_widths(kernels.graph)):
        for kernel in dict.fromkeys(kernels.at(widths)):
            _run(kernels.backend.kernel_engine(kernel), options)
        _run(kernels.network_engine(widths), options)


def _run(engine: bytes, options: onnxruntime.SessionOptions) -> None:
    session = onnxruntime.InferenceSession(engine, options)
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
    session.run(None, {spec.name: np.ones(spec.shape, types[spec.type]) for spec in session.get_inputs()})


def test_families_of_tokens_have_names(lowered):
    _, kernels = lowered
    families = {kernel.family for kernel in kernels.at({})}
    assert {"gemm", "norm", "softmax", "elementwise"} <= families
    assert "other" not in families


def test_operations_with_inputs_that_are_left_out_can_be_timed(tmp_path):
    """``Resize`` has scales or sizes behind two inputs that nobody gives."""
    model = nn.Sequential(nn.Conv2d(3, 18, 3), nn.ReLU(), nn.Upsample(scale_factor=1.5), nn.Conv2d(18, 4, 1)).eval()
    kernels = edgeprune.lower(edgeprune.trace(model, torch.randn(1, 3, 10, 10)), model=model, workdir=tmp_path)
    for widths in ({}, {"0": 5}):
        assert "Resize" in {kernel.op for kernel in kernels.at(widths)}
        for kernel in kernels.at(widths):
            _run(kernels.backend.kernel_engine(kernel), onnxruntime.SessionOptions())
        _run(kernels.network_engine(widths), onnxruntime.SessionOptions())


@pytest.mark.parametrize(
    ("attributes", "output", "sizes"),
    [
        ((("axis", 2), ("num_outputs", 2)), (1, 7, 10), [10, 10]),
        ((("axis", -1), ("num_outputs", 3)), (1, 7, 7), [7, 7, 6]),
        ((("axis", -1), ("operand1", (4, 16))), (1, 7, 4), [4, 16]),
    ],
)
def test_a_split_is_timed_with_all_its_outputs(attributes, output, sizes):
    """With the first one alone the runtime makes one of the whole, and refuses to write it into the array of a part."""
    kernel = Kernel("Split", "concat", ((1, 7, 20),), output, attributes)
    session = onnxruntime.InferenceSession(registry.get("onnxruntime").kernel_engine(kernel))
    found = session.run(None, {"input0": np.zeros((1, 7, 20), np.float32)})
    assert [part.shape for part in found] == [(1, 7, size) for size in sizes]


@pytest.mark.parametrize(
    ("op", "attributes", "dense", "known", "expected"),
    [
        ("Transpose", (("perm", (0, 2, 1)),), {"a": (1, 4, 6), "y": (1, 6, 4)}, {"a": (1, 3, 6)}, {"y": (1, 6, 3)}),
        ("MatMul", (), {"a": (2, 5, 4), "b": (2, 4, 7), "y": (2, 5, 7)}, {"a": (1, 5, 3), "b": (1, 3, 7)}, {"y": (1, 5, 7)}),
        ("FusedMatMul", (("trans_b", 1),), {"a": (2, 5, 4), "b": (2, 7, 4), "y": (2, 5, 7)}, {"a": (2, 5, 3), "y": (2, 5, 6)},
         {"b": (2, 6, 3)}),
        ("Add", (), {"a": (1, 8, 6), "b": (6,), "y": (1, 8, 6)}, {"a": (1, 8, 4)}, {"b": (4,), "y": (1, 8, 4)}),
        ("Add", (), {"a": (1, 8, 6), "b": (6,), "y": (1, 8, 6)}, {"y": (1, 8, 4)}, {"a": (1, 8, 4), "b": (4,)}),
        ("Mul", (), {"a": (1, 8, 1), "b": (1, 8, 6), "y": (1, 8, 6)}, {"a": (1, 5, 1)}, None),
        ("Softmax", (), {"a": (1, 4, 9, 9), "y": (1, 4, 9, 9)}, {"a": (1, 1, 9, 9)}, {"y": (1, 1, 9, 9)}),
        ("InstanceNormalization", (), {"a": (1, 8, 8, 8), "s": (8,), "y": (1, 8, 8, 8)}, {"a": (1, 3, 8, 8)},
         {"s": (3,), "y": (1, 3, 8, 8)}),
        ("LayerNormalization", (), {"a": (1, 8, 6), "s": (6,), "y": (1, 8, 6)}, {"a": (1, 8, 3)}, {"s": (3,), "y": (1, 8, 3)}),
        ("Concat", (("axis", 2),), {"a": (1, 2, 4), "b": (1, 2, 6), "y": (1, 2, 10)}, {"a": (1, 2, 3), "b": (1, 2, 1)},
         {"y": (1, 2, 4)}),
        ("ReduceMean", (("keepdims", 0), ("operand1", (-1,))), {"a": (1, 4, 6), "y": (1, 4)}, {"a": (1, 3, 6)}, {"y": (1, 3)}),
        ("Reshape", (), {"a": (1, 4, 3, 6), "y": (4, 18)}, {"a": (1, 2, 3, 6)}, {"y": (2, 18)}),
        ("Reshape", (), {"a": (1, 24), "y": (4, 6)}, {"a": (1, 12)}, None),
        ("ConvTranspose", (), {"a": (1, 8, 4, 4), "y": (1, 8, 4, 4)}, {"a": (1, 5, 4, 4)}, None),
    ],
)  # fmt: skip
def test_shapes_follow_from_the_operator(op, attributes, dense, known, expected):
    inputs = tuple(name for name in dense if name != "y")
    operator = Operator(name="n", op=op, inputs=inputs, outputs=("y",), attributes=attributes)
    assert inferred(operator, dense, known) == expected
