"""ONNX Runtime's graph of a model some linear layers of which are computed from tiles.

Follows `edgeprune.surgery.block_sparse` operation by operation: a ``Split`` of the input, or slices; per product a ``Concat``
and a ``MatMul``; a ``Concat`` of the outputs; the bias. What the runtime then does to them was seen in ONNX Runtime 1.31.1 and
is tested on random tiles: equal operations on equal inputs are one, slices that cut up a tensor are one split, a bias goes into
the normalization behind it, what nobody reads is not there, and a product whose bias is added behind a ``Concat`` stays a
``MatMul``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgeprune.backends._base import Operator, OperatorGraph
from edgeprune.errors import UnsupportedKernelError
from edgeprune.spec import AttributeValue
from edgeprune.surgery.tile_layout import TileLayout

Shape = tuple[int, ...]
_NORM = "SkipLayerNormalization"


def tiled(
    graph: OperatorGraph, shapes: Mapping[str, Shape], layouts: Mapping[str, TileLayout]
) -> tuple[OperatorGraph, dict[str, Shape]]:
    """See `edgeprune.backends._base.Backend.tiled`."""
    work = _Work(graph, shapes)
    made = {
        graph.sources.get(operator.outputs[0], operator.outputs[0]): at for at, operator in enumerate(graph.operators)
    }
    # What two layers share is computed where the first of them is.
    for node in sorted(layouts, key=lambda node: made.get(node, -1)):
        work.replace(node, layouts[node])
    return work.finished()


class _Work:
    def __init__(self, graph: OperatorGraph, shapes: Mapping[str, Shape]) -> None:
        self._graph = graph
        self._shapes = dict(shapes)
        self._new: dict[str, Shape] = {}
        self._operators = list(graph.operators)
        self._made: dict[tuple[object, ...], tuple[str, ...]] = {}
        self._sources = dict(graph.sources)

    def finished(self) -> tuple[OperatorGraph, dict[str, Shape]]:
        """Without what nobody reads any more, and with one split where slices cut a tensor up."""
        self._join_slices()
        needed, left = set(self._graph.outputs), []
        for operator in reversed(self._operators):
            if not needed.isdisjoint(operator.outputs):
                needed.update(operator.inputs)
                left.append(operator)
        graph = replace(
            self._graph,
            operators=tuple(reversed(left)),
            shapes={**self._graph.shapes, **self._new},
            sources=self._sources,
        )
        return graph, self._shapes | self._new

    def _join_slices(self) -> None:
        groups: dict[str, list[Operator]] = {}
        for operator in self._operators:
            if operator.op == "Slice" and operator.outputs[0] in self._new:
                groups.setdefault(operator.inputs[0], []).append(operator)
        for name, slices in groups.items():
            ranges = {_range(operator): operator for operator in slices}
            edges = [edge for piece in sorted(ranges) for edge in piece]
            axis = len(self._shapes[name]) - 1
            if (
                len(slices) < 2
                or edges[0] != 0
                or edges[-1] != self._shapes[name][axis]
                or edges[1:-1:2] != edges[2::2]
            ):
                continue
            outputs = tuple(ranges[piece].outputs[0] for piece in sorted(ranges))
            sizes: AttributeValue = tuple(end - begin for begin, end in sorted(ranges))
            attributes = (("axis", axis), ("operand1", sizes))
            at = self._operators.index(slices[0])
            self._operators[at] = Operator(f"{slices[0].name}_split", "Split", (name,), outputs, attributes)
            self._operators = [operator for operator in self._operators if operator not in slices[1:]]

    def replace(self, node: str, layout: TileLayout) -> None:
        """Compute the layer that a node of the program calls from its tiles."""
        at, x, biased = self._layer(node)
        result = self._operators[at].outputs[0]
        readers = [index for index, operator in enumerate(self._operators) if result in operator.inputs]
        norm = next((index for index in readers if self._operators[index].op == _NORM), -1)
        into_norm = biased and len(readers) == 1 and norm >= 0 and len(self._operators[norm].inputs) == 4
        made = self._products(node, x, layout)
        last = made[-1] if made else None
        if biased and not into_norm and last is not None:
            before = f"{node}_tiles"
            self._declare(before, self._shapes[result], node)
            made[-1] = replace(last, outputs=(before,))
            bias = self._declare(f"{node}_bias", (layout.out_features,), node)
            made.append(Operator(f"{node}_bias_sum", "Add", (before, bias), (result,), ()))
        elif last is not None:
            made[-1] = replace(last, outputs=(result,))
        if into_norm:
            old = self._operators[norm]
            bias = self._declare(f"{node}_bias", (layout.out_features,), node)
            self._operators[norm] = replace(old, inputs=(*old.inputs, bias))
        # Without any product the result is a constant: nobody makes it.
        self._operators[at : at + 1] = made

    def _layer(self, node: str) -> tuple[int, str, bool]:
        """Where the layer's result is made, what it reads, and whether it has a bias."""
        makers = {name: operator for operator in self._operators for name in operator.outputs}
        at = next(
            (
                index
                for index, operator in enumerate(self._operators)
                if self._graph.sources.get(operator.outputs[0], operator.outputs[0]) == node
            ),
            None,
        )
        if at is not None:
            product = self._operators[at]
            rank = len(self._shapes[product.outputs[0]])
            if product.op == "Reshape" and rank > 2:
                product = makers.get(product.inputs[0], product)
            if product.op in ("Gemm", "MatMul") and len(product.inputs) == 1:
                x = product.inputs[0]
                flat = makers.get(x)
                if rank > 2 and len(self._shapes[x]) == 2 and flat is not None and flat.op == "Reshape":
                    x = flat.inputs[0]
                if len(self._shapes[x]) == rank:
                    return at, x, bool(dict(product.attributes).get("bias", False))
        found = "fused with something else" if at is None else self._operators[at].op
        raise UnsupportedKernelError(
            f"a layer with tiles must be a product of its own in the runtime, that of {node!r} is {found}."
        )

    def _products(self, node: str, x: str, layout: TileLayout) -> list[Operator]:
        """The operations of a layer without its bias; the outputs of the last are still to be named."""
        steps: list[Operator] = []
        shape = self._shapes[x]
        axis = len(shape) - 1

        def add(op: str, inputs: tuple[str, ...], widths: list[int], **attributes: AttributeValue) -> tuple[str, ...]:
            weights = (len(self._new),) if op == "MatMul" else ()
            key = (op, inputs, tuple(widths), tuple(attributes.items()), weights)
            if key not in self._made:
                name = f"{node}_{op}_{len(self._new)}"
                outputs = tuple(f"{name}_{part}" for part in range(len(widths)))
                for output, width in zip(outputs, widths, strict=True):
                    self._declare(output, (*shape[:-1], width), node)
                steps.append(Operator(name, op, inputs, outputs, tuple(sorted(attributes.items()))))
                self._made[key] = outputs
            return self._made[key]

        def split(name: str, sizes: list[int]) -> tuple[str, ...]:
            return (name,) if len(sizes) == 1 else add("Split", (name,), sizes, axis=axis, operand1=tuple(sizes))

        sizes = [end - begin for begin, end in layout.pieces]
        if layout.is_split:
            pieces = split(x, sizes)
        else:
            pieces = tuple(
                x
                if piece == (0, layout.in_features)
                else add("Slice", (x,), [piece[1] - piece[0]], **_slice(piece, axis))[0]
                for piece in layout.pieces
            )
        made: list[tuple[str, ...]] = []
        for product in layout.products:
            read = tuple(pieces[at] for at in product.pieces)
            if layout.is_split and len(read) == len(pieces):
                read = (x,)
            elif len(read) > 1:
                read = add("Concat", read, [sum(sizes[at] for at in product.pieces)], axis=-1)
            (y,) = add("MatMul", read, [product.outputs])
            made.append(split(y, [end - begin for begin, end in product.rows]))
        if not layout.products:
            return []
        made.append(
            tuple(
                self._declare(f"{node}_zeros_{begin}", (*shape[:-1], end - begin), node)
                for begin, end in layout.empty_rows
            )
        )
        outputs = tuple(made[at][part] for at, part in layout.order)
        if len(outputs) > 1:
            add("Concat", outputs, [layout.out_features], axis=-1)
        return steps

    def _declare(self, name: str, shape: Shape, node: str) -> str:
        self._new[name] = shape
        self._sources[name] = node
        return name


def _range(operator: Operator) -> tuple[int, int]:
    attributes = dict(operator.attributes)
    return attributes["operand1"][0], attributes["operand2"][0]  # type: ignore[index, return-value]


def _slice(piece: tuple[int, int], axis: int) -> dict[str, AttributeValue]:
    return {"operand1": (piece[0],), "operand2": (piece[1],), "operand3": (axis,), "operand4": (1,)}
