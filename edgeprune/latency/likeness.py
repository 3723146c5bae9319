"""Which model a network is a pruned version of, told by what pruning leaves as it is.

Pruning changes channel counts, and with them the copies between layouts and what a runtime fuses; products,
convolutions and pools, their windows and the sizes of their images stay. So networks of one model have almost the same
skeleton, whatever their widths, and a table need not state which model each came from: merged and imported tables group
themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from edgeprune.spec import Kernel

Skeleton = Counter[tuple[object, ...]]

ALIKE = 0.8
"""Least likeness of two networks that count as one model."""

_LEFT_OUT = frozenset({"layout", "elementwise", "concat", "other"})
_BATCH_AND_CHANNELS = 2


def skeleton(kernels: Mapping[Kernel, int] | Iterable[Kernel]) -> Skeleton:
    """Kernels without their channels, with how often the network runs each; what fusing may hide is left out."""
    found: Skeleton = Counter()
    for kernel, count in Counter(kernels).items():
        if kernel.family not in _LEFT_OUT:
            found[bone(kernel)] += count
    return found


@lru_cache(maxsize=100_000)
def bone(kernel: Kernel) -> tuple[object, ...]:
    """What pruning leaves of one kernel."""
    # Of an image its height and width, of a sequence or a matrix all but the last axis, which holds the channels.
    shape = kernel.output
    sizes = shape[_BATCH_AND_CHANNELS:] if len(shape) > _BATCH_AND_CHANNELS + 1 else shape[:-1]
    return kernel.family, sizes, kernel.attribute("kernel"), kernel.attribute("stride"), kernel.precision


def likeness(first: Skeleton, second: Skeleton) -> float:
    """Share of kernels that two networks have in common, from 0 to 1 (the Jaccard index of multisets)."""
    either = (first | second).total()
    return (first & second).total() / either if either else 0.0


def nearest(wanted: Skeleton, known: Sequence[Skeleton]) -> int | None:
    """Place of the skeleton that is most like `wanted`, or None where none reaches `ALIKE`."""
    shares = [likeness(wanted, candidate) for candidate in known]
    best = max(range(len(shares)), key=lambda place: shares[place], default=None)
    return best if best is not None and shares[best] >= ALIKE else None


def grouped(skeletons: Sequence[Skeleton]) -> list[list[int]]:
    """Places of networks that are of one model, in order of each model's first network."""
    groups: list[list[int]] = []
    for place, wanted in enumerate(skeletons):
        found = nearest(wanted, [skeletons[group[0]] for group in groups])
        if found is None:
            groups.append([place])
        else:
            groups[found].append(place)
    return groups
