"""Clocks that are locked are put back, whoever is killed: fake vendor commands, real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeprune.boards.board import Board
from edgeprune.boards.device_types import device_type
from edgeprune.boards.local import LocalTransport
from edgeprune.errors import CommandError, ConfigError, ConnectError

# What the vendor's command does, with a file in place of the clocks; every call is recorded.
JETSON_CLOCKS = """#!/bin/sh
echo "jetson_clocks $*" >> "{calls}"
case "$1" in
    --show) cat "{clocks}" ;;
    --store) cp "{clocks}" "$2" ;;
    --restore) cp "$2" "{clocks}" ;;
    "") {locking} ;;
esac
"""
SUDO = '#!/bin/sh\n[ "$1" = -n ] || exit 9\nshift\nexec "$@"\n'
HOST = """
import sys, time
from edgeprune.boards.board import Board
from edgeprune.boards.device_types import device_type
from edgeprune.boards.local import LocalTransport

board = Board(LocalTransport(), name="orin", python=sys.executable, root=sys.argv[1], device=device_type("jetson-orin-nano"))
with board.hold("test"), board.lock_clocks():
    print("locked", flush=True)
    time.sleep(60)
"""


class Jetson:
    """A fake board: commands in a folder of the path, clocks in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.clocks = folder / "bin", folder / "calls", folder / "clocks"
        self.folder.mkdir()
        self.clocks.write_text("former\n")
        self.command("sudo", SUDO)
        self.jetson_clocks(f'echo locked > "{self.clocks}"')

    def command(self, name: str, script: str) -> None:
        path = self.folder / name
        path.write_text(script)
        path.chmod(0o755)

    def jetson_clocks(self, locking: str) -> None:
        self.command("jetson_clocks", JETSON_CLOCKS.format(calls=self.calls, clocks=self.clocks, locking=locking))

    def recorded(self) -> list[str]:
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [line.split("/")[0].strip() for line in lines if "--show" not in line]


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jetson:
    fake = Jetson(tmp_path)
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    return fake


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "board"


@pytest.fixture
def board(jetson: Jetson, root: Path) -> Iterator[Board]:
    device = device_type("jetson-orin-nano")
    with Board(LocalTransport(), name="orin", python=sys.executable, root=str(root), device=device) as opened:
        yield opened


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 15
    while not holds():
        assert time.monotonic() < end, "it did not come to hold within 15 s"
        time.sleep(0.05)


def at_peace(jetson: Jetson, root: Path) -> bool:
    return jetson.clocks.read_text() == "former\n" and not (root / "clocks.json").exists()


def lost(board: Board) -> bool:
    """Whether what is timed now would be refused."""
    try:
        board._require_held()
    except ConnectError as error:
        return "its clock lock was lost on the way" in error.message
    return False


def test_clocks_are_locked_for_a_while_and_the_states_are_told(board: Board, jetson: Jetson, root: Path) -> None:
    with board.hold("test"), board.lock_clocks() as told:
        assert jetson.clocks.read_text() == "locked\n"
        note = json.loads((root / "clocks.json").read_text())
        assert note["restore"][0]["argv"][-2:] == ["--restore", str(root / "jetson_clocks.conf")]
    assert at_peace(jetson, root)
    assert jetson.recorded() == ["jetson_clocks --store", "jetson_clocks", "jetson_clocks --restore"]
    assert told["ways"] == ["jetson_clocks"]
    states = [told[name]["jetson_clocks"] for name in ("before", "during", "after")]
    assert states == [["former"], ["locked"], ["former"]]
    assert told["restored"] is True


def test_clocks_are_put_back_after_ctrl_c(board: Board, jetson: Jetson, root: Path) -> None:
    with pytest.raises(KeyboardInterrupt), board.lock_clocks():
        raise KeyboardInterrupt
    assert at_peace(jetson, root)


def test_clocks_are_put_back_when_the_host_is_killed(board: Board, jetson: Jetson, root: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOST, str(root)], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == "locked\n"
        assert jetson.clocks.read_text() == "locked\n"
        host.send_signal(signal.SIGKILL)
    eventually(lambda: at_peace(jetson, root))
    with board.hold("test"), board.lock_clocks():
        assert jetson.clocks.read_text() == "locked\n"
    assert at_peace(jetson, root)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_clocks_are_put_back_when_their_process_is_killed(
    board: Board, jetson: Jetson, root: Path, number: signal.Signals
) -> None:
    with board.lock_clocks() as told:
        os.kill(told["pid"], number)
        eventually(lambda: at_peace(jetson, root))
        # A process that was asked to end says a last word first.
        eventually(lambda: lost(board))
    assert jetson.recorded()[-1] == "jetson_clocks --restore"


def test_what_a_killed_watchdog_left_is_undone_by_the_next_run(board: Board, jetson: Jetson, root: Path) -> None:
    with board.lock_clocks():
        note = (root / "clocks.json").read_text()
    jetson.clocks.write_text("locked\n")
    (root / "clocks.json").write_text(note)
    calls = len(jetson.recorded())
    with board.hold("any other run"):
        assert at_peace(jetson, root)
    assert jetson.recorded()[calls:] == ["jetson_clocks --restore"]
    # After a restart of the board the note says nothing: its clocks are what the start made them.
    (root / "clocks.json").write_text(json.dumps({**json.loads(note), "boot": "an earlier one"}))
    with board.hold("any other run"):
        assert not (root / "clocks.json").exists()
    assert len(jetson.recorded()) == calls + 1


def test_note_that_cannot_be_followed_is_kept_and_nothing_is_locked_over_it(
    board: Board, jetson: Jetson, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with board.lock_clocks():
        note = (root / "clocks.json").read_text()
    (root / "clocks.json").write_text(note)
    (root / "jetson_clocks.conf").unlink()
    with board.hold("test"):
        assert "clocks that a killed run left locked on board orin could not be restored" in caplog.text
        with pytest.raises(CommandError, match="could not be restored"), board.lock_clocks():
            pass
    assert (root / "clocks.json").exists()
    assert jetson.clocks.read_text() == "former\n"


def test_board_that_refuses_is_named_and_left_as_it_was(
    board: Board, jetson: Jetson, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jetson.command("jetson_clocks", '#!/bin/sh\necho "sudo: a password is required" >&2\nexit 1\n')
    named = "clocks to be locked, found: jetson_clocks: sudo: a password is"
    with pytest.raises(CommandError, match=named) as caught, board.lock_clocks():
        pytest.fail("it was not locked")
    assert caught.value.exit_code == 3
    assert "NOPASSWD" in str(caught.value)
    assert at_peace(jetson, root)
    (jetson.folder / "jetson_clocks").unlink()
    with pytest.raises(CommandError, match="there is no jetson_clocks"), board.lock_clocks():
        pytest.fail("it was not locked")


def test_lock_that_fails_half_way_is_undone(board: Board, jetson: Jetson, root: Path) -> None:
    jetson.jetson_clocks(f'echo half > "{jetson.clocks}"; exit 1')
    with pytest.raises(CommandError, match="jetson_clocks ended with exit code 1"), board.lock_clocks():
        pytest.fail("it was not locked")
    assert at_peace(jetson, root)
    assert jetson.recorded()[-1] == "jetson_clocks --restore"


def test_device_type_must_say_how(root: Path) -> None:
    for device, found in ((None, "of no known device type"), (device_type("android-arm64"), "names none")):
        board = Board(LocalTransport(), name="x", python=sys.executable, root=str(root), device=device)
        with board, pytest.raises(ConfigError, match=found), board.lock_clocks():
            pytest.fail("it was not locked")


def test_governors_of_all_cores_are_put_back_as_they_were(jetson: Jetson, root: Path, tmp_path: Path) -> None:
    sysroot = tmp_path / "sysroot"
    former = {}
    for core, governor in enumerate(("schedutil", "schedutil", "powersave")):
        path = sysroot / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor"
        path.parent.mkdir(parents=True)
        path.write_text(f"{governor}\n")
        former[path] = f"{governor}\n"
    with Board(LocalTransport(), name="pi", python=sys.executable, root=str(root)) as board:
        request: dict[str, Any] = {"root": str(root), "ways": ["cpufreq"], "sysroot": str(sysroot)}
        process = board.transport.open_process(
            [board.python, board._runner(), "clocks"], stdin=json.dumps(request).encode() + b"\n"
        )
        line = process.readline(20)
        assert line is not None
        held = json.loads(line)["clocks"]
        assert held["before"]["governors"] == ["powersave", "schedutil"]
        assert held["during"]["governors"] == ["performance"]
        assert {path.read_text() for path in former} == {"performance\n"}
        ended = process.close()
    result = json.loads(ended.stdout.splitlines()[-1])["result"]
    assert result["restored"] is True
    assert result["after"]["governors"] == ["powersave", "schedutil"]
    assert {path: path.read_text() for path in former} == former


# What `jetson_clocks --show` prints on a Jetson Nano, in the comments of github.com/rbonghi/jetson_stats.
SHOWN = "SOC family:tegra210  Machine:jetson-nano\nOnline CPUs: 0-1\n" + "".join(
    f"cpu{core}: Online=1 Governor=schedutil MinFreq=102000 MaxFreq=1428000 CurrentFreq=1428000 IdleStates: WFI=1 c7=1\n"
    for core in (0, 1)
)


def test_clocks_that_stay_free_though_the_command_succeeds_are_noticed(
    board: Board, jetson: Jetson, root: Path, tmp_path: Path
) -> None:
    jetson.clocks.write_text(SHOWN)
    jetson.jetson_clocks(":")
    named = "jetson_clocks: the clock of cpu0 is still free to go from 102000 to 1428000 kHz"
    with pytest.raises(CommandError, match=named) as caught, board.lock_clocks():
        pytest.fail("it was not locked")
    assert caught.value.hint == "measure without --lock-clocks"
    assert jetson.recorded()[-1] == "jetson_clocks --restore"
    assert not (root / "clocks.json").exists()
    locked = tmp_path / "locked"
    locked.write_text(SHOWN.replace("MinFreq=102000", "MinFreq=1428000"))
    jetson.jetson_clocks(f'cp "{locked}" "{jetson.clocks}"')
    with board.lock_clocks() as told:
        assert told["ways"] == ["jetson_clocks"]
    assert jetson.clocks.read_text() == SHOWN


NVIDIA_SMI = """#!/bin/sh
echo "$*" >> "{calls}"
case "$1" in
    --query-gpu=clocks.max.sm) echo 1980 ;;
    --lock-gpu-clocks=*) cat "{answer}" ;;
esac
"""
LOCKED = 'GPU clocks set to "(gpuClkMin 1980, gpuClkMax 1980)" for GPU 00000009:01:00.0\n'


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        (f"{LOCKED}All done.\n", None),
        # With exit code 0, as github.com/gperdrizet/PUBSUM quotes it for a K80.
        (
            "Setting locked GPU clocks is not supported for GPU 00000000:05:00.0.\nTreating as warning and moving on.\n",
            "found: nvidia_smi: Setting locked GPU clocks is not supported for GPU 00000000:05:00.0.",
        ),
        (
            f"{LOCKED}\nWarning: persistence mode is disabled on device 00000009:01:00.0.\n",
            "found: nvidia_smi: Warning: persistence mode is disabled on device 00000009:01:00.0.",
        ),
    ],
)
def test_a_gpu_whose_program_only_warns_is_not_taken_for_locked(
    jetson: Jetson, root: Path, tmp_path: Path, said: str, refused: str | None
) -> None:
    (tmp_path / "answer").write_text(said)
    jetson.command("nvidia-smi", NVIDIA_SMI.format(calls=jetson.calls, answer=tmp_path / "answer"))
    with Board(LocalTransport(), name="gpu", python=sys.executable, root=str(root)) as board:
        request: dict[str, Any] = {"root": str(root), "ways": ["nvidia_smi"]}
        process = board.transport.open_process(
            [board.python, board._runner(), "clocks"], stdin=json.dumps(request).encode() + b"\n"
        )
        line = process.readline(20)
        assert line is not None
        told = json.loads(line)
        process.close()
    if refused is None:
        assert told["clocks"]["ways"] == ["nvidia_smi"]
    else:
        assert (told["event"], told["error"]) == ("error", "CommandError")
        assert refused in told["message"]
    calls = [call for call in jetson.calls.read_text().splitlines() if "gpu-clocks" in call]
    assert calls == ["--lock-gpu-clocks=1980,1980", "--reset-gpu-clocks"]
