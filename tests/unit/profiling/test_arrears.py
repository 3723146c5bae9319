"""What a board measured while nobody listened is not measured again: real engines, a real stop and kill of the host."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.boards.board import Board
from edgeprune.errors import RunnerEndedError
from edgeprune.profiling.arrears import Asked, unsettled
from edgeprune.profiling.measuring import measure
from edgeprune.profiling.rounds import Slot, slots
from edgeprune.profiling.uploads import upload

ORDER = slots([(0, ["a", "b"]), (1, ["c"])], "s")
SCRIPT = """
import sys
from pathlib import Path
from edgeprune.boards.board import Board
from edgeprune.profiling.measuring import measure
folder = Path(sys.argv[1])
engines = {path.stem: path for path in sorted(folder.glob("*.onnx"))}
with Board.open("local") as board:
    measure(board, engines, rounds=2, samples=2, sample_ms=4.0, warmup_ms=2.0, every=4, max_repeats=0,
            journal=folder / "run.jsonl")
"""


def test_of_a_call_without_an_end_the_journal_says_what_is_lacking() -> None:
    first, second = Asked.anew(0, 0, ORDER), Asked.anew(1, 0, ORDER)
    told = [{"kind": "unusable"}, {"kind": "call"}, {"kind": "sample"}]
    records: list[dict[str, Any]] = [first.record(), *told, {"kind": "end"}, second.record(), *told]
    assert unsettled([{"kind": "selection"}]) is None
    assert unsettled(records[:5]) is None
    found = unsettled(json.loads(json.dumps(records)))
    assert found == Asked(second.name, 1, 0, tuple(ORDER), have=3)
    assert (found.order[0], found.order[1]) == (Slot("s", opens=0), Slot("a", stretch=0))
    assert unsettled([*records, {"kind": "fetched"}]) is None


def test_what_was_on_its_way_when_the_host_died_is_fetched_and_nothing_is_doubled(
    conv_engine: Callable[..., bytes], tmp_path: Path, board: Board
) -> None:
    for channels in range(4, 52, 4):
        (tmp_path / f"conv{channels:02d}.onnx").write_bytes(conv_engine(channels))
    journal = tmp_path / "run.jsonl"
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=dict(os.environ))
    while not (journal.exists() and journal.read_bytes().count(b'"kind":"sample"') >= 2):
        assert child.poll() is None
        time.sleep(0.002)
    # It no longer reads, the board measures on, and what it tells goes into a pipe that is then thrown away.
    child.send_signal(signal.SIGSTOP)
    held = journal.read_bytes()
    (kept,) = (tmp_path / "board" / "measured").iterdir()
    end = time.monotonic() + 30
    while kept.read_bytes().count(b'"sample"') < held.count(b'"kind":"sample"') + 3 and time.monotonic() < end:
        time.sleep(0.01)
    child.kill()
    child.wait()
    measured = [json.loads(line) for line in kept.read_bytes()[: kept.read_bytes().rfind(b"\n")].splitlines()]
    said: list[str] = []
    engines: dict[str, bytes | Path] = {path.stem: path for path in sorted(tmp_path.glob("*.onnx"))}
    settings: dict[str, Any] = {"samples": 2, "sample_ms": 4.0, "warmup_ms": 2.0, "every": 4, "max_repeats": 0}
    measure(board, engines, rounds=2, journal=journal, told=said.append, **settings)

    lines = journal.read_bytes()
    assert lines.startswith(held)
    records = [json.loads(line) for line in lines.splitlines()]
    (fetched,) = (record for record in records if record["kind"] == "fetched")
    assert fetched["samples"] >= 3
    assert said[0].endswith(f"and {fetched['samples']} that the board had kept")
    samples = [record for record in records if record["kind"] == "sample"]
    wanted = [line["times_ms"] for line in measured if line["event"] == "sample"]
    assert [record["times_ms"] for record in samples[: len(wanted)]] == wanted, "each of them once, in their order"
    times = Counter((record["round"], record["id"]) for record in samples if record["stretch"] is not None)
    assert set(times.values()) == {1}
    assert len(times) == 2 * (len(engines) - 1)
    assert list((tmp_path / "board" / "measured").iterdir()) == []


def test_a_board_gives_whole_lines_from_where_it_is_asked_and_forgets(board: Board, tmp_path: Path) -> None:
    path = tmp_path / "board" / "measured" / "ab12.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"event": "ready", "seconds": 0.1}\n{"event": "sample", "seconds": 0.2}\n{"event": "samp')
    asked = Asked("ab12", 0, 0, (), have=1)
    assert asked.lines(board) == [{"event": "sample", "seconds": 0.2}]
    assert Asked("ab12", 0, 0, (), have=5).lines(board) == []
    assert Asked("cd34", 0, 0, ()).lines(board) == []
    outside = tmp_path / "board" / "precious.jsonl"
    outside.write_text("mine")
    board.call("kept", {"forget": ["../precious", "ab12", "cd34"]})
    assert (path.exists(), outside.exists()) == (False, True)


def test_a_full_disk_ends_the_copy_and_not_the_run(
    board: Board, conv_engine: Callable[..., bytes], tmp_path: Path
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this machine has no /dev/full")
    folder = tmp_path / "board" / "measured"
    folder.mkdir(parents=True)
    (folder / "full.jsonl").symlink_to("/dev/full")
    engines = upload(board, {"a": conv_engine(8)}, kernels=())
    events: list[dict[str, Any]] = []
    request = {"engines": engines, "rounds": [["a", "a"]], "samples": 1, "sample_ms": 1.0, "warmup_ms": 1.0}
    board.call("bench", {**request, "keep": "full"}, on_event=events.append)
    assert [event["event"] for event in events if event["event"] == "sample"] == ["sample", "sample"]


def timing_process(root: str) -> int:
    """Number of the process that times on a board with this folder."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if words[-2:-1] == [b"bench"] and root.encode() in words[1]:
                    return int(entry.name)
    raise AssertionError("nothing is timed")


def test_a_program_that_is_killed_on_the_board_loses_and_doubles_no_sample(
    board: Board, conv_engine: Callable[..., bytes], tmp_path: Path
) -> None:
    """As a board does that runs out of memory."""
    engines: dict[str, bytes | Path] = {f"conv{channels}": conv_engine(channels) for channels in range(4, 52, 4)}
    settings: dict[str, Any] = {"samples": 2, "sample_ms": 4.0, "warmup_ms": 2.0, "every": 4, "max_repeats": 0}
    journal = tmp_path / "run.jsonl"

    def kill(done: int, total: int, left_s: float, message: str) -> None:
        if done == 5:
            os.kill(timing_process(board.root), signal.SIGKILL)

    with pytest.raises(RunnerEndedError, match=r"'bench' must give a result, but it was killed by SIGKILL") as caught:
        measure(board, engines, rounds=2, journal=journal, progress=kill, **settings)
    assert (caught.value.exit_code, caught.value.hint) == (3, "look for memory running out on the board: dmesg")
    held = journal.read_bytes()
    assert held.count(b'"kind":"sample"') >= 5
    said: list[str] = []
    found = measure(board, engines, rounds=2, journal=journal, told=said.append, **settings)
    assert set(found.measurements) == set(engines)
    assert said[0].startswith("going on: ")
    assert journal.read_bytes().startswith(held)
    samples = [record for record in map(json.loads, journal.read_bytes().splitlines()) if record["kind"] == "sample"]
    times = Counter((record["round"], record["id"]) for record in samples if record["stretch"] is not None)
    assert set(times.values()) == {1}
    assert len(times) == 2 * (len(engines) - 1)
