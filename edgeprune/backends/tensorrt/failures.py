"""What trtexec says when it fails, as typed errors with the next step."""

from __future__ import annotations

import re

from edgeprune.errors import BackendError, CompileError, IncompatibleTargetError

_STAMP = re.compile(r"^\[\d\d/\d\d/\d{4}-\d\d:\d\d:\d\d\] ")
_ERROR = re.compile(r"^(?:\[\S+\] )?\[E\] (?:\[TRT\] )?")
_UNKNOWN = re.compile(r"Unknown option: (--?\w+)")
_TAGS = re.compile(r"Version tag does not match\. Note: Current Version: (\d+), Serialized Engine Version: (\d+)")
_MEMORY = re.compile(r"out of memory|OutOfMemory|could not be allocated|User allocator error", re.IGNORECASE)
_ASKED = re.compile(r"Requested amount of GPU memory \((\d+) bytes\)")
_NODE = re.compile(
    r"Could not find any implementation for node (.+?)(?: due to insufficient workspace.*?)?\.(?:\)|\s*$)", re.MULTILINE
)
_LINE_CHARS = 300


def tail(log: str, lines: int = 20) -> list[str]:
    """The last lines of a log without their time stamps, the longest cut."""
    return [_STAMP.sub("", line)[:_LINE_CHARS] for line in log.splitlines()[-lines:]]


def errors(log: str) -> list[str]:
    """What a log says with severity error, in order, without prefixes."""
    return [_ERROR.sub("", line).strip() for line in log.splitlines() if _ERROR.match(line)]


def failure(log: str, returncode: int, *, step: str, version: str) -> BackendError | IncompatibleTargetError:
    """The exception for a trtexec that did not end well.

    Known causes are told apart: an option that this release lacks, an engine of another release, too little memory, a node
    without an implementation. For anything else the message has the first error of the log, which is where causes stand:
    later ones say that the step before them failed.

    Args:
        log: All that it printed, or the end of it.
        returncode: Its exit status; negative for a signal.
        step: What it was to do, as a verb: ``"build"``, ``"time"`` or ``"run"``.
        version: Of TensorRT on the board.

    Returns:
        An error to raise; `log_tail` of a `CompileError` has the last lines.
    """
    said = errors(log)
    option = _UNKNOWN.search(log)
    if option is not None:
        return CompileError(
            f"trtexec of TensorRT {version} must know the option {option[1]}, it says: Unknown option.",
            hint="a trtexec of the release that its first line states: several on one board get mixed up",
            log_tail=tail(log),
        )
    tags = _TAGS.search(log)
    if tags is not None or "Magic tag does not match" in log:
        found = "an engine of another kind" if tags is None else f"serialization version {tags[2]}"
        needed = f"built by TensorRT {version}" + ("" if tags is None else f" (serialization version {tags[1]})")
        return IncompatibleTargetError(
            "an engine", needed, found, hint="edgeprune compile --backend tensorrt --board BOARD, on that very board"
        )
    if _MEMORY.search(log):
        asked = _ASKED.search(log)
        amount = f", {int(asked[1]) / 1e6:.0f} MB were asked for" if asked else ""
        return CompileError(
            f"the board must have memory to {step} the engine, TensorRT {version} found too little{amount}.",
            hint="end other programs on the board, a smaller batch, or TensorRt(workspace_mib=...)",
            log_tail=tail(log),
        )
    node = _NODE.search(log)
    if node is not None:
        return CompileError(
            f"TensorRT {version} must have an implementation of every node, found none of {node[1][:120]}.",
            hint="another precision, without a DLA, or a newer TensorRT",
            log_tail=tail(log),
        )
    if returncode in (-9, 137):
        reason, hint = "it was killed by SIGKILL", "look for memory running out on the board: dmesg"
    else:
        how = f"ended with exit code {returncode}" if returncode >= 0 else f"was killed by signal {-returncode}"
        reason = said[0][:_LINE_CHARS].rstrip(".") if said else f"it {how} and printed no error"
        hint = "the log tail (--verbose), and NVIDIA/TensorRT's issues for its words"
    return CompileError(
        f"trtexec of TensorRT {version} must {step} the engine, found: {reason}.", hint=hint, log_tail=tail(log)
    )
