"""What becomes of a board while it is measured is said, once, and nothing is said of what was so before."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.boards.board import Board
from edgeprune.profiling.assembling import disturbances_of
from edgeprune.profiling.changes import changes
from edgeprune.profiling.measuring import MeasuredRun, measure

CALM: dict[str, Any] = {"throttling": [], "governors": ["schedutil"], "power_mode": "15W", "boot": "a"}
HOT = "clocks are held down by heat: cooling device cpu-cpufreq is at step 2."


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ([CALM, CALM, CALM], ()),
        ([{**CALM, "throttling": [HOT]}, {**CALM, "throttling": [HOT]}], ()),
        (
            [CALM, {**CALM, "throttling": [HOT]}, CALM, {**CALM, "throttling": [HOT]}],
            (f"while it was measured, {HOT}",),
        ),
        (
            [CALM, {**CALM, "power_mode": "MAXN", "governors": ["performance", "schedutil"]}],
            (
                "the power mode changed from 15W to MAXN while it was measured.",
                "the CPU frequency governor changed from schedutil to performance+schedutil while it was measured.",
            ),
        ),
        (
            [
                {**CALM, "throttling": ["7 times since it was started."]},
                {**CALM, "boot": "b", "throttling": ["1 time."]},
            ],
            ("the board was restarted while it was measured.",),
        ),
        (
            [
                CALM,
                *({**CALM, "throttling": [f"lowered its clocks {count} times since then."]} for count in (1, 5, 90)),
            ],
            ("while it was measured, lowered its clocks 90 times since then.",),
        ),
        ([CALM, {"load": 1.0}], ()),  # a board that tells nothing
        ([{"load": 1.0}, {**CALM, "boot": None}], ()),
        ([CALM], ()),
        ([], ()),
    ],
)
def test_changes_are_told_once_and_in_order(states: list[dict[str, Any]], said: tuple[str, ...]) -> None:
    assert changes(states) == said


def test_what_happens_before_and_between_the_parts_of_a_run_is_told_too() -> None:
    def part(before: dict[str, Any], after: dict[str, Any], *said: str) -> MeasuredRun:
        return MeasuredRun({}, {}, {"before": before, "after": after}, 0.0, 0, 0.0, "dense", disturbances=said)

    hot = {**CALM, "throttling": [HOT]}
    # The probe saw a calm board; it was hot when the first part began, and in another power mode when the second did.
    parts = [part(hot, hot), part({**hot, "power_mode": "MAXN"}, hot, "told by itself.")]
    assert list(disturbances_of(parts, ())) == [
        f"when measuring began, {HOT}",
        "the power mode changed from 15W to MAXN while it was measured.",
        "told by itself.",
    ]
    assert list(disturbances_of([part(hot, hot)], (HOT,))) == [], "the probe has told it"
    assert list(disturbances_of([part(CALM, CALM), part(CALM, CALM)], ())) == []


def test_a_board_that_is_throttled_in_the_middle_of_a_run_is_said_to_have_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conv_engine: Callable[..., bytes]
) -> None:
    """A real run; the firmware is a program that tells of throttling from its second answer on, as a Raspberry Pi's does."""
    folder, asked = tmp_path / "bin", tmp_path / "asked"
    folder.mkdir()
    (folder / "vcgencmd").write_text(
        f'#!/bin/sh\nif test -e "{asked}"; then echo throttled=0x40004; else echo throttled=0x0; fi\n: > "{asked}"\n'
    )
    (folder / "vcgencmd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(tmp_path / "board"))
    with Board.open("local") as board:
        asked.unlink(missing_ok=True)  # by the probe
        run = measure(board, {"conv": conv_engine(8)}, rounds=1, samples=1, sample_ms=1.0, warmup_ms=1.0)
    assert run.disturbances == (
        "while it was measured, the firmware reports that the processor is throttled now (throttled=0x40004).",
    )
