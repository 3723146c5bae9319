"""Whether times can be those of any device: what they would make it compute, or move, in a second."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from edgeprune.latency.features import Machine, features
from edgeprune.spec import Kernel

HIGHEST_RATES: Mapping[str, float] = {"fp32": 1.25e15, "fp16": 2.5e15, "int8": 5e15}
"""Precision to the multiply-accumulates per second that no single device reaches: about twice what the fastest accelerators of
2025 are said to reach on dense operands (1.2, 2.5 and 5 PFLOP/s), fp32 as their tensor units round it. Twice, since structured
sparsity and Winograd's transform leave multiplications out."""

LARGE_RATES: Mapping[str, float] = {"fp32": 5e13, "fp16": 1.5e14, "int8": 3e14}
"""Precision to the multiply-accumulates per second that only large accelerators reach: 100, 300 and 600 TFLOP/s."""

LOWEST_RATE = 1e4
"""Median multiply-accumulates per second below which a table cannot be in the stated unit: a hundredth of a slow
microcontroller's rate."""

SMALL_RATE = 5e8
"""Multiply-accumulates per second that the best kernels of any device but a microcontroller surpass: 1 GFLOP/s."""

MULTIPROCESSOR_RATE = 1.2e9
"""The same per multiprocessor of a GPU: 2 % of 64 lanes at 1 GHz, the least that GPUs have had since 2014."""

QUICK_MS = 1e-3
"""Runtimes take longer than this to start a kernel, milliseconds."""

_LONGER, _SHORTER = {"ms": "s", "us": "ms"}, {"s": "ms", "ms": "us", "us": "ns"}
_WORDS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


class ImpossibleRate(NamedTuple):
    """Times that no device can have.

    Attributes:
        text: What they must be and what was found, after "times that a device can".
        unit: What they are likely to be in, ``s`` or ``us``, where they are taken for milliseconds.
    """

    text: str
    unit: str


class Achieved(NamedTuple):
    """What kernels take, and what a device does meanwhile; each from the least to the most.

    Attributes:
        ms: Milliseconds.
        gflops: 1e9 floating-point operations per second, two to a multiply-accumulate, of convolutions and products.
        gigabytes: 1e9 bytes per second to and from memory, of all other kernels.
    """

    ms: tuple[float, float]
    gflops: tuple[float, float] | None
    gigabytes: tuple[float, float] | None

    def __str__(self) -> str:
        parts = [f"times of {_range(self.ms)} ms"]
        if self.gflops is not None:
            parts.append(f"convolutions and products at {_range(self.gflops)} GFLOP/s")
        if self.gigabytes is not None:
            parts.append(f"{'other kernels' if self.gflops else 'kernels'} at {_range(self.gigabytes)} GB/s")
        return ", ".join(parts)


def achieved(times_ms: Mapping[Kernel, Sequence[float]]) -> Achieved:
    """What kernels take and achieve.

    Args:
        times_ms: Kernel to all of its times, milliseconds; at least one of one.
    """
    multiplying = {kernel: times for kernel, times in times_ms.items() if _multiplies(kernel)}
    moving = {kernel: times for kernel, times in times_ms.items() if kernel not in multiplying}
    every = [ms for times in times_ms.values() for ms in times]
    return Achieved((min(every), max(every)), _rates(multiplying, "log_macs", 2.0), _rates(moving, "log_bytes", 1.0))


def impossible_rate(times_ms: Mapping[Kernel, float]) -> ImpossibleRate | None:
    """What is impossible about times of convolutions and matrix products; None where they can be.

    Args:
        times_ms: Kernel to its shortest time, milliseconds; other kernels do not multiply, and are not looked at.
    """
    kernels = [kernel for kernel in times_ms if _multiplies(kernel)]
    if not kernels:
        return None
    macs = _amounts(kernels, "log_macs")
    rates = [work / (times_ms[kernel] * 1e-3) for work, kernel in zip(macs, kernels, strict=True)]
    fastest = max(range(len(rates)), key=lambda place: rates[place] / HIGHEST_RATES[kernels[place].precision])
    if rates[fastest] > HIGHEST_RATES[kernels[fastest].precision]:
        return ImpossibleRate(
            f"reach, found {times_ms[kernels[fastest]]:g} ms for {macs[fastest]:.3g} multiply-accumulates in "
            f"{kernels[fastest].precision} ({rates[fastest]:.1e} per second)",
            "s",
        )
    middle = sorted(rates)[len(rates) // 2]
    if middle < LOWEST_RATE:
        return ImpossibleRate(
            f"have, found {middle:.1e} multiply-accumulates per second in the middle of its rows", "us"
        )
    return None


def doubts(times_ms: Mapping[Kernel, float], unit: str, multiprocessors: int = 0) -> Iterator[str]:
    """What is odd about times that can be, a sentence each; a wrong unit is the likeliest cause.

    Args:
        times_ms: Kernel to its shortest time, milliseconds.
        unit: That they were read in: ``s``, ``ms`` or ``us``.
        multiprocessors: Of a GPU; 0 where it is none, or it is not known.
    """
    kernels = [kernel for kernel in times_ms if _multiplies(kernel)]
    macs = _amounts(kernels, "log_macs")
    rates = {kernel: work / (times_ms[kernel] * 1e-3) for work, kernel in zip(macs, kernels, strict=True)}
    if rates:
        best = max(rates.values())
        if best < max(SMALL_RATE, MULTIPROCESSOR_RATE * multiprocessors):
            others = f"a GPU of {multiprocessors} multiprocessors" if multiprocessors else "any but a microcontroller"
            yield (
                f"the best convolution or product achieves {_number(2e-9 * best)} GFLOP/s, which {others} "
                f"surpasses{_asked(unit, _SHORTER)}"
            )
        kernel = max(rates, key=lambda one: rates[one] / LARGE_RATES[one.precision])
        if rates[kernel] > LARGE_RATES[kernel.precision]:
            yield (
                f"the best convolution or product achieves {_number(2e-9 * rates[kernel])} GFLOP/s in {kernel.precision}, which "
                f"none but the largest accelerators reach{_asked(unit, _LONGER)} Or are there rows of another kind of kernel "
                "(where, --where)?"
            )
            return
    middle = statistics.median(times_ms.values())
    if middle < QUICK_MS:
        yield (
            f"half of the kernels take {_number(1e3 * middle)} microseconds or less, which is shorter than runtimes take to "
            f"start one{_asked(unit, _LONGER)}"
        )


def _asked(unit: str, others: Mapping[str, str]) -> str:
    other = others.get(unit)
    if other is None:
        return "."
    option = f" (latency_{other}, --latency-{other})" if other != "ns" else ""
    return f": are these {_WORDS[unit]}, or {_WORDS[other]}{option}?"


def _multiplies(kernel: Kernel) -> bool:
    return kernel.family in ("conv", "gemm")


def _amounts(kernels: Sequence[Kernel], column: str) -> list[float]:
    if not kernels:
        return []
    return [math.exp(float(value)) for value in features(kernels, Machine()).column(column)]


def _rates(times_ms: Mapping[Kernel, Sequence[float]], column: str, weight: float) -> tuple[float, float] | None:
    amounts = _amounts(list(times_ms), column)
    rates = [
        weight * amount / (ms * 1e6)
        for amount, times in zip(amounts, times_ms.values(), strict=True)
        for ms in (min(times), max(times))
    ]
    return (min(rates), max(rates)) if rates else None


def _range(ends: tuple[float, float]) -> str:
    low, high = map(_number, ends)
    return low if low == high else f"{low} to {high}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
