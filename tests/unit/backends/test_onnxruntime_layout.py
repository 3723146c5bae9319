"""The layout rule against what ONNX Runtime really executes, on random nets whose code knows nothing of the rule."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from edgeprune.backends import registry
from edgeprune.backends.onnxruntime import engines, layout
from edgeprune.errors import BackendUnavailableError, CompileError, ConfigError, ExportError
from edgeprune.lowering.kernel_graph import _host_isa
from edgeprune.spec import Kernel

HOST = ("x86_64", _host_isa())


class Block(nn.Module):
    def __init__(self, channels: int, hidden: int, out: int, *, stride: int, depthwise: bool, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden) if depthwise else nn.Identity()
        self.conv2 = nn.Conv2d(hidden, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=bias)
        for norm in (self.bn1, self.bn2):
            nn.init.normal_(norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sigmoid(self.depthwise(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Net(nn.Module):
    """Residual and depthwise blocks, a concat, pools and a classifier, of eight free widths."""

    def __init__(self, widths: list[int], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        a, b, c, d, e, f, g, h = widths
        self.stem = nn.Conv2d(3, a, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.blocks = nn.Sequential(
            Block(a, b, c, stride=1, depthwise=False, bias=True),
            Block(c, d, c, stride=1, depthwise=True, bias=True),
            Block(c, e, f, stride=2, depthwise=False, bias=False),
            Block(f, g, f, stride=1, depthwise=False, bias=True),
        )
        self.branch = nn.Conv2d(f, h, 1)
        self.average = nn.AvgPool2d(2)
        self.head = nn.Linear(f + h, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.pool(torch.relu(self.stem(x))))
        x = torch.cat([x, torch.relu(self.branch(x))], 1)
        return self.head(nn.functional.adaptive_avg_pool2d(self.average(x), 1).flatten(1))


CASES = [(step, seed) for step in (1, 2, 4, 16) for seed in (0, 1)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"step{case[0]}-seed{case[1]}")
def engine(request, tmp_path_factory):
    step, seed = request.param
    generator = torch.Generator().manual_seed(100 * step + seed)
    widths = [int(width) * step for width in torch.randint(1, 80 // step + 1, (8,), generator=generator)]
    path = tmp_path_factory.mktemp("engine") / "net.onnx"
    registry.get("onnxruntime").export(Net(widths, seed), (torch.randn(1, 3, 32, 32),), path)
    return path


def keys(kernels: list[Kernel]) -> Counter[str]:
    return Counter(kernel.key for kernel in kernels)


def test_rule_gives_the_kernels_that_the_runtime_executes(engine):
    backend = registry.get("onnxruntime")
    operators = backend.operators(engine)
    assert keys(backend.layout_rule(operators, operators.shapes, *HOST)) == keys(backend.parse_engine(engine))


def test_network_with_made_up_weights_runs_the_same_kernels(engine, tmp_path):
    backend = registry.get("onnxruntime")
    operators = backend.operators(engine)
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(backend.network_engine(operators, operators.shapes))
    assert copy.stat().st_size < 20_000
    assert keys(backend.parse_engine(copy)) == keys(backend.parse_engine(engine))


def test_every_kernel_runs_alone_as_the_same_kernel(engine, tmp_path):
    backend = registry.get("onnxruntime")
    for kernel in set(backend.parse_engine(engine)):
        model = engines.optimized(backend.kernel_engine(kernel), "BASIC")
        ops = [node.op_type for node in model.graph.node]
        assert ops == [kernel.op.rpartition(".")[2]]
        weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        if kernel.op == "nchwc.Conv":
            assert weights["kernel_weight"][0] == kernel.output[1]


def test_tensors_remember_the_traced_nodes_that_they_come_from(engine):
    operators = registry.get("onnxruntime").operators(engine)
    program = torch.export.export(Net([16] * 8, 0).eval(), (torch.randn(1, 3, 32, 32),), strict=False)
    names = {node.name for node in program.graph.nodes}
    outputs = {name for operator in operators.operators for name in operator.outputs}
    assert all(operators.sources[name] in names for name in outputs)


@pytest.mark.parametrize(
    ("architecture", "isa", "block"),
    [("x86_64", ("avx2", "avx512f"), 16), ("x86_64", ("avx2",), 8), ("aarch64", ("asimd",), 1)],
)
def test_block_size_follows_the_instruction_set(architecture, isa, block):
    assert layout.block_size(architecture, isa) == block


def test_without_blocks_every_operator_stays_plain(engine):
    backend = registry.get("onnxruntime")
    operators = backend.operators(engine)
    kernels = backend.layout_rule(operators, operators.shapes, "aarch64", ("asimd",))
    assert kernels
    assert not [kernel.op for kernel in kernels if kernel.op.startswith("nchwc.")]


def test_exported_file_is_the_same_function_and_leaves_the_module_alone(tmp_path):
    import onnxruntime

    net = Net([16, 24, 12, 8, 20, 28, 16, 4], 3).train()
    example = torch.randn(2, 3, 32, 32)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    inputs, outputs = registry.get("onnxruntime").export(net, (example,), tmp_path / "net.onnx")
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert (inputs[0].shape, outputs[0].shape) == ((2, 3, 32, 32), (2, 10))
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {inputs[0].name: example.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net.eval()(example), atol=1e-4, rtol=1e-4)


def test_a_module_that_cannot_be_exported_is_one_clear_error(tmp_path):
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(ExportError, match="the model must be exportable to ONNX") as caught:
        registry.get("onnxruntime").export(Branches(), (torch.randn(2, 3),), tmp_path / "net.onnx")
    assert "\n" not in caught.value.message
    assert not list(tmp_path.iterdir())


def test_a_broken_engine_is_one_clear_error(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(CompileError, match="ONNX Runtime must be able to load the engine"):
        engines.optimized(path, "ALL")


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ConfigError, match="one of onnxruntime"):
        registry.get("tensorflow")


def test_a_backend_that_is_not_installed_is_listed_with_its_reason(monkeypatch):
    from edgeprune.backends.onnxruntime import backend

    monkeypatch.setattr(backend, "find_spec", lambda name: None if name == "onnxruntime" else object())
    assert ("onnxruntime", "missing: onnxruntime", backend.OnnxRuntime.install) in registry.describe()
    with pytest.raises(BackendUnavailableError, match="missing: onnxruntime") as caught:
        registry.get("onnxruntime")
    assert caught.value.hint == "pip install 'edgeprune[onnxruntime]'"
