"""Where ONNX Runtime moves a transpose, and whether a matrix product takes it in: against the runtime itself."""

from __future__ import annotations

import itertools

import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgeprune.backends.onnxruntime import engines
from edgeprune.backends.onnxruntime.transposes import moved, permutation, split, taken_in


@pytest.mark.parametrize(
    ("order", "sizes", "target", "shape", "permutation"),
    [
        # An attention of six heads, and of one: batch and heads were one axis.
        ((0, 2, 1), (6, 32, 36), (1, 6, 32, 36), (1, 6, 36, 32), (0, 1, 3, 2)),
        ((0, 2, 1), (1, 19, 36), (1, 1, 19, 36), (1, 36, 1, 19), (0, 2, 3, 1)),
        ((0, 2, 1), (1, 1, 36), (1, 1, 1, 36), (1, 1, 36, 1), (0, 3, 1, 2)),
        # The same where tokens come first, as in torch's own encoder layer.
        ((1, 2, 0), (4, 8, 11), (1, 4, 8, 11), (11, 1, 4, 8), (1, 2, 3, 0)),
        ((1, 2, 0), (1, 8, 11), (1, 1, 8, 11), (11, 1, 1, 8), (1, 2, 3, 0)),
        ((1, 0, 2), (1, 11, 8), (1, 1, 11, 8), (1, 11, 1, 8), (2, 0, 1, 3)),
    ],
)
def test_a_transpose_ends_up_behind_the_reshape(order, sizes, target, shape, permutation):
    assert moved(order, sizes, target) == (shape, permutation)


def test_what_a_reshape_does_not_split_is_not_moved():
    assert split((6, 4), (4, 6)) is None
    assert split((6, 4), (2, 3, 2, 2)) == (2, 2)
    assert split((6,), (6, 1, 1)) == (3,)
    assert moved((1, 0), (6, 4), (4, 6)) is None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 3), min_size=4, max_size=4), st.sampled_from([(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 1, 0)])
)
def test_the_runtime_moves_it_there(target, order):
    """Lengths from 1 to 3, so most cases have axes of length one or of equal length.

    All 324 were tried with ONNX Runtime 1.31.1: it is right but where one head has one dimension and one token.
    """
    target = tuple(target)
    assume(target[1:] != (1, 1, 1))
    sizes = (target[0] * target[1], *target[2:])
    source = [0] * 3
    for axis, size in zip(order, sizes, strict=True):
        source[axis] = size
    nodes = _optimized(tuple(source), order, target)
    _, turn = moved(order, sizes, target)
    product = next(node for node in nodes if node.op_type == "FusedMatMul")
    flags = {entry.name: helper.get_attribute_value(entry) for entry in product.attribute}
    assert (flags["transB"], flags["transBatchB"]) == (taken_in(turn) or (0, 0))
    left = [tuple(node.attribute[0].ints) for node in nodes if node.op_type == "Transpose"]
    assert left == ([] if taken_in(turn) else [turn])


def _optimized(source, order, target):
    def tensor(name, shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    scale = helper.make_tensor("scale", TensorProto.FLOAT, [1], [0.5])
    shape = helper.make_tensor("shape", TensorProto.INT64, [len(target)], target)
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("Transpose", ["r"], ["t"], name="turn", perm=order),
        helper.make_node("Reshape", ["t", "shape"], ["s"], name="split"),
        helper.make_node("Mul", ["s", "scale"], ["k"], name="scaled"),
        helper.make_node("MatMul", ["q", "k"], ["y"], name="product"),
    ]
    left = (*target[:2], 5, target[2])
    graph = helper.make_graph(
        nodes, "g", [tensor("x", source), tensor("q", left)], [tensor("y", (*left[:3], target[3]))], [scale, shape]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return engines.optimized(model.SerializeToString(), "ALL").graph.node


def test_flags_and_permutations_are_two_names_of_one_thing():
    for rank in (2, 3, 4, 5):
        for flags in itertools.product((0, 1), repeat=2):
            if rank > 2 or not flags[1]:
                assert taken_in(permutation(*flags, rank)) == flags
    assert taken_in((0, 2, 3, 1)) is None
    assert taken_in((2, 0, 1, 3)) is None
