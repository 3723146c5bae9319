"""What trtexec is told, release by release.

Defaults changed with TensorRT 11: the same words then time something else. So everything that decides what is built or timed
is said, in the form ``--option=value``, which is the only one that trtexec takes, and what has become a default is left out.

Source: NVIDIA/TensorRT, samples/common/sampleOptions.cpp at v8.6.1 (a25ca8b), v10.3.0 (c5b9de3) and v11.1 (82d1dca); the
options named here were also looked up at 8.6.0, at each tag from v10.0.0 to v10.16, and at v11.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgeprune.backends.tensorrt.versions import Version, dialect
from edgeprune.errors import CompileError, ConfigError
from edgeprune.spec import Precision

WARM_UP_MS = 500
DURATION_S = 3
ITERATIONS = 100


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Args:
        precision: ``"fp32"`` (TF32 is switched off: it has 10 bits of mantissa), ``"fp16"``, or ``"int8"``, of a model with
            quantize nodes, where what has none is fp32; for a DLA, which up to TensorRT 10 takes no such nodes (NVIDIA/TensorRT
            issue 2222, NVIDIA/Model-Optimizer pull request 1661), of a float model with a table of scales, and the rest is
            fp16.
        dla_core: Number of a Jetson's deep learning accelerator, with the GPU for what it does not take; None for the GPU.
        workspace_mib: Bound of the memory that a tactic may use, MiB; None leaves it to TensorRT.

    Raises:
        ConfigError: They contradict each other.
    """

    precision: Precision = "fp32"
    dla_core: int | None = None
    workspace_mib: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "fp16", "int8"):
            raise ConfigError(
                f"the precision of a TensorRT engine must be fp32, fp16 or int8, found {self.precision!r}.",
                hint="--precision fp16",
            )
        if self.dla_core is not None and self.dla_core < 0:
            raise ConfigError(f"a DLA core must be 0 or more, found {self.dla_core}.")
        if self.dla_core is not None and self.precision == "fp32":
            raise ConfigError("a DLA must be used in fp16 or int8, found precision fp32.", hint="--precision fp16")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ConfigError(f"the workspace must be at least 1 MiB, found {self.workspace_mib}.")


def build(
    version: Version,
    options: BuildOptions,
    *,
    onnx: str,
    engine: str,
    layers: str,
    cache: str,
    scales: str | None = None,
    exact: Sequence[str] = (),
) -> list[str]:
    """Arguments that build an engine and export its layers.

    Args:
        version: Of the board's trtexec.
        options: How to build.
        onnx: Model on the board. For fp16 under a release that goes by the graph's types, one whose types are fp16; for int8
            one with quantize nodes.
        engine: File to write.
        layers: File for the layers, JSON.
        cache: Timing cache, read where it is there and written.
        scales: Table of scales, for a DLA in int8.
        exact: Names of the layers that stay in fp16 there.

    Raises:
        IncompatibleTargetError: The release is not supported.
        CompileError: A layer that must stay in fp16 cannot be named to it.
    """
    words = [
        f"--onnx={onnx}",
        f"--saveEngine={engine}",
        f"--exportLayerInfo={layers}",
        # Anything less gives names instead of layers.
        "--profilingVerbosity=detailed",
        f"--timingCacheFile={cache}",
        "--skipInference",
        "--device=0",
        *dla(options),
    ]
    if options.precision != "fp16":
        words.append("--noTF32")
    if options.precision != "fp32" and not dialect(version).strongly_typed:
        words.append(f"--{options.precision}")
    if scales is not None:
        words += ["--fp16", f"--calib={scales}", *_in_fp16(exact)]
    if options.workspace_mib is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace_mib}")
    return words


def _in_fp16(layers: Sequence[str]) -> list[str]:
    """Keep layers in fp16, where a table of scales would let the builder take int8."""
    if odd := [name for name in layers if not name or set(name) & set(',:*"')]:
        raise CompileError(
            f"layers that stay in float must have names that trtexec can be told, found {odd[0]!r}.",
            hint="--snr with a smaller ratio, --precision fp16, or without --dla",
        )
    told = ",".join(f"{name}:fp16" for name in layers)
    return [f"--layerPrecisions={told}", "--precisionConstraints=prefer"] if layers else []


def time(version: Version, options: BuildOptions, *, engine: str, profile: str, times: str) -> list[str]:
    """Arguments that time an engine, as a whole and in a run of its own layer by layer.

    The whole is timed without data transfers, with CUDA graph (which a DLA cannot have) and spin wait, in every release.

    Args:
        version: Of the board's trtexec.
        options: How it was built.
        engine: The engine.
        profile: File for the layers' times, JSON.
        times: File for the times of single queries, JSON.

    Raises:
        IncompatibleTargetError: The release is not supported.
    """
    words = [
        f"--loadEngine={engine}",
        f"--exportProfile={profile}",
        f"--exportTimes={times}",
        f"--warmUp={WARM_UP_MS}",
        f"--duration={DURATION_S}",
        f"--iterations={ITERATIONS}",
        "--device=0",
        *dla(options),
    ]
    graph = options.dla_core is None
    if dialect(version).quiet_defaults:
        return words if graph else [*words, "--noCudaGraph"]
    words += ["--noDataTransfers", "--useSpinWait", "--separateProfileRun"]
    return [*words, "--useCudaGraph"] if graph else words


def dla(options: BuildOptions) -> list[str]:
    """What every use of an engine must be told of its DLA: its file does not say it."""
    return [] if options.dla_core is None else [f"--useDLACore={options.dla_core}", "--allowGPUFallback"]
