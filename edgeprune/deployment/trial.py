"""A release on trial: switched to, watched, then confirmed or put back.

From the instant of the switch a process on the board holds the dead man's handle (`edgeprune/boards/onboard/guard.py`): unless
this machine confirms the release within the health window, it puts the former one back, with nobody's help.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from edgeprune.deployment import faults, gates
from edgeprune.deployment.status import BoardStatus, read_status
from edgeprune.errors import (
    AuthError,
    BoardBusyError,
    ConfigError,
    ConnectError,
    EdgepruneError,
    HealthError,
    HostKeyError,
    InconsistentBoardError,
    RemoteError,
    RemoteTimeoutError,
    UncertainBoardError,
)

if TYPE_CHECKING:
    from edgeprune.boards.board import Board
    from edgeprune.deployment.artifact import Artifact

WINDOW_S = 60.0
"""Health window where none is given, beside the time that the release itself needs to answer, seconds."""
STEADY_S = 10.0

_HEALTH_CASES = 1
_POLL_S = 0.5
_RETRY_S = 1.0
_LATE_S = 60.0
"""So long after its end a window may still be open: the board rehashes what it puts back."""
_LONGEST_COMMAND = 4096
_LONGEST_WINDOW_S = 86400.0
_AWAY = (ConnectError, RemoteTimeoutError, HostKeyError, AuthError, BoardBusyError)
"""A board that somebody else took while the link was lost is away, too: taking it has ended the trial."""

Tell = Callable[[str, int, int, str], None]
_Result = TypeVar("_Result")

_log = logging.getLogger("edgeprune.deployment.trial")


@dataclass(frozen=True)
class Health:
    """What the user asks of the time after the switch; see `edgeprune.deployment.deploying.deploy`.

    Raises:
        ConfigError: A command is empty, or the window is too short.
    """

    command: str | None = None
    reload: str | None = None
    window_s: float | None = None
    steady_s: float | None = None

    def __post_init__(self) -> None:
        for name, command in (("health", self.command), ("reload", self.reload)):
            if command is not None and (not command.strip() or "\0" in command or len(command) > _LONGEST_COMMAND):
                raise ConfigError(
                    f"the {name} command must be a line for the board's shell of at most {_LONGEST_COMMAND} characters, "
                    f"found {command[:40]!r}."
                )
        window_s, steady_s = self.window_s, self.steady_s
        if window_s is not None and not (1 <= window_s <= _LONGEST_WINDOW_S):
            raise ConfigError(
                f"the health window must be at least 1 s and at most a day, found {window_s:g} s.",
                hint="--health-window 60",
            )
        if steady_s is not None and not 0 <= steady_s < (WINDOW_S if window_s is None else window_s):
            raise ConfigError(
                f"the health command must hold for less than the whole health window, found {steady_s:g} s.",
                hint="a longer --health-window",
            )

        if steady_s is not None and self.command is None:
            raise ConfigError(
                "the time that the health command must hold needs one, found none.", hint="--health COMMAND"
            )

    def request(self, checked_s: float) -> dict[str, Any]:
        """The window as the board is told of it.

        Args:
            checked_s: What the parity check took: a slow board is slow to answer through ``current`` too, seconds.
        """
        seconds = WINDOW_S + 2 * checked_s if self.window_s is None else self.window_s
        steady_s = min(STEADY_S, seconds / 2) if self.steady_s is None else self.steady_s
        return {
            "id": secrets.token_hex(8),
            "seconds": round(seconds, 3),
            "steady_s": steady_s,
            "health": self.command,
            "reload": self.reload,
        }


@dataclass(frozen=True)
class Switched:
    """What `Trial.activate` did.

    Attributes:
        previous: The release that `rollback` would put back, or None.
        changed: False when the board ran this release already.
        on_trial: Whether the board watches it: also one that ran already, and was never confirmed.
        window: As the board was told of it.
        until_s: When it is over for this machine, by its monotonic clock.
    """

    previous: str | None
    changed: bool
    on_trial: bool
    window: Mapping[str, Any]
    until_s: float


class Trial:
    """Switches one board to a release, and decides whether it stays.

    Args:
        board: The board; it must be held.
        artifact: What the release is made of.
        before: What the board ran before.
        tell: Told what happens, as `edgeprune.deployment.deploying.Progress`.
        known_as: What the user calls the board.
        threads: Threads inside one operation.
        health: What the user asks.
    """

    def __init__(
        self,
        board: Board,
        artifact: Artifact,
        before: BoardStatus,
        tell: Tell,
        *,
        known_as: str,
        threads: int,
        health: Health,
    ) -> None:
        self.board, self.artifact, self.before, self.known_as = board, artifact, before, known_as
        self.threads, self.wanted, self._tell = threads, health, tell

    def activate(self, folder: str, *, checked_s: float = 0.0) -> Switched:
        """Switch ``current``, with a guard on the board.

        Args:
            folder: The staged release.
            checked_s: See `Health.request`.
        """
        self._tell("activate", 0, 0, f"switching to {folder}")
        window = self.wanted.request(checked_s)
        until_s = time.monotonic() + window["seconds"]
        request = {"folder": folder, "window": window, **faults.request_fields()}
        try:
            answer = self.board.call("activate", request, timeout_s=120.0)
            switched = Switched(answer["previous"], answer["changed"], answer["on_trial"], window, until_s)
        except EdgepruneError as error:
            switched = self._switched_all_the_same(folder, window, until_s, error)
        faults.reached("activate")
        return switched

    def decide(self, folder: str, switched: Switched, note: Mapping[str, Any]) -> None:
        """Watch the release for as long as was asked for, then confirm it; or put the former one back.

        Args:
            folder: The release.
            switched: Of `activate`.
            note: Kept in the board's journal with the confirmation.

        Raises:
            HealthError: It was rolled back; or it ran before, and was left alone.
            InconsistentBoardError: It could not be rolled back.
        """
        self._tell("health", 0, 0, "one inference through current")
        reason = self._ill(folder, switched)
        if reason is not None:
            if switched.changed or not self.before.confirmed:
                self._go_back(folder, switched, reason)
            raise HealthError(
                f"release {folder} ({self.artifact.manifest.name}) on board {self.board.name} {_must(reason)}; it ran there "
                "before and had passed its health check, so it was left as it is.",
                hint="deploy again; if it fails again, edgeprune doctor",
            )
        if switched.on_trial:
            self._watch(folder, switched)
        self._confirm(folder, switched, note)
        faults.reached("health")

    def _ill(self, folder: str, switched: Switched) -> str | None:
        """What is wrong with an inference through ``current``, or None."""

        def infer() -> str | None:
            found = gates.check_parity(self.board, self.artifact, "current", threads=self.threads, cases=_HEALTH_CASES)
            return None if found.passed else found.complaint()

        try:
            return self._within_the_window(folder, switched, infer)
        except HealthError:
            raise
        except EdgepruneError as error:
            return error.message.rstrip(".")

    def _watch(self, folder: str, switched: Switched) -> None:
        """Return once the user's commands have said that all is well; the guard runs them."""
        if self.wanted.command is None and self.wanted.reload is None:
            return
        total, unguarded = max(1, math.ceil(switched.window["seconds"])), 0
        while True:
            seen = self._look(folder, switched)
            if not seen["open"]:
                self._gone(folder, seen)
            state = seen["state"] or {}
            if state.get("steady"):
                return
            unguarded = unguarded + 1 if state.get("guarded") is False else 0
            # Once may be the instant in which it ends its watch.
            if unguarded > 1 or time.monotonic() > switched.until_s + _LATE_S:
                self._go_back(folder, switched, "must be watched by its guard on the board, found it gone")
            past = min(total, max(0, round(total - (switched.until_s - time.monotonic()))))
            wrong = state.get("complaint")
            message = "the health command holds so far" if state.get("checks") else "waiting for the user's commands"
            self._tell("health", past, total, message if wrong is None else f"it {wrong}")
            time.sleep(_POLL_S)

    def _confirm(self, folder: str, switched: Switched, note: Mapping[str, Any]) -> None:
        """Tell the board that the release stays, as often as it takes until the window is over."""

        def confirm() -> None:
            self.board.call("confirm", {"folder": folder, "note": dict(note)}, timeout_s=60.0)

        try:
            self._within_the_window(folder, switched, confirm)
        except HealthError:
            raise
        except EdgepruneError as error:
            if switched.on_trial:
                seen = self._look(folder, switched)
                if not seen["open"]:
                    self._gone(folder, seen)
                self._go_back(folder, switched, f"must be confirmed, found: {error.message.rstrip('.')}")
            # It runs and answers; the next deployment checks and confirms it again.
            _log.warning(
                "%s: the health check passed, but was not recorded on the board: %s", self.board.name, error.message
            )

    def _look(self, folder: str, switched: Switched) -> dict[str, Any]:
        """The board's word on the trial."""
        request = {"id": switched.window["id"], "folder": folder}
        return self._within_the_window(folder, switched, lambda: self.board.call("window", request, timeout_s=60.0))

    def _within_the_window(self, folder: str, switched: Switched, work: Callable[[], _Result]) -> _Result:
        """Do something that may be done twice. A board that is away is waited for until it has decided by itself.

        Raises:
            HealthError: It was away all the time. Of a release that ran before, the second lost link is raised as it is.
        """
        if not switched.on_trial:
            return self._again_after_a_lost_link(work)
        while True:
            try:
                return work()
            except _AWAY as error:
                if time.monotonic() > switched.until_s:
                    raise self._unseen(folder, error) from error
                _log.warning("%s: %s It is tried once more.", self.board.name, error.message)
                time.sleep(_RETRY_S)

    def _unseen(self, folder: str, error: RemoteError) -> HealthError:
        former = "no release" if self.before.current is None else str(self.before.current)
        return HealthError(
            f"release {folder} ({self.artifact.manifest.name}) on board {self.board.name} must be confirmed within its health "
            f"window, found the board away: {error.message} The board itself goes back to {former}.",
            hint=f"edgeprune status --board {self.known_as}, then deploy again",
        )

    def _gone(self, folder: str, seen: Mapping[str, Any]) -> NoReturn:
        """The board closed the window before this machine did."""
        name, reason = (
            self.artifact.manifest.name,
            str(seen["reason"] or "must be on trial still, found its window closed"),
        )
        if seen["current"] == folder:
            raise InconsistentBoardError(
                f"release {folder} ({name}) on board {self.board.name} {reason.rstrip('.')}; it runs there still.",
                hint=f"edgeprune status --board {self.known_as}, then edgeprune deploy with a good artifact",
            )
        now = read_status(self.board, known_as=self.known_as)
        raise HealthError(
            f"release {folder} ({name}) on board {self.board.name} {_must(reason).rstrip('.')}; it was rolled back. "
            f"Board {self.board.name} runs {now.current or 'no release'}.",
            hint="look at what the command says on the board, then deploy again",
        )

    def _switched_all_the_same(
        self, folder: str, window: Mapping[str, Any], until_s: float, error: EdgepruneError
    ) -> Switched:
        """What `activate` would have answered, where only its answer was lost; else raise its error, with what runs."""
        try:
            now = read_status(self.board, known_as=self.known_as)
        except EdgepruneError as silent:
            raise UncertainBoardError(
                f"{error.message} Whether board {self.board.name} has switched to {folder} is not known; if it has, it goes back "
                f"within {window['seconds']:.0f} s.",
                hint=f"edgeprune status --board {self.known_as}, then deploy again",
            ) from silent
        if now.current is None or now.current.folder != folder:
            error.message = f"{error.message} {now.still_runs()}"
            raise error
        _log.warning("%s: the switch went through, its answer was lost: %s", self.board.name, error.message)
        former = self.before.current
        changed = former is None or former.folder != folder
        previous = former if changed else now.previous
        on_trial = changed or now.window is not None
        return Switched(None if previous is None else previous.folder, changed, on_trial, window, until_s)

    def _again_after_a_lost_link(self, work: Callable[[], _Result]) -> _Result:
        """Do something that may be done twice; once more where the link, and not the release, was the trouble."""
        try:
            return work()
        except RemoteError as error:
            _log.warning("%s: %s It is tried once more.", self.board.name, error.message)
            return work()

    def _go_back(self, folder: str, switched: Switched, reason: str) -> NoReturn:
        name = self.artifact.manifest.name
        request = {"from": folder, "reason": reason, "allow_none": switched.changed}
        try:
            self._within_the_window(folder, switched, lambda: self.board.call("rollback", request, timeout_s=120.0))
            now = read_status(self.board, known_as=self.known_as)
        except HealthError:
            raise
        except EdgepruneError as error:
            raise InconsistentBoardError(
                f"release {folder} ({name}) on board {self.board.name} {_must(reason)}; putting back the former release "
                f"failed too: {error.message}",
                hint=f"edgeprune status --board {self.known_as}, then edgeprune deploy with a good artifact",
            ) from error
        raise HealthError(
            f"release {folder} ({name}) on board {self.board.name} {_must(reason)}; it was rolled back. "
            f"Board {self.board.name} runs {now.current or 'no release'}.",
            hint="edgeprune doctor",
        )


def _must(reason: str) -> str:
    return reason if reason.startswith("must") else f"must run through current, found: {reason}"
