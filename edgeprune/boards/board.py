"""One physical board: a transport, a folder on it, and a Python there that runs the on-board runner."""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeprune.boards import fingerprint
from edgeprune.boards.carrying import carried
from edgeprune.boards.greeting import GREETING, answer_of
from edgeprune.boards.holding import Hold
from edgeprune.boards.installing import for_board
from edgeprune.boards.power import BoardPower
from edgeprune.boards.reaching import DEFAULT_ROOT, reached
from edgeprune.boards.runner_events import crash, error_of, parse_event
from edgeprune.boards.runner_package import runner_package
from edgeprune.boards.storing import stored, temporary
from edgeprune.boards.transport import CommandResult, Process, Progress, Transport
from edgeprune.errors import ConfigError, IncompatibleTargetError
from edgeprune.spec import DeviceSpec, Fingerprint

logger = logging.getLogger("edgeprune.boards.board")

_OLDEST_PYTHON = (3, 6)
_POWER_MODES = "nvpmodel"
"""Of the ways that a device type names the one that is only used when a mode is asked for."""
_TIMED_VERBS = frozenset({"bench", "energy", "layers", "sustain"})


class Board:
    """A board that was opened. Use it as a context manager, or `close` it; get one from `Board.open`.

    Attributes:
        name: What the user calls it.
        device: Its device type, where known.
        transport: How it is reached.
        root: Absolute folder on the board that holds everything of edgeprune's.
        python: The board's Python that the runner runs with: that of the environment which `edgeprune device setup` made, else
            `base_python`.
        base_python: The board's Python as it was named.
        signers: List on this machine of those who may sign what is deployed there, or None.
        cores: Those of the board that engines are timed on; empty for all that its user has.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        name: str,
        python: str = "python3",
        root: str = DEFAULT_ROOT,
        device: DeviceSpec | None = None,
        signers: Path | None = None,
        cores: Sequence[int] | None = None,
    ) -> None:
        self.signers, self.cores = signers, tuple(cores or ())
        self.transport = transport
        self.name = name
        self.device = device
        self._users = 1
        self._build: str | None = None
        self._run_id = ""
        self._hold = Hold(name, self._start_lock)
        self._clocks = Hold(name, self._start_clocks, "clock lock", patience_s=90.0)
        self._clock_request: dict[str, Any] = {}
        self._runner_ready = self._untouched = False
        self.python = self.base_python = self._at_home(python)
        self.root = self._greeted(root)

    @classmethod
    def open(cls, spec: str | Board = "local", *, config: Path | None = None) -> Board:
        """Reach a board and see that it has a Python that can run the runner.

        Args:
            spec: ``"local"``, a configured name, ``"ssh://user@host:port"`` with the options ``?python=``, ``&root=``,
                ``&identity=``, ``&host_key=``, ``&jump=`` and ``&cores=``, or a board that is open already: it stays open until
                everyone who opened it has closed it.
            config: File with the configured boards instead of the user's.

        Raises:
            ConfigError: The address is none of these; `UnknownBoardError`: no board of that name is configured.
            RemoteError: The board cannot be reached, or refuses.
            IncompatibleTargetError: The board has no Python >= 3.6.
        """
        if isinstance(spec, Board):
            spec._users += 1
            return spec
        found = reached(spec, config)
        try:
            return cls(
                found.transport,
                name=found.name,
                python=found.python,
                root=found.root,
                device=found.device,
                signers=found.signers,
                cores=found.cores,
            )
        except BaseException:
            found.transport.close()
            raise

    def close(self) -> None:
        """Close the connection, once everyone who opened this board has closed it."""
        self._users -= 1
        if self._users == 0:
            self.transport.close()

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Board({self.name!r}, {self.transport.address!r}, root={self.root!r})"

    @contextlib.contextmanager
    def using(self, python: str) -> Iterator[None]:
        """Run the runner with another Python of the board for as long as the block lasts.

        Args:
            python: Its path on the board.
        """
        before, self.python = self.python, python
        try:
            yield
        finally:
            self.python = before

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Leave no file on the board for as long as the block lasts, not even the runner: it travels with each request.

        For verbs that only look: ``probe``, ``status`` and ``store`` to ask what is missing.
        """
        before, self._untouched = self._untouched, True
        try:
            yield
        finally:
            self._untouched = before

    def greet(self) -> None:
        """Ask the board again what lies there, after its environment or its runner came or went."""
        self.python = self.base_python
        self.root = self._greeted(self.root)

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float = 60.0,
        on_line: Callable[[str], None] | None = None,
    ) -> CommandResult:
        """Run a command on the board; see `Transport.run`."""
        return self.transport.run(argv, stdin=stdin, timeout_s=timeout_s, on_line=on_line)

    def put(self, local: Path, remote: str, *, progress: Progress | None = None) -> None:
        """Copy a file to the board; see `Transport.put`."""
        self.transport.put(local, remote, progress=progress)

    def get(self, remote: str, local: Path) -> None:
        """Copy a file from the board; see `Transport.get`."""
        self.transport.get(remote, local)

    def facts(self) -> dict[str, Any]:
        """Everything that the on-board probe finds, as its JSON."""
        return self.call("probe", {}, timeout_s=120.0)

    def probe(self) -> Fingerprint:
        """What the board is and runs, and what could disturb a measurement on it."""
        return fingerprint.from_facts(self.facts())

    def power(self, *, meter: str | None = None) -> BoardPower:
        """What can be read of the board's power: sensors with their rails, kinds and periods, and what cannot be read.

        Args:
            meter: Command on the board that prints the watts of an external meter, one reading per line, each with its
                seconds before it or without; see ``docs/power.md``.
        """
        request = {} if meter is None else {"meter": meter}
        return BoardPower.of(self.call("power", request, timeout_s=120.0), self.device)

    def call(
        self,
        verb: str,
        request: Mapping[str, Any],
        *,
        timeout_s: float = 60.0,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Run one verb of the on-board runner, which is uploaded first where it is missing.

        Args:
            verb: One of the runner's verbs.
            request: JSON-ready; ``root`` is added, and ``owner`` while this process holds the board.
            timeout_s: Deadline, seconds; past it the runner is killed on the board.
            on_event: Called with each event as it arrives, the result left out; what it raises ends the verb.

        Returns:
            The verb's result.

        Raises:
            EdgepruneError: The exception that the verb names, or `CommandError` when it ends without a result.
            RemoteTimeoutError: Past the deadline.
            ConnectError: The link was lost; or the board's lock, while the verb was timing something.
        """
        self._hold.renew()
        if verb in _TIMED_VERBS:
            self._clocks.renew()
        outcome: dict[str, Any] = {}

        def on_line(line: str) -> None:
            event = parse_event(line)
            if event is None:
                logger.debug("%s: %s", self.name, line)
            elif event["event"] in ("result", "error"):
                outcome.update(event)
            elif on_event is not None:
                if verb in _TIMED_VERBS:
                    self._require_held()
                on_event(event)

        argv, stdin = self._command(verb, request)
        ended = self.transport.run(argv, stdin=stdin, timeout_s=timeout_s, on_line=on_line)
        if verb in _TIMED_VERBS:
            self._require_held()
        if ended.stderr:
            logger.debug("%s: %s: %s", self.name, verb, ended.stderr.decode("utf-8", "replace"))
        if outcome.get("event") == "result":
            result: dict[str, Any] = outcome["result"]
            return result
        if outcome:
            raise error_of({**outcome, "hint": outcome.get("hint") and for_board(outcome["hint"], self.name)})
        raise crash(verb, ended)

    @contextlib.contextmanager
    def hold(self, purpose: str, *, build: str | None = None) -> Iterator[None]:
        """Have the board to oneself. The lock belongs to a live process on the board: it goes with that process, which
        goes with this one or with the link, so nothing is left to clean up.

        A board that is held can be held again through the same object; the first one counts. Where the link was lost
        meanwhile, the next `call` takes the lock anew, or raises BoardBusyError when somebody else has it.

        Args:
            purpose: What others are told, e.g. ``"profile"``.
            build: Name of the TensorRT build that may run there already, since this run takes it up.

        Raises:
            BoardBusyError: Another run holds it, the message says whose and since when; or a build whose host has gone runs.
        """
        before, self._build = self._build, build or self._build
        if not self._hold.held:
            self._run_id = secrets.token_hex(8)
        try:
            with self._hold.take(purpose):
                yield
        finally:
            self._build = before

    @contextlib.contextmanager
    def lock_clocks(self, *, clocks: bool = True, power_mode: str | None = None) -> Iterator[dict[str, Any]]:
        """Hold the board's clocks still, in the ways that its device type allows; they are put back in any case.

        A process of its own on the board puts them back when the block ends, when this process dies, and when the link is
        lost; where that process is killed too, the next run that holds the board does.

        Args:
            clocks: Whether clocks are held; without it only the power mode is.
            power_mode: Name or number of a Jetson's power mode to be in meanwhile. A board is another one in another mode:
                `probe` it afterwards.

        Yields:
            ``ways`` and the states ``before`` and ``during``; once the block has ended also ``after`` and ``restored``,
            where the board could still say so.

        Raises:
            ConfigError: The device type is not known, or allows none.
            CommandError: The board does not let its user lock clocks, or has no such mode; nothing was changed.
        """
        allowed = [] if self.device is None else list(self.device.facts.get("clock_locks", ()))
        ways = [way for way in allowed if (power_mode is not None if way == _POWER_MODES else clocks)]
        if (clocks and set(ways) <= {_POWER_MODES}) or (power_mode is not None and _POWER_MODES not in ways):
            kind = "of no known device type" if self.device is None else f"a {self.device.name}, which names none"
            what = "its clocks are locked" if clocks else "its power mode is chosen"
            raise ConfigError(
                f"the device type of board {self.name} must say how {what}, found {kind}.",
                hint="edgeprune device add --type, or measure without --lock-clocks and --power-mode",
            )
        self._clock_request = {"ways": ways, "power_mode": power_mode}
        with self._clocks.take("clocks"):
            told: dict[str, Any] = dict(self._clocks.taken["clocks"])
            yield told
        told.update(self._clocks.released)

    def _require_held(self) -> None:
        self._hold.require()
        self._clocks.require()

    @property
    def owner(self) -> dict[str, Any]:
        """Who this run is to the lock of a board: another one each time that it is held, also by the same process."""
        return {"host": socket.gethostname(), "pid": os.getpid(), "run": self._run_id}

    def push(self, content: Path | bytes, *, progress: Progress | None = None) -> str:
        """Bring a file into the board's store, ``<root>/store/<sha256>``; what is there already is not sent again.

        Returns:
            Its sha256.

        Raises:
            BoardFullError: It does not fit; nothing was sent.
            TransferError: What arrived is not what was sent.
        """
        return stored(self, content, progress=progress)

    def _at_home(self, path: str) -> str:
        """A path with a leading ``~/`` made absolute on the board: every word of a command is quoted, and none expanded."""
        if not path.startswith("~/"):
            return path
        home = self.transport.run(["sh", "-c", 'printf %s "$HOME"'], timeout_s=30.0).stdout
        return home.decode("utf-8", "surrogateescape").strip().rstrip("/") + path[1:]

    def _greeted(self, root: str) -> str:
        """Absolute root folder, from a Python that is new enough."""
        package = runner_package()
        ended = self.transport.run([self.python, "-c", GREETING, root, package.name], timeout_s=30.0)
        answer = answer_of(ended)
        if isinstance(answer, str):
            raise self._no_python(f"none at {self.python}" + (f" ({answer})" if answer else ""))
        if answer.version < _OLDEST_PYTHON:
            raise self._no_python(f"{'.'.join(map(str, answer.version))} at {self.python}")
        self._runner_ready = answer.runner_bytes == len(package.content)
        self.python = answer.python or self.base_python
        return answer.root

    def _no_python(self, found: str) -> IncompatibleTargetError:
        return IncompatibleTargetError(
            "python",
            ">= 3.6",
            found,
            hint=f"install python3 on {self.transport.address}, or name another one with --python /path/to/python3",
        )

    def _runner(self) -> str:
        """Path of the runner on the board."""
        package = runner_package()
        path = f"{self.root}/runner/{package.name}"
        if not self._runner_ready:
            with temporary(package.content) as local:
                self.transport.put(local, path)
            self._runner_ready = True
        return path

    def _command(self, verb: str, request: Mapping[str, Any]) -> tuple[list[str], bytes]:
        if self._untouched:
            return carried(self.python, verb, self._request({**request, "untouched": True}))
        return [self.python, self._runner(), verb], self._request(request)

    def _request(self, request: Mapping[str, Any]) -> bytes:
        added: dict[str, Any] = {"root": self.root}
        if self._hold.held:
            added["owner"] = self.owner
        if self.cores:
            added["cores"] = list(self.cores)
        return json.dumps({**added, **request}).encode("ascii") + b"\n"

    def _start_lock(self, purpose: str) -> Process:
        request = self._request({**self.owner, "user": _user(), "purpose": purpose, "build": self._build})
        return self.transport.open_process([self.python, self._runner(), "lock"], stdin=request)

    def _start_clocks(self, purpose: str) -> Process:
        request = self._request(self._clock_request)
        return self.transport.open_process([self.python, self._runner(), purpose], stdin=request)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"user {os.getuid()}"
