"""The measuring run: rounds of shuffled items around a sentinel, journaled, resumable, with drifted stretches repeated.

Every item is warmed up by time and until it is stable, then timed in samples that are long enough for the clock; all
items are measured once per round, each round in another order, so that slow changes of the machine hit all items alike;
a sentinel every few items shows such changes. What a call costs by itself is timed in the same process and taken off
kernels, never off networks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.boards.reconnecting import Reconnector
from edgeprune.errors import ConfigError, ConnectError, RemoteError, RunnerEndedError
from edgeprune.profiling.arrears import Asked, unsettled
from edgeprune.profiling.blaming import Blame
from edgeprune.profiling.comparing import Comparison, compare
from edgeprune.profiling.journal import Journal
from edgeprune.profiling.levels import PATIENCE
from edgeprune.profiling.measured import MeasuredRun, measured_run
from edgeprune.profiling.protocol import Protocol
from edgeprune.profiling.recording import recorded
from edgeprune.profiling.rounds import Ledger, Place, slots, stretches
from edgeprune.profiling.uploads import Entry, content_hash, upload

if TYPE_CHECKING:
    from edgeprune.boards.board import Board

__all__ = ["Comparison", "MeasuredRun", "Progress", "Protocol", "compare", "measure"]

_LOAD_MS = 6.0
"""What an item takes besides its own time, about."""

logger = logging.getLogger("edgeprune.profiling")

Progress = Callable[[int, int, float, str], None]
"""Called with (items done, items in all, seconds left, what happens now)."""


def measure(
    board: Board,
    engines: Mapping[str, bytes | Path],
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    rounds: int = 3,
    samples: int = 5,
    sample_ms: float = 5.0,
    warmup_ms: float = 20.0,
    sentinel: str | None = None,
    every: int = 20,
    seed: int = 0,
    journal: Path | None = None,
    progress: Progress | None = None,
    told: Callable[[str], None] | None = None,
    kernels: Collection[str] = (),
    budget_s: float | None = None,
    drift_limit: float = 0.03,
    max_repeats: int = 3,
    per_call: int = 256,
    passes: int = 1,
    patience: float = PATIENCE,
    identity: Mapping[str, Any] | None = None,
    level_ms: float | None = None,
    wait_s: float = 0.0,
    timing_s: float | None = None,
) -> MeasuredRun:
    """Measure engines on a board.

    Args:
        board: Where; nobody else should use it meanwhile (`Board.hold`).
        engines: Id to engine file or its bytes.
        runtime: Runtime that executes them.
        threads: Threads inside one operation.
        rounds: Most rounds; with a `budget_s`, at least two are tried.
        samples: Samples per item and round.
        sample_ms: Least length of one sample, milliseconds.
        warmup_ms: Least warm-up before each item, milliseconds.
        sentinel: Id that is measured again and again to catch drift; the first one by default.
        every: Most items between two sentinels.
        seed: Seed of the orders.
        journal: File that holds what is measured; a run with the same arguments goes on from it.
        progress: Told how far it is.
        told: Told, once, that it goes on from an earlier run; and of each link that was lost and came back.
        kernels: Ids of engines that are single kernels: the cost of the call itself is taken off them, and one that the
            board cannot run is left out and told in `MeasuredRun.unusable`.
        budget_s: No round is begun, and no stretch repeated, that would take longer than this in all, seconds.
        drift_limit: See `Protocol`.
        max_repeats: See `Protocol`.
        per_call: See `Protocol`.
        passes: See `Protocol`; few networks bear the calibration, and what a machine's memory has to do for others meanwhile
            moves them more than single kernels.
        patience: See `Protocol`; 0 does not look at who slows the core down.
        identity: What else must be equal for a journal to be continued, e.g. `Fingerprint.identity`.
        level_ms: What the sentinel took in an earlier part of the same run, milliseconds; drift is judged by it, and not by
            this part alone.
        wait_s: How long a board whose link is lost meanwhile is waited for, seconds; its clocks are locked again where they
            were. The time does not count as measured.
        timing_s: What one timing takes about, seconds, where the runtime does it in a process of its own; its layers are
            timed too then, see `MeasuredRun.layers`.

    Raises:
        ConfigError: No engines, or an id that is not among them.
        RemoteError: The board was lost, and did not come back in time; what was measured is in the journal.
        BackendError: A network does not load on the board.
    """
    if not engines:
        raise ConfigError("there must be at least one engine to measure, found none.")
    sentinel = next(iter(engines)) if sentinel is None else sentinel
    for name in (sentinel, *kernels):
        if name not in engines:
            raise ConfigError(f"sentinel and kernels must be ids of engines, found {name[:80]!r}.")
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, found {rounds}.")
    protocol = Protocol(samples, sample_ms, warmup_ms, every, drift_limit, max_repeats, per_call, passes, patience)
    request = {
        "engines": {name: content_hash(engine) for name, engine in engines.items()},
        "kernels": sorted(kernels),
        "board": [board.name, dict(identity or {})],
        "runtime": [runtime, threads],
        "order": [sentinel, seed],
        "protocol": asdict(protocol),
        **({} if timing_s is None else {"layers": True}),
    }
    with Journal(journal, request) as book:
        kept = sum(record["kind"] == "sample" for record in book.records)
        run = _Run(board, engines, frozenset(kernels), sentinel, protocol, runtime, threads, seed, book, progress)
        run.ledger.level_ms = level_ms
        run.reconnector, run.told = Reconnector(board, wait_s), told
        run.timing_s = timing_s
        fetched = run.fetch()
        if (kept or fetched) and told is not None:
            more = f", and {fetched} that the board had kept" if fetched else ""
            told(f"going on: {kept} measurements of the interrupted run are kept{more}")
        found = run.all_rounds(rounds, budget_s)
        run.forget()
        return found


class _Run:
    """State of one measuring run; the journal's records are the only truth, `ledger` is computed from them."""

    def __init__(
        self,
        board: Board,
        engines: Mapping[str, bytes | Path],
        kernels: frozenset[str],
        sentinel: str,
        protocol: Protocol,
        runtime: str,
        threads: int,
        seed: int,
        journal: Journal,
        progress: Progress | None,
    ) -> None:
        self.board, self.engines, self.kernels, self.sentinel = board, engines, kernels, sentinel
        self.protocol, self.runtime, self.threads, self.seed = protocol, runtime, threads, seed
        self.journal, self.progress = journal, progress
        self.ledger = Ledger(journal.records, threads)
        self.entries: dict[str, Entry] | None = None
        self.total = 0
        self.budget_s: float | None = None
        self.timing_s: float | None = None
        self.begun = time.monotonic()
        self.done_before: int | None = None
        self.settled: list[str] = []
        self.reconnector = Reconnector(board, 0.0)
        self.told: Callable[[str], None] | None = None
        self.blame = Blame(kernels)

    def fetch(self) -> int:
        """Take over what the board measured in a call that was interrupted, and could not tell; returns how many samples."""
        asked = unsettled(self.journal.records)
        if asked is None:
            return 0
        count = 0
        for line in asked.lines(self.board):
            self.blame.hear(line)
            record = recorded(line, asked.number, asked.attempt, asked.order)
            if record is not None:
                self._note({**record, "seconds": line["seconds"]})
                count += record["kind"] == "sample"
        self._note({"kind": "fetched", "samples": count})
        # Those of earlier calls too: which of them the board was told to forget nobody wrote down.
        self.settled = [record["name"] for record in self.journal.records if record["kind"] == "asked"]
        return count

    def forget(self) -> None:
        """Tell the board what it need not keep any more; a board that cannot be reached forgets it some day."""
        settled, self.settled = self.settled, []
        if settled:
            try:
                self.board.call("kept", {"forget": settled})
            except RemoteError as error:
                logger.debug("what board %s has kept is not removed: %s", self.board.name, error)

    def all_rounds(self, rounds: int, budget_s: float | None) -> MeasuredRun:
        layouts: list[list[tuple[str, ...]]] = []
        self.budget_s = budget_s
        self.total = sum(len(names) + 1 for number in range(rounds) for names in self._layout(number))
        for number in range(rounds):
            spent = self.ledger.spent_s
            fits = budget_s is None or number < 2 or spent + spent / number <= budget_s
            layout = self._layout(number)
            if not fits and not any(self.ledger.begun((number, 0, stretch)) for stretch in range(len(layout))):
                logger.info("stopped after %d of %d rounds: the time is used up", number, rounds)
                break
            layouts.append(layout)
            self._attempt(number, 0, layout, range(len(layout)))
        self._repeat(layouts)
        self.total = min(self.ledger.measured, self.total)
        self._tell("measured")
        return measured_run(
            self.ledger,
            layouts,
            self.engines,
            self.kernels,
            self.sentinel,
            drift_limit=self.protocol.drift_limit,
            threads=self.threads,
        )

    def _layout(self, number: int) -> list[tuple[str, ...]]:
        names = [name for name in self.engines if name != self.sentinel]
        return stretches(
            names,
            every=self.protocol.every,
            seed=self.seed,
            round_number=number,
            often=[name for name in names if name not in self.kernels],
            passes=self.protocol.passes,
        )

    def _repeat(self, layouts: Sequence[Sequence[tuple[str, ...]]]) -> None:
        """Measure stretches again that drifted from what is usual, while there are attempts and time left."""
        # Only now is it known what is usual: a run may begin in the middle of a disturbance. What is measured again moves
        # that level in its turn, so all stretches are looked at until none is left; first those with an item of which no
        # round held, since a round that drifted does not count where another one held.
        while again := self._drifted(layouts, lacking=True) or self._drifted(layouts):
            for (number, attempt), chosen in again.items():
                begun = any(self.ledger.begun((number, attempt, stretch)) for stretch in chosen)
                if not begun and self.budget_s is not None and self.ledger.spent_s >= self.budget_s:
                    return
                logger.info("round %d, stretches %s: the sentinel drifted, measuring again", number, chosen)
                self._attempt(number, attempt, layouts[number], chosen)

    def _drifted(
        self, layouts: Sequence[Sequence[tuple[str, ...]]], lacking: bool = False
    ) -> dict[tuple[int, int], list[int]]:
        """Stretches that may be repeated, by round and number of the next attempt; maybe only those an item depends on."""
        attempts = {
            (number, stretch): self.ledger.drifts(number, stretch)
            for number, layout in enumerate(layouts)
            for stretch in range(len(layout))
        }
        held = {place for place, drifts in attempts.items() if min(drifts) <= self.protocol.drift_limit}
        known = {name for number, stretch in held for name in layouts[number][stretch]}
        found: dict[tuple[int, int], list[int]] = {}
        for (number, stretch), drifts in attempts.items():
            needed = not lacking or not known.issuperset(layouts[number][stretch])
            if needed and (number, stretch) not in held and len(drifts) <= self.protocol.max_repeats:
                found.setdefault((number, len(drifts)), []).append(stretch)
        return found

    def _attempt(self, number: int, attempt: int, layout: Sequence[tuple[str, ...]], chosen: Sequence[int]) -> None:
        places = [(number, attempt, stretch) for stretch in chosen]
        while waiting := [place for place in places if self.ledger.open(place, layout[place[2]])]:
            try:
                self._call(number, attempt, self._portion(waiting, layout))
            except ConnectError as lost:
                self._reconnect(lost)
            except RunnerEndedError as ended:
                if not self._left_out(ended):
                    raise

    def _left_out(self, ended: RunnerEndedError) -> bool:
        """Leave out the kernel at which the board's program has ended again; whether there is one."""
        self.fetch()
        self.forget()
        found = self.blame.records(self.journal.records, ended.message)
        for record in found:
            self._note(record)
        return any(record["kind"] == "unusable" for record in found)

    def _reconnect(self, lost: ConnectError) -> None:
        """Go on over a new link; what the board could not tell over the old one is asked for first."""
        gone_s = self.reconnector.wait(
            lost,
            self.ledger.measured,
            lambda left_s: self._tell(f"the link is lost, waiting for the board for up to {left_s:.0f} s"),
        )
        fetched = self.fetch()
        self.entries = None  # A board that has started anew may have lost what was brought to it.
        self.begun += gone_s
        if self.told is not None:
            kept = f"; {fetched} measurements that it had kept were fetched" if fetched else ""
            self.told(f"the link to board {self.board.name} was lost, and came back after {gone_s:.0f} s{kept}")

    def _portion(self, waiting: Sequence[Place], layout: Sequence[Sequence[str]]) -> list[tuple[int, list[str]]]:
        """As many stretches as one call may hold, at least one."""
        portion: list[tuple[int, list[str]]] = []
        size = 0
        for place in waiting:
            left = self.ledger.left(place, layout[place[2]])
            if portion and size + len(left) > self.protocol.per_call:
                break
            portion.append((place[2], left))
            size += len(left)
        return portion

    def _call(self, number: int, attempt: int, todo: list[tuple[int, list[str]]]) -> None:
        if self.entries is None:
            self._tell("bringing the engines to the board")
            self.entries = upload(self.board, self.engines, self.kernels)
        order = slots(todo, self.sentinel)
        keeping: dict[str, Any] = {}
        if self.journal.path is not None:
            asked = Asked.anew(number, attempt, order)
            self._note(asked.record())
            keeping = {"keep": asked.name, "forget": self.settled}
        last, self.blame = time.monotonic(), Blame(self.kernels, [slot.name for slot in order])

        def on_event(event: dict[str, Any]) -> None:
            nonlocal last
            now = time.monotonic()
            self.blame.hear(event)
            record = recorded(event, number, attempt, order)
            if record is not None:
                self._note({**record, "seconds": round(now - last, 4)})
                last = now
                self._tell(f"round {number + 1}" + (f", repeat {attempt}" if attempt else ""))

        protocol = self.protocol
        result = self.board.call(
            "bench",
            {
                "runtime": self.runtime,
                "threads": self.threads,
                "engines": {slot.name: self.entries[slot.name] for slot in order},
                "optional": [slot.name for slot in order if slot.name in self.kernels and slot.name != self.sentinel],
                "rounds": [[slot.name for slot in order]],
                "samples": protocol.samples,
                "sample_ms": protocol.sample_ms,
                "warmup_ms": protocol.warmup_ms,
                "patience": self._patience(),
                **({} if self.timing_s is None else {"layers": True}),
                **keeping,
            },
            timeout_s=self._deadline_s(len(order)),
            on_event=on_event,
        )
        self._note({"kind": "end", "conditions": result["conditions"]["after"]})
        self.settled = [keeping["keep"]] if keeping else []

    def _note(self, record: dict[str, Any]) -> None:
        self.journal.append(record)
        self.ledger.add(record)

    def _patience(self) -> float:
        """What of the budget the rounds that are done in any case leave for waiting, as a multiple of their own time."""
        if self.budget_s is None or not self.protocol.patience:
            return self.protocol.patience
        names = [name for number in (0, 1) for part in self._layout(number) for name in (*part, self.sentinel)]
        due_s = max(1, len(names) - self.ledger.measured) * self._nominal_s
        return min(self.protocol.patience, max(1.0, (self.budget_s - self.ledger.spent_s) / due_s))

    @property
    def _nominal_s(self) -> float:
        if self.timing_s is not None:
            return self.timing_s
        return (self.protocol.warmup_ms + self.protocol.samples * self.protocol.sample_ms + _LOAD_MS) / 1e3

    def _deadline_s(self, items: int) -> float:
        if self.timing_s is not None:
            # That of a board that is several times slower than what it is taken for.
            return 600.0 + 5 * items * self.timing_s
        nominal_s = (4 * self.protocol.warmup_ms + 3 * self.protocol.samples * self.protocol.sample_ms) / 1e3
        return 120.0 + items * (2.0 + nominal_s)

    def _tell(self, message: str) -> None:
        if self.progress is None:
            return
        done = min(self.ledger.measured, self.total)
        if self.done_before is None:
            self.done_before = done
        fresh = done - self.done_before
        pace_s = (time.monotonic() - self.begun) / fresh if fresh else 0.0
        left = self.total - done
        left_s = pace_s * left
        if self.budget_s is not None:
            # Past two rounds the budget may end the run before all of them are done; of a run that begins no more is known.
            due = sum(len(names) + 1 for number in (0, 1) for names in self._layout(number)) - done
            allowed_s = max(self.budget_s - self.ledger.spent_s, pace_s * due, 0.0)
            left_s = min(left_s, allowed_s) if fresh else allowed_s
        self.progress(done, self.total, left_s if left else 0.0, message)
