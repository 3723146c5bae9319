"""Which slices of the traced program are those of a runtime's graph: they take the same positions of the same tensor.

An exporter takes operations apart that the traced program consists of, and the tracing takes others apart (`tensor_split` into
slices): what both then call ``slice_1`` need not be the same. Where a piece begins and ends tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise

from torch.fx import Graph

from edgeprune.backends._base import Operator
from edgeprune.graph.rules._base import named_arguments

Shape = tuple[int, ...]
Piece = tuple[str, int, int, int]
"""Name of what is cut up, axis, begin and end."""

_SLICES = frozenset({"aten.slice.Tensor", "aten.narrow.default"})


def slices_of(program: Graph, dense: Mapping[str, Shape]) -> dict[Piece, str]:
    """Per piece that the program slices out, step by step, the first node that does.

    Args:
        program: The traced one.
        dense: Shape of each of its nodes.
    """
    found: dict[Piece, str] = {}
    for node in program.nodes:
        if str(node.target) not in _SLICES:
            continue
        given = named_arguments(node)
        whole, begin, dim = given["self"].name, given["start"], int(given["dim"])
        if whole in dense and node.name in dense and given.get("step", 1) == 1 and isinstance(begin, int | None):
            first = slice(begin, None).indices(dense[whole][dim])[0]
            piece = (whole, dim % len(dense[whole]), first, first + dense[node.name][dim])
            found.setdefault(piece, node.name)
    return found


def pieces_of(operator: Operator, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Piece]]:
    """The outputs of a ``Split``, or that of a ``Slice`` of one axis step by step, and which piece of its input each is.

    Args:
        operator: Any; of others there is none.
        shapes: Of the dense graph's tensors.
    """
    if operator.op not in ("Split", "Slice") or any(
        name not in shapes for name in (operator.inputs[0], *operator.outputs)
    ):
        return
    attributes, whole = dict(operator.attributes), operator.inputs[0]
    start, _, axes, step = (attributes.get(f"operand{place}") for place in range(1, 5))
    if operator.op == "Split":
        dim, first = int(attributes.get("axis", 0)), 0  # type: ignore[arg-type]
    elif isinstance(start, tuple) and isinstance(axes, tuple) and len(axes) == 1 and step in (None, (1,)):
        dim = int(axes[0])
        first = slice(int(start[0]), None).indices(shapes[whole][dim])[0]
    else:
        return
    places = accumulate((shapes[name][dim] for name in operator.outputs), initial=first)
    for name, (begin, end) in zip(operator.outputs, pairwise(places), strict=True):
        yield name, (whole, dim % len(shapes[whole]), begin, end)
