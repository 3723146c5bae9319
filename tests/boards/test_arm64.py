"""An arm64 Debian, *emulated* by qemu: set up from empty, deployed to, and refused what it cannot run. Nothing is timed there."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeprune.boards.board import Board
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.compiling import compile as compile_artifact
from edgeprune.deployment.deploying import deploy
from edgeprune.deployment.environment import set_up
from edgeprune.deployment.status import rollback, status
from edgeprune.errors import EmulatedProcessorError, IncompatibleTargetError, ParityError
from edgeprune.testing.arm64 import Arm64Board
from edgeprune.testing.sshd import OpenSshServer

pytestmark = [pytest.mark.boards, pytest.mark.slow]

RUNTIME = "1.23.2"
"""ONNX Runtime that imports under qemu 7.2; 1.31.1 dies of a segmentation fault there."""

URL = "ssh://board"


@pytest.fixture(scope="module", autouse=True)
def reached(arm64: Arm64Board, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("host")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPRUNE_SSH_CONFIG", str(arm64.config))
        patch.setenv("EDGEPRUNE_CONFIG", str(folder / "boards.toml"))
        patch.setenv("EDGEPRUNE_STATE", str(folder / "state"))
        patch.delenv("EDGEPRUNE_FAULT", raising=False)
        yield


@pytest.fixture(scope="module")
def ready(reached: None) -> str:
    """The board, set up from empty."""
    with Board.open(URL) as board:
        found = board.probe()
        assert "onnxruntime" not in found.runtimes
        assert board.run(["sh", "-c", "ls -A ~/.edgeprune | grep -v runner"]).stdout == b""
    made = set_up(URL, runtime_version=RUNTIME)
    assert (made.version, made.changed) == (RUNTIME, True)
    assert made.target.architecture == "aarch64"
    assert made.parity is not None
    assert made.parity.passed
    return URL


def network(seed: int, width: int = 8):
    """A small convolutional network."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(2 * width, 10),
    )


def compiled(folder: Path, seed: int, **options: object) -> Artifact:
    import torch

    return compile_artifact(network(seed), torch.randn(1, 3, 32, 32), folder, name=f"net{seed}", **options)


def test_board_is_what_it_is_and_says_that_it_is_emulated(ready: str) -> None:
    with Board.open(ready) as board:
        found = board.probe()
    assert found.architecture == "aarch64"
    assert found.facts["emulated"] is True
    assert {"asimd", "atomics", "asimddp"} <= set(found.isa)
    assert "avx2" not in found.isa
    assert found.runtimes["onnxruntime"]["version"] == RUNTIME
    assert found.disturbances[0].startswith("the processor is emulated")


def test_onnx_runtime_engine_is_deployed_passes_parity_and_is_not_timed(ready: str, tmp_path: Path) -> None:
    with Board.open(ready) as board:
        fingerprint = board.probe()
    made = [compiled(tmp_path / f"net{seed}", seed, fingerprint=fingerprint) for seed in (0, 1)]
    done = deploy(made[0], ready, health="true", health_window_s=60, steady_s=0.5)
    assert done.parity.passed
    assert done.parity.snr_db is None or done.parity.snr_db >= 80
    assert (done.measured_ms, done.latency_ms, done.ratio) == (None, None, None)
    assert done.conditions == {"emulated": True}
    assert deploy(made[1], ready).previous == done.release
    assert rollback(ready).current is not None
    current = status(ready).current
    assert current is not None
    assert current.name == "net0"


def test_release_answers_there_as_the_module_does_here(ready: str, tmp_path: Path) -> None:
    import torch

    with Board.open(ready) as board:
        labels = [f"class {number}" for number in range(10)]
        artifact = compiled(tmp_path / "net2", 2, fingerprint=board.probe(), labels=labels)
        deploy(artifact, board)
        image = torch.randn(1, 3, 32, 32)
        np.save(tmp_path / "image.npy", image.numpy())
        board.put(tmp_path / "image.npy", f"{board.root}/image.npy")
        name = artifact.model["inputs"][0]["name"]
        ran = board.run(
            [board.python, f"{board.root}/current/infer.py", f"{name}={board.root}/image.npy"], timeout_s=120
        )
    assert ran.returncode == 0, ran.stderr
    with torch.inference_mode():
        best = int(network(2).eval()(image).argmax())
    assert f"best: class {best}" in ran.stdout.decode()


def test_wrong_weight_does_not_pass_there(ready: str, tmp_path: Path) -> None:
    import torch

    artifact = compiled(tmp_path / "net3", 3)
    wrong = network(3)
    with torch.no_grad():
        wrong[-1].weight[:] *= 1.01
    other = compile_artifact(wrong, torch.randn(1, 3, 32, 32), tmp_path / "wrong", name="wrong")
    before = status(ready).current
    golden = (artifact.folder / "golden.npz").read_bytes()
    with pytest.raises(ParityError, match="must"):
        deploy(regolden(other, golden), ready)
    assert status(ready).current == before


def regolden(artifact: Artifact, golden: bytes) -> Artifact:
    """The artifact with the golden data of another one, consistent by its manifest."""
    from edgeprune.deployment.artifact import GOLDEN_NAME, describe_file
    from edgeprune.deployment.manifest import MANIFEST_NAME

    path = artifact.folder / GOLDEN_NAME
    path.write_bytes(golden)
    files = {**artifact.manifest.files, GOLDEN_NAME: describe_file(path)}
    manifest = artifact.manifest.model_copy(update={"files": files})
    (artifact.folder / MANIFEST_NAME).write_bytes(manifest.canonical())
    return Artifact.load(artifact.folder)


def test_nothing_is_timed_there(ready: str, tmp_path: Path) -> None:
    import torch

    import edgeprune

    artifact = compiled(tmp_path / "net4", 4)
    with pytest.raises(EmulatedProcessorError, match="must have a real processor to be held to a budget of"):
        deploy(artifact, ready, budget_ms=1000.0)
    with pytest.raises(EmulatedProcessorError, match="must have a real processor to be profiled"):
        edgeprune.profile(network(4), torch.randn(1, 3, 32, 32), ready, minutes=0.1)
    with Board.open(ready) as board, board.hold("a test"):
        engine = board.push(artifact.engine)
        request = {"engines": {"net": {"blob": engine}}, "rounds": [["net"]]}
        with pytest.raises(EmulatedProcessorError, match="found an emulated aarch64"):
            board.call("bench", request, timeout_s=120)


def test_verb_says_that_nothing_was_measured(ready: str, tmp_path: Path) -> None:
    artifact = compiled(tmp_path / "net5", 5)
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune", "deploy", str(artifact.folder), "--board", ready],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "not measured: the processor of board is emulated" in " ".join((done.stdout + done.stderr).split())


@pytest.fixture(scope="module")
def tvm(reached: None) -> str:
    """The board with TVM, beside ONNX Runtime where that is there already, and a cross compiler here."""
    import shutil

    pytest.importorskip("tvm", reason="TVM is not installed here: pip install 'edgeprune[tvm]'")
    if shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("no cross compiler here: apt install gcc-aarch64-linux-gnu")
    made = set_up(URL, backend="tvm")
    assert made.parity is not None
    assert made.parity.passed
    return URL


@pytest.fixture(scope="module")
def for_neoverse(tvm: str, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A TVM engine for the processor that the board has."""
    with Board.open(tvm) as board:
        found = board.probe()
    made = compiled(tmp_path_factory.mktemp("tvm") / "net6", 6, backend="tvm", fingerprint=found)
    assert made.manifest.requires["architecture"] == "aarch64"
    assert {"atomics", "asimddp"} <= set(made.manifest.requires["isa"])
    return made


def test_cross_compiled_tvm_engine_is_deployed_and_passes_parity(tvm: str, for_neoverse: Artifact) -> None:
    done = deploy(for_neoverse, tvm)
    assert done.parity.passed
    assert done.measured_ms is None


def test_tvm_engine_is_refused_by_a_processor_without_its_instructions(
    tvm: str, for_neoverse: Artifact, arm64: Arm64Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = status(tvm).current
    (tmp_path / "older").mkdir()
    older: OpenSshServer = arm64.with_processor(tmp_path / "older", "cortex-a57")
    with older:
        monkeypatch.setenv("EDGEPRUNE_SSH_CONFIG", str(older.config))
        with pytest.raises(IncompatibleTargetError, match=r"instruction sets .*none of .*asimddp.*atomics"):
            deploy(for_neoverse, tvm)
        with Board.open(tvm) as board:
            found = board.probe()
            assert not {"atomics", "asimddp"} & set(found.isa)
            fitting = compiled(tmp_path / "net7", 6, backend="tvm", fingerprint=found)
            assert deploy(fitting, board).parity.passed
    monkeypatch.undo()
    assert before is not None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the wrong architecture is that of this machine")
def test_engine_of_another_architecture_is_refused(tvm: str, tmp_path: Path) -> None:
    artifact = compiled(tmp_path / "net8", 8, backend="tvm")
    before = status(tvm).current
    with pytest.raises(IncompatibleTargetError, match="architecture x86_64, the board has aarch64"):
        deploy(artifact, tvm)
    assert status(tvm).current == before
