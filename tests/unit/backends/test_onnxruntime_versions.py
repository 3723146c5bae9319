"""Which ONNX is written for which ONNX Runtime, and that older files still hold the same model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgeprune.backends.onnxruntime.backend import OnnxRuntime
from edgeprune.backends.onnxruntime.runtime import onnxruntime
from edgeprune.backends.onnxruntime.versions import READS, OnnxVersions, oldest_reader, read_by, written_for
from edgeprune.boards.fingerprint import from_facts
from edgeprune.errors import ConfigError, ExportError
from edgeprune.spec import Fingerprint


class Net(nn.Module):
    """Operations whose form changed between opsets: reductions, splits, pads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(torch.nn.functional.pad(x, (1, 0, 0, 1))))
        left, right = x.chunk(2, dim=1)
        x = torch.cat([left.clamp(max=1.0), right.amax((2, 3), keepdim=True) + left], 1)
        return torch.softmax(self.head(x.mean((2, 3))), -1)


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def board(version: str | None) -> Fingerprint:
    runtimes = {} if version is None else {"onnxruntime": {"version": version, "sha256": "0" * 64}}
    return from_facts({"architecture": "aarch64", "runtimes": runtimes})


def test_the_table_only_grows() -> None:
    for older, newer in pairwise(READS.values()):
        assert older.opset <= newer.opset
        assert older.ir_version <= newer.ir_version


def test_every_row_s_opset_may_stand_in_its_ir_version() -> None:
    # onnx's own table: what a release of ONNX brought, the first that has an opset has the least IR version.
    least: dict[int, int] = {}
    for _, ir_version, opset, *_ in onnx.helper.VERSION_TABLE:
        least.setdefault(opset, ir_version)
    for release in READS:
        versions = written_for(".".join(map(str, release)))
        assert least[versions.opset] <= versions.ir_version


@pytest.mark.parametrize(
    ("runtime", "versions"),
    [
        ("1.31.1", (18, 9)),
        ("1.16.3", (18, 9)),
        ("1.15.1", (18, 9)),
        ("1.14.0", (18, 8)),
        ("1.13.1", (17, 8)),
        ("1.11.1", (16, 8)),
        ("1.10.0", (15, 8)),
        ("1.16.0+nv23.9", (18, 9)),
        ("0.5.0", (15, 8)),
        ("2.0", (18, 9)),
    ],
)
def test_what_is_written_goes_by_the_runtime(runtime: str, versions: tuple[int, int]) -> None:
    assert written_for(runtime) == versions


@given(st.sampled_from(sorted(READS)), st.integers(0, 9))
def test_what_is_written_for_a_runtime_it_and_all_newer_ones_read(release: tuple[int, int], patch: int) -> None:
    versions = written_for(f"{release[0]}.{release[1]}.{patch}")
    oldest = tuple(int(part) for part in oldest_reader(*versions).split("."))
    assert oldest <= release
    for newer in READS:
        if newer >= oldest:
            read = read_by(".".join(map(str, newer)))
            assert versions.opset <= read.opset
            assert versions.ir_version <= read.ir_version


def test_a_file_that_no_release_of_the_table_reads_needs_a_later_one() -> None:
    assert oldest_reader(23, 11) == "1.21"


def test_the_backend_of_a_board_writes_for_its_runtime_and_else_for_this_host_s() -> None:
    here = OnnxRuntime()
    assert here.versions == written_for(onnxruntime.__version__)
    assert here.for_board(board("1.13.1")).versions == (17, 8)
    assert here.for_board({"runtime": "onnxruntime", "runtime_version": "1.11.0", "isa": []}).versions == (16, 8)
    for unknown in (None, {"runtime": "tvm", "runtime_version": "0.27.0"}):
        assert here.for_board(unknown) is here
    for other in (board(None), board("unknown")):
        assert here.for_board(other).versions == here.versions


@pytest.mark.parametrize("versions", [(18, 8), (17, 8), (15, 8)])
def test_a_file_of_every_opset_computes_the_same(tmp_path: Path, versions: tuple[int, int]) -> None:
    from edgeprune.backends.onnxruntime import exporting

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(1, 3, 8, 8)
    path = tmp_path / "net.onnx"
    inputs, outputs = exporting.export(net, (x,), path, OnnxVersions(*versions))
    model = onnx.load(path)
    assert ([entry.version for entry in model.opset_import if not entry.domain], model.ir_version) == (
        [versions[0]],
        versions[1],
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {inputs[0].name: x.numpy()})
    np.testing.assert_allclose(found, net(x).detach().numpy(), atol=1e-6)
    assert outputs[0].shape == (1, 4)


def test_an_older_engine_remembers_its_nodes_and_makes_engines_of_its_own_opset(tmp_path: Path) -> None:
    backend = OnnxRuntime("1.13.1")
    path = tmp_path / "net.onnx"
    OnnxRuntime("1.31.1").export(net := Net(), (torch.randn(1, 3, 8, 8),), path)
    newer = backend.operators(path)
    backend.export(net, (torch.randn(1, 3, 8, 8),), path)
    graph = backend.operators(path)
    assert [operator.outputs for operator in graph.operators] == [operator.outputs for operator in newer.operators]
    assert graph.sources == newer.sources
    assert graph.shapes == newer.shapes
    kernels = backend.parse_engine(path)
    for content in [backend.network_engine(graph, graph.shapes), *map(backend.kernel_engine, kernels)]:
        model = onnx.load_from_string(content)
        assert next(entry.version for entry in model.opset_import if not entry.domain) == 17
        assert model.ir_version == 8
        onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def test_what_has_no_older_form_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="must be expressible in opset 16") as caught:
        OnnxRuntime("1.11.1").export(Normalized(), (torch.randn(2, 6),), tmp_path / "net.onnx")
    assert "edgeprune device setup BOARD" in (caught.value.hint or "")
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_is_too_old_for_a_file_is_told_what_reads_it() -> None:
    needs = {"opset": 18, "ir_version": 9}
    (lacking,) = OnnxRuntime().requirements(board("1.14.1"), needs)
    assert not lacking.met
    assert (lacking.needed, lacking.found) == (">= 1.15 to read opset 18 and IR version 9", "1.14.1")
    assert "edgeprune device setup BOARD, or compile it for what the board has" in (lacking.hint or "")
    (enough,) = OnnxRuntime().requirements(board("1.14.1"), {"opset": 18, "ir_version": 8})
    assert enough.met
    (none,) = OnnxRuntime().requirements(board(None), needs)
    assert none.hint == "edgeprune device setup BOARD"


def test_what_device_setup_installs() -> None:
    backend = OnnxRuntime()
    assert backend.board_packages()[0] == (f"onnxruntime=={onnxruntime.__version__}",)
    assert backend.board_packages("1.20.1") == (("onnxruntime==1.20.1",),)
    assert backend.board_packages("1.16.3") == (("onnxruntime==1.16.3", "numpy<2"),), "older wheels state no bound"
    for wrong in ("1.2", "newest", "1.20; rm"):
        with pytest.raises(ConfigError, match="the runtime's version must be one of ONNX Runtime from"):
            backend.board_packages(wrong)
