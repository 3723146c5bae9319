"""A runtime's graph in which a convolution slides over channels that are gone: what a cut program does around it.

Channels that stay keep their distances (`edgeprune.graph.places`): a ``Pad`` adds a zero, a ``Gather`` puts every channel in its
place, the convolution runs at its dense length, and another ``Gather`` picks those that stay. An activation that the runtime has
fused into the convolution comes behind that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from edgeprune.backends._base import Operator, OperatorGraph
from edgeprune.spec import AttributeValue

Shape = tuple[int, ...]

_CONVOLUTIONS = ("Conv", "FusedConv", "QLinearConv", "microsoft.QLinearConv")

_SETTINGS = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "Clip": ("operand1", "operand2")}
"""What the numbers of a fused activation are when it stands alone."""


def with_places(
    graph: OperatorGraph, shapes: Mapping[str, Shape], convolutions: Iterable[Operator]
) -> tuple[OperatorGraph, dict[str, Shape]]:
    """Put in what a cut program does around some convolutions.

    Args:
        graph: Before layouts are chosen.
        shapes: Tensor name to shape of the candidate.
        convolutions: Operators of the graph whose last axis has lost channels at these shapes.
    """
    names = {operator.name for operator in convolutions}
    dense, sizes = dict(graph.shapes), dict(shapes)
    sources, dtypes = dict(graph.sources), dict(graph.dtypes)
    operators: list[Operator] = []
    for operator in graph.operators:
        if operator.name not in names:
            operators.append(operator)
            continue
        source, result = operator.inputs[0], operator.outputs[0]
        axis, length = len(dense[source]) - 1, dense[source][-1]

        def tensor(part: str, like: str, long: int, wide: int, operator: Operator = operator) -> str:
            """A new tensor, like another one but for its last axis: so long in the dense model, so wide in the candidate."""
            name = f"{operator.name}_{part}"
            dense[name], sizes[name] = (*dense[like][:-1], long), (*sizes[like][:-1], wide)
            sources[name] = graph.sources.get(operator.outputs[0], operator.outputs[0])
            return name

        def index(part: str, wide: int, operator: Operator = operator, length: int = length) -> str:
            name = f"{operator.name}_{part}"
            dense[name], sizes[name], dtypes[name] = (length,), (wide,), "int64"
            return name

        def add(op: str, inputs: tuple[str, ...], output: str, **attributes: AttributeValue) -> str:
            operators.append(Operator(f"{output}_{op}", op, inputs, (output,), tuple(sorted(attributes.items()))))
            return output

        left = sizes[source][-1]
        pads = (*[0] * len(dense[source]), *[0] * axis, 1)
        found = tensor("padded", source, length + 1, left + 1)
        add("Pad", (source,), found, mode="constant", operand1=pads, operand2=0.0)
        found = add("Gather", (found, index("places", length)), tensor("placed", source, length, length), axis=axis)
        attributes = dict(operator.attributes)
        activation = str(attributes.pop("activation", ""))
        settings = attributes.pop("activation_params", ())
        slid = tensor("slid", result, length, length)
        plain = {**attributes, "activation": "", "residual": False}
        operators.append(Operator(operator.name, "Conv", (found,), (slid,), tuple(sorted(plain.items()))))
        steps: list[tuple[str, tuple[str, ...], dict[str, AttributeValue]]] = [
            ("Gather", (index("left", left),), {"axis": axis})
        ]
        if len(operator.inputs) > 1:
            steps.append(("Add", (operator.inputs[1],), {}))
        if activation:
            values = settings if isinstance(settings, tuple) else (settings,)
            steps.append((activation, (), dict(zip(_SETTINGS.get(activation, ()), values, strict=False))))
        found = slid
        for step, (op, others, own) in enumerate(steps):
            output = result if step == len(steps) - 1 else tensor(f"step{step}", result, length, left)
            found = add(op, (found, *others), output, **own)
    return replace(graph, operators=tuple(operators), shapes=dense, sources=sources, dtypes=dtypes), sizes


def sliding(graph: OperatorGraph) -> tuple[Operator, ...]:
    """Convolutions along one axis that read neighbors, and whose results have the places of what they read."""
    found = []
    for operator in graph.operators:
        attributes = dict(operator.attributes)
        kernel = attributes.get("kernel")
        if (
            operator.op in _CONVOLUTIONS
            and isinstance(kernel, tuple)
            and len(kernel) == 1
            and kernel != (1,)
            and graph.shapes[operator.inputs[0]][-1] == graph.shapes[operator.outputs[0]][-1]
            and attributes.get("stride", (1,)) == (1,)
        ):
            found.append(operator)
    return tuple(found)
