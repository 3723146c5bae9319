"""Health windows on the board: the guard is a real process, and reverts with nobody's help."""

import ast
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeprune.boards.runner_package import runner_package


def window(seconds, **more):
    return {"id": os.urandom(8).hex(), "seconds": seconds, "steady_s": 0.0, "health": None, "reload": None, **more}


def activate(board, text, told, **options):
    """Stage a release and switch to it under a window; its folder."""
    folder = board.call("stage", **board.blobs(text))["folder"]
    answer = board.call("activate", folder=folder, window=told, **options)
    assert answer == "killed" or answer["current"] == folder
    return folder


def wait_until(condition, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


def ended(pid):
    """Whether a process is gone; where nobody collects orphans it stays as a zombie."""
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True


def guard_of(board):
    return json.loads((board.root / "window.json").read_text())["pid"]


def journal(board, event):
    lines = [json.loads(line) for line in (board.root / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_release_that_nobody_confirms_is_reverted_by_the_board_itself(board):
    one = board.release("one")
    two = activate(board, "two", told := window(4.0))
    status = board.call("status")
    assert (status["current"], status["confirmed"], status["window"]["guarded"]) == (two, False, True)
    assert 0 < status["window"]["left_s"] <= 4.0
    wait_until(lambda: board.target() == one)
    board.assert_valid(one)
    answer = board.call("window", id=told["id"], folder=two)
    assert (answer["open"], answer["current"]) == (False, one)
    assert answer["reason"] == "must be confirmed by its host within 4 s, found that it was not"
    wait_until(lambda: not list(board.root.glob("guard-*.lock")))
    assert not (board.root / "window.json").exists()
    late = board.call("confirm", folder=two)
    assert late["error"] == "DeployError"
    assert f"must be current to be confirmed, found {one}" in late["message"]


def test_confirmed_release_stays(board):
    board.release("one")
    two = activate(board, "two", window(4.0))
    board.call("confirm", folder=two)
    assert board.call("status")["window"] is None
    wait_until(lambda: not list(board.root.glob("guard-*.lock")))
    time.sleep(4.0)
    assert board.target() == two


def test_first_release_that_nobody_confirms_leaves_none(board):
    activate(board, "one", window(0.5))
    wait_until(lambda: board.target() is None)


@pytest.mark.parametrize(
    "state", ["board:intent", "board:linked", "board:switched", "board:previous", "board:recorded"]
)
def test_guard_stays_when_the_process_that_switches_is_killed(board, state):
    one = board.release("one")
    two = activate(board, "two", window(1.0), fault=f"after:{state}")
    assert board.target() in (one, two)
    wait_until(lambda: board.target() == one and not list(board.root.glob("guard-*.lock")))
    board.assert_valid(one)
    assert board.call("rollback")["error"] == "DeployError", "nothing is before the first release"


def test_guard_is_in_no_session_or_group_of_its_login(board):
    one = board.release("one")
    activate(board, "two", window(4.0))
    guard = guard_of(board)
    assert os.getsid(guard) == guard
    assert os.getpgid(guard) == guard
    wait_until(lambda: board.target() == one)


def test_date_that_is_set_off_by_a_year_changes_nothing(board, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        "import time\ntrue, calls = time.time, []\n"
        "def jumping():\n    calls.append(0)\n    return true() + (1 if len(calls) % 2 else -1) * 365 * 86400\n"
        "time.time = jumping\n"
    )
    one = board.release("one")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began = time.monotonic()
    two = activate(board, "two", window(4.0))
    assert board.call("status")["window"]["left_s"] <= 4.0
    assert board.target() == two
    wait_until(lambda: board.target() == one)
    assert 3.9 <= time.monotonic() - began < 20
    stamps = [line["time_s"] for line in journal(board, "activate")]
    assert abs(stamps[-1] - stamps[0]) > 86400, "the date of the board was set off"


@pytest.mark.parametrize("name", ["guard.py", "window.py", "hooks.py"])
def test_guard_never_asks_for_the_date(board, name):
    called = {
        node.attr for node in ast.walk(ast.parse((board.program / name).read_text())) if isinstance(node, ast.Attribute)
    }
    assert not called & {"time", "now", "utcnow", "today", "localtime", "gmtime", "st_mtime"}


def test_health_command_must_hold_and_is_told(board, tmp_path):
    board.release("one")
    well = tmp_path / "it is $(well)\n'\""
    told = window(20.0, steady_s=0.5, health='test -e "$MARK" || { echo "no mark"; exit 3; }')
    os.environ["MARK"] = str(well)
    try:
        two = activate(board, "two", told)
    finally:
        del os.environ["MARK"]
    wait_until(lambda: board.call("window", id=told["id"], folder=two)["state"]["checks"] >= 1)
    state = board.call("window", id=told["id"], folder=two)["state"]
    assert not state["steady"]
    assert state["complaint"] == "must have its health command end with exit code 0, found exit code 3: no mark"
    well.touch()
    wait_until(lambda: board.call("status")["window"]["steady"])
    assert board.call("status")["window"]["complaint"] is None
    board.call("confirm", folder=two)


def test_health_that_never_holds_reverts_and_says_why(board):
    one = board.release("one")
    told = window(4.0, health="echo 'still no $(answer)'; exit 7")
    two = activate(board, "two", told)
    wait_until(lambda: board.target() == one)
    reason = board.call("window", id=told["id"], folder=two)["reason"]
    assert reason == "must have its health command end with exit code 0, found exit code 7: still no $(answer)"


def test_health_command_that_hangs_is_killed_with_its_children(board, tmp_path):
    one = board.release("one")
    told = window(4.0, health=f"sleep 77.125 & echo $! > '{tmp_path}/child'; wait")
    two = activate(board, "two", told)
    wait_until(lambda: board.target() == one)
    assert "still running" in board.call("window", id=told["id"], folder=two)["reason"]
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: ended(child))


def test_reload_runs_after_the_switch_and_after_the_revert(board, tmp_path):
    one = board.release("one")
    seen = tmp_path / "seen"
    command = f"readlink \"$EDGEPRUNE_CURRENT\" >> '{seen}'"
    two = activate(board, "two", window(4.0, reload=command))
    wait_until(lambda: seen.exists() and seen.read_text().count("\n") == 2)
    assert seen.read_text().split() == [f"releases/{two}", f"releases/{one}"]
    assert journal(board, "reloaded")[-1]["exit"] == 0


def test_reload_that_fails_reverts_at_once(board):
    one = board.release("one")
    told = window(30.0, reload="echo no such service; exit 4")
    two = activate(board, "two", told)
    wait_until(lambda: board.target() == one)
    reason = board.call("window", id=told["id"], folder=two)["reason"]
    assert reason == "must have its reload command end with exit code 0, found exit code 4: no such service"


def test_rollback_runs_the_reload_command_that_the_release_came_with(board, tmp_path):
    one = board.release("one")
    seen = tmp_path / "seen"
    two = activate(board, "two", window(20.0, reload=f"readlink \"$EDGEPRUNE_CURRENT\" >> '{seen}'"))
    wait_until(lambda: board.call("status")["window"]["steady"])
    board.call("confirm", folder=two)
    back = board.call("rollback")
    assert (back["current"], back["reload"]["exit"]) == (one, 0)
    assert seen.read_text().split() == [f"releases/{two}", f"releases/{one}"]


def test_former_release_that_is_damaged_is_not_put_back_and_status_says_so(board):
    one = board.release("one")
    engine = board.root / "releases" / one / "engine.onnx"
    engine.chmod(0o644)
    engine.write_bytes(b"damaged")
    two = activate(board, "two", told := window(0.5))
    wait_until(lambda: journal(board, "stuck"))
    board.assert_valid(two)
    assert "found engine.onnx damaged" in board.call("window", id=told["id"], folder=two)["reason"]
    assert board.call("status")["confirmed"] is False


def take_lock(board, owner):
    """What the verb ``lock`` says up to the moment when it holds the board; it is let go at once."""
    request = {"purpose": "profile", "user": "ann", **owner}
    done = subprocess.run(
        [sys.executable, str(board.program), "lock"],
        input=json.dumps({"root": str(board.root), **request}) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    return [json.loads(line)["event"] for line in done.stdout.splitlines()]


def test_next_run_settles_the_trial_of_a_host_that_is_gone_even_without_its_guard(board):
    one = board.release("one")
    owner = {"host": "desk", "pid": 7}
    two = activate(board, "two", window(60.0), owner=owner)
    os.kill(guard_of(board), signal.SIGKILL)
    wait_until(lambda: not board.call("status")["window"]["guarded"])
    assert board.call("status")["window"]["left_s"] is None
    assert "settled" not in take_lock(board, owner), "the host itself has only lost its link for a moment"
    assert board.target() == two
    assert take_lock(board, {"host": "desk", "pid": 8})[:2] == ["settling", "settled"]
    board.assert_valid(one)
    assert "settled" not in take_lock(board, {"host": "desk", "pid": 8})
    (lock,) = board.root.glob("guard-*.lock")
    cleaned = board.call("clean", releases=True, dry_run=True)["removed"]
    assert str(lock) in {entry["what"] for entry in cleaned}, "the folder must be empty without it"
    board.call("gc")
    assert not list(board.root.glob("guard-*.lock"))


def test_line_of_the_documentation_puts_the_former_release_back_as_the_board_starts(board, tmp_path):
    document = Path(__file__).parents[3] / "docs" / "deployment.md"
    (line,) = re.findall(r"^@reboot (.*)$", document.read_text(), re.MULTILINE)
    home = tmp_path / "home of $(ann)"
    home.mkdir()
    (home / ".edgeprune").symlink_to(board.root)
    one = board.release("one")
    activate(board, "two", window(60.0), owner={"host": "desk", "pid": 7})
    os.kill(guard_of(board), signal.SIGKILL)
    (board.root / "runner").mkdir()
    (board.root / "runner" / runner_package().name).write_bytes(runner_package().content)
    done = subprocess.run(["sh", "-c", line], env={**os.environ, "HOME": str(home)}, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    board.assert_valid(one)
    again = subprocess.run(["sh", "-c", line], env={**os.environ, "HOME": str(home)}, capture_output=True, timeout=60)
    assert again.returncode == 0
    board.assert_valid(one)


def test_board_whose_folder_was_removed_has_no_guard_left(board):
    activate(board, "one", window(60.0))
    guard = guard_of(board)
    shutil.rmtree(board.root)
    wait_until(lambda: ended(guard))


def test_guard_on_a_disk_that_takes_nothing_reverts_as_soon_as_it_takes_something(board):
    one = board.release("one")
    two = activate(board, "two", window(1.0, health="exit 3"))
    guard = guard_of(board)
    unlimited = resource.prlimit(guard, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    time.sleep(2.0)
    assert not ended(guard), "a note that cannot be written must not end the watch"
    board.assert_valid(one, two)
    resource.prlimit(guard, resource.RLIMIT_FSIZE, unlimited)
    wait_until(lambda: board.target() == one)
    board.assert_valid(one)


def test_commands_that_cannot_be_started_are_ill_and_the_guard_lives(board, tmp_path, monkeypatch):
    one = board.release("one")
    monkeypatch.setenv("PATH", str(tmp_path))
    two = activate(board, "two", told := window(1.0, health="true"))
    wait_until(lambda: board.target() == one)
    reason = board.call("window", id=told["id"], folder=two)["reason"]
    assert reason.startswith("must have its health command end with exit code 0, found that it does not start: ")
    assert "'sh'" in reason


def test_unconfirmed_release_is_put_on_trial_again(board):
    one = board.release("one")
    engine = board.root / "releases" / one / "engine.onnx"
    whole = engine.read_bytes()
    engine.chmod(0o644)
    engine.write_bytes(b"damaged")
    two = activate(board, "two", window(0.2))
    wait_until(lambda: journal(board, "stuck"))
    engine.write_bytes(whole)
    assert board.call("activate", folder=two)["on_trial"] is False
    again = board.call("activate", folder=two, window=window(0.5, health="exit 3"))
    assert again == {"current": two, "previous": one, "changed": False, "on_trial": True}
    wait_until(lambda: board.target() == one)
    board.assert_valid(one)


def test_same_process_that_deploys_again_is_another_run_and_ends_the_trial(board):
    one = board.release("one")
    activate(board, "two", window(60.0), owner={"host": "desk", "pid": 7, "run": "first"})
    assert "settled" not in take_lock(board, {"host": "desk", "pid": 7, "run": "first"})
    assert take_lock(board, {"host": "desk", "pid": 7, "run": "second"})[:2] == ["settling", "settled"]
    board.assert_valid(one)


def test_intent_that_was_undone_takes_no_confirmation_away(board):
    one = board.release("one")
    board.call("confirm", folder=one)
    two = board.release("two")
    board.call("confirm", folder=two)
    assert board.call("activate", folder=one, fault="after:board:intent") == "killed"
    assert board.call("rollback")["current"] == one
    assert board.call("status")["confirmed"]


def test_rollback_that_is_killed_before_the_link_moves_does_not_end_the_watch(board):
    one = board.release("one")
    two = activate(board, "two", window(2.0))
    assert board.call("rollback", **{"from": two, "fault": "after:board:intent"}) == "killed"
    assert board.target() == two
    wait_until(lambda: board.target() == one)
    board.assert_valid(one)
