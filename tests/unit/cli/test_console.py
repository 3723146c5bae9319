"""What a long step says: a line now and then where there is no terminal, nothing with ``--json``."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress as Bar

from edgeprune.cli.console import PLAIN_EVERY_S, Output, Progress, report_error


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_without_a_terminal_a_long_step_says_now_and_then_how_far_it_is() -> None:
    said: list[str] = []
    clock = Clock()
    progress = Progress("train", say=said.append, clock=clock)
    for second in range(100):
        clock.now_s = float(second)
        progress.share(second, 200)
    assert said == ["  train, 15%", "  train, 30%", "  train, 45%"]
    clock.now_s += PLAIN_EVERY_S
    progress.timed(3, 4, 90.0, "kernels")
    clock.now_s += PLAIN_EVERY_S
    progress.told("compile", "exporting")
    # A quarter of the time since the last share was told: 30 of 120 seconds.
    assert said[3:] == ["  train: kernels (3 of 4), 25%, about 1:30 left", "  train: exporting"]
    progress.said("going on: 3 measurements kept")
    assert said[-1] == "going on: 3 measurements kept"


def test_stages_are_one_share_of_the_time_that_never_falls() -> None:
    said: list[str] = []
    clock = Clock()
    progress = Progress("profile", say=said.append, clock=clock)
    # Set-up, a first stage whose end is not the end, and a second one whose items are counted anew.
    steps = [(0, 0, 60.0), (10, 100, 45.0), (100, 100, 30.0), (0, 0, 30.0), (1, 20, 40.0), (20, 20, 0.0), (1, 5, 5.0)]
    for number, (done, total, left_s) in enumerate(steps):
        clock.now_s = (number + 1) * PLAIN_EVERY_S
        progress.timed(done, total, left_s, "round 1")
    shares = [int(text.partition("%")[0].rpartition(" ")[2]) for text in said]
    assert len(shares) == len(steps)
    assert shares == sorted(shares)
    assert shares[-1] < 100
    assert said[1] == "  profile: round 1 (10 of 100), 57%, about 0:45 left"
    assert "left" not in said[0]
    # The last item of a stage is not the end, and how long the next one takes is not known yet.
    assert not [text for text in said if "0:00 left" in text]


def test_what_is_timed_after_something_else_has_a_share_of_its_own() -> None:
    said: list[str] = []
    clock = Clock()
    progress = Progress("prune", say=said.append, clock=clock)
    clock.now_s = 10 * PLAIN_EVERY_S
    progress.stepped("tuning", 10, 10)
    clock.now_s += PLAIN_EVERY_S
    progress.timed(1, 4, 3 * PLAIN_EVERY_S, "timing")
    assert said == ["  prune: tuning, 100%", "  prune: timing (1 of 4), 25%, about 1:30 left"]


def test_on_a_terminal_the_bar_shows_it_and_sentences_stay_above() -> None:
    screen = io.StringIO()
    with Bar(console=Console(file=screen, force_terminal=True, width=100, highlight=False)) as bar:
        clock = Clock()
        progress = Progress("profile", bar, say=lambda line: bar.console.print(line, markup=False), clock=clock)
        progress.said("going on: 3 measurements kept")
        clock.now_s = 3.0
        progress.timed(1, 4, 9.0, "timing")
        (task,) = bar.tasks
        assert (task.description, task.completed, task.total) == ("profile: timing (1 of 4)", 250, 1000)
        assert task.fields["left"] == "about 0:09 left"
        progress.share(2, 4)
        assert (task.description, task.completed, task.total) == ("profile: timing (1 of 4)", 2, 4)
    assert "going on: 3 measurements kept" in screen.getvalue()


def test_with_json_a_step_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Output(json_mode=True).step("train") as progress:
        progress.said("going on")
        progress.share(1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_hint_follows_a_whole_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for message in ("it must fit, found another", "it must fit, found another.", "what did you mean?"):
        report_error("E", message, hint="this", exit_code=2, json_mode=False)
    assert capsys.readouterr().err.splitlines() == [
        "error: it must fit, found another. Try: this",
        "error: it must fit, found another. Try: this",
        "error: what did you mean? Try: this",
    ]
