"""Candidates of TVM's tuning, timed on a board behind a real OpenSSH server, over a link that is lost meanwhile.

The quick tests bring a stand-in for TVM to the board, whose libraries are texts that say how their functions behave: what is
tested is the way there and back. The slow one tunes a small network with TVM.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.backends import registry
from edgeprune.backends.tvm import board_timing, engine_file, tuning_database
from edgeprune.backends.tvm.backend import Tvm
from edgeprune.backends.tvm.board_timing import BoardTiming
from edgeprune.backends.tvm.tuning import Tuning
from edgeprune.boards.board import Board
from edgeprune.boards.ssh import SshTransport
from edgeprune.deployment.beside import beside_onnxruntime
from edgeprune.errors import BackendUnavailableError
from edgeprune.testing.proxy import FaultyLink

pytestmark = pytest.mark.loopback

STAND_IN = '''
"""What the board's program calls of TVM."""

import os
import time

__version__ = "0.27.0"


def get_global_func(name):
    return lambda *arguments: None


class runtime:
    @staticmethod
    def tensor(array):
        return array

    @staticmethod
    def load_module(path):
        with open(path, "rb") as file:
            kind, _, value = file.readline().decode().strip().partition(" ")
        if kind == "unknown":
            raise RuntimeError("no such instruction")
        if kind == "unloadable":
            os._exit(11)
        calls = []

        def main(*arguments):
            calls.append(arguments)
            if kind == "dies" and len(calls) > 1:
                os._exit(11)
            if kind == "hangs":
                time.sleep(600)
            if kind == "tells" and not os.path.exists(value):
                open(value, "w").close()
                time.sleep(1.5)
            end = time.perf_counter() + (float(value) if kind == "runs" else 1e-3)
            while time.perf_counter() < end:
                pass

        return {"main": main}
'''


def python_with(folder: Path, *paths: str) -> str:
    """A Python of the board that finds other modules first: a session over SSH has an environment of its own."""
    path = folder / "python"
    paths_ = shlex.quote(os.pathsep.join(paths))
    path.write_text(f'#!/bin/sh\nPYTHONPATH={paths_} exec {shlex.quote(sys.executable)} "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def far(far_board: SshTransport, tmp_path: Path) -> Iterator[Board]:
    """A board with the stand-in, behind the proxy, and held."""
    (tmp_path / "modules" / "tvm").mkdir(parents=True)
    (tmp_path / "modules" / "tvm" / "__init__.py").write_text(STAND_IN)
    python = python_with(tmp_path, str(tmp_path / "modules"))
    board = Board(far_board, name="far", python=python, root=str(tmp_path / "root"))
    with board.hold("tune"):
        yield board


@pytest.fixture
def candidate(tmp_path: Path) -> Callable[[str], Path]:
    """Writes an engine whose function behaves as a text says."""

    def made(behavior: str) -> Path:
        path = tmp_path / f"{len(list(tmp_path.glob('*.so')))}.so"
        described = {
            "architecture": platform.machine(),
            "function": "main",
            "arguments": [{"shape": [4], "dtype": "float32"}],
        }
        path.write_bytes(engine_file.packed(f"{behavior}\n".encode(), described))
        return path

    return made


def test_candidates_that_fail_cost_only_themselves_and_nothing_stays_on_the_board(
    far: Board, candidate: Callable[[str], Path]
) -> None:
    behaviors = ("runs 0.003", "unknown", "unloadable", "dies", "runs 0.001")
    with BoardTiming(far) as timing:
        slow, *failed, quick = timing.seconds([candidate(one) for one in behaviors])
        assert failed == [None, None, None]
        assert slow is not None
        assert quick is not None
        assert 1e-3 <= quick < slow
        assert slow >= 3e-3
    assert list((Path(far.root) / "store").iterdir()) == []
    assert list((Path(far.root) / "incoming").glob("*")) == []


def test_a_candidate_that_never_ends_is_given_up(
    far: Board, candidate: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board_timing, "_START_S", 8.0)
    monkeypatch.setattr(board_timing, "_EACH_S", 0.1)
    with BoardTiming(far) as timing:
        hung, fine = timing.seconds([candidate("hangs"), candidate("runs 0.001")])
    assert hung is None
    assert fine is not None


def test_a_link_that_is_lost_is_waited_for_and_what_was_timed_is_not_timed_again(
    far: Board, link: FaultyLink, candidate: Callable[[str], Path], tmp_path: Path
) -> None:
    begun, told, waiting = tmp_path / "begun", [], []

    def cut() -> None:
        end = time.monotonic() + 30
        while not begun.exists() and time.monotonic() < end:
            time.sleep(0.01)
        link.cut()

    other = threading.Thread(target=cut)
    other.start()
    with BoardTiming(far, waiting.append, told.append) as timing:
        found = timing.seconds([candidate("runs 0.001"), candidate(f"tells {begun}")])
    other.join()
    assert None not in found
    assert timing.waited_s > 0
    assert 0 < waiting[0] <= 300
    assert told[0].startswith("the link to board far was lost, and came back after ")


def test_a_board_without_tvm_says_how_it_gets_it(
    far_board: SshTransport, tmp_path: Path, candidate: Callable[[str], Path]
) -> None:
    (tmp_path / "tvm.py").write_text("raise ImportError('none here')\n")
    board = Board(far_board, name="bare", python=python_with(tmp_path, str(tmp_path)), root=str(tmp_path / "root"))
    with (
        board.hold("tune"),
        BoardTiming(board) as timing,
        pytest.raises(BackendUnavailableError, match="must have tvm to run engines") as caught,
    ):
        timing.seconds([candidate("runs 0.001")])
    assert caught.value.hint == "edgeprune device setup bare --backend tvm"


class Net(nn.Module):
    """Two layers that are tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))))


@pytest.mark.slow
def test_a_network_is_tuned_on_the_board_with_the_link_cut_on_the_way(
    far_board: SshTransport, link: FaultyLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        registry.get("tvm")
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("EDGEPRUNE_STATE", str(tmp_path / "state"))
    python = python_with(tmp_path, *(path for path in sys.path if path))
    board = Board(far_board, name="far", python=python, root=str(tmp_path / "root"))
    said: list[str] = []
    cuts: list[int] = []

    def progress(done: int, *_: object) -> None:
        if done >= 8 and not cuts:
            cuts.append(done)
            # In the middle of what is brought there next.
            link.cut_after(12_000)

    torch.manual_seed(0)
    net, example = Net().eval(), torch.randn(1, 8, 12, 12)

    def compiled(name: str, tuning: Tuning | None) -> edgeprune.Artifact:
        return edgeprune.compile(net, example, tmp_path / name, backend=Tvm(tuning=tuning), board=board)

    tuned = compiled("tuned", Tuning(200, 28, progress=progress, told=said.append))
    assert cuts
    assert "28 trials: 2 functions" in said[-1]
    target = Tvm().for_board(board.probe()).target
    known = tuning_database.found(target)
    assert known is not None
    assert len(known.records) == 28
    assert any(known.best(index)[0].searched for index in range(len(known.workloads)))
    assert tuned.manifest.host_parity["relative"] <= 1e-4
    assert list((Path(board.root) / "store").iterdir()) == []

    # What is known is used without a word to the board; a further tuning goes on with it.
    assert compiled("again", None).engine.read_bytes() == tuned.engine.read_bytes()
    compiled("further", Tuning(100, 4, told=said.append))
    assert "4 trials: 2 functions, 2 of them known" in said[-1]

    found = beside_onnxruntime(tuned, net, example, board=board)
    assert str(found).startswith("on board far tvm takes ")
