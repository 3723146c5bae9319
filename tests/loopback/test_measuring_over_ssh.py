"""A measuring run over a real OpenSSH server whose link swallows what the board tells, and is then cut."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeprune.boards.board import Board
from edgeprune.errors import BoardBusyError, ConnectError, RemoteError
from edgeprune.profiling import afterwards
from edgeprune.profiling.journal import Journal
from edgeprune.profiling.measuring import measure
from edgeprune.profiling.percentiles import percentiles
from edgeprune.testing.proxy import FaultyLink
from edgeprune.testing.sshd import OpenSshServer

pytestmark = pytest.mark.loopback


def product(columns: int) -> bytes:
    """An engine of one matrix product."""
    weight = numpy_helper.from_array(np.full((64, columns), 0.01, np.float32), "w")
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [16, size]) for name, size in (("x", 64), ("y", columns))
    ]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", *([one] for one in tensors))
    graph.initializer.append(weight)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


SETTINGS: dict[str, Any] = {"rounds": 2, "samples": 2, "sample_ms": 4.0, "warmup_ms": 2.0, "every": 5, "max_repeats": 0}


@pytest.fixture(scope="module")
def engines() -> dict[str, bytes | Path]:
    return {f"product{columns}": product(columns) for columns in range(16, 336, 16)}


@dataclass
class Swallowing:
    """A link that passes nothing on once so much was measured, and is cut and mended once the board has measured more.

    Attributes:
        link: That link.
        url: Of the board behind it.
        root: Its folder.
    """

    link: FaultyLink
    url: str
    root: Path
    swallowed: bool = False

    def swallow(self, done: int, total: int, left_s: float, message: str) -> None:
        """A run's progress."""
        if done >= 4 and not self.swallowed:
            self.swallowed = True
            self.link.black_hole()

    def cut_later(self) -> None:
        end = time.monotonic() + 30
        while self._kept() < 10 and time.monotonic() < end:
            time.sleep(0.01)
        self.link.cut()
        self.link.mend()

    def _kept(self) -> int:
        return sum(path.read_bytes().count(b'"sample"') for path in (self.root / "measured").glob("*.jsonl"))


@pytest.fixture
def swallowing(sshd: OpenSshServer, tmp_path: Path) -> Iterator[Swallowing]:
    root = tmp_path / "board"
    with FaultyLink(sshd.host, sshd.port) as link:
        board = Swallowing(link, sshd.board_behind(link, root), root)
        cutting = threading.Thread(target=board.cut_later)
        cutting.start()
        yield board
        cutting.join()


def assert_each_once(records: list[dict[str, Any]], engines: dict[str, bytes | Path]) -> None:
    """Each item was measured once in each of two rounds."""
    times = Counter(
        (record["round"], record["id"])
        for record in records
        if record["kind"] == "sample" and record["stretch"] is not None
    )
    assert set(times.values()) == {1}
    assert len(times) == 2 * (len(engines) - 1)


def test_what_a_silent_link_swallowed_is_fetched_over_the_next(
    swallowing: Swallowing, engines: dict[str, bytes | Path], tmp_path: Path
) -> None:
    journal, said = tmp_path / "run.jsonl", []
    with pytest.raises(RemoteError), Board.open(swallowing.url) as board:
        measure(board, engines, journal=journal, progress=swallowing.swallow, **SETTINGS)
    arrived = journal.read_text().count('"kind":"sample"')
    with Board.open(swallowing.url) as board:
        measure(board, engines, journal=journal, told=said.append, **SETTINGS)
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    (fetched,) = (record for record in records if record["kind"] == "fetched")
    assert fetched["samples"] >= 3
    assert said == [
        f"going on: {arrived} measurements of the interrupted run are kept, and {fetched['samples']} that the board had kept"
    ]
    assert_each_once(records, engines)
    assert list((swallowing.root / "measured").iterdir()) == []


def test_a_board_that_comes_back_in_time_is_measured_further(
    swallowing: Swallowing, engines: dict[str, bytes | Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal, said, waited = tmp_path / "run.jsonl", [], []

    def progress(done: int, total: int, left_s: float, message: str) -> None:
        swallowing.swallow(done, total, left_s, message)
        if "waiting for the board" in message:
            waited.append(message)

    with Board.open(swallowing.url) as board, board.hold("a measurement"):
        found = measure(board, engines, journal=journal, progress=progress, told=said.append, wait_s=60.0, **SETTINGS)
        with (
            Board.open(swallowing.url) as other,
            pytest.raises(BoardBusyError, match="a measurement"),
            other.hold("mine"),
        ):
            pass
    assert set(found.measurements) == set(engines)
    assert waited
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert sum("is lost; waiting for it for up to 60 s" in message for message in warned) == 1
    assert sum("was lost on the way" in message for message in warned) == 1
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    (fetched,) = (record for record in records if record["kind"] == "fetched")
    assert fetched["samples"] >= 3
    (sentence,) = said
    assert "was lost, and came back after" in sentence
    assert sentence.endswith(f"; {fetched['samples']} measurements that it had kept were fetched")
    assert_each_once(records, engines)
    assert list((swallowing.root / "measured").iterdir()) == []


def test_a_board_that_stays_away_is_waited_for_no_longer_than_asked(
    sshd: OpenSshServer, engines: dict[str, bytes | Path], tmp_path: Path
) -> None:
    waited: list[float] = []

    def progress(done: int, total: int, left_s: float, message: str) -> None:
        if done == 4 and not waited:
            links.close()
        if "waiting for the board" in message:
            waited.append(time.monotonic())

    with ExitStack() as links:
        link = links.enter_context(FaultyLink(sshd.host, sshd.port))
        url = sshd.board_behind(link, tmp_path / "board")
        with pytest.raises(ConnectError, match=r"link to .* must stay up"), Board.open(url) as board:
            measure(board, engines, journal=tmp_path / "run.jsonl", progress=progress, wait_s=2.5, **SETTINGS)
        assert len(waited) >= 2
        assert time.monotonic() - waited[0] < 10
    assert '"kind":"sample"' in (tmp_path / "run.jsonl").read_text()


def test_what_is_timed_after_the_rounds_waits_for_the_board_too(
    sshd: OpenSshServer, engines: dict[str, bytes | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: engines[name] for name in ("product16", "product64")}
    monkeypatch.setattr(afterwards, "network_engines", lambda setting, selection: few)
    monkeypatch.setattr(afterwards, "timed_singly", partial(percentiles, rounds=2, runs=20))
    setting: Any = SimpleNamespace(runtime="onnxruntime", threads=1, wait_s=60.0, start_s=0.0)
    selection: Any = None
    said, waited = [], []
    with FaultyLink(sshd.host, sshd.port) as link:

        def progress(done: int, total: int, left_s: float, message: str) -> None:
            if "waiting for the board" in message:
                waited.append(message)
            elif done == 1 and not waited:
                link.cut()

        url = sshd.board_behind(link, tmp_path / "board")
        with (
            Board.open(url) as board,
            board.hold("a measurement"),
            Journal(tmp_path / "selection.jsonl", {}) as book,
        ):
            found = afterwards.percentiles(board, setting, selection, book, progress, said.append)
    assert set(found) == set(few)
    assert all(one["runs"] >= 40 for one in found.values())
    assert waited
    (sentence,) = said
    assert "was lost, and came back after" in sentence
