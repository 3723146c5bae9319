"""TVM's fused functions as kernels, and kernels as networks of a few ONNX nodes.

A kernel's attribute ``body`` is the canonical text of everything that the function computes: its nodes, how they are wired, and
the shape of every value. Equal bodies are equal functions, and a body is enough to compile the function again by itself. The
attributes beside it are those of the node that does the work, under the names that the predictor knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgeprune.backends._base import Operator, OperatorGraph
from edgeprune.backends.onnxruntime.operators import VIEWS, base, family, input_dtypes, output_dtype, resized
from edgeprune.errors import UnsupportedKernelError
from edgeprune.spec import AttributeValue, Kernel, Precision, TensorSpec

Shape = tuple[int, ...]

# Whose node names a function that computes several: the first family in this order.
_WORK = ("conv", "gemm", "pool", "reduce", "softmax", "norm", "other", "concat", "layout", "elementwise")
_ACTIVATIONS = frozenset(
    {"Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Selu", "Softplus", "Gelu"}
)


def kernels(
    graph: OperatorGraph, shapes: Mapping[str, Shape], groups: Sequence[Sequence[str]], precision: Precision = "fp32"
) -> list[Kernel | None]:
    """The kernel of each group of operators, None for a group that only views memory in another shape, and for an empty one.

    Args:
        graph: Operators before fusion.
        shapes: Tensor name to shape.
        groups: Names of the operators that one function computes, function by function.
        precision: That they are computed in.
    """
    by_name = {operator.name: operator for operator in graph.operators}
    readers: dict[str, set[str]] = {}
    for operator in graph.operators:
        for tensor in operator.inputs:
            readers.setdefault(tensor, set()).add(operator.name)
    found: list[Kernel | None] = []
    for names in groups:
        members = [by_name[name] for name in names]
        if all(_is_view(member, shapes) for member in members):
            found.append(None)
            continue
        inside = set(names)
        left = [
            tensor
            for member in members
            for tensor in member.outputs
            if tensor in graph.outputs or not readers.get(tensor, set()) <= inside or tensor not in readers
        ]
        found.append(_kernel(members, left, graph, shapes, precision))
    return found


def graph_of(kernel: Kernel) -> OperatorGraph:
    """The kernel as a network of its own.

    Raises:
        UnsupportedKernelError: It is not one of this backend's.
    """
    text = kernel.attribute("body")
    if not isinstance(text, str):
        raise UnsupportedKernelError(
            f"a TVM kernel must say what it computes in its attribute 'body', found none in {kernel.op}.",
            hint="edgeprune profile --backend tvm",
        )
    body: dict[str, Any] = json.loads(text)
    shapes: dict[str, Shape] = {name: tuple(shape) for name, shape in body["shapes"].items()}
    operators = tuple(
        Operator(
            name=f"operator{index}",
            op=node["op"],
            inputs=tuple(node["inputs"]),
            outputs=tuple(node["outputs"]),
            attributes=tuple(
                (name, tuple(value) if isinstance(value, list) else value) for name, value in node["with"]
            ),
        )
        for index, node in enumerate(body["nodes"])
    )
    dtypes: dict[str, str] = {}
    for operator in operators:
        for name, dtype in zip(operator.inputs, input_dtypes(operator), strict=True):
            dtypes.setdefault(name, dtype)
        dtypes |= dict.fromkeys(operator.outputs, output_dtype(operator))
    return OperatorGraph(
        operators=operators,
        inputs=tuple(TensorSpec(name, shapes[name], dtypes.get(name, "float32")) for name in body["inputs"]),
        outputs=tuple(body["outputs"]),
        shapes=shapes,
        sources={},
        dtypes={name: dtype for name, dtype in dtypes.items() if dtype != "float32"},
    )


def _kernel(
    members: Sequence[Operator],
    left: Sequence[str],
    graph: OperatorGraph,
    shapes: Mapping[str, Shape],
    precision: Precision,
) -> Kernel:
    anchor = min(members, key=lambda member: _WORK.index(family(member.op)))
    attributes = {member.name: resized(member, graph, shapes) for member in members}
    made = {tensor for member in members for tensor in member.outputs}
    read = dict.fromkeys(
        tensor for member in (anchor, *members) for tensor in member.inputs if tensor not in made and tensor in shapes
    )
    short = {tensor: f"i{index}" for index, tensor in enumerate(read)}
    short |= {tensor: f"t{index}" for index, tensor in enumerate(t for member in members for t in member.outputs)}
    body = {
        "inputs": [short[tensor] for tensor in read],
        "outputs": [short[tensor] for tensor in left],
        "nodes": [
            {
                "op": member.op,
                "inputs": [short[tensor] for tensor in member.inputs],
                "outputs": [short[tensor] for tensor in member.outputs],
                "with": sorted(attributes[member.name].items()),
            }
            for member in members
        ],
        "shapes": {name: shapes[tensor] for tensor, name in short.items() if tensor in shapes},
    }
    told: dict[str, AttributeValue] = dict(attributes[anchor.name])
    if family(anchor.op) == "conv":
        told["activation"] = next((base(member.op) for member in members if base(member.op) in _ACTIVATIONS), "")
        told["residual"] = any(base(member.op) == "Add" and len(member.inputs) > 1 for member in members)
    told["body"] = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return Kernel(
        op="+".join(member.op for member in members),
        family=family(anchor.op),
        inputs=tuple(shapes[tensor] for tensor in read),
        output=shapes[left[-1]],
        attributes=tuple(sorted(told.items())),
        precision=precision,
    )


def _is_view(operator: Operator, shapes: Mapping[str, Shape]) -> bool:
    """Whether an operator leaves every element where it is in memory: then TVM passes its input on.

    A transposition does so where the axes longer than 1 keep their order, e.g. of attention with a single head.
    """
    if base(operator.op) != "Transpose":
        return base(operator.op) in VIEWS
    shape = shapes[operator.inputs[0]]
    order = dict(operator.attributes).get("perm", tuple(reversed(range(len(shape)))))
    long = [axis for axis in order if shape[int(axis)] > 1]  # type: ignore[union-attr]
    return long == sorted(long)


def as_json(graph: OperatorGraph) -> dict[str, Any]:
    """For the description behind an engine."""
    return {
        "operators": [
            [operator.name, operator.op, operator.inputs, operator.outputs, operator.attributes]
            for operator in graph.operators
        ],
        "inputs": [[spec.name, spec.shape, spec.dtype] for spec in graph.inputs],
        "outputs": graph.outputs,
        "shapes": dict(graph.shapes),
        "sources": dict(graph.sources),
        "dtypes": dict(graph.dtypes),
    }


def from_json(fields: Mapping[str, Any]) -> OperatorGraph:
    """What `as_json` wrote, read from JSON."""
    return OperatorGraph(
        operators=tuple(
            Operator(
                name,
                op,
                tuple(inputs),
                tuple(outputs),
                tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in attributes),
            )
            for name, op, inputs, outputs, attributes in fields["operators"]
        ),
        inputs=tuple(TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in fields["inputs"]),
        outputs=tuple(fields["outputs"]),
        shapes={name: tuple(shape) for name, shape in fields["shapes"].items()},
        sources=dict(fields["sources"]),
        dtypes=dict(fields["dtypes"]),
    )
