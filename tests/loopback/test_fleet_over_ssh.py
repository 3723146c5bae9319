"""One artifact to several boards: folders of their own behind one real OpenSSH server, and an address that nobody answers."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.boards.config import BoardConfig, BoardEntry
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.fleet import FleetReport, Outcome, deploy_to
from edgeprune.errors import ConfigError
from edgeprune.testing import forking
from edgeprune.testing.sshd import OpenSshServer

pytestmark = pytest.mark.loopback

NAMES = ("a", "b", "c")


@pytest.fixture
def boards(sshd: OpenSshServer, tmp_path: Path, host_with: Callable[[Path], None]) -> Path:
    """Three boards and one that is away, in groups; the folder that holds the roots of the three."""
    host_with(sshd.config)
    config = BoardConfig()
    for name in NAMES:
        config.add(name, BoardEntry(ssh="board", python=sys.executable, root=str(tmp_path / f"root of {name}; $(id)")))
    config.add("away", BoardEntry(ssh=f"{sshd.user}@127.0.0.1:1"))
    with config.path.open("a") as stream:
        stream.write('\n[groups]\nhere = ["a", "b", "c"]\nsome = ["away", "a", "b"]\n')
    return tmp_path


def states(report: FleetReport) -> dict[str, str]:
    return {outcome.board: outcome.state for outcome in report.outcomes}


def running(boards: Path, name: str) -> str | None:
    link = boards / f"root of {name}; $(id)" / "current"
    return Artifact.load(link).id if link.is_symlink() else None


def test_board_that_is_away_is_pending_and_no_canary_and_a_second_run_skips_those_that_are_done(
    tiny_artifacts: list[Artifact], boards: Path
) -> None:
    told: list[str] = []
    report = deploy_to(
        tiny_artifacts[0],
        BoardConfig().members(["some"]),
        rounds=1,
        on_outcome=lambda outcome: told.append(outcome.board),
    )
    assert states(report) == {"away": "pending", "a": "deployed", "b": "deployed"}
    assert told[:2] == ["away", "a"], "the canary is the first that answers, and nobody else before it"
    assert (report.exit_code, report.stopped) == (3, None)
    assert [running(boards, name) for name in NAMES] == [tiny_artifacts[0].id, tiny_artifacts[0].id, None]
    assert report.outcomes[0].error == "ConnectError"
    assert report.outcomes[0].message is not None
    again = deploy_to(tiny_artifacts[0], ["a", "b"], rounds=1)
    assert states(again) == {"a": "ran already", "b": "ran already"}
    assert again.exit_code == 0


def test_canary_that_fails_a_gate_ends_it_before_any_other_board(tiny_artifacts: list[Artifact], boards: Path) -> None:
    report = deploy_to(tiny_artifacts[1], ["a", "b", "c"], rounds=1, budget_ms=1e-6)
    assert states(report) == {"a": "failed", "b": "not tried", "c": "not tried"}
    assert report.stopped == "canary board a failed"
    assert report.exit_code == 5
    assert "must be at most 1e-06 ms" in str(report.outcomes[0].message)
    assert [running(boards, name) for name in NAMES] == [None] * 3


@pytest.mark.slow
def test_failures_beyond_the_canary_stop_what_has_not_begun(tiny_artifacts: list[Artifact], boards: Path) -> None:
    damaged = boards / "root of b; $(id)"
    damaged.mkdir()
    (damaged / "releases").write_text("a file where the folder must be")
    report = deploy_to(tiny_artifacts[1], ["a", "b", "c"], at_once=1, rounds=1)
    assert states(report) == {"a": "deployed", "b": "failed", "c": "not tried"}
    assert report.stopped == "board b failed"
    assert report.exit_code != 0
    assert running(boards, "a") == tiny_artifacts[1].id


AWAY = ["ssh://ann@127.0.0.1:1", "ssh://bob@127.0.0.1:1", "ssh://eve@127.0.0.1:1"]


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, ZeroDivisionError])
def test_trouble_of_this_machine_loses_no_outcome(
    tiny_artifacts: list[Artifact], boards: Path, trouble: type[BaseException]
) -> None:
    told: list[str] = []

    def on_outcome(outcome: Outcome) -> None:
        told.append(outcome.board)
        if len(told) == 1:
            time.sleep(1.0)  # by now the others are through
            raise trouble

    with pytest.raises(trouble):
        deploy_to(tiny_artifacts[0], AWAY, canary=3, rounds=1, on_outcome=on_outcome)
    assert sorted(told) == AWAY


@pytest.mark.slow
def test_interrupt_leaves_every_board_as_it_was_or_wholly_switched(
    tiny_artifacts: list[Artifact], boards: Path
) -> None:
    seen = []

    def progress(board: str, state: str, done: int, total: int, message: str) -> None:
        if board != "a" and state == "stage" and not seen:
            seen.append(board)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        deploy_to(tiny_artifacts[0], ["a", "b", "c"], rounds=1, progress=progress)
    assert running(boards, "a") == tiny_artifacts[0].id
    assert {running(boards, name) for name in ("b", "c")} <= {None, tiny_artifacts[0].id}
    assert None in {running(boards, name) for name in ("b", "c")}
    report = deploy_to(tiny_artifacts[0], ["a", "b", "c"], rounds=1)
    assert set(states(report).values()) <= {"ran already", "deployed"}
    assert states(report)["a"] == "ran already"


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "at least one board"),
        (["a", "b", "a"], {}, "must be named once, found 'a' twice"),
        (["a"], {"canary": 0}, "canary must be at least 1, found 0"),
        (["a"], {"max_failures": 0}, "max-failures must be at least 1"),
        (["a"], {"at_once": 0}, "at-once must be at least 1"),
    ],
)
def test_fleet_that_cannot_be_is_refused(
    tiny_artifacts: list[Artifact], names: list[str], options: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        deploy_to(tiny_artifacts[0], names, **options)


@pytest.mark.slow
def test_verb_reports_every_board_and_ends_with_the_gravest_code(tiny_artifacts: list[Artifact], boards: Path) -> None:
    folder = boards / "two words"
    tiny_artifacts[0].folder.rename(folder)
    try:
        command = ("deploy", str(folder), "--to", "away,a", "--rounds", "1", "--json")
        done = forking.run(command, Path.cwd(), os.environ, 120)
    finally:
        kept = json.loads((boards / "two words.fleet.json").read_text())
        folder.rename(tiny_artifacts[0].folder)
    assert done.returncode == 3, done.stderr
    said = json.loads(done.stdout)
    assert [(one["board"], one["state"]) for one in said["boards"]] == [("away", "pending"), ("a", "deployed")]
    assert kept["boards"]["a"]["deployment"]["release"] == tiny_artifacts[0].release
    assert (boards / "two words.a.deployment.json").exists()
    assert running(boards, "a") == tiny_artifacts[0].id
