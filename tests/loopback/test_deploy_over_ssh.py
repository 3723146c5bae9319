"""Deployments to a board behind a real OpenSSH server."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.deploying import deploy
from edgeprune.deployment.status import rollback, status
from edgeprune.errors import (
    BoardBusyError,
    CommandError,
    ConnectError,
    DeployError,
    HealthError,
    LatencyGateError,
    RemoteError,
)
from edgeprune.testing import forking
from edgeprune.testing.proxy import FaultyLink
from edgeprune.testing.sshd import OpenSshServer

pytestmark = pytest.mark.loopback


@pytest.fixture(scope="module")
def artifacts(two_of: Callable[..., list[Artifact]]) -> list[Artifact]:
    """Two artifacts that are large enough for an upload to take several packets."""
    from torch import nn

    return two_of(lambda: nn.Sequential(nn.Flatten(), nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 10)), 1, 3, 10, 10)


@pytest.fixture
def root(sshd: OpenSshServer, tmp_path: Path, host_with: Callable[[Path], None]) -> Path:
    """Folder on the board for this test alone."""
    host_with(sshd.config)
    return tmp_path / "board root"


@pytest.fixture(scope="module")
def deployed(sshd: OpenSshServer, artifacts: list[Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder on a board to which the first artifact was deployed."""
    folder = tmp_path_factory.mktemp("deployed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPRUNE_SSH_CONFIG", str(sshd.config))
        patch.setenv("EDGEPRUNE_CONFIG", str(folder / "boards.toml"))
        patch.setenv("EDGEPRUNE_STATE", str(folder / "state"))
        deploy(artifacts[0], url_of(folder / "root"), rounds=1)
    return folder / "root"


@pytest.fixture
def running(root: Path, deployed: Path) -> Path:
    """As `root`, but the board runs the first artifact already."""
    shutil.copytree(deployed, root, symlinks=True)
    return root


@pytest.fixture
def url(root: Path) -> str:
    return url_of(root)


def url_of(root: Path) -> str:
    return f"ssh://board?python={quote(sys.executable)}&root={quote(str(root))}"


def assert_runs(root: Path, *allowed: Artifact) -> None:
    assert Artifact.load(root / "current").id in {artifact.id for artifact in allowed}


def deploy_soon(artifact: Artifact, url: str) -> None:
    """Deploy, waiting for the lock of a host that was just killed: it goes when the board sees the end of the link."""
    deadline = time.monotonic() + 20
    while True:
        try:
            deploy(artifact, url, rounds=1)
            return
        except BoardBusyError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_deploy_twice_then_roll_back(artifacts: list[Artifact], root: Path, url: str) -> None:
    first = deploy(artifacts[0], url, rounds=1)
    assert first.changed
    assert first.bytes_sent == artifacts[0].size_bytes
    again = deploy(artifacts[0], url, rounds=1)
    assert not again.changed
    assert again.bytes_sent == 0
    second = deploy(artifacts[1], url, rounds=1)
    assert second.previous == first.release
    assert_runs(root, artifacts[1])
    assert rollback(url).current is not None
    assert_runs(root, artifacts[0])
    with pytest.raises(DeployError, match="must keep an earlier release to roll back to, found none"):
        rollback(url)


def test_gate_that_fails_leaves_the_board_as_it_was(artifacts: list[Artifact], running: Path, url: str) -> None:
    with pytest.raises(LatencyGateError, match=rf"still runs {artifacts[0].release} \(net0\)\."):
        deploy(artifacts[1], url, rounds=1, budget_ms=1e-6)
    assert_runs(running, artifacts[0])


@pytest.mark.parametrize("state", ["upload", "latency", "activate", "board:copied", "board:switched"])
def test_kill_of_either_side_leaves_current_valid_and_a_second_run_converges(
    artifacts: list[Artifact], running: Path, url: str, state: str
) -> None:
    environment = {**os.environ, "EDGEPRUNE_FAULT": f"after:{state}"}
    command = ("deploy", str(artifacts[1].folder), "--board", url, "--rounds", "1")
    killed = forking.run(command, Path.cwd(), environment, 120)
    # Where only the runner died after the switch, the deployment sees that it is through, and goes on.
    codes = {"board:copied": CommandError.exit_code, "board:switched": 0}
    assert killed.returncode == codes.get(state, 137), killed.stderr
    assert_runs(running, artifacts[1 if state in ("activate", "board:switched") else 0])
    deploy_soon(artifacts[1], url)
    assert_runs(running, artifacts[1])
    found = status(url)
    assert found.confirmed
    assert found.previous is not None
    assert found.previous.name == "net0"


def test_link_that_is_cut_during_a_deployment_leaves_current_valid_and_then_the_board_is_offline(
    artifacts: list[Artifact], sshd: OpenSshServer, root: Path
) -> None:
    with FaultyLink(sshd.host, sshd.port) as link:
        url = sshd.board_behind(link, root)
        deploy(artifacts[0], url, rounds=1)
        sent = link.sent_bytes
        for share in (0.02, 0.2, 0.5, 0.8):
            link.cut_after(int(sent * share))
            try:
                deploy_soon(artifacts[1], url)
            except RemoteError:
                assert_runs(root, *artifacts)
        # A deployment that was through before its cut leaves that cut pending.
        link.mend()
        deploy_soon(artifacts[1], url)
        assert_runs(root, artifacts[1])
        assert status(url).online
    time.sleep(0.05)
    away = status(url)
    assert not away.online
    assert away.current is not None
    assert away.current.name == "net1"
    assert away.age_s > 0
    assert away.error is not None
    with pytest.raises(ConnectError):
        deploy(artifacts[0], url)


def test_status_of_a_board_that_was_never_seen_raises(sshd: OpenSshServer, root: Path, tmp_path: Path) -> None:
    with FaultyLink(sshd.host, sshd.port) as link:
        url = f"ssh://{sshd.user}@{link.host}:{link.port}?identity={quote(str(sshd.identity))}"
    with pytest.raises(ConnectError):
        status(url)


WATCHED = """
import sys
from edgeprune.deployment.deploying import deploy
deploy(sys.argv[1], sys.argv[2], rounds=1, health_window_s=9, health=sys.argv[3])
"""


def wait_until(condition: Callable[[], bool], limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


def current(root: Path) -> str:
    return (root / "current").readlink().name


@pytest.mark.slow
def test_host_that_is_killed_in_the_health_window_is_not_needed_to_go_back(
    artifacts: list[Artifact], root: Path, url: str
) -> None:
    deploy(artifacts[0], url, rounds=1)
    environment = {**os.environ, "EDGEPRUNE_FAULT": "after:activate", "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-c", WATCHED, str(artifacts[1].folder), url, "true"]
    assert subprocess.run(arguments, env=environment, capture_output=True, timeout=120).returncode == 137
    seen = status(url)
    assert seen.current is not None
    assert (seen.current.name, seen.confirmed) == ("net1", False)
    assert seen.window is not None
    assert seen.window["guarded"]
    wait_until(lambda: current(root) == artifacts[0].release)
    assert_runs(root, artifacts[0])
    assert {one.name: one.state for one in status(url).releases} == {"net0": "current", "net1": "rolled back"}


@pytest.mark.slow
def test_server_and_session_that_are_killed_in_the_health_window_are_not_needed_to_go_back(
    artifacts: list[Artifact], root: Path, new_server: Callable[..., OpenSshServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_server()
    monkeypatch.setenv("EDGEPRUNE_SSH_CONFIG", str(server.config))
    url = url_of(root)
    deploy(artifacts[0], url, rounds=1)
    holders = []

    def progress(state: str, *_: object) -> None:
        if state == "health" and not holders:
            holders.append(json.loads((root / "lock").read_text())["board_pid"])
            server.cut()
            # What a login manager does that ends everything of a session.
            os.killpg(os.getpgid(holders[0]), signal.SIGKILL)

    with pytest.raises(
        HealthError, match=r"found the board away: .* The board itself goes back to .*\(net0\)"
    ) as caught:
        deploy(artifacts[1], url, rounds=1, health_window_s=3, progress=progress)
    assert caught.value.exit_code == 6
    wait_until(lambda: current(root) == artifacts[0].release)
    assert_runs(root, artifacts[0])


@pytest.mark.slow
def test_link_that_falls_silent_in_the_health_window_holds_up_nobody(
    artifacts: list[Artifact], sshd: OpenSshServer, root: Path
) -> None:
    with FaultyLink(sshd.host, sshd.port) as link:
        url = sshd.board_behind(link, root)
        deploy(artifacts[0], url, rounds=1)
        back = []

        def progress(state: str, *_: object) -> None:
            if state == "health":
                link.black_hole()
                back.append(time.monotonic())

        with pytest.raises(HealthError, match=r"found the board away: .* The board itself goes back to .*\(net0\)"):
            deploy(artifacts[1], url, rounds=1, health_window_s=3, progress=progress)
        assert time.monotonic() - back[0] < 60
        wait_until(lambda: current(root) == artifacts[0].release)
        link.mend()
        deploy_soon(artifacts[1], url)
        assert_runs(root, artifacts[1])


@pytest.mark.slow
def test_health_command_with_hostile_words_decides(artifacts: list[Artifact], root: Path, url: str) -> None:
    deploy(artifacts[0], url, rounds=1)
    mark = root / 'it\'s "$(touch escaped)"\n../well'
    mark.parent.mkdir()
    with pytest.raises(HealthError, match=r"found exit code 1.*Board board runs .*\(net0\)\."):
        deploy(artifacts[1], url, rounds=1, health=f"test -e {shlex.quote(str(mark))}", health_window_s=5)
    assert_runs(root, artifacts[0])
    mark.touch()
    command = f"test -e {shlex.quote(str(mark))}"
    deploy(artifacts[1], url, rounds=1, health=command, health_window_s=20, steady_s=0.5)
    assert_runs(root, artifacts[1])
    assert status(url).confirmed
