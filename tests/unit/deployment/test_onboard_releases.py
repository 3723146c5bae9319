"""The on-board release verbs, run as the board runs them: one process per verb, killed wherever it hurts."""

import json
import os
import stat
import subprocess
import sys
import time

import pytest

STATES = (
    "board:copied",
    "board:staged",
    "board:intent",
    "board:linked",
    "board:switched",
    "board:previous",
    "board:recorded",
)


def test_staged_release_is_whole_read_only_and_not_yet_current(board):
    blobs = board.blobs("one")
    result = board.call("stage", **blobs)
    assert result == {"folder": blobs["release"], "reused": False}
    folder = board.root / "releases" / blobs["release"]
    assert (folder / "engine.onnx").read_bytes() == b"one" * 1000
    assert (folder / "data" / "extra.bin").read_bytes() == b"shared"
    assert not stat.S_IMODE((folder / "engine.onnx").stat().st_mode) & 0o222
    assert board.target() is None
    assert list((board.root / "incoming").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_disk_that_fills_up_while_staging_leaves_no_half_release(board):
    board.root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=56k", "tmpfs", str(board.root)], check=True)
    try:
        one = board.release("one")
        blobs = board.blobs("two" * 4)
        event = board.call("stage", **blobs)
        assert event["error"] == "BoardFullError"
        board.assert_valid(one)
        assert not (board.root / "releases" / blobs["release"]).exists()
        assert list((board.root / "incoming").iterdir()) == []
    finally:
        subprocess.run(["umount", str(board.root)], check=True)


def test_staging_again_reuses_the_release(board):
    blobs = board.blobs("one")
    board.call("stage", **blobs)
    assert board.call("stage", **blobs)["reused"] is True


def test_damaged_blob_is_refused_and_removed_so_that_it_is_sent_again(board):
    blobs = board.blobs("one")
    blob = board.root / "store" / blobs["files"]["engine.onnx"]["sha256"]
    blob.write_bytes(b"two" * 1000)
    event = board.call("stage", **blobs)
    assert event["error"] == "TransferError"
    assert event["message"].startswith("engine.onnx on the board must have sha256")
    assert not blob.exists()
    assert list((board.root / "releases").iterdir()) == []
    assert list((board.root / "incoming").iterdir()) == []


def test_symbolic_link_in_the_store_is_refused(board, tmp_path):
    blobs = board.blobs("one")
    blob = board.root / "store" / blobs["files"]["engine.onnx"]["sha256"]
    elsewhere = tmp_path / "elsewhere"
    blob.rename(elsewhere)
    blob.symlink_to(elsewhere)
    assert board.call("stage", **blobs)["error"] == "TransferError"


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/../../b", "a b", "$(id)", "", "a//b", ".hidden"])
def test_file_names_that_could_leave_the_folder_are_refused(board, name):
    blobs = board.blobs("one")
    blobs["files"][name] = blobs["files"]["engine.onnx"]
    event = board.call("stage", **blobs)
    assert event["error"] == "ManifestError"
    assert "must stay inside the release's folder" in event["message"]


@pytest.mark.parametrize("change", ["another engine", "one more", "one less"])
def test_files_that_the_manifest_does_not_list_are_refused(board, change):
    blobs = board.blobs("one")
    if change == "another engine":
        blobs["files"]["engine.onnx"] = board.blobs("two")["files"]["engine.onnx"]
    elif change == "one more":
        blobs["files"]["more.bin"] = blobs["files"]["engine.onnx"]
    else:
        del blobs["files"]["data/extra.bin"]
    event = board.call("stage", **blobs)
    assert event["error"] == "ManifestError"
    assert "must be the one that the manifest lists, found another" in event["message"]
    assert list((board.root / "releases").iterdir()) == []
    assert list((board.root / "incoming").iterdir()) == []


def test_release_must_carry_the_hash_of_its_manifest(board):
    blobs = board.blobs("one")
    assert board.call("stage", **{**blobs, "release": "0" * 16})["error"] == "ManifestError"


def test_activation_keeps_the_former_release_as_previous(board):
    one, two = board.release("one"), board.release("two")
    assert (board.target("current"), board.target("previous")) == (two, one)
    assert (board.root / "current" / "engine.onnx").read_bytes() == b"two" * 1000
    status = board.call("status")
    assert (status["current"], status["previous"], status["confirmed"]) == (two, one, False)
    board.call("confirm", folder=two)
    assert board.call("status")["confirmed"] is True


def test_activating_the_current_release_changes_nothing(board):
    one, two = board.release("one"), board.release("two")
    before = (board.root / "journal.jsonl").read_bytes()
    assert board.call("activate", folder=two) == {
        "current": two,
        "previous": one,
        "changed": False,
        "on_trial": False,
    }
    assert (board.root / "journal.jsonl").read_bytes() == before


def test_release_that_is_not_staged_cannot_be_activated(board):
    event = board.call("activate", folder="0" * 16)
    assert event["error"] == "DeployError"
    assert "must be staged" in event["message"]


def test_rollback_goes_back_step_by_step_and_then_refuses(board):
    one, two, three = (board.release(text) for text in ("one", "two", "three"))
    assert board.call("rollback", **{"from": three})["current"] == two
    assert board.target("previous") == one
    assert board.call("rollback", **{"from": three})["changed"] is False
    assert board.call("rollback", **{"from": two})["current"] == one
    event = board.call("rollback")
    assert event["error"] == "DeployError"
    assert event["message"].endswith(f"it still runs {one}.")
    board.assert_valid(one)


def test_rollback_without_a_former_release_removes_current_only_when_allowed(board):
    one = board.release("one")
    assert board.call("rollback")["error"] == "DeployError"
    assert board.target() == one
    assert board.call("rollback", allow_none=True)["current"] is None
    assert board.target() is None


def test_damaged_former_release_is_not_put_back(board):
    one, two = board.release("one"), board.release("two")
    engine = board.root / "releases" / one / "engine.onnx"
    engine.chmod(0o644)
    engine.write_bytes(b"damaged")
    event = board.call("rollback")
    assert event["error"] == "InconsistentBoardError"
    assert "found engine.onnx damaged" in event["message"]
    board.assert_valid(two)


def test_damaged_current_release_is_replaced_by_a_whole_copy(board):
    one, two = board.release("one"), board.release("two")
    extra = board.root / "releases" / two / "left-behind"
    extra.write_text("not in the manifest")
    assert board.damaged(board.root / "current") == ["left-behind"]
    repaired = board.release("two")
    assert repaired == f"{two}-2"
    board.assert_valid(repaired)
    assert board.target("previous") == one


def test_gc_keeps_the_last_releases_and_never_current_or_previous(board):
    folders = [board.release(text) for text in ("one", "two", "three", "four")]
    board.call("rollback")
    result = board.call("gc", keep=1)
    assert board.target() == folders[2]
    assert board.target("previous") == folders[1]
    assert sorted(result["removed"]) == sorted([folders[0], folders[3]])
    board.assert_valid(folders[2])
    blobs = {path.name for path in (board.root / "store").iterdir()}
    assert board.digest(b"shared") in blobs
    assert board.digest(b"one" * 1000) not in blobs
    assert board.digest(b"two" * 1000) in blobs


def test_gc_removes_old_files_that_nothing_needs_and_keeps_young_ones(board):
    one = board.release("one")
    names = ["store/" + board.digest(b"timed only"), "incoming/unfinished.partial-12", "runner/runner-old.pyz"]
    for name in [*names, *(old[:-1] + "0" for old in names)]:
        (board.root / name).parent.mkdir(exist_ok=True)
        (board.root / name).write_bytes(b"x" * 10)
    two_days_ago = time.time() - 2 * 86400
    for name in names:
        os.utime(board.root / name, (two_days_ago, two_days_ago))
    for path in (board.root / "store").iterdir():
        if path.stat().st_size != 10:
            os.utime(path, (two_days_ago, two_days_ago))
    result = board.call("gc", keep=3)
    assert (result["removed"], result["freed_bytes"]) == ([], 30)
    for name in names:
        assert not (board.root / name).exists()
        assert (board.root / (name[:-1] + "0")).exists()
    assert board.call("stage", **board.blobs("one")) == {"folder": one, "reused": True}
    assert (board.root / "store" / board.digest(b"one" * 1000)).exists()


def test_blob_that_somebody_asked_for_lately_is_not_old(board):
    board.release("one")
    blob = board.root / "store" / board.digest(b"timed only")
    blob.write_bytes(b"timed only")
    os.utime(blob, (1, 1))
    assert board.call("store", action="missing", blobs={blob.name: 10})["missing"] == []
    assert board.call("gc")["freed_bytes"] == 0
    assert blob.exists()


def test_removal_that_was_killed_is_finished_by_the_next(board):
    one = board.release("one")
    (board.root / "incoming" / "release-0123456789abcdef").mkdir()
    (board.root / "incoming" / "release-0123456789abcdef" / "engine.onnx").write_bytes(b"12345")
    assert board.call("gc")["freed_bytes"] == 5
    board.assert_valid(one)


@pytest.mark.parametrize("state", STATES)
def test_kill_at_any_state_leaves_current_valid_and_a_second_run_converges(board, state):
    one, two = board.release("one"), board.release("two")
    blobs = board.blobs("three")
    three = blobs["release"]
    fault = f"after:{state}"
    staged = board.call("stage", **blobs, fault=fault)
    killed = staged == "killed" or board.call("activate", folder=three, fault=fault) == "killed"
    assert killed
    board.assert_valid(two, three)
    assert board.target("previous") in (one, two)
    folder = board.call("stage", **blobs)["folder"]
    result = board.call("activate", folder=folder)
    assert (result["current"], result["previous"]) == (three, two)
    assert (board.target("current"), board.target("previous")) == (three, two)
    board.assert_valid(three)
    assert list((board.root / "incoming").iterdir()) == []
    board.call("gc", keep=3)
    assert [path for path in board.root.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "state", ["board:intent", "board:linked", "board:switched", "board:previous", "board:recorded"]
)
def test_kill_during_rollback_leaves_current_valid_and_a_second_run_converges(board, state):
    one, two, three = (board.release(text) for text in ("one", "two", "three"))
    assert board.call("rollback", **{"from": three, "fault": f"after:{state}"}) == "killed"
    board.assert_valid(two, three)
    board.call("rollback", **{"from": three})
    assert (board.target("current"), board.target("previous")) == (two, one)
    board.assert_valid(two)


def test_journal_line_cut_short_by_a_power_loss_is_skipped(board):
    board.release("one")
    with (board.root / "journal.jsonl").open("ab") as stream:
        stream.write(b'{"event": "activ')
    two = board.release("two")
    assert board.call("status")["current"] == two
    assert board.call("rollback")["changed"] is True


def test_verbs_that_write_respect_the_lock_of_another_run(board):
    one, two = board.release("one"), board.release("two")
    holder = subprocess.Popen(
        [sys.executable, str(board.program), "lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    try:
        holder.stdin.write(
            json.dumps({"root": str(board.root), "purpose": "deploy", "user": "ann", "host": "desk", "pid": 7}) + "\n"
        )
        assert json.loads(holder.stdout.readline())["event"] == "held"
        event = board.call("activate", folder=one)
        assert event["error"] == "BoardBusyError"
        assert "ann on desk (process 7, deploy)" in event["message"]
        assert board.target() == two
        assert board.call("status")["current"] == two
        assert board.call("activate", folder=one, owner={"host": "desk", "pid": 7})["changed"] is True
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    assert board.call("activate", folder=two)["changed"] is True


def test_status_tells_releases_that_ran_from_those_that_never_did(board):
    one, two = board.release("one"), board.release("two")
    three = board.release("three")
    refused = board.call("stage", **board.blobs("too slow"))["folder"]
    assert board.call("refuse", folder=refused, reason="too slow") == {"refused": refused}
    interrupted = board.call("stage", **board.blobs("interrupted"))["folder"]

    def states():
        return {release["folder"]: release["state"] for release in board.call("status")["releases"]}

    assert states() == {
        one: "former",
        two: "previous",
        three: "current",
        refused: "refused",
        interrupted: "incomplete",
    }
    board.call("rollback")
    assert states()[two] == "current"
    assert states()[three] == "rolled back"
    board.call("activate", folder=refused)
    assert states()[refused] == "current", "it passed the next time"


def test_a_second_rollback_says_the_way_forward(board):
    board.release("one")
    board.release("two")
    board.call("rollback")
    again = board.call("rollback")
    assert again["error"] == "DeployError"
    assert "only the release before the current one" in again["hint"]
    assert "edgeprune deploy" in again["hint"]
