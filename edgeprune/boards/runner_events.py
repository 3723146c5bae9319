"""What the on-board runner says: events, and the typed exceptions that its errors stand for."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from typing import Any

from edgeprune import errors
from edgeprune.boards.transport import CommandResult
from edgeprune.errors import (
    BudgetInfeasibleError,
    CommandError,
    EdgepruneError,
    IncompatibleTargetError,
    RunnerEndedError,
)


def parse_object(line: str) -> dict[str, Any] | None:
    """The JSON object that a line holds, or None: a login script may print other things."""
    if not line.startswith("{"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def parse_event(line: str) -> dict[str, Any] | None:
    """The event that a line holds, or None."""
    value = parse_object(line)
    return value if value is not None and "event" in value else None


def error_of(event: Mapping[str, Any]) -> EdgepruneError:
    """The typed exception that an error event names; only edgeprune's own can be named."""
    kind = getattr(errors, str(event.get("error")), None)
    message, hint = str(event.get("message")), event.get("hint")
    details = event.get("details") or {}
    if not (isinstance(kind, type) and issubclass(kind, EdgepruneError)):
        return CommandError(f"{event.get('error')}: {message}", hint=hint)
    if kind is IncompatibleTargetError:
        found = [str(details.get(key, "unknown")) for key in ("field", "needed", "found")]
        return IncompatibleTargetError(*found, hint=hint)
    if kind is BudgetInfeasibleError:
        return BudgetInfeasibleError(message, best_ms=float(details.get("best_ms", "nan")), hint=hint)
    return kind(message, hint=hint)


def crash(verb: str, ended: CommandResult) -> RunnerEndedError:
    """A runner that ended without a word for us."""
    if ended.returncode < 0:
        try:
            how = f"was killed by {signal.Signals(-ended.returncode).name}"
        except ValueError:
            how = f"was killed by signal {-ended.returncode}"
        hint = "look for memory running out on the board: dmesg" if ended.returncode == -signal.SIGKILL else None
    else:
        how, hint = f"ended with exit code {ended.returncode}", None
    said = ended.stderr.decode("utf-8", "replace").strip().splitlines()
    last = f": {said[-1].strip()}" if said else ""
    return RunnerEndedError(f"the runner's verb {verb!r} must give a result, but it {how}{last}.", hint=hint)
