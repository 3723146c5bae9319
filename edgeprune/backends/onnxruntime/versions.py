"""Which ONNX a release of ONNX Runtime reads, and which is therefore written for it.

An ONNX file states the version of its format (IR version) and of its operations (opset). ONNX Runtime reads everything older
than what it was built with and refuses everything newer, so a file for a board goes by the runtime of that board.

Source: compatibility page of ONNX Runtime, onnxruntime.ai/docs/reference/compatibility.html (``docs/reference/compatibility.md``
of microsoft/onnxruntime, branch ``gh-pages``, commit 109c0baa). It ends with 1.20; later releases read at least as much.
Tried: each of 1.11 to 1.19, 1.15.0 and 1.20.1 read exactly this much, on x86-64; 1.31.1 reads opset 25 and IR version 13.
"""

from __future__ import annotations

from typing import NamedTuple


class OnnxVersions(NamedTuple):
    """What an ONNX file states, or the newest that a runtime reads.

    Attributes:
        opset: Version of the standard operations.
        ir_version: Version of the file format.
    """

    opset: int
    ir_version: int


READS: dict[tuple[int, int], OnnxVersions] = {
    (1, 10): OnnxVersions(15, 8),
    (1, 11): OnnxVersions(16, 8),
    (1, 12): OnnxVersions(17, 8),
    (1, 13): OnnxVersions(17, 8),
    (1, 14): OnnxVersions(18, 8),
    # The page says IR version 8; 1.15.0 and 1.15.1 read 9.
    (1, 15): OnnxVersions(19, 9),
    (1, 16): OnnxVersions(19, 9),
    (1, 17): OnnxVersions(20, 9),
    (1, 18): OnnxVersions(21, 10),
    (1, 19): OnnxVersions(21, 10),
    (1, 20): OnnxVersions(21, 10),
}
"""Release of ONNX Runtime to the newest that it reads. Older releases than these are not written for."""

WRITTEN = OnnxVersions(18, 9)
"""What is written where the runtime reads it. The exporter's operations are those of opset 18; a newer one would only change
which kernels the same model runs as, from board to board."""


def read_by(runtime: str) -> OnnxVersions:
    """The newest that a release of ONNX Runtime reads.

    Args:
        runtime: Its version, e.g. ``"1.16.3"``. What is older than the table is taken for its first row.
    """
    known = [release for release in READS if release <= _release(runtime)]
    return READS[max(known, default=min(READS))]


def written_for(runtime: str) -> OnnxVersions:
    """What to write for a release of ONNX Runtime.

    Args:
        runtime: Its version, e.g. ``"1.16.3"``.
    """
    newest = read_by(runtime)
    return OnnxVersions(min(WRITTEN.opset, newest.opset), min(WRITTEN.ir_version, newest.ir_version))


def oldest_reader(opset: int, ir_version: int) -> str:
    """The oldest release that reads a file; where none of the table does, the one that follows its last."""
    readers = [
        release for release, newest in READS.items() if opset <= newest.opset and ir_version <= newest.ir_version
    ]
    major, minor = max(READS)
    return ".".join(map(str, min(readers, default=(major, minor + 1))))


def _release(runtime: str) -> tuple[int, ...]:
    # Builds of others add to the number: 1.16.0+nv23.9, 1.20.0.dev20241022.
    numbers = runtime.split("+")[0].split(".")[:2]
    return tuple(int(number) for number in numbers if number.isdigit())
