"""What became of a board while it was measured, in sentences: throttling, governor, power mode, a restart."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_NAMES = {"power_mode": "the power mode", "governors": "the CPU frequency governor"}
_COUNT = re.compile(r"\b[0-9]+ times\b")


def changes(states: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """How a board was disturbed between the first of its states and the last.

    Args:
        states: As the board told them before and after each call, in order.

    Returns:
        Sentences, each once, in the order in which things happened; empty where nothing did. What was so from the beginning
        is no change, and what a board does not tell is not guessed.
    """
    found: list[str] = []
    for before, after in itertools.pairwise(states):
        restarted = _differ(before, after, "boot")
        if restarted:
            found.append("the board was restarted while it was measured.")
        known = set(before.get("throttling") or ())
        # After a restart the counts since the start begin anew.
        for sentence in () if restarted else after.get("throttling") or ():
            if sentence not in known:
                found.append(f"while it was measured, {sentence}")
        for key, name in _NAMES.items():
            if _differ(before, after, key):
                was, now = (_text(state[key]) for state in (before, after))
                found.append(f"{name} changed from {was} to {now} while it was measured.")
    return once(found)


def once(sentences: Iterable[str]) -> tuple[str, ...]:
    """Sentences, each once, in their order; of those that differ in a count of times alone, the last."""
    found: dict[str, str] = {}
    for sentence in sentences:
        found[_COUNT.sub("times", sentence)] = sentence
    return tuple(found.values())


def _differ(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> bool:
    return bool(before.get(key) and after.get(key)) and before[key] != after[key]


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
