"""Which function is tuned next: the one whose next trials save most of an inference.

Source: Zheng et al. 2020, "Ansor: Generating High-Performance Tensor Programs for Deep Learning" (OSDI), section 6.2, whose
gradient of the network's time over the trials of a function is used without its term of similar functions: similar ones
begin with each other's schedules here (`edgeprune.backends.tvm.transfer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

_PAST = 0.2
"""Weight of what the last trials have won, against what is hoped for (alpha in the paper)."""
ENOUGH = 384
"""Trials of one function after which hardly one gets better: what a user waits for is then better spent elsewhere."""
_LEAST_SHARE = 0.003
"""Functions that take less of an inference than this are left as they are."""


@dataclass
class TaskState:
    """A function that can be tuned.

    Attributes:
        calls: How often one inference calls it.
        best_ms: What its best schedule takes, milliseconds.
        trials: Schedules that were tried, in all tunings.
        won: By round of this tuning (trials, milliseconds that the best schedule became quicker).
        exhausted: Whether the search has nothing left to try.
    """

    calls: int
    best_ms: float
    trials: int
    won: list[tuple[int, float]] = field(default_factory=list)
    exhausted: bool = False

    @property
    def network_ms(self) -> float:
        """What it takes of an inference, milliseconds."""
        return self.calls * self.best_ms

    @property
    def gain(self) -> float:
        """Milliseconds of an inference that one trial more is expected to save."""
        tried, saved = self.won[-1] if self.won else (0, 0.0)
        past = saved / tried if tried else 0.0
        # As many trials again could at best save all of it.
        hoped = self.best_ms / max(1, self.trials)
        return self.calls * (_PAST * past + (1 - _PAST) * hoped)

    def told(self, tried: int, best_ms: float | None) -> None:
        """Note a round: trials, and the quickest of them, None where all failed."""
        better = self.best_ms if best_ms is None else min(self.best_ms, best_ms)
        self.won.append((tried, self.best_ms - better))
        self.best_ms, self.trials = better, self.trials + tried


def choose(tasks: Sequence[TaskState]) -> int | None:
    """Index of the function to tune next; None when none is worth it."""
    whole_ms = sum(task.network_ms for task in tasks)
    open_ = [
        index
        for index, task in enumerate(tasks)
        if not task.exhausted and task.trials < ENOUGH and task.network_ms >= _LEAST_SHARE * whole_ms
    ]
    return max(open_, key=lambda index: tasks[index].gain, default=None)


@dataclass
class Allowance:
    """What a tuning may take.

    Attributes:
        seconds: Time, from its beginning.
        trials: Trials of all functions together; None is as many as there is time for.
        spent_trials: So far.
    """

    seconds: float
    trials: int | None
    spent_trials: int = 0

    def next_batch(self, most: int, passed_s: float, begun_s: float = 0.0) -> int:
        """How many trials can still be made at once.

        Args:
            most: What would be made if nothing were short.
            passed_s: Since the tuning began.
            begun_s: Of these, until the first trial began.
        """
        count = most if self.trials is None else min(most, self.trials - self.spent_trials)
        left_s = self.seconds - passed_s
        if self.spent_trials:
            each_s = (passed_s - begun_s) / self.spent_trials
            count = min(count, int(left_s / each_s) if each_s > 0 else count)
        return max(0, count) if left_s > 0 else 0

    def left_s(self, passed_s: float) -> float:
        """About how long it will still take, seconds."""
        left_s = max(0.0, self.seconds - passed_s)
        if self.trials is None or not self.spent_trials:
            return left_s
        return min(left_s, (self.trials - self.spent_trials) * passed_s / self.spent_trials)

    def expected_trials(self, passed_s: float) -> int:
        """About how many trials there will have been in the end; 0 while that is not known."""
        if not self.spent_trials or passed_s <= 0:
            return self.trials or 0
        whole = round(self.spent_trials * max(self.seconds, passed_s) / passed_s)
        return max(self.spent_trials, whole if self.trials is None else min(whole, self.trials))
