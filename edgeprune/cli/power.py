"""What the verbs say of a board's power."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.errors import PowerUnavailableError

if TYPE_CHECKING:
    from edgeprune.boards.power import BoardPower


def energy_sentence(power: BoardPower) -> str:
    """One line: what energy would be measured on, or why it cannot be."""
    try:
        return f"energy can be measured: {power.scope().covers}"
    except PowerUnavailableError as error:
        return f"energy cannot be measured: {error}"
