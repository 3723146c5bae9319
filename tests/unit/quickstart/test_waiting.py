"""A board that another run has for a moment does not cost the quickstart its minutes of work."""

import threading

import pytest

from edgeprune.boards.board import Board
from edgeprune.errors import BoardBusyError
from edgeprune.quickstart import waiting


@pytest.fixture
def boards(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(tmp_path / "board"))
    with Board.open("local") as one, Board.open("local") as other:
        yield one, other


def test_a_board_that_another_run_has_is_waited_for(boards):
    mine, other = boards
    told, held, free = [], threading.Event(), threading.Event()

    def elsewhere():
        with other.hold("profile"):
            held.set()
            free.wait(30)

    run = threading.Thread(target=elsewhere)
    run.start()
    assert held.wait(30)
    threading.Timer(1.5, free.set).start()
    with waiting.held(mine, told.append):
        run.join(30)
        with pytest.raises(BoardBusyError), other.hold("profile"):
            pass
    assert len(told) == 1
    assert told[0].startswith("waiting for up to 15 minutes: the board must be free, but ")


def test_it_is_not_waited_for_for_ever(boards, monkeypatch):
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.0)
    mine, other = boards
    with other.hold("profile"), pytest.raises(BoardBusyError), waiting.held(mine, print):
        pass
