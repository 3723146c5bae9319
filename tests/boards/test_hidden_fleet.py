"""Boards that only a bastion reaches: real hosts in network namespaces, each with an OpenSSH server, and links that can fail."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.boards.board import Board
from edgeprune.boards.config import BoardConfig, BoardEntry
from edgeprune.boards.ssh import SshTransport
from edgeprune.boards.ssh_config import resolve, with_overrides
from edgeprune.boards.ssh_connection import show_host_key
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.fleet import FleetReport, deploy_to
from edgeprune.errors import ConnectError, HostKeyError
from edgeprune.testing.namespaces import HiddenFleet

pytestmark = pytest.mark.boards


@pytest.fixture
def named(fleet: HiddenFleet, tmp_path: Path, host_with: Callable[[Path], None]) -> Callable[[str], Path]:
    """The boards by name in the group ``fleet``: the first ones by alias, the last by its address and a jump host. The folder of
    each on this machine's disk, which the namespaces share."""
    host_with(fleet.config)

    def root(name: str) -> Path:
        return tmp_path / f"root of {name}"

    config = BoardConfig()
    *aliases, last = fleet.boards
    for name in aliases:
        config.add(name, BoardEntry(ssh=name, python=sys.executable, root=str(root(name))))
    server = fleet.servers[last]
    address = f"{server.user}@{fleet.address(last)}"
    shown = fleet.call(lambda: show_host_key(with_overrides(resolve(address), jumps=("bastion",))))
    direct = BoardEntry(
        ssh=address,
        jump="bastion",
        identity=str(server.identity),
        host_key=shown.fingerprint,
        python=sys.executable,
        root=str(root(last)),
    )
    config.add(last, direct)
    with config.path.open("a") as stream:
        stream.write(f"\n[groups]\nfleet = {json.dumps(list(fleet.boards))}\n")
    return root


def test_boards_are_reached_through_the_bastion_alone(fleet: HiddenFleet, named: Callable[[str], Path]) -> None:
    def where(target: str, **options: object) -> bytes:
        with SshTransport(target, connect_timeout_s=5, **options) as transport:
            return transport.run(["sh", "-c", "echo $BOARD"]).stdout

    first, *_, last = fleet.boards
    server = fleet.servers[last]
    assert [fleet.call(lambda name=name: where(name)) for name in fleet.boards] == [
        f"{name}\n".encode() for name in fleet.boards
    ]
    address = f"{server.user}@{fleet.address(last)}"
    keys = {"identity": server.identity, "known_hosts": server.known_hosts}
    with pytest.raises(ConnectError, match="must be reachable"):
        fleet.call(lambda: where(address, **keys))
    assert fleet.call(lambda: where(address, jump="bastion", **keys)) == f"{last}\n".encode()
    # The second hop is looked up and reached from the first, so a board can be the way to another only where it has one.
    with pytest.raises(ConnectError, match="cannot reach it"):
        fleet.call(lambda: where(address, jump=f"bastion,{first}", **keys))
    with pytest.raises(HostKeyError, match="must be known"):
        fleet.call(lambda: where(address, jump="bastion", known_hosts=Path("/dev/null")))


def test_board_behind_a_jump_host_is_added_and_probed_by_the_command_line(
    fleet: HiddenFleet, named: Callable[[str], Path], tmp_path: Path
) -> None:
    last = fleet.boards[-1]
    known = BoardConfig().get(last)
    edgeprune = [sys.executable, "-m", "edgeprune"]
    words = ["--ssh", known.ssh, "--jump", "bastion", "--identity", str(known.identity)]
    asked = fleet.run([*edgeprune, "device", "add", "hidden", *words, "--json"])
    assert asked.returncode == 3
    assert str(known.host_key) in asked.stderr
    words += ["--host-key", str(known.host_key), "--python", sys.executable, "--root", str(tmp_path / "hidden")]
    added = fleet.run([*edgeprune, "device", "add", "hidden", *words, "--json"])
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["jump"] == "bastion"
    assert BoardConfig().get("hidden").jump == "bastion"

    def probed() -> str:
        with Board.open("hidden") as board:
            return board.run(["sh", "-c", "echo $BOARD"]).stdout.decode()

    assert fleet.call(probed) == f"{last}\n"


def states(report: FleetReport) -> dict[str, str]:
    return {outcome.board: outcome.state for outcome in report.outcomes}


def running(root: Path) -> str | None:
    return Artifact.load(root / "current").id if (root / "current").is_symlink() else None


@pytest.mark.slow
def test_waves_go_on_around_a_host_that_was_dropped(
    fleet: HiddenFleet, named: Callable[[str], Path], tiny_artifacts: list[Artifact]
) -> None:
    canary, dropped, last = fleet.boards
    boards = BoardConfig().members(["fleet"])
    fleet.drop(dropped)
    try:
        report = fleet.call(lambda: deploy_to(tiny_artifacts[0], boards, rounds=1))
    finally:
        fleet.mend(dropped)
    assert states(report) == {canary: "deployed", dropped: "pending", last: "deployed"}
    assert report.exit_code == 3
    assert "the jump host" in str(report.outcomes[1].message)
    assert [running(named(name)) for name in boards] == [tiny_artifacts[0].id, None, tiny_artifacts[0].id]
    again = fleet.call(lambda: deploy_to(tiny_artifacts[0], boards, rounds=1))
    assert states(again) == {canary: "ran already", dropped: "deployed", last: "ran already"}
    assert again.exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("state", ["upload", "latency"])
def test_host_that_is_dropped_during_its_deployment_runs_what_it_ran(
    fleet: HiddenFleet, named: Callable[[str], Path], tiny_artifacts: list[Artifact], state: str
) -> None:
    canary, dropped, last = fleet.boards
    boards = [canary, dropped, last]
    assert fleet.call(lambda: deploy_to(tiny_artifacts[0], boards, rounds=1)).exit_code == 0
    gone = threading.Event()

    def progress(board: str, now: str, *_: object) -> None:
        if (board, now) == (dropped, state) and not gone.is_set():
            gone.set()
            fleet.drop(dropped)

    try:
        report = fleet.call(lambda: deploy_to(tiny_artifacts[1], boards, rounds=1, progress=progress))
    finally:
        fleet.mend(dropped)
    assert gone.is_set()
    assert states(report) == {canary: "deployed", dropped: "pending", last: "deployed"}
    assert [running(named(name)) for name in boards] == [
        tiny_artifacts[1].id,
        tiny_artifacts[0].id,
        tiny_artifacts[1].id,
    ]
    again = fleet.call(lambda: deploy_to(tiny_artifacts[1], boards, rounds=1))
    assert states(again) == {canary: "ran already", dropped: "deployed", last: "ran already"}


@pytest.mark.slow
def test_bastion_that_goes_away_leaves_every_board_as_it_was(
    fleet: HiddenFleet, named: Callable[[str], Path], tiny_artifacts: list[Artifact]
) -> None:
    boards = list(fleet.boards)
    assert fleet.call(lambda: deploy_to(tiny_artifacts[0], boards, rounds=1)).exit_code == 0
    bastion = fleet.servers["bastion"]

    def progress(board: str, now: str, *_: object) -> None:
        if now == "stage":
            bastion.cut()

    try:
        report = fleet.call(lambda: deploy_to(tiny_artifacts[1], boards, rounds=1, progress=progress))
    finally:
        bastion.start()
    assert set(states(report).values()) == {"pending"}
    assert [running(named(name)) for name in boards] == [tiny_artifacts[0].id] * 3
    assert fleet.call(lambda: deploy_to(tiny_artifacts[1], boards, rounds=1)).exit_code == 0
