"""The table of allocators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.extensions import Extensions

if TYPE_CHECKING:
    from edgeprune.allocation._base import Allocator

ALLOCATORS: Extensions[Allocator] = Extensions(
    "an allocator",
    "edgeprune.allocation",
    {
        "blockdrop": "edgeprune.allocation.blockdrop:BlockDrop",
        "exact": "edgeprune.allocation.exact:Exact",
        "global_threshold": "edgeprune.allocation.global_threshold:GlobalThreshold",
        "greedy": "edgeprune.allocation.greedy:Greedy",
        "knapsack": "edgeprune.allocation.knapsack:Knapsack",
        "uniform": "edgeprune.allocation.uniform:Uniform",
    },
)
names, get = ALLOCATORS.names, ALLOCATORS.make
