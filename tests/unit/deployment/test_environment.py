"""What a set-up says of an environment that did not pass its test."""

import fcntl

import pytest

from edgeprune.backends import registry
from edgeprune.boards.board import Board
from edgeprune.deployment.environment import _Run
from edgeprune.errors import AuthError, BackendUnavailableError
from edgeprune.testing.wheels import write_wheel

ID = "0123456789abcdef"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A set-up that has built an environment without a runtime."""
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(tmp_path / "root"))
    wheel = write_wheel(tmp_path, "hello", "1.0", {"hello.py": b""})
    with Board.open("local") as board:
        made = _Run(board, registry.get("onnxruntime"), tmp_path, None)
        made.state = {"used": None}
        wheels = [{"name": wheel.name, "sha256": board.push(wheel)}]
        made.built = board.call("environment", {"action": "build", "id": ID, "wheels": wheels})
        yield made


def names(run):
    with run.board.using(run.board.base_python):
        return list(run.board.call("environment", {"action": "status"})["environments"])


def test_it_is_removed_and_an_older_runtime_advised(run, artifacts):
    with pytest.raises(BackendUnavailableError, match="The new environment was removed") as caught:
        run._tried_or_dropped(artifacts[0], {}, run.built)
    assert "--runtime-version, with an older one" in caught.value.hint
    assert names(run) == []


def test_what_could_not_be_removed_is_not_said_to_be(run, artifacts, tmp_path):
    with (tmp_path / "root" / "environment.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BackendUnavailableError) as caught:
            run._tried_or_dropped(artifacts[0], {}, run.built)
    assert "removed" not in caught.value.message
    assert names(run) == [ID]


def test_an_error_of_the_link_says_nothing_of_it(run, artifacts, monkeypatch):
    def refused(*_, **__):
        raise AuthError("the board must accept the key.", hint="ssh-add")

    monkeypatch.setattr(run, "_tried", refused)
    with pytest.raises(AuthError) as caught:
        run._tried_or_dropped(artifacts[0], {}, run.built)
    assert (caught.value.message, caught.value.hint) == ("the board must accept the key.", "ssh-add")
    assert names(run) == [ID]
