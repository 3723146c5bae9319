"""A private environment for a runtime on a board: wheels chosen here, sent, unpacked there, tried, and only then used.

No root, no network and no pip on the board. The environment is built aside and switched to in one rename after it has run an
inference, so whatever happens meanwhile the one before stays as it is, and the same call goes on where the last one stopped.
Later runs find it by themselves: the board's greeting names its Python, and the fingerprint says what is in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.backends import registry
from edgeprune.boards.board import Board
from edgeprune.boards.downloading import Wheel, download
from edgeprune.boards.wheels import WheelTarget, target_of
from edgeprune.deployment import agreement, faults
from edgeprune.deployment.agreement import Parity
from edgeprune.deployment.artifact import GOLDEN_NAME, MODEL_NAME
from edgeprune.errors import (
    BackendError,
    BoardFullError,
    CommandError,
    ConfigError,
    ConnectError,
    EdgepruneError,
    ParityError,
    RemoteTimeoutError,
    WheelUnavailableError,
)
from edgeprune.spec import Fingerprint

if TYPE_CHECKING:
    from edgeprune.backends._base import Backend
    from edgeprune.deployment.artifact import Artifact

STATES = ("setup:probe", "setup:choose", "setup:upload", "setup:build", "setup:test", "setup:use")

Progress = Callable[[str, int, int, str], None]
"""Called with (state, done, total, what happens); done and total are bytes, items, or 0 and 0 where nothing is counted."""

_RESERVE_BYTES = 16 << 20
_SLOWEST_UNPACKING_BYTES_S = 1e6
_TEST_TIMEOUT_S = 300.0

_log = logging.getLogger("edgeprune.deployment.environment")


@dataclass(frozen=True)
class Setup:
    """What a board was set up with, or would be.

    Attributes:
        board: Its name.
        backend: Whose runtime it is.
        version: Version of the runtime.
        target: What wheels had to fit.
        packages: Every package of the environment: name to version.
        bytes_sent: Bytes that were sent; in a dry run, those that would be.
        bytes_unpacked: Size of the environment, bytes.
        python: Path of the environment's Python on the board; None in a dry run.
        changed: Whether the board uses another environment than before; False in a dry run.
        parity: What the inference on the board found; None in a dry run.
    """

    board: str
    backend: str
    version: str
    target: WheelTarget
    packages: Mapping[str, str]
    bytes_sent: int
    bytes_unpacked: int
    python: str | None = None
    changed: bool = False
    parity: Parity | None = None


def set_up(
    board: str | Board = "local",
    *,
    backend: str | Backend = "onnxruntime",
    runtime_version: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Setup:
    """Give a board a runtime in an environment of its own. Runtimes of other backends that it got so before stay in it.

    Args:
        board: As in `Board.open`.
        backend: Whose runtime.
        runtime_version: Its version; by default that of this host where a wheel of it fits the board, else the newest that does.
        dry_run: Choose and download the wheels, and send nothing: no file is left on the board.
        progress: Told every state.

    Raises:
        IncompatibleTargetError: No wheels are made for the board's Python or C library.
        WheelUnavailableError: No wheel of the runtime fits, or the package index cannot be asked.
        BoardFullError: There is not enough free space; nothing was sent.
        BoardBusyError: Another run holds the board.
        BackendError: The runtime does not run there; the board uses what it used.
        ParityError: It runs and computes something else; the board uses what it used.
        ConfigError: The backend brings no runtime onto boards, or the version is none of its.
    """
    chosen = registry.get(backend)
    with Board.open(board) as opened, tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        run = _Run(opened, chosen, Path(folder), progress)
        with opened.untouched() if dry_run else nullcontext():
            run.probe()
            run.choose(runtime_version)
            if dry_run:
                return run.planned()
        run.require_space()
        artifact = run.compiled()
        with opened.hold("device setup"):
            return run.carry_out(artifact)


class _Run:
    """One set-up, state by state."""

    def __init__(self, board: Board, backend: Backend, folder: Path, progress: Progress | None) -> None:
        self.board, self.backend, self.folder = board, backend, folder
        self._tell: Progress = progress or (lambda state, done, total, message: None)
        self.bytes_sent = 0
        self.fingerprint: Fingerprint
        self.state: dict[str, Any]
        self.target: WheelTarget
        self.wheels: tuple[Wheel, ...]
        self.requirements: dict[str, list[str]]
        self.version: str

    def probe(self) -> None:
        """What the board's own Python is, and which environments there are."""
        self._tell("probe", 0, 0, f"probing board {self.board.name}")
        with self.board.using(self.board.base_python):
            self.fingerprint = self.board.probe()
            self.state = self._call("status")
        self.target = target_of(self.fingerprint)
        faults.reached("setup:probe")

    def choose(self, runtime_version: str | None) -> None:
        """Download what fits, with the runtimes that the board uses already."""
        alternatives = self.backend.board_packages(runtime_version)
        if not alternatives:
            raise ConfigError(
                f"a backend must say which packages its runtime is made of, {self.backend.name} does not.",
                hint="install its runtime on the board by hand",
            )
        before = self.state["environments"].get(self.state["used"], {}).get("requirements", {})
        others = {name: list(wanted) for name, wanted in before.items() if name != self.backend.name}
        for number, wanted in enumerate(alternatives):
            try:
                found = self._downloaded(wanted, others)
                break
            except WheelUnavailableError as error:
                if error.fitting is None or number == len(alternatives) - 1:
                    raise
                self._tell("choose", 0, 0, f"no wheel of {wanted[0]} fits, looking for {alternatives[number + 1][0]}")
        self.version = _runtime_of(found, wanted[0]).version
        (exact, *_) = self.backend.board_packages(self.version)
        if len(exact) > len(wanted):
            found = self._downloaded(exact, others)
        self.wheels, self.requirements = found, {**others, self.backend.name: list(exact)}
        faults.reached("setup:choose")

    def _downloaded(self, wanted: tuple[str, ...], others: Mapping[str, list[str]]) -> tuple[Wheel, ...]:
        self._tell("choose", 0, 0, f"choosing wheels for {self.target}")
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        everything = [*wanted, *(package for packages in others.values() for package in packages)]
        return download(everything, self.target, folder, progress=lambda line: self._tell("choose", 0, 0, line))

    @cached_property
    def identity(self) -> str:
        """Name of the environment that these wheels make with this Python."""
        told = [self.target.python, self.target.abi, sorted(wheel.sha256 for wheel in self.wheels)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    @cached_property
    def bytes_unpacked(self) -> int:
        """Size of what the wheels hold, bytes."""
        total = 0
        for wheel in self.wheels:
            with zipfile.ZipFile(wheel.path) as archive:
                total += sum(info.file_size for info in archive.infolist())
        return total

    def _there(self) -> bool:
        return any(name[:16] == self.identity and told["alive"] for name, told in self.state["environments"].items())

    def _missing(self) -> tuple[int, int]:
        """(bytes that the board lacks, bytes free there)."""
        sizes = {wheel.sha256: wheel.size_bytes for wheel in self.wheels}
        answer = self.board.call("store", {"action": "missing", "blobs": sizes})
        lacking = sum(sizes[sha256] for sha256 in answer["missing"])
        return lacking - min(lacking, answer["incoming_bytes"]), answer["free_bytes"]

    def planned(self) -> Setup:
        """What would be done."""
        lacking = 0 if self._there() else self._missing()[0]
        return self._result(bytes_sent=lacking)

    def require_space(self) -> None:
        """Refuse before anything is sent."""
        if self._there():
            return
        lacking, free = self._missing()
        needed = lacking + self.bytes_unpacked + _RESERVE_BYTES
        if free < needed:
            raise BoardFullError(
                f"board {self.board.name} must have {needed / 1e6:.0f} MB free under {self.board.root} for the environment, "
                f"found {free / 1e6:.0f} MB.",
                hint=f"edgeprune device clean {self.board.name}, or give the board another root folder",
            )

    def compiled(self) -> Artifact:
        """What the board is to compute, for the runtime that it will have."""
        self._tell("compile", 0, 0, f"compiling a small network for {self.backend.name} {self.version}")
        runtimes = {**self.fingerprint.runtimes, self.backend.name: {"version": self.version}}
        return small_artifact(self.backend, replace(self.fingerprint, runtimes=runtimes), self.folder / "check")

    def carry_out(self, artifact: Artifact) -> Setup:
        """Upload, build, try, switch. The lock is held."""
        blobs = {
            role: self.board.push(artifact.folder / name)
            for role, name in (("engine", artifact.manifest.engine), ("golden", GOLDEN_NAME), ("model", MODEL_NAME))
        }
        built, parity = self._found(artifact, blobs)
        if parity is None:
            self._upload()
            built = self._built(None if built is None else built["name"])
            parity = self._tried_or_dropped(artifact, blobs, built)
        assert built is not None
        self._tell("use", 0, 0, "switching to it")
        done = [wheel.sha256 for wheel in self.wheels] + list(blobs.values())
        with self.board.using(self.board.base_python):
            switched = self._call("use", name=built["name"], blobs=done)
        self.board.greet()
        faults.reached("setup:use")
        self._tell("done", 0, 0, f"board {self.board.name} runs {self.backend.name} {self.version}")
        return self._result(
            bytes_sent=self.bytes_sent, python=self.board.python, changed=switched["changed"], parity=parity
        )

    def _found(self, artifact: Artifact, blobs: Mapping[str, str]) -> tuple[dict[str, Any] | None, Parity | None]:
        """The environment of these wheels that is there already, and what an inference in it found; None where it fails."""
        if not self._there():
            return None, None
        there = self._built(None)
        try:
            return there, self._tried(artifact, blobs, there)
        except (ConnectError, RemoteTimeoutError):
            raise
        except EdgepruneError as error:
            _log.warning("%s: environment %s is built anew: %s", self.board.name, there["name"], error.message)
            return there, None

    def _upload(self) -> None:
        total, done = sum(wheel.size_bytes for wheel in self.wheels), 0
        lacking = self._missing()[0]
        for wheel in self.wheels:
            before = done

            def on_bytes(sent: int, _: int, base: int = before, name: str = wheel.name) -> None:
                self._tell("upload", base + sent, total, f"sending {name}")

            self.board.push(wheel.path, progress=on_bytes)
            done += wheel.size_bytes
        self.bytes_sent = lacking
        faults.reached("setup:upload")

    def _built(self, broken: str | None) -> dict[str, Any]:
        record = {
            "packages": {wheel.name: wheel.version for wheel in self.wheels},
            "requirements": self.requirements,
            "python": self.target.python,
        }
        wheels = [{"name": wheel.path.name, "sha256": wheel.sha256} for wheel in self.wheels]
        deadline_s = 60.0 + self.bytes_unpacked / _SLOWEST_UNPACKING_BYTES_S

        def on_event(event: Mapping[str, Any]) -> None:
            if event["event"] == "wheel":
                self._tell("build", event["done"], event["of"], f"unpacking {event['name']}")

        with self.board.using(self.board.base_python):
            request = {"id": self.identity, "wheels": wheels, "record": record, "anew": broken}
            built = self._call("build", timeout_s=deadline_s, on_event=on_event, **request)
        faults.reached("setup:build")
        return built

    def _tried(self, artifact: Artifact, blobs: Mapping[str, str], built: Mapping[str, Any]) -> Parity:
        """One inference with the environment's Python."""
        self._tell("test", 0, 0, "running an inference on the board")
        # The store serves as the artifact's folder, whose files have hashes for names.
        fields = {**agreement.request(artifact.manifest, threads=1), **blobs, "folder": f"{self.board.root}/store"}
        with self.board.using(built["python"]):
            result = self.board.call("parity", fields, timeout_s=_TEST_TIMEOUT_S)
        found = Parity.from_result(result, artifact.manifest)
        if not found.passed:
            raise ParityError(
                f"{self.backend.name} {self.version} on board {self.board.name} {found.complaint()}.",
                hint="another version: --runtime-version",
            )
        faults.reached("setup:test")
        return found

    def _tried_or_dropped(self, artifact: Artifact, blobs: Mapping[str, str], built: Mapping[str, Any]) -> Parity:
        try:
            return self._tried(artifact, blobs, built)
        except (BackendError, ParityError, CommandError) as error:
            # After any other error it may be good: the next run tries it.
            removed = None
            with suppress(EdgepruneError), self.board.using(self.board.base_python):
                removed = self._call("drop", name=built["name"])["removed"]
            if removed is None:
                raise
            used = "uses the environment that it used" if self.state["used"] else "uses no environment"
            error.message = f"{error.message} The new environment was removed; board {self.board.name} {used}."
            error.hint = f"edgeprune device setup {self.board.name} --runtime-version, with an older one"
            raise

    def _call(
        self,
        action: str,
        timeout_s: float = 120.0,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        request = {"action": action, **fields, **faults.request_fields()}
        return self.board.call("environment", request, timeout_s=timeout_s, on_event=on_event)

    def _result(self, **found: Any) -> Setup:
        return Setup(
            board=self.board.name,
            backend=self.backend.name,
            version=self.version,
            target=self.target,
            packages={wheel.name: wheel.version for wheel in self.wheels},
            bytes_unpacked=self.bytes_unpacked,
            **found,
        )


def _runtime_of(wheels: tuple[Wheel, ...], requirement: str) -> Wheel:
    name = requirement.partition("=")[0].partition(">")[0].strip().lower()
    return next(wheel for wheel in wheels if wheel.name == name)


def small_artifact(backend: Backend, fingerprint: Fingerprint, folder: Path) -> Artifact:
    """A network that runs the kernels which differ between processors, with golden outputs of this host.

    Args:
        backend: What compiles it.
        fingerprint: The board that it is for, with the runtime that it will have.
        folder: Folder to write.
    """
    import torch
    from torch import nn

    from edgeprune.deployment.compiling import compile as compile_artifact

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.Conv2d(16, 24, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 10),
        )
        example = torch.randn(1, 3, 16, 16)
    return compile_artifact(
        module, example, folder, backend=backend, name="set-up check", edge_cases=(), fingerprint=fingerprint
    )
