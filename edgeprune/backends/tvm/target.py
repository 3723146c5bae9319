"""What an engine is compiled for: architecture, LLVM's CPU name, and exactly the instruction sets that the board has."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.boards.host import host_cpu_model, host_isa
from edgeprune.errors import CompileError
from edgeprune.spec import Fingerprint

SERIES = "0.27"
"""Of TVM. The virtual machine's byte code and TVM's calling convention change between minor versions."""

# Linux's name of a flag (as the probe tells it) to LLVM's. Only what code for fp32 networks can gain from.
# Source: llvm/lib/Target/X86/X86.td and llvm/lib/Target/AArch64/AArch64Features.td; Linux's names as in
# arch/x86/include/asm/cpufeatures.h and Documentation/arch/arm64/elf_hwcaps.rst.
_X86 = {
    "ssse3": "ssse3",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "avx": "avx",
    "f16c": "f16c",
    "fma": "fma",
    "avx2": "avx2",
    "bmi1": "bmi",
    "bmi2": "bmi2",
    **{name: name for name in ("avx512f", "avx512cd", "avx512dq", "avx512bw", "avx512vl")},
}
_ARM = {"atomics": "lse", "asimdrdm": "rdm", "asimdhp": "fullfp16", "asimddp": "dotprod", "asimdfhm": "fp16fml"}
# Part of every 64-bit ARM processor that runs Linux, and of what LLVM assumes.
_ARM_ALWAYS = ("asimd", "fp")
# Code for scalable vectors has not been tried: it is never generated, also where the CPU's name would allow it.
_ARM_NEVER = ("sve", "sve2", "sme")

_HALF = {"x86_64": "f16c", "aarch64": "asimdhp"}
"""What half precision asks for: to convert it there, to compute with it here."""

_TRIPLES = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}
_CORE = re.compile(r"(cortex-[axr]\d+[a-z]*|neoverse-[nve]\d+)")
_NATIVE_COMPILERS = ("cc", "gcc", "clang")


@dataclass(frozen=True)
class TvmTarget:
    """What TVM generates code for.

    Attributes:
        architecture: As ``uname -m`` prints it.
        cpu: LLVM's name of the CPU, whose timings it schedules for.
        features: LLVM's switches, ``"+avx2"`` or ``"-sve"``; what the board has is on, all else of our list is off.
        isa: Flags that a board must have, as its probe tells them, sorted.
        model: Name of the processor as its probe tells it, ``"unknown"`` where that is not known: what schedules were timed on.
    """

    architecture: str
    cpu: str
    features: tuple[str, ...]
    isa: tuple[str, ...]
    model: str = "unknown"

    @property
    def triple(self) -> str:
        """GNU triple, which is also the prefix of the cross compiler's name."""
        return _TRIPLES[self.architecture]

    @property
    def llvm(self) -> dict[str, Any]:
        """As ``tvm.target.Target`` takes it. One core: kernels are timed on one thread, and untuned ones use no more."""
        return {
            "kind": "llvm",
            "mtriple": self.triple,
            "mcpu": self.cpu,
            "mattr": list(self.features),
            "num-cores": 1,
        }

    def require_half(self) -> None:
        """Refuse half precision where the processor has none of it.

        Raises:
            CompileError: Names what it lacks.
        """
        needed = _HALF[self.architecture]
        if needed not in self.isa:
            raise CompileError(
                f"a processor must have {needed} for engines in fp16, found {self.model} without.",
                hint="--precision fp32",
            )

    @property
    def runs_here(self) -> bool:
        """Whether this host can execute the code."""
        return self.architecture == platform.machine() and set(self.isa) <= set(host_isa())

    def linker(self) -> str:
        """Path of the C compiler that links for this target.

        Raises:
            CompileError: There is none on this host; the hint is how to get it.
        """
        native = self.architecture == platform.machine()
        names = (f"{self.triple}-gcc", f"{self.triple}-g++", *(_NATIVE_COMPILERS if native else ()))
        for name in names:
            path: str | None = shutil.which(name)
            if path is not None:
                return path
        package = "gcc" if native else f"gcc-{self.triple.replace('_', '-')}"
        raise CompileError(
            f"a C compiler for {self.architecture} must be on this host to link TVM's code, found none of {', '.join(names)}.",
            hint=f"apt-get install {package}",
        )


def target_of(device: Fingerprint | Mapping[str, Any] | None) -> TvmTarget:
    """The target of a board.

    Args:
        device: A probed board, the ``identity`` of one (see `Fingerprint.identity`), or None for this host.

    Raises:
        CompileError: TVM engines are not made for its architecture.
    """
    if device is None:
        return _target(platform.machine(), host_cpu_model(), host_isa())
    if isinstance(device, Fingerprint):
        return _target(device.architecture, device.cpu_model, device.isa)
    return _target(device["architecture"], str(device.get("cpu_model", "unknown")), device["isa"])


def _target(architecture: str, cpu_model: str, isa: Sequence[str]) -> TvmTarget:
    if architecture not in _TRIPLES:
        raise CompileError(
            f"TVM engines can be compiled for {' and '.join(sorted(_TRIPLES))}, found a board with {architecture}.",
            hint="--backend onnxruntime",
        )
    has = set(isa)
    if architecture == "x86_64":
        # The baseline CPU by name, everything else by flag, so that nothing is used that the board did not tell.
        needed = sorted(has & set(_X86))
        features = tuple(f"+{_X86[name]}" for name in needed)
        return TvmTarget(architecture, "x86-64", features, tuple(needed), cpu_model)
    switches = [f"{'+' if name in has else '-'}{llvm}" for name, llvm in sorted(_ARM.items())]
    switches += [f"-{name}" for name in _ARM_NEVER]
    needed = sorted((has & set(_ARM)) | set(_ARM_ALWAYS))
    return TvmTarget(architecture, _arm_cpu(cpu_model), tuple(switches), tuple(needed), cpu_model)


def _arm_cpu(cpu_model: str) -> str:
    """LLVM's name of a core: ``cortex-a72`` of ``Cortex-A72``; of a board with several kinds, none: code may run on any."""
    found = set(_CORE.findall(cpu_model.lower()))
    return str(found.pop()) if len(found) == 1 and " + " not in cpu_model else "generic"
