"""Which TensorRT a board has, and what of ONNX its parser takes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgeprune.errors import IncompatibleTargetError
from edgeprune.spec import Precision

_BANNER = re.compile(r"\[TensorRT v(\d+)\]")


@dataclass(frozen=True, order=True)
class Version:
    """A release of TensorRT."""

    major: int
    minor: int
    patch: int = 0

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"

    @property
    def number(self) -> int:
        """``NV_TENSORRT_VERSION``: 8601 of 8.6.1, 100300 of 10.3.0; see `of_log`."""
        return self.major * (10_000 if self.major >= 10 else 1000) + self.minor * 100 + self.patch


@dataclass(frozen=True)
class Dialect:
    """One family of releases that share their options and their ONNX parser.

    Attributes:
        name: What a person calls it.
        oldest: First release of the family.
        end: First release that no longer belongs to it.
        opset: Newest ONNX opset of its parser.
        ir_version: Newest ONNX IR version of the ONNX release that the parser is built with.
        strongly_typed: Whether types are taken from the graph alone, so that no option asks for fp16.
        quiet_defaults: Whether CUDA graph, spin wait, no data transfers and a profile run of its own are the defaults, and the
            options that asked for them do nothing.
    """

    name: str
    oldest: Version
    end: Version
    opset: int
    ir_version: int
    strongly_typed: bool
    quiet_defaults: bool


DIALECTS = (
    # Opset: onnx/onnx-tensorrt, docs/operators.md at 6ba67d3, which NVIDIA/TensorRT v8.6.1 pins: "up to Opset 17". IR: its
    # ONNX 1.13 has IR version 8.
    Dialect("8.6", Version(8, 6), Version(8, 7), 17, 8, strongly_typed=False, quiet_defaults=False),
    # onnx/onnx-tensorrt, docs/operators.md at 96e7811 (branch 10.1-GA): opset 9 to 20; what later releases add was not looked
    # up. IR: the first ONNX with opset 20 is 1.15, with IR version 9.
    Dialect("10", Version(10, 0), Version(11, 0), 20, 9, strongly_typed=False, quiet_defaults=False),
    # NVIDIA, ONNX Opset Guide of TensorRT 11.x: ONNX 1.20, opset 9 to 25.
    # https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/onnx-opset-guide.html
    # Defaults and types: NVIDIA/TensorRT v11.1, samples/common/sampleOptions.cpp, InferenceOptions::parse.
    Dialect("11", Version(11, 0), Version(12, 0), 25, 9, strongly_typed=True, quiet_defaults=True),
)
SUPPORTED = "8.6, 10.x or 11.x"
# NVIDIA, "Working with DLA" of TensorRT 11.4.1: 10.7 was the last 10.x release that had one, 11.0 to 11.3 have none, 11.4.0 only
# on Windows on ARM. https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/inference-library/work-with-dla.html
_WITHOUT_DLA = (Version(10, 8), Version(11, 4, 1))


def of_log(log: str) -> Version | None:
    """The version that trtexec prints in its first line, or None.

    ``NV_TENSORRT_VERSION`` is major * 1000 + minor * 100 + patch up to TensorRT 9 and major * 10000 + minor * 100 + patch
    since TensorRT 10.

    Source: NVIDIA/TensorRT, samples/common/logging.h (``Logger::defineTest``) and include/NvInferRuntimeBase.h at v8.6.1,
    v10.3.0 and v11.1.
    """
    found = _BANNER.search(log)
    if found is None:
        return None
    number = int(found[1])
    unit = 10_000 if number >= 100_000 else 1000
    return Version(number // unit, number % unit // 100, number % 100)


def parse(text: str) -> Version:
    """A version as `Version.__str__` writes it, or with more parts; what is no number counts as 0."""
    parts = [int(part) if part.isdigit() else 0 for part in text.split(".")[:3]]
    return Version(*[*parts, 0, 0, 0][:3])


def require_dla(version: Version, precision: Precision = "fp16") -> None:
    """See that a release builds for a Jetson's DLA; all of them have the options for it.

    Raises:
        IncompatibleTargetError: It does not, or not in that precision.
    """
    if precision == "int8" and dialect(version).strongly_typed:
        # It has no option for a table of scales any more; what its DLA takes of quantize nodes was not looked up.
        raise IncompatibleTargetError(
            "TensorRT",
            "up to 10.7, which build for a DLA in int8",
            str(version),
            hint="--precision fp16, or without --dla",
        )
    first, again = _WITHOUT_DLA
    if first <= version < again:
        raise IncompatibleTargetError(
            "TensorRT",
            f"up to 10.7 or from {again}, which build for a DLA",
            str(version),
            hint="leave out --dla, or a JetPack with one of these releases",
        )


def dialect(version: Version) -> Dialect:
    """The family of a release.

    Raises:
        IncompatibleTargetError: edgeprune does not know the options of that release.
    """
    for one in DIALECTS:
        if one.oldest <= version < one.end:
            return one
    raise IncompatibleTargetError(
        "TensorRT",
        SUPPORTED,
        str(version),
        hint="a JetPack or TensorRT release of one of these, or --backend onnxruntime",
    )
