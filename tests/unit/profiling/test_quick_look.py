"""A board is looked at again before it is refused."""

from __future__ import annotations

import pytest

from edgeprune.errors import ConfigError, UnstableMeasurementError
from edgeprune.profiling import quick_look


def test_what_a_burst_made_strange_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_look, "AGAIN_AFTER_S", (0.0, 0.25))
    turns: list[int] = []
    said: list[str] = []

    def looked() -> None:
        turns.append(len(turns))
        if len(turns) < 3:
            raise UnstableMeasurementError("found +7% to +74%.")

    quick_look.accepted(looked, said.append)
    assert len(turns) == 3
    assert [sentence.rsplit("again in ")[-1] for sentence in said] == ["0 s", "0 s"]


def test_what_stays_strange_is_refused_with_what_was_seen_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_look, "AGAIN_AFTER_S", (0.0, 0.0))
    turns: list[int] = []

    def looked() -> None:
        turns.append(len(turns))
        raise UnstableMeasurementError(f"look {len(turns)}.")

    with pytest.raises(UnstableMeasurementError, match=r"look 3\."):
        quick_look.accepted(looked, lambda _: None)


def test_an_error_that_is_no_judgement_is_not_waited_for() -> None:
    turns: list[int] = []

    def looked() -> None:
        turns.append(len(turns))
        raise ConfigError("no such engine.")

    with pytest.raises(ConfigError):
        quick_look.accepted(looked, lambda _: None)
    assert len(turns) == 1
