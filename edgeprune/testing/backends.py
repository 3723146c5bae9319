"""Conformance suite of backends: subclass it, give the fixture `backend`, and run it on a host that has the runtime.

class TestMine(BackendConformance):
    @pytest.fixture
    def backend(self):
        return Mine()
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from edgeprune.backends._base import Backend
from edgeprune.boards.host import host_isa
from edgeprune.errors import BackendError, ExportError
from edgeprune.spec import Fingerprint, Kernel


class SmallNet(nn.Module):
    """Convolutions of awkward widths with a shortcut, a pool and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 20, 3, padding=1)
        self.conv2 = nn.Conv2d(20, 33, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(33, 33, 3, padding=1)
        self.head = nn.Linear(33, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        x = torch.relu(self.conv3(x) + x)
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


class Branches(nn.Module):
    """Control flow that depends on the data: nothing can export it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def keys(kernels: Iterable[Kernel]) -> Counter[str]:
    """Kernels as a multiset."""
    return Counter(kernel.key for kernel in kernels)


def _board(runtimes: dict[str, dict[str, str]]) -> Fingerprint:
    return Fingerprint(
        architecture=platform.machine(),
        cpu_model="any",
        isa=host_isa(),
        cores=1,
        caches_bytes={},
        memory_bytes=2**30,
        os="any",
        kernel="any",
        libc="any",
        python="3.11.0",
        runtimes=runtimes,
        power_mode=None,
        governor=None,
        free_disk_bytes=2**30,
        load=0.0,
    )


class BackendConformance:
    """What every backend promises."""

    @pytest.fixture
    def backend(self) -> Backend:
        """The backend under test."""
        raise pytest.UsageError("a subclass must override the fixture `backend`")

    @pytest.fixture
    def engine(self, backend: Backend, tmp_path: Path) -> Path:
        """An engine of `SmallNet`."""
        path = tmp_path / f"net{backend.suffix}"
        backend.export(SmallNet(), (torch.randn(1, 3, 16, 16),), path)
        return path

    def test_it_is_available_here(self, backend: Backend) -> None:
        assert backend.availability() is None
        assert backend.install

    def test_export_leaves_the_module_as_it_is_and_tells_shapes(self, backend: Backend, tmp_path: Path) -> None:
        net = SmallNet().train()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        inputs, outputs = backend.export(net, (torch.randn(2, 3, 16, 16),), tmp_path / f"net{backend.suffix}")
        assert net.training
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert [spec.shape for spec in (*inputs, *outputs)] == [(2, 3, 16, 16), (2, 5)]

    def test_what_cannot_be_exported_is_one_sentence_and_leaves_no_file(self, backend: Backend, tmp_path: Path) -> None:
        with pytest.raises(ExportError) as caught:
            backend.export(Branches(), (torch.randn(2, 3),), tmp_path / f"net{backend.suffix}")
        assert "\n" not in caught.value.message
        assert not list(tmp_path.iterdir())

    def test_operators_are_joined_to_traced_nodes(self, backend: Backend, engine: Path) -> None:
        graph = backend.operators(engine)
        program = torch.export.export(SmallNet().eval(), (torch.randn(1, 3, 16, 16),), strict=False)
        names = {node.name for node in program.graph.nodes}
        made = [name for operator in graph.operators for name in operator.outputs]
        assert made
        assert all(graph.sources.get(name) in names for name in made)
        known = {spec.name for spec in graph.inputs}
        for operator in graph.operators:
            assert set(operator.inputs) <= known, "operators must stand in an order in which they can run"
            known |= set(operator.outputs)

    def test_layout_rule_gives_what_the_runtime_executes(self, backend: Backend, engine: Path) -> None:
        graph = backend.operators(engine)
        found = backend.layout_rule(graph, graph.shapes, platform.machine(), host_isa())
        assert keys(found) == keys(backend.parse_engine(engine))

    def test_network_engine_runs_the_same_kernels(self, backend: Backend, engine: Path, tmp_path: Path) -> None:
        graph = backend.operators(engine)
        copy = tmp_path / f"copy{backend.suffix}"
        copy.write_bytes(backend.network_engine(graph, graph.shapes))
        assert keys(backend.parse_engine(copy)) == keys(backend.parse_engine(engine))

    def test_kernel_engines_are_small_and_differ_by_kernel(self, backend: Backend, engine: Path) -> None:
        kernels = set(backend.parse_engine(engine))
        files = {backend.kernel_engine(kernel) for kernel in kernels}
        assert len(files) == len(kernels)
        assert max(map(len, files)) < 1 << 16

    def test_a_damaged_engine_is_one_sentence(self, backend: Backend, tmp_path: Path) -> None:
        path = tmp_path / f"broken{backend.suffix}"
        path.write_bytes(b"not an engine")
        with pytest.raises(BackendError) as caught:
            backend.parse_engine(path)
        assert "\n" not in caught.value.message

    def test_requirements_name_what_a_bare_board_lacks(self, backend: Backend) -> None:
        unmet = [item for item in backend.requirements(_board({})) if not item.met]
        assert unmet
        assert all(item.field and item.needed and item.found and item.hint for item in unmet)
        equipped = _board({backend.name: {"version": "99.0.0", "sha256": "0" * 64}})
        assert not [item for item in backend.requirements(equipped) if not item.met and item.field == backend.name]
