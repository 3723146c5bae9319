"""The layout rule against what ONNX Runtime really executes, on random nets whose code knows nothing of the rule."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from edgeprune.backends import registry
from edgeprune.backends.onnxruntime import engines, layout
from edgeprune.boards.host import host_isa
from edgeprune.errors import BackendUnavailableError, CompileError, ConfigError
from edgeprune.spec import Kernel

HOST = ("x86_64", host_isa())


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


def test_every_kernel_runs_alone_as_the_same_kernel(engine, tmp_path):
    backend = registry.get("onnxruntime")
    for kernel in set(backend.parse_engine(engine)):
        model = engines.optimized(backend.kernel_engine(kernel), "BASIC")
        ops = [node.op_type for node in model.graph.node]
        assert ops == [kernel.op.rpartition(".")[2]]
        weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        if kernel.op == "nchwc.Conv":
            assert weights["kernel_weight"][0] == kernel.output[1]


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


class Parts(nn.Module):
    """Chunk, channel padding and concat: sizes that are written out as constants."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * width, 3, padding=1)
        self.left = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(2 * width + 6, 24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = torch.relu(self.stem(x)).chunk(2, 1)
        padded = nn.functional.pad(torch.cat([self.left(left), right], 1), (0, 0, 0, 0, 3, 3))
        return self.last(padded).reshape(x.shape[0], -1)


@pytest.mark.parametrize("width", [8, 13, 16])
def test_constants_follow_the_widths(width, tmp_path):
    backend = registry.get("onnxruntime")
    engines_by_width = {}
    for size in (20, width):
        engines_by_width[size] = tmp_path / f"{size}.onnx"
        backend.export(Parts(size), (torch.randn(1, 3, 8, 8),), engines_by_width[size])
    dense, cut = (backend.operators(engines_by_width[size]) for size in (20, width))
    # The same program at other widths: tensors of the same names, shapes of the smaller one.
    assert keys(backend.layout_rule(dense, cut.shapes, *HOST)) == keys(backend.parse_engine(engines_by_width[width]))
    timing = tmp_path / "timing.onnx"
    timing.write_bytes(backend.network_engine(dense, cut.shapes))
    assert keys(backend.parse_engine(timing)) == keys(backend.parse_engine(engines_by_width[width]))
    for kernel in set(backend.parse_engine(timing)):
        engines.optimized(backend.kernel_engine(kernel), "BASIC")
