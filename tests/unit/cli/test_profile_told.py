"""What `edgeprune profile` says of the run that just ended, where the table has others before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeprune.cli import profile
from edgeprune.cli.console import Output
from edgeprune.latency.table import LatencyTable

TABLE = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"
NET = "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"


def of_runs(*loads: str) -> LatencyTable:
    """A table whose runs found the board under these loads."""
    stored = LatencyTable.load(TABLE)
    runs: list[dict[str, Any]] = [
        {"fingerprint": {"disturbances": [f"the load is {load}."]}, "drift": {"lost_s": 0.0}} for load in loads
    ]
    fingerprint = {**(stored.header.get("fingerprint") or {}), "disturbances": ["the load is 6.13."]}
    drift = {"largest": 0.0, "lost_s": 50.0, "drifted_rows": 0}
    header = {**stored.header, "board": "pi", "unsupported": {}, "fingerprint": fingerprint, "drift": drift}
    return LatencyTable({**header, "runs": runs} if runs else header, stored.rows)


@pytest.mark.parametrize(
    ("before", "after", "load"), [(None, (), "6.13"), ((), ("0.5",), "0.5"), (("0.5",), ("0.5", "0.7"), "0.7")]
)
def test_conditions_are_those_of_the_last_run(
    before: tuple[str, ...] | None, after: tuple[str, ...], load: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table, base = of_runs(*after), None if before is None else of_runs(*before)
    profile._tell(Output(False), table, profile._last_run(table, base), Path("t.parquet"))
    said = capsys.readouterr().out
    assert f"could have disturbed the measurement: the load is {load}." in said
    assert said.count("could have disturbed") == 1
    assert ("50 s were lost" in said) == (base is None)


def test_a_run_that_had_nothing_to_measure_tells_no_conditions(capsys: pytest.CaptureFixture[str]) -> None:
    table = of_runs("0.5")
    assert profile._last_run(table, table) is None
    profile._tell(Output(False), table, None, Path("t.parquet"))
    assert "could have disturbed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spent_s", "earlier_s", "lost_s", "said"),
    [
        (88.0, 0.0, 0.2, "measuring took 88 s of the 90 s asked for; with set-up and fits the command took 99 s"),
        (
            72.0,
            31.0,
            0.0,
            "measuring took 72 s of the 90 s asked for, 31 s of it before it was interrupted; "
            "with set-up and fits this command took 99 s",
        ),
        (
            122.0,
            0.0,
            40.0,
            "measuring took 122 s of the 90 s asked for, 40 s of it waiting for others who use the board's core, "
            "since two rounds are measured whatever they take; with set-up and fits the command took 99 s",
        ),
    ],
)
def test_where_the_time_went_is_one_sentence(spent_s: float, earlier_s: float, lost_s: float, said: str) -> None:
    run = {"protocol": {"spent_s": spent_s, "earlier_s": earlier_s}, "drift": {"lost_s": lost_s}}
    assert profile.where_time_went(run, 90.0, 99.0) == said


def test_models_are_called_what_was_typed_of_them(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            (tmp_path / folder / f"{name}.py").write_text(NET)
    first, second, other = (f"{tmp_path}/{place}:build" for place in ("one/a.py", "one/b.py", "two/a.py"))
    flags: tuple[Any, ...] = (None, ["x=1x3x8x8"], None, 0)
    assert list(profile._modules([first, second], *flags)[0]) == ["a.py:build", "b.py:build"]
    assert list(profile._modules([first, other], *flags)[0]) == [first, other], "folders tell what files do not"
