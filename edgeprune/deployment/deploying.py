"""Bring an artifact to a board: upload, stage, check numbers and milliseconds there, switch, check again.

The states, in order, are `STATES`. Until ``activate`` nothing that runs on the board is touched; ``activate`` is one rename;
whatever fails after it is rolled back, by the board itself where this machine cannot (`edgeprune.deployment.trial`). Every state
can be killed and the whole be started again: what is done already is recognized by its hashes. An interrupt at any moment leaves
``current`` as it was or wholly switched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeprune.boards.board import Board
from edgeprune.boards.installing import for_board
from edgeprune.budget import Budget
from edgeprune.deployment import faults, gates, preflight
from edgeprune.deployment.agreement import Parity
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.cargo import Cargo, engine_of
from edgeprune.deployment.gates import Latency
from edgeprune.deployment.result import Deployment
from edgeprune.deployment.signing import require_signed
from edgeprune.deployment.status import BoardStatus, read_status, remember_status
from edgeprune.deployment.threads import slower_note, thread_notes, threads_for
from edgeprune.deployment.trial import Health, Trial
from edgeprune.errors import (
    ConfigError,
    EdgepruneError,
    LatencyGateError,
    ParityError,
    TransferError,
)

STATES = ("probe", "preflight", "lock", "upload", "stage", "parity", "latency", "activate", "health", "done")

_TIMED = ("measured_ms", "dense_ms", "ratio", "ratio_low", "ratio_high", "latency_ms")
MEDIAN = 50
"""The percentile that predictions and measurements of a manifest are of, unless they say otherwise."""

_STORE_TIMEOUT_S = 60.0
_SLOWEST_COPY_BYTES_S = 5e6

Progress = Callable[[str, int, int, str], None]
"""Called with (state, done, total, what happens); done and total are bytes, items, or 0 and 0 where nothing is counted."""

_log = logging.getLogger("edgeprune.deployment.deploying")


def deploy(
    artifact: Artifact | str | Path,
    board: str | Board = "local",
    *,
    budget_ms: float | None = None,
    budget_ratio: float | None = None,
    reference: Artifact | str | Path | None = None,
    dense_ms: float | None = None,
    tolerance: float = 0.05,
    threads: int | None = None,
    rounds: int = 20,
    keep: int = 3,
    percentile: int = 50,
    health: str | None = None,
    reload: str | None = None,
    health_window_s: float | None = None,
    steady_s: float | None = None,
    signers: str | Path | None = None,
    progress: Progress | None = None,
) -> Deployment:
    """Check an artifact on a board, then switch to it.

    Args:
        artifact: The artifact, or its folder.
        board: As in `Board.open`.
        budget_ms: Upper bound of the latency, milliseconds; without a budget the latency is measured and reported only.
        budget_ratio: Upper bound as a share of the dense latency, instead of `budget_ms`; needs `reference`.
        reference: Artifact of the dense model, or its engine file: timed interleaved with the new engine, never released.
        dense_ms: Dense latency that `budget_ms` was chosen against, milliseconds: the verdict is on ratio times this, which
            does not depend on how fast the board happens to be today. By default as timed beside the release.
        tolerance: Share by which the budget may be exceeded.
        threads: Threads inside one operation, at most as many as the board lets us have cores; by default those that the
            artifact's latency was measured or predicted with, else 1.
        rounds: Rounds of the latency comparison.
        keep: Releases that the board keeps, the current and the previous one included.
        percentile: Of the latency that the budget is for; above 50 one of single inferences, see
            `edgeprune.profiling.comparing.compare`.
        health: Shell command that the board runs each second after the switch; exit code 0 is healthy.
        reload: Shell command that the board runs after every switch of ``current``, there and back, so that an application
            loads what is there now.
        health_window_s: Seconds after the switch within which the release must have been confirmed. Otherwise the board puts the
            former one back by itself, whatever has become of this process and of the link. By default a minute, and twice what
            the parity check took.
        steady_s: How long `health` must hold without a break before the release is confirmed, seconds; by default ten, or half
            of the window where that is shorter.
        signers: List of those who may have signed the artifact; by default that of the board, as it was added. A board with a
            list of its own (``allowed_signers`` in its folder) asks again.
        progress: Told every state.

    Raises:
        ManifestError: The artifact's files are not what its manifest says.
        SignatureError: It is not signed as the list demands; nothing was activated.
        IncompatibleTargetError: The board lacks something, e.g. a core for each thread; nothing was sent.
        EmulatedProcessorError: A budget was given, and the board's processor is emulated; nothing was sent. Without a budget the
            numbers are checked there, and nothing is timed.
        BoardFullError: There is not enough free space; nothing was activated.
        BoardBusyError: Another run holds the board.
        ParityError: Outputs on the board differ; it still runs what it ran.
        LatencyGateError: Too slow on the board; it still runs what it ran.
        UnstableMeasurementError: Too noisy for a verdict; it still runs what it ran.
        HealthError: Failed after the switch, and was rolled back.
        InconsistentBoardError: Failed after the switch, and could not be rolled back.
        UncertainBoardError: The link was lost as it switched; if it has, the board puts the former release back.
    """
    started = time.monotonic()
    budget = budget_of(budget_ms, budget_ratio, reference, tolerance)
    watched = Health(health, reload, health_window_s, steady_s)
    opened_artifact = Artifact.load(artifact.folder if isinstance(artifact, Artifact) else artifact)
    dense = engine_of(reference)
    threads = threads_for(opened_artifact.manifest, threads)
    known_as = board if isinstance(board, str) else board.name
    with Board.open(board) as opened:
        require_signed(opened_artifact, opened.signers if signers is None else Path(signers))
        run = _Run(opened, opened_artifact, dense, known_as, threads, progress)
        run.prepare(budget)
        with opened.hold(f"deploy {opened_artifact.manifest.name}"):
            faults.reached("lock")
            # Between the look before and the lock, another run may have switched.
            run.before = read_status(opened, known_as=known_as)
            with _untouched(run.before):
                folder = run.upload_and_stage()
                with run.refusing(folder):
                    parity = run.parity(folder)
                    latency = run.latency(
                        budget, tolerance=tolerance, rounds=rounds, dense_ms=dense_ms, percentile=percentile
                    )
                if latency is not None and percentile == MEDIAN:
                    run.mind(slower_note(opened_artifact.manifest, latency.measured_ms, threads))
            trial = Trial(
                run.board, run.artifact, run.before, run.tell, known_as=known_as, threads=threads, health=watched
            )
            switched = trial.activate(folder, checked_s=run.checked_s)
            tasks = {name: str(one) for name, one in parity.tasks.items()}
            timed: dict[str, Any] = {name: None if latency is None else getattr(latency, name) for name in _TIMED}
            note = {
                "measured_ms": timed["measured_ms"],
                "ratio": timed["ratio"],
                "threads": threads,
                "percentile": percentile,
                "budget": None if budget is None else str(budget),
                "tasks": tasks,
            }
            trial.decide(folder, switched, note)
            run.finish(keep)
    return Deployment(
        board=opened.name,
        artifact=opened_artifact.id,
        release=folder,
        previous=switched.previous,
        changed=switched.changed,
        parity=parity,
        **timed,
        conditions={"emulated": True} if latency is None else latency.conditions,
        bytes_sent=run.bytes_sent,
        seconds=time.monotonic() - started,
        threads=threads,
        made_for_threads=opened_artifact.manifest.threads,
        disturbance="" if latency is None else latency.disturbance,
        notes=run.notes,
    )


class _Run:
    """One deployment, state by state."""

    def __init__(
        self,
        board: Board,
        artifact: Artifact,
        dense: Path | None,
        known_as: str,
        threads: int,
        progress: Progress | None,
    ) -> None:
        self.board, self.artifact, self.dense, self.known_as, self.threads = board, artifact, dense, known_as, threads
        self.bytes_sent = 0
        self.checked_s = 0.0
        self.notes: tuple[str, ...] = ()
        self.tell: Progress = progress or (lambda state, done, total, message: None)
        self.cargo = Cargo(artifact, dense)
        self.before: BoardStatus
        self.emulated = False

    def prepare(self, budget: Budget | None) -> None:
        """Probe, then refuse before anything is sent."""
        self.tell("probe", 0, 0, f"probing board {self.board.name}")
        fingerprint = self.board.probe()
        self.emulated = bool(fingerprint.facts.get("emulated"))
        preflight.require_real(fingerprint, budget, board=self.board.name)
        self.before = read_status(self.board, known_as=self.known_as)
        faults.reached("probe")
        self.tell("preflight", 0, 0, "checking what the artifact needs")
        new_bytes = self.cargo.new_bytes(self.cargo.missing(self.board), self.before)
        manifest, name = self.artifact.manifest, self.board.name
        preflight.check(manifest, fingerprint, board=name, new_bytes=new_bytes, threads=self.threads)
        self.notes = thread_notes(manifest, fingerprint, self.threads, board=name)
        for note in self.notes:
            _log.info("%s: %s", name, note)
        faults.reached("preflight")

    def mind(self, note: str | None) -> None:
        """Keep a sentence that a person must know beside the verdict, where there is one."""
        if note is not None:
            note = for_board(note, self.known_as)
            self.notes = (*self.notes, note)
            _log.info("%s: %s", self.board.name, note)

    def upload_and_stage(self) -> str:
        """Send what the board lacks, build the release there; returns its folder."""
        self._upload()
        try:
            folder = self._stage()
        except TransferError as error:
            # A blob that went bad on the board's disk was removed there just now: send it again, once.
            _log.warning("%s: %s", self.board.name, error)
            self._upload()
            folder = self._stage()
        faults.reached("stage")
        return folder

    def _upload(self) -> None:
        lack = self.cargo.missing(self.board)
        total, done = lack.total_bytes, 0
        self.tell("upload", 0, total, f"sending {total / 1e6:.2f} MB" if total else "the board has all files")
        for sha256, size in lack.sizes.items():
            sent_before = done

            def on_bytes(sent: int, _: int, base: int = sent_before) -> None:
                self.tell("upload", base + sent, total, "sending")

            self.board.push(self.cargo.paths[sha256], progress=on_bytes)
            done += size
        self.bytes_sent += total
        faults.reached("upload")

    def _stage(self) -> str:
        self.tell("stage", 0, 0, "building the release on the board")
        request = {
            "release": self.artifact.release,
            "files": {name: entry.model_dump() for name, entry in self.cargo.files.items()},
            **faults.request_fields(),
        }
        deadline_s = 60.0 + self.artifact.size_bytes / _SLOWEST_COPY_BYTES_S
        folder: str = self.board.call("stage", request, timeout_s=deadline_s)["folder"]
        return folder

    @contextmanager
    def refusing(self, folder: str) -> Iterator[None]:
        """Let the board know of a release that does not pass a check, so that `status` can tell it from the others."""
        try:
            yield
        except (ParityError, LatencyGateError) as error:
            try:
                self.board.call("refuse", {"folder": folder, "reason": error.message}, timeout_s=_STORE_TIMEOUT_S)
            except EdgepruneError as unkept:
                _log.info("%s: the refusal was not recorded: %s", self.board.name, unkept.message)
            raise

    def parity(self, folder: str) -> Parity:
        """Check A: numbers, on the staged release."""
        self.tell("parity", 0, 0, "running the golden inputs on the board")
        started = time.monotonic()
        found = gates.check_parity(self.board, self.artifact, folder, threads=self.threads)
        self.checked_s = time.monotonic() - started
        gates.require_parity(found, self.artifact, self.board)
        faults.reached("parity")
        return found

    def latency(
        self, budget: Budget | None, *, tolerance: float, rounds: int, dense_ms: float | None, percentile: int
    ) -> Latency | None:
        """Check B: milliseconds, interleaved with the dense engine; None on an emulated processor, where none mean anything."""
        if self.emulated:
            self.tell("latency", 0, 0, "nothing is timed: the processor is emulated")
            return None

        level_ms: float | None = None

        def measure(count: int) -> Latency:
            nonlocal level_ms
            found = gates.measure_latency(
                self.board,
                self.artifact.engine,
                self.dense,
                runtime=self.artifact.manifest.backend,
                threads=self.threads,
                dense_ms=dense_ms,
                rounds=count,
                percentile=percentile,
                level_ms=level_ms,
                progress=lambda done, total, left_s, message: self.tell("latency", done, total, message),
            )
            level_ms = found.level_ms
            return found

        self.tell("latency", 0, 0, "timing on the board")
        found = gates.check_latency(
            measure,
            budget,
            tolerance=tolerance,
            rounds=rounds,
            name=self.artifact.manifest.name,
            board=self.board.name,
        )
        faults.reached("latency")
        return found

    def finish(self, keep: int) -> None:
        """Remove old releases, and remember what the board runs."""
        try:
            left = self.board.call("gc", {"keep": keep}, timeout_s=120.0)
            remember_status(self.board, left["status"], known_as=self.known_as)
        except EdgepruneError as error:
            # The release runs and was confirmed; what is left over is removed by the next deployment.
            _log.warning("old releases on board %s were not removed: %s", self.board.name, error)
        self.tell("done", 0, 0, f"board {self.board.name} runs {self.artifact.release}")
        faults.reached("done")


@contextmanager
def _untouched(before: BoardStatus) -> Iterator[None]:
    """Whatever fails inside has changed nothing that runs; say so in its message."""
    try:
        yield
    except EdgepruneError as error:
        if before.still_runs() not in error.message:
            error.message = f"{error.message} {before.still_runs()}"
        raise


def budget_of(
    budget_ms: float | None, budget_ratio: float | None, reference: object | None, tolerance: float
) -> Budget | None:
    """The budget that `deploy` is given, or None without one.

    Raises:
        ConfigError: The tolerance is negative, or there is no reference for a share of its latency.
    """
    if tolerance < 0:
        raise ConfigError(f"the tolerance must be at least 0, found {tolerance}.")
    if budget_ms is None and budget_ratio is None:
        return None
    if budget_ratio is not None and reference is None:
        raise ConfigError(
            "a relative budget must come with the dense model as reference, found none.", hint="--reference"
        )
    return Budget(latency_ms=budget_ms, latency_ratio=budget_ratio)
