"""The measuring run on this machine: real engines, a real kill, a real disturbance."""

from __future__ import annotations

import contextlib
import json
import os
import random
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
from edgeprune.boards.local import LocalTransport
from edgeprune.cli.console import Progress
from edgeprune.errors import BackendError, BoardFullError, ConfigError
from edgeprune.profiling.measuring import MeasuredRun, measure
from edgeprune.profiling.statistics import Samples, summarize

# Whatever happens to the machine meanwhile, every round counts.
QUICK: dict[str, Any] = {
    "samples": 2,
    "sample_ms": 1.0,
    "warmup_ms": 1.0,
    "every": 3,
    "max_repeats": 0,
    "drift_limit": 1e9,
    "patience": 0.0,
}


def records(journal: Path, kind: str = "sample") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in journal.read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def test_every_item_is_measured_once_per_round_in_another_order_each(
    board: Board, conv_engine: Callable[..., bytes], tmp_path: Path
) -> None:
    engines: dict[str, bytes | Path] = {f"conv{channels}": conv_engine(channels) for channels in range(4, 40, 4)}
    journal = tmp_path / "run.jsonl"
    run = measure(board, engines, sentinel="conv32", rounds=3, seed=1, journal=journal, **QUICK)
    items = [record for record in records(journal) if record["stretch"] is not None]
    orders = [[record["id"] for record in items if record["round"] == number] for number in range(3)]
    assert all(sorted(order) == sorted(set(engines) - {"conv32"}) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    # Eight items in stretches of three: four sentinels per round.
    assert len([record for record in records(journal) if record["stretch"] is None]) == 12
    assert set(run.measurements) == set(engines)
    assert all(len(rounds_ms) == 3 for rounds_ms in run.rounds.values())
    assert run.measurements["conv36"].min_ms > run.measurements["conv4"].min_ms
    assert run.sentinel == "conv32"
    assert run.conditions["after"]["context"]["cpu_s"] > 0


def test_cost_of_the_call_is_taken_off_kernels_and_not_off_networks(
    board: Board, conv_engine: Callable[..., bytes], tmp_path: Path
) -> None:
    network = tmp_path / "network.onnx"
    # Far above the cost of a call: what is left of a sample has a least share, which must not come in here.
    network.write_bytes(conv_engine(64))
    engines = {"network": network, "kernel": conv_engine(64)}
    journal = tmp_path / "run.jsonl"
    run = measure(board, engines, rounds=3, kernels=["kernel"], journal=journal, **QUICK)
    assert 0.0005 < run.overhead_ms < 0.05
    for name, cost_ms in (("network", 0.0), ("kernel", run.overhead_ms)):
        timed = [[r for r in records(journal) if (r["id"], r["round"]) == (name, number)] for number in range(3)]
        raw_ms = [summarize([Samples.of(*found)]).median_ms for found in timed]
        assert run.rounds[name] == pytest.approx([value - cost_ms for value in raw_ms])


def test_kernel_that_does_next_to_nothing_is_kept_with_a_flag(board: Board, conv_engine: Callable[..., bytes]) -> None:
    run = measure(board, {"network": conv_engine(32), "nothing": _identity()}, rounds=2, kernels=["nothing"], **QUICK)
    assert "below-overhead" in run.flags["nothing"]
    assert run.measurements["nothing"].median_ms > 0


def test_kernel_that_the_board_cannot_run_is_left_out_with_the_reason(
    board: Board, conv_engine: Callable[..., bytes]
) -> None:
    engines = {"network": conv_engine(16), "good": conv_engine(8), "bad": b"not a model"}
    run = measure(board, engines, rounds=2, kernels=["good", "bad"], **QUICK)
    assert set(run.measurements) == {"network", "good"}
    assert "must load the engine" in run.unusable["bad"]


def test_network_that_the_board_cannot_run_is_an_error(board: Board, conv_engine: Callable[..., bytes]) -> None:
    with pytest.raises(BackendError, match="on the board must load the engine"):
        measure(board, {"a": conv_engine(8), "network": b"not a model"}, **QUICK)


def test_run_that_is_complete_is_answered_from_its_journal(
    board: Board, conv_engine: Callable[..., bytes], tmp_path: Path
) -> None:
    engines = {f"conv{channels}": conv_engine(channels) for channels in (8, 16)}
    journal = tmp_path / "run.jsonl"
    first = measure(board, engines, rounds=2, journal=journal, **QUICK)
    content = journal.read_bytes()
    assert measure(board, engines, rounds=2, journal=journal, **QUICK) == first
    assert journal.read_bytes() == content
    # More rounds go on where it ended; another seed is another run.
    longer = measure(board, engines, rounds=3, journal=journal, **QUICK)
    assert longer.rounds["conv8"][:2] == first.rounds["conv8"]
    assert len(longer.rounds["conv8"]) == 3
    measure(board, engines, rounds=1, seed=7, journal=journal, **QUICK)
    assert (tmp_path / "run.jsonl.other-1").exists()


def test_budget_ends_the_run_after_a_whole_round_but_not_before_two(
    board: Board, conv_engine: Callable[..., bytes]
) -> None:
    engines = {f"conv{channels}": conv_engine(channels) for channels in (8, 16)}
    told: list[tuple[int, int, float, str]] = []
    run = measure(board, engines, rounds=50, budget_s=0.01, progress=lambda *state: told.append(state), **QUICK)
    assert {len(rounds_ms) for rounds_ms in run.rounds.values()} == {2}
    assert told[0][2] == 0.01, "nothing is measured yet, and there is no more time than that"
    done, total, left_s, _ = told[-1]
    assert done == total
    assert left_s == 0.0
    assert [state[0] for state in told] == sorted(state[0] for state in told)


class Bar:
    """What the bar of a display was told."""

    def __init__(self) -> None:
        self.shown: list[dict[str, Any]] = []

    def add_task(self, text: str, **state: Any) -> int:
        return 0

    def update(self, task: int, **state: Any) -> None:
        self.shown.append(state)


def test_two_stages_are_one_share_on_the_display_and_neither_says_that_all_is_done(
    board: Board, conv_engine: Callable[..., bytes]
) -> None:
    bar, later_s = Bar(), 65.0
    display = Progress("profile", bar)

    def first(done: int, total: int, left_s: float, message: str) -> None:
        display.timed(done, total, left_s + later_s, message)

    for sizes, told, budget_s in (((8, 16, 24), first, 5.0), ((32, 40), display.timed, later_s)):
        engines = {f"conv{channels}": conv_engine(channels) for channels in sizes}
        measure(board, engines, rounds=3, budget_s=budget_s, progress=told, **QUICK)
    shares = [state["completed"] / state["total"] for state in bar.shown]
    assert shares == sorted(shares)
    assert len(set(shares)) > 2
    assert shares[-1] < 1
    begins = [state["left"] for state in bar.shown if "bringing the engines" in state["description"]]
    assert begins == ["about 1:10 left", "about 1:05 left"], "what was not measured yet takes as long as it may"


def test_stretches_are_repeated_while_there_is_time(board: Board, conv_engine: Callable[..., bytes]) -> None:
    """A limit of zero makes every stretch drift, so that repeats go on as long as they may."""
    engines = {f"conv{channels}": conv_engine(channels) for channels in (8, 16)}
    settings = {**QUICK, "max_repeats": 2, "drift_limit": 0.0}
    run = measure(board, engines, rounds=1, **settings)
    assert run.repeated_rounds == 2
    assert "drifted" in run.flags["conv16"]
    assert len(run.rounds["conv16"]) == 1
    assert measure(board, engines, rounds=1, budget_s=0.0, **settings).repeated_rounds == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engines": {}}, "there must be at least one engine to measure, found none"),
        ({"engines": {"a": b""}, "sentinel": "b"}, "sentinel and kernels must be ids of engines, found 'b'"),
        ({"engines": {"a": b""}, "kernels": ["c"]}, "sentinel and kernels must be ids of engines, found 'c'"),
        ({"engines": {"a": b""}, "rounds": 0}, "rounds must be at least 1, found 0"),
    ],
)
def test_request_that_makes_no_sense_is_refused(board: Board, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(board, **arguments)


def test_disk_of_the_board_that_fills_up_in_the_middle_stops_only_what_needs_it_and_loses_nothing(
    small_disk: Callable[[str], Path], conv_engine: Callable[..., bytes], tmp_path: Path
) -> None:
    disk, journal = small_disk("8m"), tmp_path / "run.jsonl"
    board = Board(LocalTransport(), name="tiny", python=sys.executable, root=str(disk / "root"))
    engines: dict[str, bytes | Path] = {f"conv{channels}": conv_engine(channels) for channels in (8, 12, 16, 20)}
    filler = disk / "somebody else's file"

    def fill(done: int, total: int, left_s: float, message: str) -> None:
        if done >= 2 and not filler.exists():
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass

    # Several calls to the board after that: nothing is written there to time what is there.
    run = measure(board, engines, rounds=2, journal=journal, progress=fill, **{**QUICK, "every": 2, "per_call": 2})
    assert os.statvfs(disk).f_bavail <= 1, "what the board had kept for the host may be gone again"
    assert {len(rounds_ms) for rounds_ms in run.rounds.values()} == {2}
    # What is sent there afterwards is refused before anything of it is timed, and goes on once there is space.
    further = {**engines, "conv24": conv_engine(24)}
    again = tmp_path / "again.jsonl"
    with pytest.raises(BoardFullError, match=r"board tiny must have .* free under .*, found "):
        measure(board, further, rounds=1, journal=again, **QUICK)
    assert records(again) == []
    filler.unlink()
    assert set(measure(board, further, rounds=1, journal=again, **QUICK).measurements) == set(further)


SCRIPT = """
import sys
from pathlib import Path
from edgeprune.boards.board import Board
from edgeprune.profiling.measuring import measure
folder = Path(sys.argv[1])
engines = {path.stem: path for path in sorted(folder.glob("*.onnx"))}
with Board.open("local") as board:
    measure(board, engines, rounds=3, samples=2, sample_ms=4.0, warmup_ms=2.0, every=3, max_repeats=1,
            seed=5, journal=folder / "run.jsonl")
"""


def test_run_that_is_killed_again_and_again_loses_and_doubles_no_sample(
    conv_engine: Callable[..., bytes], tmp_path: Path
) -> None:
    for channels in range(4, 36, 4):
        (tmp_path / f"conv{channels:02d}.onnx").write_bytes(conv_engine(channels))
    journal = tmp_path / "run.jsonl"
    environment = {**os.environ, "EDGEPRUNE_ROOT": str(tmp_path / "board")}
    source = random.Random(11)
    kept: list[str] = []
    kills = 0
    for _ in range(40):
        child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment)
        sizes = journal.stat().st_size if journal.exists() else 0
        patience = source.randrange(1, 12)
        # Killed after a random number of new records, at a random instant between two.
        while child.poll() is None and kills < 4:
            if journal.exists() and journal.read_bytes()[sizes:].count(b"\n") >= patience:
                time.sleep(source.uniform(0.0, 0.03))
                child.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        if child.wait() == 0:
            break
        content = journal.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].decode().splitlines()
        assert lines[: len(kept)] == kept
        kept = lines
    else:
        pytest.fail("the run never ended")
    assert kills == 4
    assert journal.read_text().splitlines()[: len(kept)] == kept
    assert list(tmp_path.glob("run.jsonl.other-*")) == []
    items = [record for record in records(journal) if record["stretch"] is not None]
    times = Counter((record["round"], record["attempt"], record["id"]) for record in items)
    assert max(times.values()) == 1
    first = {(number, name) for number, attempt, name in times if attempt == 0}
    assert first == {(number, f"conv{channels:02d}") for number in range(3) for channels in range(8, 36, 4)}
    # Nothing is left to measure: every stretch of the three rounds has its closing sentinel.
    closed = {(record["round"], record["closes"]) for record in records(journal) if record["attempt"] == 0}
    assert closed - {(0, None), (1, None), (2, None)} == {
        (number, stretch) for number in range(3) for stretch in range(3)
    }


# Slow tier: how much the programs take from the runner is the scheduler's to say.
@pytest.mark.slow
def test_disturbance_is_seen_by_the_sentinel_and_its_stretch_repeated(
    board: Board, conv_engine: Callable[..., bytes], tmp_path: Path
) -> None:
    """Programs that keep every core busy in the last round, until a stretch is repeated."""
    engines: dict[str, bytes | Path] = {f"conv{channels}": conv_engine(channels) for channels in (32, 8, 12, 16, 20)}
    journal = tmp_path / "run.jsonl"
    burners: list[subprocess.Popen[bytes]] = []

    def disturb(done: int, total: int, left_s: float, message: str) -> None:
        if message == "round 3" and not burners:
            burners.extend(
                # Each in a session of its own: schedulers that group by session would give all of them one share.
                subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
                for _ in range(2 * len(os.sched_getaffinity(0)))
            )
        elif "repeat" in message:
            for burner in burners:
                burner.kill()

    # Samples so long that none escapes the scheduler, and a round so long that the programs are up before it ends.
    settings: dict[str, Any] = {"samples": 1, "sample_ms": 100.0, "warmup_ms": 5.0, "every": 2}
    try:
        run: MeasuredRun = measure(board, engines, rounds=3, journal=journal, progress=disturb, **settings)
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    assert burners
    again = {(record["round"], record["stretch"]) for record in records(journal) if record["attempt"]}
    repeated = {stretch for number, stretch in again if number == 2 and stretch is not None}
    assert repeated
    assert run.repeated_rounds >= len(repeated)
    # One attempt counts, the others are not averaged into it.
    assert {len(rounds_ms) for rounds_ms in run.rounds.values()} == {3}


def test_first_round_is_repeated_when_the_others_show_that_it_was_disturbed(
    board: Board, conv_engine: Callable[..., bytes], tmp_path: Path
) -> None:
    engines: dict[str, bytes | Path] = {f"conv{channels}": conv_engine(channels) for channels in (32, 8, 12, 16, 20)}
    journal = tmp_path / "run.jsonl"
    settings = {**QUICK, "every": 2, "drift_limit": 4.0, "max_repeats": 1}
    measure(board, engines, rounds=1, journal=journal, **settings)
    # As if everything had taken twenty times as long meanwhile.
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "sample":
            line["times_ms"] = [20 * time_ms for time_ms in line["times_ms"]]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = measure(board, engines, rounds=3, journal=journal, **settings)
    again = {(record["round"], record["id"]) for record in records(journal) if record["attempt"]}
    assert {(0, name) for name in engines} <= again
    for rounds_ms in run.rounds.values():
        assert len(rounds_ms) == 3
        assert rounds_ms[0] < 8 * min(rounds_ms[1:])
    # What was repeated holds, and is not repeated again.
    content = journal.read_bytes()
    assert measure(board, engines, rounds=3, journal=journal, **settings) == run
    assert journal.read_bytes() == content


def _identity() -> bytes:
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "identity",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8).SerializeToString()
    )
