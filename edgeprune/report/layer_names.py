"""Which layer of the model a kernel computes, as a person would name it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeprune.graph.capture import module_path

if TYPE_CHECKING:
    import torch

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.spec import Kernel

_CONTRACTIONS = ("conv", "linear", "mm", "matmul", "addmm", "bmm")
_CONTRACTING_FAMILIES = ("conv", "gemm")


class LayerNames:
    """Names for the kernels of one model.

    A fused kernel knows the nodes at its end (the last activation, say), not the convolution in its middle; so the program
    is walked back from there to the contraction, but not into what other kernels compute.

    Args:
        graph: The traced model.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._nodes: dict[str, torch.fx.Node] = {node.name: node for node in graph.program.graph_module.graph.nodes}

    def contractions(self, kernels: Sequence[Kernel]) -> list[str | None]:
        """Node of the convolution or matrix product that each kernel computes; None for others, or where none is found."""
        ends = {name for kernel in kernels for name in kernel.origin}
        return [
            self._walk_back(kernel, ends - set(kernel.origin)) if kernel.family in _CONTRACTING_FAMILIES else None
            for kernel in kernels
        ]

    def names(self, kernels: Sequence[Kernel]) -> list[str]:
        """Module path of each kernel's layer; for what has none, the node, or what it is."""
        return [self._name(kernel, node) for kernel, node in zip(kernels, self.contractions(kernels), strict=True)]

    def _walk_back(self, kernel: Kernel, others: set[str]) -> str | None:
        waiting = [name for name in kernel.origin if name in self._nodes]
        seen = set(waiting)
        while waiting:
            node = self._nodes[waiting.pop(0)]
            if node.op == "call_function" and _operation(node) in _CONTRACTIONS:
                return node.name
            for before in node.all_input_nodes:
                if before.op == "call_function" and before.name not in others and before.name not in seen:
                    seen.add(before.name)
                    waiting.append(before.name)
        return None

    def _name(self, kernel: Kernel, contraction: str | None) -> str:
        if contraction is not None:
            return module_path(self._nodes[contraction]) or contraction
        for name in kernel.origin:
            if name in self._nodes:
                label = module_path(self._nodes[name]) or name
                return f"layout change at {label}" if kernel.family == "layout" else f"{label} ({kernel.family})"
        return f"{kernel.family} ({kernel.op})"


def _operation(node: torch.fx.Node) -> str:
    """``"conv"`` of ``aten.conv2d.default`` and of ``aten._convolution.default``."""
    name = str(node.target).removeprefix("aten.").partition(".")[0].lstrip("_")
    return "conv" if name.startswith("conv") else name
