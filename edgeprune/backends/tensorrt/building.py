"""Building and timing an engine on the board that will run it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.backends.tensorrt import exports, failures, flags, kernels, versions
from edgeprune.backends.tensorrt.flags import BuildOptions
from edgeprune.errors import BackendError, CompileError, IncompatibleTargetError, RemoteTimeoutError, TransferError
from edgeprune.files import replacing, sha256_of
from edgeprune.spec import Fingerprint

if TYPE_CHECKING:
    from edgeprune.backends.tensorrt.scales import Scales
    from edgeprune.boards.board import Board

RECORD_NAME = "tensorrt.json"
RECORD_FORMAT = 1

_ENGINE, _LAYERS, _PROFILE, _TIMES = "engine.plan", "layers.json", "profile.json", "times.json"
_BUILD_S = 3600.0
_TIME_S = 600.0

logger = logging.getLogger("edgeprune.backends.tensorrt")


@dataclass(frozen=True)
class Model:
    """What an engine is built from.

    Attributes:
        content: The ONNX file.
        operations: Name of each node to its operation.
        origins: Name of a node to that of the traced program's node.
        scales: For a DLA in int8.
    """

    content: bytes
    operations: Mapping[str, str]
    origins: Mapping[str, str]
    scales: Scales | None = None


def gpu_of(fingerprint: Fingerprint) -> dict[str, str]:
    """What an engine is bound to besides the release: the GPU as the board tells it.

    A Jetson without ``nvidia-smi`` tells its board's model instead, which decides the GPU.
    """
    gpus = fingerprint.facts.get("gpus") or []
    if gpus:
        return {"gpu": str(gpus[0].get("name")), "compute_capability": str(gpus[0].get("compute_capability"))}
    return {"gpu": str(fingerprint.facts.get("board_model") or "unknown")}


def version_on(board: Board) -> versions.Version:
    """The release of TensorRT whose trtexec the board has.

    Raises:
        BackendUnavailableError: It has none.
        IncompatibleTargetError: Its options are not known to edgeprune.
    """
    answer = board.call("trtexec", {"action": "find"}, timeout_s=120.0)
    version = versions.of_log(str(answer["banner"]))
    if version is None:
        raise BackendError(f"trtexec on {board.name} must tell its version, found {str(answer['banner'])[:80]!r}.")
    versions.dialect(version)
    return version


def build(
    board: Board,
    version: versions.Version,
    model: Model,
    options: BuildOptions,
    path: Path,
    *,
    gpu: Mapping[str, str] | None = None,
    timed: bool = True,
) -> dict[str, Any]:
    """Build an engine on a board, time it there, and bring it here.

    A build that goes on there after the link was lost, or that has finished, is taken up by the next call with the same
    model, options, release and GPU, if the engine is still what was built. One that cannot be timed is not taken up again. The
    timing cache stays on the board and serves every later build there.

    Args:
        board: An open board.
        version: Its release of TensorRT.
        model: What to build.
        options: How.
        path: File for the engine; it appears whole or not at all.
        gpu: What the engine is bound to, see `gpu_of`; the board is asked where it is None.
        timed: Whether it is timed at once; without it the record has layers without times.

    Returns:
        The record of the build, JSON-ready; see ``docs/backends.md``.

    Raises:
        CompileError: trtexec cannot build or load it; `CompileError.log_tail` has the end of its log.
        IncompatibleTargetError: It does not take its own engine, since two releases are mixed up on the board, or it has no DLA.
        BoardBusyError: Another run holds the board, which a build would disturb.
        RemoteError: The board cannot be reached; the build goes on there.
    """
    if options.dla_core is not None:
        versions.require_dla(version, options.precision)
    blob = board.push(model.content)
    place = {"onnx": f"{{store}}/{blob}", "engine": f"{{work}}/{_ENGINE}"}
    cache = f"{{root}}/tensorrt/timing-{version}.cache"
    more: dict[str, Any] = {}
    if model.scales is not None:
        more = {"scales": f"{{store}}/{board.push(model.scales.table)}", "exact": model.scales.exact}
    commands = {
        "build": flags.build(version, options, **place, layers=f"{{work}}/{_LAYERS}", cache=cache, **more),
        "time": flags.time(
            version, options, engine=place["engine"], profile=f"{{work}}/{_PROFILE}", times=f"{{work}}/{_TIMES}"
        ),
    }
    # Home folders move between boards, by network or by card: an engine of another GPU is another build.
    bound = dict(gpu_of(board.probe()) if gpu is None else gpu)
    identity = json.dumps([str(version), bound, commands["build"]], sort_keys=True).encode()
    work = hashlib.sha256(identity).hexdigest()[:32]
    with board.hold("build a TensorRT engine", build=work):
        built = _run(
            board,
            version,
            work,
            "build",
            commands["build"],
            [_ENGINE, _LAYERS],
            keep=[_ENGINE],
            engine_arguments=flags.dla(options),
            timeout_s=_BUILD_S,
        )
        if _ENGINE not in built["outputs"]:
            raise CompileError(
                f"trtexec of TensorRT {version} must write the engine, found that it ended well without one.",
                log_tail=failures.tail(built["log"]),
            )
        times: dict[str, Any] = {"outputs": {}, "by": built["by"]}
        try:
            if timed:
                times = _run(board, version, work, "time", commands["time"], [_PROFILE, _TIMES], timeout_s=_TIME_S)
        except (CompileError, IncompatibleTargetError):
            if built["found"] == "finished":
                board.call("trtexec", {"action": "forget", "work": work, "step": "build"})
            raise
    engine = built["outputs"][_ENGINE]
    folder = f"{board.root}/tensorrt/{work}"
    with replacing(path) as partial:
        board.get(f"{folder}/{_ENGINE}", partial)
        found = sha256_of(partial)
        if found != engine["sha256"]:
            raise TransferError(f"the engine must arrive as it was built, sha256 {engine['sha256']}, found {found}.")
    texts = {
        name: _text(board, f"{folder}/{name}", path.with_name(f".{name}"))
        for name in (_LAYERS, _PROFILE, _TIMES)
        if name in {**built["outputs"], **times["outputs"]}
    }
    return {
        "format": RECORD_FORMAT,
        "tensorrt": str(version),
        "engine_sha256": engine["sha256"],
        "onnx_sha256": blob,
        "precision": options.precision,
        "dla_core": options.dla_core,
        "commands": commands,
        **_read(model, texts, by=times["by"], timed=timed),
    }


def _run(
    board: Board,
    version: versions.Version,
    work: str,
    step: str,
    arguments: Sequence[str],
    outputs: Sequence[str],
    *,
    timeout_s: float,
    keep: Sequence[str] = (),
    engine_arguments: Sequence[str] = (),
) -> dict[str, Any]:
    """One step on the board, to its end."""
    logger.info("%s: trtexec %s", board.name, " ".join(arguments))
    request = {
        "action": "run",
        "work": work,
        "step": step,
        "arguments": list(arguments),
        "outputs": list(outputs),
        "keep": list(keep),
        "engine_arguments": list(engine_arguments),
    }
    try:
        result = board.call(
            "trtexec",
            request,
            timeout_s=timeout_s,
            on_event=lambda event: logger.info("%s: %s", board.name, event.get("line", "")),
        )
    except RemoteTimeoutError as error:
        raise RemoteTimeoutError(
            f"trtexec must {step} the engine on board {board.name} within {timeout_s:.0f} s, found it still running; it goes "
            "on there.",
            hint="run the same command again, which takes it up",
        ) from error
    if result["found"] is not None:
        logger.info("%s: the %s step was found %s", board.name, step, result["found"])
    if result["returncode"] != 0:
        for line in failures.tail(result["log"]):
            logger.info("%s: %s", board.name, line)
        logger.info("%s: the whole log is %s", board.name, result["log_path"])
        raise failures.failure(result["log"], result["returncode"], step=step, version=str(version))
    return result


def _text(board: Board, remote: str, local: Path) -> str:
    try:
        board.get(remote, local)
        return local.read_text(encoding="utf-8", errors="replace")
    finally:
        local.unlink(missing_ok=True)


def _read(model: Model, texts: Mapping[str, str], *, by: str, timed: bool) -> dict[str, Any]:
    """What the exports say. An engine whose export cannot be read is an engine: the reason is recorded instead."""
    found: dict[str, Any] = {"kernels": None, "latency": None, "unread": []}
    try:
        layers = exports.read_layers(texts.get(_LAYERS, ""))
        profile = exports.read_profile(texts.get(_PROFILE, "")) if timed else None
        joined = kernels.timed_kernels(layers, profile, operations=model.operations, origins=model.origins)
        found["kernels"] = [kernel.as_json() for kernel in joined]
    except BackendError as error:
        logger.warning("%s", error.message)
        found["unread"].append(error.message)
    if not timed:
        return found
    try:
        times = exports.read_times(texts.get(_TIMES, ""))
        found["latency"] = {
            "median_ms": times.percentile_ms(50),
            "p90_ms": times.percentile_ms(90),
            "p99_ms": times.percentile_ms(99),
            "queries": len(times.latency_ms),
            "by": f"{by} on the board, device times without transfers",
        }
    except BackendError as error:
        logger.warning("%s", error.message)
        found["unread"].append(error.message)
    return found
