"""What is measured after all timing goes on where it was: real journals, a real board; what replays would tell is made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeprune.boards.board import Board
from edgeprune.boards.power import BoardPower, PowerSensor
from edgeprune.errors import ConnectError
from edgeprune.profiling import afterwards
from edgeprune.profiling.energy_windows import EnergyMeasurement
from edgeprune.profiling.journal import Journal

# Of a sensor as quick as this a minute holds four replays.
POWER = BoardPower((PowerSensor("meter meter", "meter", "meter", "power", "total", period_s=0.01),), ())
NETWORKS: dict[str, bytes | Path] = {f"network{number}": b"" for number in range(6)}
FOUND = EnergyMeasurement(3.0, 0.1, 5.0, 3000.0, 1000.0, 1.0, 1.0, 5000, 1, 500, ("meter",), "a meter", ("doubtful.",))


class Replays:
    """In place of `measure_energy`: notes what it is asked for, and fails where it is told to."""

    def __init__(self, *failures: BaseException | None) -> None:
        self.asked: list[set[str]] = []
        self._failures = list(failures)

    def __call__(self, board: Board, engines: dict[str, bytes], **settings: Any) -> dict[str, EnergyMeasurement]:
        self.asked.append(set(engines))
        if self._failures and (failure := self._failures.pop(0)) is not None:
            raise failure
        windows = 2 * len(engines) + 1
        settings["progress"](windows, windows, 0.0, "energy by replay")
        return dict.fromkeys(engines, FOUND)


@pytest.fixture(autouse=True)
def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(afterwards, "network_engines", lambda setting, selection: NETWORKS)


@pytest.fixture
def replay(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Energies of all networks, with the journal of one run."""

    def run(replays: Replays, meter: str = "a", wait_s: float = 0.0, **others: Any) -> dict[str, EnergyMeasurement]:
        monkeypatch.setattr(afterwards, "measure_energy", replays)
        setting: Any = SimpleNamespace(runtime="onnxruntime", threads=1, seed=0, wait_s=wait_s, start_s=0.0)
        selection: Any = None
        tell, told = others.get("tell", lambda *state: None), others.get("told")
        with Journal(tmp_path / "selection.jsonl", {"of": "one run"}) as book:
            how = {"meter": meter, "host_meter": None, "rails": None}
            return afterwards.energies(board, setting, selection, POWER, how, book, tell, told)

    return run


def test_networks_that_an_interrupted_run_has_replayed_are_not_replayed_again(replay: Any) -> None:
    first, second, other = Replays(None, KeyboardInterrupt()), Replays(), Replays()
    with pytest.raises(KeyboardInterrupt):
        replay(first)
    assert [len(names) for names in first.asked] == [4, 2]
    states: list[tuple[int, int, float, str]] = []
    assert replay(second, tell=lambda *state: states.append(state)) == dict.fromkeys(NETWORKS, FOUND)
    assert second.asked == [first.asked[1]]
    assert states[-1][:3] == (5, 5, 0.0)
    again = Replays()
    assert set(replay(again)) == set(NETWORKS)
    assert again.asked == []
    replay(other, meter="another command")
    assert set().union(*other.asked) == set(NETWORKS)


def test_share_that_is_shown_is_that_of_all_networks(replay: Any) -> None:
    states: list[tuple[int, int, float, str]] = []
    replay(Replays(), tell=lambda *state: states.append(state))
    assert [(done, total) for done, total, _, _ in states] == [(9, 14), (14, 14)]
    assert states[0][2] == pytest.approx(29, abs=1), "two networks are left"


def test_a_link_that_is_lost_is_waited_for_and_one_part_is_done_anew(replay: Any) -> None:
    gone = ConnectError("the link to the board must stay up, it was reset.")
    said: list[str] = []
    lost = Replays(None, gone)
    found = replay(lost, wait_s=20.0, told=said.append)
    assert set(found) == set(NETWORKS)
    assert [len(names) for names in lost.asked] == [4, 2, 2]
    (sentence,) = said
    assert sentence.startswith("the link to board local was lost, and came back after ")
    assert sentence.endswith(" s; what was on its way begins anew")


def test_nobody_waits_who_was_not_asked_to(replay: Any) -> None:
    with pytest.raises(ConnectError, match="it was reset"):
        replay(Replays(ConnectError("the link to the board must stay up, it was reset.")))


@pytest.mark.parametrize(("start_s", "asked"), [(0.0, [6]), (4.0, [3, 3])])
def test_percentiles_are_taken_once(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_s: float, asked: list[int]
) -> None:
    taken: list[set[str]] = []
    states: list[tuple[int, int, float]] = []
    setting: Any = SimpleNamespace(runtime="onnxruntime", threads=1, wait_s=0.0, start_s=start_s)
    selection: Any = None

    def timed(board: Board, engines: dict[str, bytes], **settings: Any) -> dict[str, dict[str, Any]]:
        taken.append(set(engines))
        settings["progress"](5 * len(engines), 5 * len(engines), 0.0, "single inferences")
        if len(taken) == len(asked):
            raise KeyboardInterrupt
        return {name: {"runs": 500, "median_ms": 1.5, "ms": {"95": 2.0}, "ratio": {"95": 4 / 3}} for name in engines}

    def run() -> dict[str, dict[str, Any]]:
        with Journal(tmp_path / "selection.jsonl", {"of": "one run"}) as book:
            return afterwards.percentiles(
                board, setting, selection, book, lambda *state: states.append(state[:3]), None
            )

    monkeypatch.setattr(afterwards, "timed_singly", timed)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [len(names) for names in taken] == asked
    assert [(done, total) for done, total, _ in states] == [
        (5 * sum(asked[: end + 1]), 30) for end in range(len(asked))
    ]
    assert states[0][2] == start_s * 5 * sum(asked[1:]), "what is left"
    # Of what was interrupted nothing is known, of what was before it all.
    found = run()
    assert taken[len(asked) :] == [taken[len(asked) - 1]]
    assert set(found) == set(NETWORKS)
    assert run() == found
    assert len(taken) == len(asked) + 1
