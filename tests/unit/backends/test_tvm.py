"""TVM engines, compiled and run here: numbers, kernels at other widths, refusals on the board's side."""

from __future__ import annotations

import platform
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.backends import registry
from edgeprune.backends.onnxruntime import engines, exporting
from edgeprune.backends.tvm import candidate_engine, engine_file, importing
from edgeprune.backends.tvm.backend import Tvm
from edgeprune.backends.tvm.target import target_of
from edgeprune.backends.tvm.workloads import normalized
from edgeprune.boards.board import Board
from edgeprune.boards.host import host_isa
from edgeprune.deployment import preflight
from edgeprune.deployment.kernel_times import kernel_times
from edgeprune.errors import (
    BackendError,
    BackendUnavailableError,
    CompileError,
    ConfigError,
    IncompatibleTargetError,
    UnsupportedKernelError,
)
from edgeprune.profiling.uploads import upload
from edgeprune.spec import Kernel
from edgeprune.testing.backends import SmallNet, keys

ARM = {"architecture": "aarch64", "cpu_model": "Cortex-A72", "isa": ["asimd", "fp"]}


@pytest.fixture(scope="module")
def backend():
    try:
        return registry.get("tvm")
    except BackendUnavailableError as error:
        pytest.skip(str(error))


class Mixed(nn.Module):
    """Depthwise, a concat of branches, pools, a sigmoid gate, and two convolutions of one input with equal shapes."""

    def __init__(self, a: int, b: int, c: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, a, 3, padding=1)
        self.norm = nn.BatchNorm2d(a)
        nn.init.normal_(self.norm.weight)
        self.depthwise = nn.Conv2d(a, a, 3, padding=1, groups=a)
        self.left, self.right = nn.Conv2d(a, b, 1), nn.Conv2d(a, b, 1)
        self.gate = nn.Linear(2 * b, 2 * b)
        self.head = nn.Linear(2 * b, c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = nn.functional.max_pool2d(x + torch.sigmoid(self.depthwise(x)), 2)
        x = torch.cat([torch.relu(self.left(x)), self.right(x)], 1)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3)))).unflatten(1, (-1, 1, 1))
        logits: torch.Tensor = self.head(x.flatten(2).mean(2))
        return logits


@pytest.fixture(scope="module")
def artifact(backend, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tvm")
    return edgeprune.compile(SmallNet(), torch.randn(1, 3, 16, 16), folder / "artifact", backend=backend)


def test_an_artifact_agrees_with_the_module_and_says_what_it_needs(artifact):
    parity = artifact.manifest.host_parity
    assert parity["cases"] > 0
    assert parity["relative"] <= 1e-4
    assert parity["snr_db"] >= 80
    needs = artifact.manifest.requires
    assert (needs["runtime"], needs["architecture"]) == ("tvm", registry.get("tvm").target.architecture)
    assert {"isa", "series", "glibc"} <= set(needs)


def test_a_board_of_another_kind_is_refused_before_anything_is_sent(artifact):
    with Board.open("local") as board:
        probed = board.probe()
    assert probed.runtimes["tvm"]["version"].startswith("0.27.")
    preflight.check(artifact.manifest, probed, board="local")
    needed = artifact.manifest.requires["isa"][0]
    for field, other in {
        "architecture": replace(probed, architecture="riscv64"),
        "instruction sets": replace(probed, isa=tuple(flag for flag in probed.isa if flag != needed)),
        "tvm": replace(probed, runtimes={}),
    }.items():
        with pytest.raises(IncompatibleTargetError) as caught:
            preflight.check(artifact.manifest, other, board="other")
        assert caught.value.field == field
        assert caught.value.hint


def test_equal_models_give_equal_engines_and_other_weights_another(backend, artifact, tmp_path):
    example = (torch.randn(1, 3, 16, 16),)
    torch.manual_seed(0)
    backend.export(SmallNet(), example, tmp_path / "again.so")
    assert (tmp_path / "again.so").read_bytes() == artifact.engine.read_bytes()
    backend.export(SmallNet(), example, tmp_path / "other.so")
    assert (tmp_path / "other.so").read_bytes() != artifact.engine.read_bytes()


def test_kernels_at_other_widths_are_those_that_run(backend, tmp_path):
    example = torch.randn(1, 3, 12, 12)
    dense = edgeprune.compile(Mixed(16, 24, 10), example, tmp_path / "dense", backend=backend).engine
    cut = edgeprune.compile(Mixed(13, 7, 10), example, tmp_path / "cut", backend=backend)
    # Widths that no tile divides are computed as exactly as others.
    assert cut.manifest.host_parity["relative"] <= 1e-4
    shapes = backend.operators(cut.engine).shapes
    told = backend.layout_rule(backend.operators(dense), shapes, backend.target.architecture, backend.target.isa)
    ran = backend.parse_engine(cut.engine)
    assert keys(told) == keys(ran)
    for kernel in (next(kernel for kernel in ran if "Conv" in kernel.op), ran[-1]):
        alone = tmp_path / "kernel.so"
        alone.write_bytes(backend.kernel_engine(kernel))
        assert backend.parse_engine(alone) == [kernel]


def test_weights_of_engines_for_timing_are_inputs_and_stay_out_of_the_file(backend, tmp_path):
    wide = nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 256, 3))
    path = tmp_path / "wide.so"
    backend.export(wide, (torch.randn(1, 3, 8, 8),), path)
    kernel = backend.parse_engine(path)[-1]
    assert path.stat().st_size > 4 * 256 * 256 * 9
    content = backend.kernel_engine(kernel)
    assert len(content) < 1 << 16
    with Board.open("local") as board:
        events = []
        request = {"engines": upload(board, {"kernel": content}, kernels=("kernel",)), "rounds": [["kernel"]]}
        settings = {"runtime": "tvm", "samples": 3, "sample_ms": 1.0, "warmup_ms": 1.0}
        result = board.call("bench", {**request, **settings}, on_event=events.append)
    timed = next(event for event in events if event["event"] == "sample")
    # 85 million multiply-accumulates cannot take less than what a call costs.
    assert min(timed["times_ms"]) > result["overhead_ms"] > 0


def test_the_board_refuses_a_damaged_engine_and_one_of_another_architecture(backend, artifact, tmp_path):
    content = artifact.engine.read_bytes()
    told = engine_file.description_of(artifact.engine)
    del told["format"]
    foreign = engine_file.packed(content[:64], {**told, "architecture": "riscv64"})
    with Board.open("local") as board:
        for engine, reason in ((b"not an engine", "no TVM engine"), (foreign, "compiled for riscv64")):
            request = {"engines": upload(board, {"it": engine}, kernels=()), "rounds": [["it"]], "runtime": "tvm"}
            with pytest.raises(BackendError, match=reason) as caught:
                board.call("bench", request)
            assert caught.value.hint


def test_what_tvm_cannot_do_is_one_sentence(backend, tmp_path):
    with pytest.raises(UnsupportedKernelError, match="body"):
        backend.kernel_engine(Kernel("nchwc.Conv", "conv", ((1, 16, 8, 8),), (1, 16, 8, 8)))


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-gcc") is None, reason="needs gcc-aarch64-linux-gnu")
def test_an_engine_for_arm_is_made_here_and_not_run_here(backend, tmp_path):
    arm = backend.for_board(ARM)
    path = tmp_path / "engine.so"
    arm.export(SmallNet(), (torch.randn(1, 3, 16, 16),), path)
    assert engine_file.architecture_of(path.read_bytes()) == "aarch64"
    assert arm.needs(path)["architecture"] == "aarch64"
    assert not arm.runs_here(path)
    graph = arm.operators(path)
    kernels = arm.layout_rule(graph, graph.shapes, "aarch64", ARM["isa"])
    assert kernels[0].op == "Conv+Relu"
    with pytest.raises(CompileError, match="compiled for this host"):
        arm.parse_engine(path)


def test_the_backend_is_listed_with_its_install_command_where_tvm_is_missing(monkeypatch):
    import edgeprune.backends.tvm.backend as module

    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "tvm" else object())
    assert ("tvm", "missing: tvm", "pip install 'edgeprune[tvm]'") in registry.describe()


def test_the_virtual_machine_tells_what_each_kernel_takes(backend, tmp_path):
    torch.manual_seed(0)
    example = torch.randn(1, 3, 16, 16)
    artifact = edgeprune.compile(SmallNet().eval(), example, tmp_path / "artifact", backend="tvm")
    found = kernel_times(artifact, "local")
    made = backend.parse_engine(artifact.engine)
    assert [one.op for one in found.kernels] == [kernel.op for kernel in made]
    assert all(one.us > 0 for one in found.kernels)
    assert sum(one.share for one in found.kernels) == pytest.approx(1)


def test_half_precision_is_compiled_where_the_processor_has_it(backend, tmp_path):
    torch.manual_seed(0)
    net, example = SmallNet().eval(), torch.randn(1, 3, 16, 16)
    lacking = backend.for_board(ARM).for_precision("fp16")
    with pytest.raises(CompileError, match="must have asimdhp for engines in fp16, found Cortex-A72 without") as caught:
        lacking.export(net, (example,), tmp_path / "arm.so")
    assert caught.value.hint == "--precision fp32"
    with pytest.raises(ConfigError, match="in fp32, found precision fp16"):
        edgeprune.lower(edgeprune.trace(net, example), "tvm", model=net, precision="fp16")
    if not {"f16c", "asimdhp"} & set(host_isa()):
        pytest.skip("this processor has no half precision")
    exact = edgeprune.compile(net, example, tmp_path / "fp32", backend="tvm")
    half = edgeprune.compile(net, example, tmp_path / "fp16", backend="tvm", precision="fp16")
    assert half.manifest.precision == "fp16"
    # Other numbers than those of fp32, and within what is allowed.
    assert 1e-5 < half.manifest.host_parity["relative"] < 2e-2
    # Half of the weights.
    weights = 4 * sum(value.numel() for value in net.parameters())
    assert exact.engine.stat().st_size - half.engine.stat().st_size == pytest.approx(weights / 2, abs=0.3 * weights)
    kernels = backend.parse_engine(half.engine)
    assert {kernel.precision for kernel in kernels} == {"fp16"}
    assert "conv" in {kernel.family for kernel in kernels}


def test_torch_s_program_is_compiled_without_onnx_between(backend, tmp_path):
    torch.manual_seed(0)
    net, example = Mixed(12, 10, 4).eval(), torch.randn(1, 3, 16, 16)
    artifact = edgeprune.compile(net, example, tmp_path / "artifact", backend=Tvm(frontend="program"))
    assert artifact.manifest.host_parity["relative"] <= 1e-4
    assert [(one["shape"], one["dtype"]) for one in artifact.model["inputs"]] == [([1, 3, 16, 16], "float32")]
    searched, functions = backend.searched(artifact.engine)
    assert (searched, functions > 5) == (0, True)
    found = kernel_times(artifact, "local")
    assert len(found.kernels) >= functions
    with pytest.raises(ConfigError, match="the frontend must be one of onnx, program"):
        Tvm(frontend="caffe")


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-gcc") is None, reason="no cross compiler: apt install gcc-aarch64-linux-gnu"
)
def test_a_candidate_of_tuning_is_linked_for_the_board(backend, tmp_path):
    import tvm
    from tvm import relax

    source, target = tmp_path / "model.onnx", target_of(ARM)
    exporting.export(nn.Conv2d(3, 8, 3), (torch.randn(1, 3, 8, 8),), source)
    joined, _ = importing.fused(engines.optimized(source, "BASIC"), target)
    with tvm.target.Target(target.llvm):
        functions = relax.transform.FuseTIR()(joined).functions
    alone = next(normalized(one) for _, one in functions.items() if isinstance(one, tvm.tirx.PrimFunc))
    path = tmp_path / "candidate.so"
    path.write_bytes(candidate_engine.engine_of(alone, tvm.target.Target(target.llvm), target.linker()))
    told = engine_file.description_of(path)
    assert (told["architecture"], told["function"]) == ("aarch64", "main")
    # Input, weights and bias, and what is made of them.
    assert [1, 3, 8, 8] in [one["shape"] for one in told["arguments"]]
    assert told["arguments"][-1] == {"shape": [1, 8, 6, 6], "dtype": "float32"}
    if platform.machine() != "aarch64":
        with Board.open("local") as board:
            entry = {**upload(board, {"candidate": path}, kernels=())["candidate"], "kind": "function"}
            request = {"runtime": "tvm", "engines": {"candidate": entry}, "rounds": [["candidate"]]}
            with pytest.raises(BackendError, match="it is compiled for aarch64"):
                board.call("bench", request)
