"""Timing candidates on a board: they are built and linked here, brought there in one file per batch, and timed by the board's
own runner.

TVM's remote procedure calls would do so too. But their server runs whatever code anybody sends it who can reach its port, any
user of the board at least, and what a lost link takes with it there is the whole session. The runner comes over the link that
everything else goes over, listens on nothing, and times as it times everything: warmed up, in samples, one at a time. It needs of
the board what deploying an engine needs.
"""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgeprune.boards.reconnecting import WAIT_S, Reconnector
from edgeprune.errors import BoardBusyError, ConnectError, RemoteError, RemoteTimeoutError, RunnerEndedError

if TYPE_CHECKING:
    from edgeprune.boards.board import Board

_SAMPLES, _SAMPLE_MS, _WARMUP_MS, _ITEM_MS = 3, 5.0, 5.0, 200.0
_START_S, _EACH_S = 60.0, 8.0
_CALM = 0.95
"""A sample with less than this share of its processor time was interrupted by something else."""
_EPOCH = (1980, 1, 1, 0, 0, 0)

_log = logging.getLogger("edgeprune.backends.tvm")


class BoardTiming:
    """Times batches of candidates on a board; use it as a context manager, and hold the board meanwhile.

    Args:
        board: Where, open.
        waiting: Told, before each try to reach a board whose link was lost, how many seconds are left.
        told: Told that the link was lost, and came back.
        wait_s: How long it is waited for, seconds.

    Attributes:
        waited_s: How long the board was waited for so far, seconds.
    """

    def __init__(
        self,
        board: Board,
        waiting: Callable[[float], None] | None = None,
        told: Callable[[str], None] | None = None,
        wait_s: float = WAIT_S,
    ) -> None:
        self._board, self._waiting, self._told = board, waiting or (lambda left_s: None), told or (lambda message: None)
        self._reconnector = Reconnector(board, wait_s)
        self._timed = 0
        self._there: set[str] = set()
        self.waited_s = 0.0

    def __enter__(self) -> BoardTiming:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    def seconds(self, engines: Sequence[Path]) -> list[float | None]:
        """What each engine takes, seconds, median of its samples; None where it does not run, or takes too long.

        Args:
            engines: Files of `candidate_engine.engine_of`.

        Raises:
            RemoteError: The board was lost and did not come back in time, or refuses.
            BackendUnavailableError: It has no TVM.
        """
        contents = {f"candidate{number}": engine.read_bytes() for number, engine in enumerate(engines)}
        found: dict[str, float | None] = {}
        while left := {name: content for name, content in contents.items() if name not in found}:
            try:
                self._call(left, found)
            except (ConnectError, BoardBusyError) as error:
                # Busy with what it did for us when the link was lost: the board is held, and nobody else gets it otherwise.
                lost = error if isinstance(error, ConnectError) else ConnectError(error.message, hint=error.hint)
                gone_s = self._reconnector.wait(lost, self._timed, self._waiting)
                self.waited_s += gone_s
                self._told(f"the link to board {self._board.name} was lost, and came back after {gone_s:.0f} s")
        self._clear()
        return [found[name] for name in contents]

    def _call(self, contents: Mapping[str, bytes], found: dict[str, float | None]) -> None:
        """Time engines in one process of the board, into `found`; the one at which that process ends, or hangs, gets None."""
        bundle = _bundle(contents.values())
        self._there.add(hashlib.sha256(bundle).hexdigest())
        blob = self._board.push(bundle)
        names = list(contents)
        # What the process is about to do: the engine that it loads, and then the one that it times.
        loading: str | None = None
        loaded = False

        def on_event(event: dict[str, Any]) -> None:
            nonlocal loading, loaded
            if event["event"] == "loading":
                loading = event["id"]
            elif event["event"] == "loaded":
                loaded = event["done"] == event["total"]
            elif event["event"] == "unusable":
                _log.debug("a candidate does not run on board %s: %s", self._board.name, event["message"])
                found[event["id"]] = None
            elif event["event"] == "sample":
                found[event["id"]] = _seconds(event)
                self._timed += 1

        try:
            self._board.call(
                "bench",
                {
                    "runtime": "tvm",
                    "engines": {
                        name: {"kind": "function", "blob": blob, "member": _name(contents[name])} for name in names
                    },
                    "optional": names,
                    "rounds": [names],
                    "samples": _SAMPLES,
                    "sample_ms": _SAMPLE_MS,
                    "warmup_ms": _WARMUP_MS,
                    "item_ms": _ITEM_MS,
                },
                timeout_s=_START_S + _EACH_S * len(names),
                on_event=on_event,
            )
        except (RunnerEndedError, RemoteTimeoutError) as error:
            at = next((name for name in names if name not in found), None) if loaded else loading
            if at is None or at in found:
                raise
            _log.debug("a candidate ended the program on board %s: %s", self._board.name, error.message)
            found[at] = None

    def _clear(self) -> None:
        """Remove what was brought to the board; a board that cannot be reached keeps it until it is cleaned."""
        if self._there:
            try:
                self._board.call("store", {"action": "drop", "blobs": sorted(self._there)})
            except RemoteError as error:
                _log.debug("candidates stay on board %s: %s", self._board.name, error.message)
            else:
                self._there.clear()


def _seconds(sample: Mapping[str, Any]) -> float:
    """Time of one run from a ``sample`` event: of the samples that nothing interrupted, else what the processor spent on them."""
    samples = list(zip(sample["times_ms"], sample["cpu_share"], strict=True))
    calm = [float(time_ms) for time_ms, share in samples if share >= _CALM]
    return median(calm or [float(time_ms) * float(share) for time_ms, share in samples]) / 1e3


def _bundle(contents: Collection[bytes]) -> bytes:
    """One file with all of them, each under its hash."""
    by_name = {_name(content): content for content in contents}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(by_name):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), by_name[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
