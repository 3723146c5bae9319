"""A model in half precision whose inputs and outputs stay what they are."""

from __future__ import annotations

import onnx


def in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and activations of a float model made fp16, with casts behind its inputs and before its outputs.

    Nodes keep their names; what has no form in fp16 stays in float, between casts.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    found: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True)
    _sort(found.graph)
    return found


def _sort(graph: onnx.GraphProto) -> None:
    """Put nodes into an order in which they can run, as close to theirs as can be.

    The conversion to fp16 appends the casts of the inputs at the end (seen with ONNX Runtime 1.31.1).
    """
    known = {"", *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    waiting, ordered = list(graph.node), []
    while waiting:
        late = []
        for node in waiting:
            if known.issuperset(node.input):
                ordered.append(node)
                known.update(node.output)
            else:
                late.append(node)
        if len(late) == len(waiting):
            # No order exists; the checker says what is missing.
            ordered += late
            break
        waiting = late
    del graph.node[:]
    graph.node.extend(ordered)
