import stat
import time

import pytest

from edgeprune.boards.board import Board
from edgeprune.deployment import state
from edgeprune.deployment.status import BoardStatus, rollback, status
from edgeprune.errors import BoardBusyError, DeployError


def test_board_without_releases(root):
    found = status("local")
    assert (found.online, found.current, found.previous, found.releases, found.confirmed) == (
        True,
        None,
        None,
        (),
        False,
    )
    assert found.still_runs() == "Board local still runs no release."


def test_rollback_needs_a_release(root):
    with pytest.raises(DeployError, match="must run a release to roll back, found none"):
        rollback("local")


def test_rollback_needs_an_earlier_release(running, artifacts):
    with pytest.raises(DeployError, match=f"found none; it still runs {artifacts[0].release}") as caught:
        rollback("local")
    assert caught.value.exit_code == 5
    assert status("local").current.name == "net0"


def test_rollback_waits_for_nobody(running):
    with Board.open("local") as other, other.hold("deploy"), pytest.raises(BoardBusyError, match="deploy"):
        rollback("local")


def test_what_was_seen_last_is_remembered_with_its_age(running, tmp_path):
    seen = status("local")
    result, age_s = state.recall("local")
    assert BoardStatus.from_result("local", result) == seen
    assert 0 <= age_s < 60
    (written,) = (tmp_path / "state" / "boards").iterdir()
    assert stat.S_IMODE(written.stat().st_mode) & 0o077 == 0


@pytest.mark.parametrize("name", ["ssh://a@b:22?root=/tmp/" + "x" * 400, "../../escape", "a/b", "größe", ""])
def test_any_name_can_be_remembered_and_stays_in_its_folder(root, tmp_path, name):
    state.remember(name, {"current": name})
    assert state.recall(name)[0] == {"current": name}
    assert len(list((tmp_path / "state" / "boards").iterdir())) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": 1, "time_s": 2}', '{"status": {}}', "null"])
def test_broken_memory_counts_as_none(root, tmp_path, text):
    state.remember("local", {})
    (path,) = (tmp_path / "state" / "boards").iterdir()
    path.write_text(text)
    assert state.recall("local") is None


def test_age_is_never_negative(root, monkeypatch):
    state.remember("local", {})
    past = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: past)
    assert state.recall("local")[1] == 0.0


def test_machine_that_cannot_remember_goes_on(root, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEPRUNE_STATE", str(tmp_path / "file"))
    assert status("local").online
    assert "could not be remembered" in caplog.text
