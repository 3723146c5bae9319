"""Costs that need no board, as sums of terms over widths: parameters and multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgeprune.allocation._base import Widths
from edgeprune.allocation.terms import CostTerm, Floats
from edgeprune.errors import UnsupportedKernelError
from edgeprune.graph.forms import SizeForm

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.lowering.kernel_graph import KernelGraph

_CONVOLUTIONS = frozenset({"Conv", "FusedConv", "QLinearConv"})
_PRODUCTS = frozenset({"Gemm", "FusedGemm", "MatMul", "FusedMatMul", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"})


class Parameters:
    """Number of parameters of a model at any widths; buffers do not count.

    Args:
        graph: From `edgeprune.trace`.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        axes = graph.size_forms()
        self.sizes = graph.widths()
        named = dict(graph.model.named_parameters())
        self.shapes = tuple(axes[name] for name in named if name in axes)
        self._gates = [_gate(name, axes[name], graph) for name in named if name in axes]
        # What is in no program cannot change.
        self.constant = sum(parameter.numel() for name, parameter in named.items() if name not in axes)

    def value(self, widths: Widths) -> float:
        """Parameters at these widths; groups left out are dense."""
        every = {**self.sizes, **widths}
        counted = (
            math.prod(form.at(every) for form in shape)
            for shape, gate in zip(self.shapes, self._gates, strict=True)
            if gate is None or gate.at(every)
        )
        return float(self.constant + sum(counted))

    def terms(self) -> list[CostTerm]:
        """One per parameter."""
        fixed = float(self.constant)
        return [
            CostTerm((), lambda: np.array(fixed)),
            *(
                product(shape) if gate is None else _gated(shape, gate)
                for shape, gate in zip(self.shapes, self._gates, strict=True)
            ),
        ]


class MultiplyAccumulates:
    """Multiply-accumulates of the convolutions and matrix products of a model at any widths, at the deployment batch.

    Args:
        kernel_graph: From `edgeprune.lower`.

    Raises:
        UnsupportedKernelError: The size of a tensor is no sum of widths and no product of two.
    """

    def __init__(self, kernel_graph: KernelGraph) -> None:
        self.sizes = kernel_graph.graph.widths()
        forms = kernel_graph.tensor_forms
        self._products: list[tuple[tuple[SizeForm, ...], float]] = []
        for operator in kernel_graph.operators.operators:
            name = operator.op.rpartition(".")[2]
            if name not in _CONVOLUTIONS and name not in _PRODUCTS:
                continue
            source, target = forms.get(operator.inputs[0], ()), forms.get(operator.outputs[0], ())
            sizes = [*target, source[1 if name in _CONVOLUTIONS else -1]] if source and target else [None]
            known = tuple(form for form in sizes if form is not None)
            if len(known) < len(sizes):
                raise UnsupportedKernelError(
                    f"multiply-accumulates need every size of {operator.op} {operator.name!r} as a form in widths, found "
                    "one that is none.",
                    hint="a budget of parameters or latency",
                )
            attributes = dict(operator.attributes)
            if name in _PRODUCTS:
                self._products.append((known, 1.0))
                continue
            groups, channels = int(attributes["groups"]), source[1]  # type: ignore[arg-type]
            area = float(math.prod(attributes["kernel"]))  # type: ignore[arg-type]
            depthwise = groups == kernel_graph.operators.shapes[operator.inputs[0]][1] > 1
            if depthwise and channels is not None and channels.terms:
                # As many groups as channels, however many are left: each output reads one.
                self._products.append((known[:-1], area))
            else:
                self._products.append((known, area / groups))

    def value(self, widths: Widths) -> float:
        """Multiply-accumulates at these widths; groups left out are dense."""
        every = {**self.sizes, **widths}
        return float(sum(factor * math.prod(form.at(every) for form in sizes) for sizes, factor in self._products))

    def terms(self) -> list[CostTerm]:
        """One per convolution and matrix product."""
        return [product(sizes, factor) for sizes, factor in self._products]


def _gate(name: str, shape: Sequence[SizeForm], graph: ChannelGraph) -> SizeForm | None:
    """The width that a parameter goes with although it has no axis of it: that of the branch that it lies in."""
    for branch in graph.branches:
        if name in branch.tensors:
            changing = [form for form in shape if form.terms]
            # A third size is more than a term can say: such a weight counts until its own groups are narrow.
            if len(changing) < 2 and not any(branch.lead in form.groups for form in changing):
                return SizeForm(0, (((branch.lead,), 1),))
    return None


def _gated(shape: Sequence[SizeForm], gate: SizeForm) -> CostTerm:
    """The term of a product of sizes, of which at most one changes with widths, that is 0 where another size is."""
    inner = product(shape)

    def at(width: npt.NDArray[np.int64], *sizes: npt.NDArray[np.int64]) -> Floats:
        return np.where(np.asarray(width) > 0, inner.at(*sizes), 0.0)

    return CostTerm((gate, *inner.forms), at)


def product(shape: Sequence[SizeForm], factor: float = 1.0) -> CostTerm:
    """The term of a product of sizes, of which at most two change with widths.

    Args:
        shape: The sizes.
        factor: What they are multiplied by.

    Raises:
        ConfigError: More than two of them change.
    """
    changing = tuple(form for form in shape if form.terms)
    constant = factor * math.prod(form.constant for form in shape if not form.terms)

    def at(*sizes: npt.NDArray[np.int64]) -> Floats:
        total = np.asarray(constant, dtype=np.float64)
        for size in sizes:
            total = total * size
        return total

    return CostTerm(changing, at)
