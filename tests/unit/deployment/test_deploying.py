"""Deployments to the board ``local``, with the real runtime and no stand-ins."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeprune.boards.board import Board
from edgeprune.boards.local import LocalTransport
from edgeprune.deployment import gates
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.cleaning import clean_releases
from edgeprune.deployment.deploying import STATES, deploy
from edgeprune.deployment.fleet import deploy_to
from edgeprune.deployment.status import rollback, status
from edgeprune.errors import (
    BoardBusyError,
    BoardFullError,
    ConfigError,
    ConnectError,
    HealthError,
    IncompatibleTargetError,
    InconsistentBoardError,
    LatencyGateError,
    ManifestError,
    ParityError,
)
from edgeprune.profiling import comparing
from edgeprune.profiling.comparing import compare

BOARD_STATES = (
    "board:copied",
    "board:staged",
    "board:intent",
    "board:linked",
    "board:switched",
    "board:previous",
    "board:recorded",
)


def quick(artifact, **options):
    return deploy(artifact, "local", **{"rounds": 1, **options})


def current(root):
    link = root / "current"
    return link.readlink().name if link.is_symlink() else None


def assert_runs(root, artifact):
    """`current` is that artifact, whole; or there is none."""
    if artifact is None:
        assert current(root) is None
        return
    assert current(root)[:16] == artifact.release
    assert Artifact.load(root / "current").id == artifact.id


def assert_tidy(root):
    """No half-written file is left, and nobody holds the board."""
    assert list((root / "incoming").iterdir()) == [] if (root / "incoming").exists() else True
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []
    with Board.open("local") as board, board.hold("test"):
        pass


def test_first_deployment_activates_and_the_second_sends_and_changes_nothing(artifacts, root):
    states = []
    first = quick(artifacts[0], progress=lambda state, *_: states.append(state))
    assert list(dict.fromkeys(states)) == [state for state in STATES if state != "lock"]
    assert first.changed
    assert first.previous is None
    assert first.bytes_sent == artifacts[0].size_bytes
    assert first.parity.passed
    assert first.parity.top1_agreement == 1.0
    assert first.measured_ms > 0
    assert_runs(root, artifacts[0])
    second = quick(artifacts[0].folder)
    assert (second.changed, second.bytes_sent, second.release) == (False, 0, first.release)
    assert second.parity.cases == first.parity.cases
    assert_runs(root, artifacts[0])
    assert_tidy(root)


def test_current_holds_the_engine_and_what_its_users_must_know(running):
    root = running
    assert sorted(path.name for path in (root / "current").iterdir()) == [
        "engine.onnx",
        "golden.npz",
        "infer.py",
        "manifest.json",
        "model.json",
    ]
    model = json.loads((root / "current" / "model.json").read_text())
    assert model["engine"] == "engine.onnx"
    assert model["inputs"][0]["shape"] == [1, 3, 12, 12]


def test_a_refused_release_is_told_from_the_others(artifacts, running):
    with pytest.raises(LatencyGateError):
        quick(artifacts[1], budget_ms=1e-6)
    found = status("local")
    assert {release.folder: release.state for release in found.releases} == {
        artifacts[0].release: "current",
        artifacts[1].release: "refused",
    }


def test_former_release_is_kept_and_rollback_puts_it_back(artifacts, running):
    root = running
    done = quick(artifacts[1])
    assert done.previous == artifacts[0].release
    found = status("local")
    assert (found.current.name, found.previous.name, found.confirmed, found.online) == ("net1", "net0", True, True)
    back = rollback("local")
    assert back.current.name == "net0"
    assert back.previous is None
    assert_runs(root, artifacts[0])


def test_old_releases_go_and_the_last_ones_stay(artifacts, running, forge):
    quick(artifacts[1])
    quick(forge(artifacts[1], "net2", name="net2"), keep=2)
    assert {release.name for release in status("local").releases} == {"net1", "net2"}


def test_cleaning_a_board_removes_what_ran_before_and_keeps_the_current_release(artifacts, running):
    former = running / "releases" / ("0" * 16)
    shutil.copytree(running / "releases" / artifacts[0].release, former)
    left = clean_releases("local", keep=1)
    assert left.removed == (former.name,)
    assert left.kept == (artifacts[0].release,)
    assert not former.exists()
    assert_runs(running, artifacts[0])
    assert clean_releases("local").removed == ()
    with pytest.raises(ConfigError, match="at least 1 release, found 0"):
        clean_releases("local", keep=0)


def test_altered_engine_is_refused_before_the_board_is_asked(artifacts, root, tmp_path):
    folder = Path(shutil.copytree(artifacts[0].folder, tmp_path / "altered"))
    with (folder / "engine.onnx").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ManifestError, match=r"'engine\.onnx' of artifact"):
        quick(folder)
    assert not root.exists()


@pytest.mark.parametrize("layer", [0, 5])
def test_weights_that_differ_by_one_percent_fail_parity_and_current_stays(artifacts, running, forge, net, layer):
    import torch

    wrong = net(1)
    with torch.no_grad():
        wrong[layer].weight *= 1.01
    forged = forge(artifacts[1], "forged", engine=wrong)
    with pytest.raises(ParityError) as caught:
        quick(forged)
    assert caught.value.exit_code == 5
    message = caught.value.message
    assert "'net1' on board local must agree with the golden outputs within 0.0001 of their scale and 80 dB" in message
    assert "found max abs" in message
    assert "would have passed" in message
    assert message.endswith(f"Board local still runs {artifacts[0].release} (net0).")
    assert_runs(running, artifacts[0])
    assert_tidy(running)


def test_engine_with_other_outputs_is_refused(artifacts, root, forge, net):
    forged = forge(artifacts[0], "forged", engine=net(0, classes=7))
    with pytest.raises(ParityError, match=r"must have shape \[1, 10\], found \[1, 7\].*still runs no release"):
        quick(forged)
    assert_runs(root, None)


def test_release_slower_than_the_budget_is_not_activated(artifacts, running):
    with pytest.raises(LatencyGateError) as caught:
        quick(artifacts[1], budget_ms=1e-6)
    assert caught.value.exit_code == 5
    assert "latency of 'net1' on board local must be at most 1e-06 ms (+5%), found" in caught.value.message
    assert caught.value.message.endswith(f"Board local still runs {artifacts[0].release} (net0).")
    assert_runs(running, artifacts[0])


def test_relative_budget_is_held_against_the_interleaved_ratio(artifacts, root):
    with pytest.raises(LatencyGateError, match=r"must be at most 20 % of dense \(\+5%\)"):
        quick(artifacts[0], budget_ratio=0.2, reference=artifacts[1], rounds=2)
    assert_runs(root, None)
    done = quick(artifacts[0], budget_ratio=1.0, tolerance=1.0, reference=artifacts[1].engine, rounds=4)
    assert done.ratio_low <= done.ratio <= done.ratio_high
    assert done.dense_ms > 0
    assert_runs(root, artifacts[0])
    assert artifacts[1].release not in {release.folder for release in status("local").releases}


def test_longer_measurement_knows_what_the_reference_took_in_the_first(artifacts, root, monkeypatch):
    levels = []

    def watched(*args, **options):
        found = compare(*args, **options)
        levels.append((options["level_ms"], found.level_ms))
        return found

    monkeypatch.setattr(comparing, "compare", watched)
    verdicts = iter([None, True])  # an interval that straddles the budget, then one that does not
    monkeypatch.setattr(gates, "_verdict", lambda *_: next(verdicts))
    quick(artifacts[0], budget_ratio=1.0, reference=artifacts[1])
    (first, found), (second, _) = levels
    assert first is None
    assert second == found


def test_budget_in_ms_is_held_against_the_ratio_times_the_dense_latency_of_the_profile(artifacts, root):
    done = quick(artifacts[0], budget_ms=2000, dense_ms=1000, tolerance=1.0, reference=artifacts[1], rounds=2)
    assert done.latency_ms == pytest.approx(1000 * done.ratio)
    with pytest.raises(LatencyGateError):
        quick(artifacts[0], budget_ms=2000, dense_ms=100000, reference=artifacts[1], rounds=2)


def test_relative_budget_without_reference_is_refused(artifacts, root):
    with pytest.raises(ConfigError, match="must come with the dense model as reference"):
        quick(artifacts[0], budget_ratio=0.5)


def test_board_of_another_architecture_is_refused_before_anything_is_sent(artifacts, root, forge):
    requires = {**artifacts[0].manifest.requires, "architecture": "riscv64"}
    with pytest.raises(IncompatibleTargetError) as caught:
        quick(forge(artifacts[0], "foreign", requires=requires))
    assert (caught.value.field, caught.value.needed, caught.value.found) == (
        "architecture",
        "riscv64",
        os.uname().machine,
    )
    assert caught.value.exit_code == 4
    assert not (root / "store").exists()


def test_runtime_that_is_too_old_is_refused_with_the_command_that_mends_it(artifacts, root, forge):
    requires = {**artifacts[0].manifest.requires, "min_version": "99.0"}
    with pytest.raises(IncompatibleTargetError, match=r"needs onnxruntime >= 99\.0") as caught:
        quick(forge(artifacts[0], "new", requires=requires))
    assert "edgeprune device setup local" in caught.value.hint


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_is_refused_before_anything_is_sent(artifacts, root):
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(root)], check=True)
    try:
        with pytest.raises(BoardFullError, match=r"board local must have .* MB free for the artifact, found"):
            quick(artifacts[0])
        assert not (root / "store").exists()
        assert_runs(root, None)
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_board_that_another_run_holds_is_busy(artifacts, running):
    with Board.open("local") as other, other.hold("profile"), pytest.raises(BoardBusyError, match="profile"):
        quick(artifacts[1])
    assert_runs(running, artifacts[0])


def damage(folder):
    engine = folder / "engine.onnx"
    engine.chmod(0o644)
    engine.write_bytes(b"not an engine")


def test_release_that_fails_after_the_switch_is_rolled_back(artifacts, running):
    root = running

    def progress(state, *_):
        if state == "health":
            damage(root / "current")

    with pytest.raises(HealthError) as caught:
        quick(artifacts[1], progress=progress)
    assert caught.value.exit_code == 6
    assert f"it was rolled back. Board local runs {artifacts[0].release} (net0)." in caught.value.message
    assert_runs(root, artifacts[0])
    assert quick(artifacts[1]).release == f"{artifacts[1].release}-2"
    assert_runs(root, artifacts[1])


def test_first_release_that_fails_after_the_switch_leaves_no_release(artifacts, root):
    def progress(state, *_):
        if state == "health":
            damage(root / "current")

    with pytest.raises(HealthError, match="Board local runs no release"):
        quick(artifacts[0], progress=progress)
    assert_runs(root, None)


class LossyTransport(LocalTransport):
    """This machine, over a link that is lost before or after the named verbs are run, so many times each."""

    def __init__(self, *, before=None, after=None):
        super().__init__()
        self.before, self.after = dict(before or {}), dict(after or {})

    def run(self, argv, **options):
        self._lose(self.before, argv[-1])
        result = super().run(argv, **options)
        self._lose(self.after, argv[-1])
        return result

    def _lose(self, left, verb):
        if left.get(verb, 0):
            left[verb] -= 1
            raise ConnectError("the link must stay up, it was lost (connection reset by peer).")


def over_a_bad_link(artifact, root, *, progress=None, health_window_s=None, **losses):
    with Board(LossyTransport(**losses), name="local", python=sys.executable, root=str(root)) as board:
        return deploy(artifact, board, rounds=1, progress=progress, health_window_s=health_window_s)


def wait_until(condition, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


def test_link_that_is_lost_after_the_switch_does_not_leave_it_unchecked(artifacts, running):
    done = over_a_bad_link(artifacts[1], running, after={"activate": 1})
    assert (done.changed, done.release, done.previous) == (True, artifacts[1].release, artifacts[0].release)
    assert_runs(running, artifacts[1])
    assert status("local").confirmed
    again = over_a_bad_link(artifacts[1], running, after={"activate": 1})
    assert (again.changed, again.previous) == (False, artifacts[0].release)


def test_link_that_is_lost_before_the_switch_says_what_runs(artifacts, running):
    with pytest.raises(ConnectError) as caught:
        over_a_bad_link(artifacts[1], running, before={"activate": 1})
    assert caught.value.message.endswith(f"Board local still runs {artifacts[0].release} (net0).")
    assert_runs(running, artifacts[0])


def test_link_that_stays_lost_after_the_switch_says_that_nobody_knows(artifacts, running):
    losses = {"activate": 1}

    def progress(state, *_):
        if state == "activate":
            losses["status"] = 9

    with Board(transport := LossyTransport(), name="local", python=sys.executable, root=str(running)) as board:
        transport.after, opened = losses, Board.open
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Board, "open", lambda spec: opened(board))
            report = deploy_to(artifacts[1], ["local"], rounds=1, progress=lambda name, state, *_: progress(state))
    (outcome,) = report.outcomes
    assert f"Whether board local has switched to {artifacts[1].release} is not known" in outcome.message
    # A board that may run what nobody has confirmed is none to go on after.
    assert (outcome.state, outcome.error, outcome.exit_code) == ("uncertain", "UncertainBoardError", 3)
    assert report.stopped == "canary board local failed"
    quick(artifacts[1])
    assert status("local").confirmed


def test_one_lost_link_in_the_health_check_does_not_roll_a_good_release_back(artifacts, running):
    states = []
    with Board(transport := LossyTransport(), name="local", python=sys.executable, root=str(running)) as board:

        def progress(state, *_):
            states.append(state)
            if state == "health":
                transport.before = {"parity": 1, "confirm": 1}

        deploy(artifacts[1], board, rounds=1, progress=progress)
        assert transport.before == {"parity": 0, "confirm": 0}
    assert states[-1] == "done"
    assert_runs(running, artifacts[1])
    assert status("local").confirmed


@pytest.mark.slow
def test_confirmation_is_repeated_until_it_arrives(artifacts, running, caplog):
    done = over_a_bad_link(artifacts[1], running, before={"confirm": 2})
    assert done.changed
    assert "It is tried once more" in caplog.text
    assert_runs(running, artifacts[1])
    assert status("local").confirmed


def test_release_whose_confirmation_never_arrives_is_reverted_by_the_board(artifacts, running):
    with pytest.raises(HealthError, match=r"found the board away.*The board itself goes back to .*\(net0\)"):
        over_a_bad_link(artifacts[1], running, health_window_s=2, before={"confirm": 99, "window": 99})
    wait_until(lambda: current(running) == artifacts[0].release)
    assert_runs(running, artifacts[0])


def test_confirmation_of_a_release_that_ran_before_is_made_up_for_later(artifacts, running, caplog):
    quick(artifacts[1])
    over_a_bad_link(artifacts[1], running, before={"confirm": 2})
    assert "the health check passed, but was not recorded" in caplog.text
    assert_runs(running, artifacts[1])


def test_healthy_release_is_confirmed_once_its_command_has_held(artifacts, running, tmp_path):
    seen = tmp_path / 'it\'s "$(here)"'
    reload = f"echo reload >> {shlex.quote(str(seen))}"
    health = f"grep -q reload {shlex.quote(str(seen))}"
    said = []
    done = quick(
        artifacts[1],
        health=health,
        reload=reload,
        health_window_s=20,
        steady_s=1.2,
        progress=lambda state, *rest: said.append((state, rest[2])),
    )
    assert done.changed
    assert ("health", "the health command holds so far") in said
    found = status("local")
    assert (found.confirmed, found.window) == (True, None)
    assert seen.read_text() == "reload\n"
    assert rollback("local").current.name == "net0"
    assert seen.read_text() == "reload\nreload\n", "the application is told of the way back too"


def test_unhealthy_release_is_rolled_back_by_the_board_and_the_error_says_what_the_command_said(artifacts, running):
    with pytest.raises(HealthError) as caught:
        quick(artifacts[1], health="echo 'queue $(is) full'; exit 3", health_window_s=5)
    assert caught.value.exit_code == 6
    assert (
        "must have its health command end with exit code 0, found exit code 3: queue $(is) full" in caught.value.message
    )
    assert f"it was rolled back. Board local runs {artifacts[0].release} (net0)." in caught.value.message
    assert_runs(running, artifacts[0])
    assert {one.folder: one.state for one in status("local").releases}[artifacts[1].release] == "rolled back"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"health": " "}, "the health command must be a line"),
        ({"reload": "a\0b"}, "the reload command must be a line"),
        ({"health_window_s": 0.5}, "the health window must be at least 1 s and at most a day, found 0.5 s"),
        ({"health_window_s": float("nan")}, "the health window must be at least 1 s and at most a day, found nan s"),
        ({"health_window_s": 1e10}, r"the health window must be at least 1 s and at most a day, found 1e\+10 s"),
        ({"steady_s": 5}, "the time that the health command must hold needs one, found none"),
        ({"health_window_s": 5, "steady_s": 5}, "must hold for less than the whole health window, found 5 s"),
    ],
)
def test_health_options_that_cannot_be_are_refused_before_the_board_is_asked(artifacts, root, options, message):
    with pytest.raises(ConfigError, match=message):
        quick(artifacts[0], **options)
    assert not root.exists()


def test_guard_that_is_killed_is_noticed_and_the_release_goes_back(artifacts, running):
    def progress(state, *_):
        if state == "health" and (note := running / "window.json").exists():
            guard = json.loads(note.read_text())["pid"]
            with contextlib.suppress(ProcessLookupError):
                os.kill(guard, signal.SIGKILL)

    with pytest.raises(HealthError, match=r"must be watched by its guard .*, found it gone; it was rolled back\."):
        quick(artifacts[1], health="exit 3", health_window_s=60, progress=progress)
    assert_runs(running, artifacts[0])


def test_unconfirmed_release_must_pass_its_health_command_to_be_confirmed(artifacts, running):
    journal = running / "journal.jsonl"
    lines = [line for line in journal.read_text().splitlines() if '"confirmed"' not in line]
    # As an older version left it, which knew no trials.
    journal.write_text("".join(f"{line}\n" for line in lines).replace('"window"', '"another"'))
    with pytest.raises(InconsistentBoardError, match=r"found exit code 3;.* it runs there still\."):
        quick(artifacts[0], health="exit 3", health_window_s=5)
    assert not status("local").confirmed
    assert_runs(running, artifacts[0])


@pytest.mark.slow
def test_board_that_somebody_took_in_the_health_window_has_gone_back(artifacts, running):
    with contextlib.ExitStack() as stack:

        def progress(state, *_):
            if state == "health":
                holder = json.loads((running / "lock").read_text())["board_pid"]
                os.kill(holder, signal.SIGKILL)
                time.sleep(0.2)
                stack.enter_context(stack.enter_context(Board.open("local")).hold("profile"))

        with pytest.raises(HealthError, match=r"board must be free, but .*\(net0\)") as caught:
            quick(artifacts[1], health_window_s=1.5, progress=progress)
        assert caught.value.exit_code == 6
        assert_runs(running, artifacts[0])


def test_release_that_was_confirmed_before_is_left_alone_when_its_health_cannot_be_seen(artifacts, running):
    with Board(transport := LossyTransport(), name="local", python=sys.executable, root=str(running)) as board:

        def progress(state, *_):
            if state == "health":
                transport.before = {"parity": 2}

        with pytest.raises(HealthError, match="it ran there before and had passed its health check, so it was left as"):
            deploy(artifacts[0], board, rounds=1, progress=progress)
    assert_runs(running, artifacts[0])


def test_board_whose_former_release_is_damaged_too_is_called_inconsistent(artifacts, running):
    root = running

    def progress(state, *_):
        if state == "health":
            damage(root / "current")
            damage(root / "previous")

    with pytest.raises(InconsistentBoardError, match="putting back the former release failed too") as caught:
        quick(artifacts[1], progress=progress)
    assert caught.value.exit_code == 7
    assert caught.value.hint.startswith("edgeprune status --board local,")
    quick(artifacts[0])
    assert_runs(root, artifacts[0])


def test_blob_that_went_bad_on_the_board_is_sent_again(artifacts, running):
    root = running
    shutil.rmtree(root / "releases")
    (root / "current").unlink()
    blob = root / "store" / artifacts[0].manifest.files["engine.onnx"].sha256
    size = blob.stat().st_size
    blob.chmod(0o644)
    blob.write_bytes(b"\0" * size)
    done = quick(artifacts[0])
    assert done.bytes_sent == size
    assert_runs(root, artifacts[0])


def test_interrupt_at_any_state_leaves_current_as_it_was_or_wholly_switched(artifacts, running):
    root = running
    for state in [state for state in STATES if state != "lock"]:

        def interrupt(reached, *_, at=state):
            if reached == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quick(artifacts[1], progress=interrupt)
        assert_runs(root, artifacts[1 if state in ("health", "done") else 0])
    quick(artifacts[1])
    assert_runs(root, artifacts[1])
    assert_tidy(root)
    assert status("local").confirmed


PROGRAM = """
import sys
from edgeprune.deployment.deploying import deploy
deploy(sys.argv[1], "local", rounds=1)
"""


def test_of_two_hosts_that_deploy_at_once_one_may_be_refused_and_current_is_valid(artifacts, running):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    hosts = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(artifact.folder)], env=environment, stderr=subprocess.PIPE)
        for artifact in (artifacts[1], artifacts[1])
    ]
    said = [host.communicate(timeout=120)[1] for host in hosts]
    codes = [host.returncode for host in hosts]
    assert 0 in codes
    assert all(code == 0 or b"BoardBusyError" in text for code, text in zip(codes, said, strict=True))
    assert_runs(running, artifacts[1])
    assert_tidy(running)


def killed_deployment(artifact, state):
    environment = {**os.environ, "EDGEPRUNE_FAULT": f"after:{state}", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(artifact.folder)], env=environment, capture_output=True, timeout=120
    )


def test_kill_after_each_state_leaves_current_valid_and_the_next_run_goes_on_from_there(artifacts, running):
    for state in STATES:
        assert killed_deployment(artifacts[1], state).returncode == 137
        assert_runs(running, artifacts[1 if state in ("activate", "health", "done") else 0])
        assert status("local").previous is None or state in ("activate", "health", "done")
    done = quick(artifacts[1])
    assert not done.changed
    assert_runs(running, artifacts[1])
    assert status("local").previous.folder == artifacts[0].release
    assert_tidy(running)


def test_rollback_of_a_release_on_trial_goes_back_one_step_only(artifacts, running):
    quick(artifacts[1])
    window = {"id": "0" * 16, "seconds": 60, "health": None, "reload": None}
    with Board.open("local") as board:
        board.call("activate", {"folder": artifacts[0].release, "window": window, "owner": {"host": "gone", "pid": 1}})
    assert status("local").window["guarded"]
    assert rollback("local").current.name == "net1"
    assert_runs(running, artifacts[1])


@pytest.mark.slow
@pytest.mark.parametrize("state", [*STATES, *BOARD_STATES])
def test_kill_after_any_state_leaves_current_valid_and_a_second_run_converges(artifacts, running, state):
    killed = killed_deployment(artifacts[1], state)
    switched_there = state in ("board:switched", "board:previous", "board:recorded")
    if switched_there:
        # Only the runner died, and the board says that the switch is through: the deployment goes on.
        assert killed.returncode == 0
    elif state in BOARD_STATES:
        assert b"RunnerEndedError" in killed.stderr
    else:
        assert killed.returncode == 137
    switched = switched_there or state in ("activate", "health", "done")
    assert_runs(running, artifacts[1 if switched else 0])
    assert status("local").current is not None
    quick(artifacts[1])
    assert_runs(running, artifacts[1])
    assert status("local").previous.folder == artifacts[0].release
    assert_tidy(running)
