"""A run that was not told where its table shall be saved can be gone on with too."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeprune.profiling.journal_place import FORGOTTEN_S, journals

REQUEST = {"board": "orin", "settings": [10, 1, 0]}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPRUNE_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def on(root: str) -> Any:
    """A board, as far as it matters here."""
    return SimpleNamespace(transport=SimpleNamespace(address="ann@orin:22"), root=root)


def interrupted(request: dict[str, Any], board: Any) -> Path:
    """A run that was interrupted after it had written something; where."""
    with contextlib.suppress(KeyboardInterrupt), journals(None, board, request) as path:
        assert path is not None
        path.with_name("journal").write_text("measured")
        raise KeyboardInterrupt
    return path


def test_a_place_of_its_own_is_taken_as_it_is(tmp_path: Path, state: Path) -> None:
    with journals(tmp_path / "table.parquet", on("/a"), REQUEST) as path:
        assert path == tmp_path / "table.parquet"
    assert not state.exists()


def test_what_an_interrupted_run_left_is_found_by_the_same_run_alone(state: Path) -> None:
    left = interrupted(REQUEST, on("/a"))
    assert interrupted({**REQUEST, "settings": [20, 1, 0]}, on("/a")) != left
    assert interrupted(REQUEST, on("/b")) != left
    with journals(None, on("/a"), dict(REQUEST)) as path:
        assert path == left
        assert path.with_name("journal").read_text() == "measured"
    assert not left.parent.exists(), "a run that ended well leaves nothing"
    assert len(list((state / "profiles").iterdir())) == 2


def test_what_nobody_remembers_is_removed(state: Path) -> None:
    old, fresh = interrupted(REQUEST, on("/a")), interrupted(REQUEST, on("/b"))
    then = time.time() - FORGOTTEN_S - 60
    for path in (old.with_name("journal"), old.parent):
        os.utime(path, (then, then))
    with journals(None, on("/c"), REQUEST):
        assert not old.parent.exists()
        assert fresh.parent.exists()


def test_a_state_that_cannot_be_written_is_no_obstacle(state: Path) -> None:
    state.write_text("a file")
    with journals(None, on("/a"), REQUEST) as path:
        assert path is None
