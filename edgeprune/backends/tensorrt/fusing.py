"""Which operators TensorRT computes as one layer, whatever their widths, and what such a group is as a kernel.

The builder decides by itself, and says what it did only after it has built. What is written here are the fusions that do
not depend on widths, as NVIDIA states them and recorded engines have them: a convolution or a matrix product takes the
element-wise operations behind it into its epilogue, a sum with another branch among them; of two convolutions whose outputs are
summed the later one does; what is left of element-wise operations is one layer as far as one value leaves it; views of memory
are no layers. Where the builder fuses less, its layers of a group are added up; where it fuses more, a group cannot be timed, and
`edgeprune.backends.tensorrt.layer_times` says so. In int8 the groups are the same: what quantizes belongs to what it is for.

Source: NVIDIA TensorRT documentation, "Types of Fusions" (Conv ElementWise, PointWise, Shuffle fusions), and the layers of the
engines in the exports that are described in ``tests/data/README.md``. Checked against these alone: *replayed*.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from edgeprune.backends._base import Operator, OperatorGraph
from edgeprune.backends.onnxruntime.operators import VIEWS, base, family, resized
from edgeprune.spec import AttributeValue, Kernel, Precision

Shape = tuple[int, ...]
Group = tuple[str, ...]
"""Names of the operators of one layer, the one that does the work first."""

_LEADING = ("conv", "gemm")
_ACTIVATIONS = frozenset(
    {"Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Selu", "Softplus", "Gelu"}
)


def groups(graph: OperatorGraph) -> list[Group]:
    """Every operator in exactly one group, but views that nothing else is joined to; groups in an order in which they can run."""
    wiring = _Wiring(graph)
    order = range(len(graph.operators))
    leading = [place for place in order if family(graph.operators[place].op) in _LEADING]
    # Of two that are summed the later one takes the sum.
    for place in (*reversed(leading), *order):
        if place not in wiring.owner and not _is_view(graph.operators[place]):
            wiring.take(place, wiring.epilogue(place))
    for place in reversed(order):
        if _is_view(graph.operators[place]):
            wiring.place_view(place)
    members: dict[int, list[int]] = {}
    for place in order:
        leader = wiring.owner.get(place)
        if leader is not None:
            members.setdefault(leader, []).append(place)
    ordered = sorted(members.items(), key=lambda item: max(item[1]))
    return [
        tuple(graph.operators[place].name for place in (leader, *(place for place in places if place != leader)))
        for leader, places in ordered
    ]


def kernels(
    graph: OperatorGraph, shapes: Mapping[str, Shape], found: Sequence[Group], precision: Precision
) -> list[Kernel]:
    """The kernel of each group at some widths. In int8 those of operators that are not quantized are fp32.

    Tactics and layouts are TensorRT's choice at each size, and no part of what a kernel is: its time is that of the best.
    """
    by_name = {operator.name: operator for operator in graph.operators}
    # What else an operator reads is a constant.
    computed = {spec.name for spec in graph.inputs} | {name for one in graph.operators for name in one.outputs}
    exact = _in_float(graph, computed) if precision == "int8" else frozenset()
    return [
        _kernel([by_name[name] for name in names], graph, shapes, computed, "fp32" if names[0] in exact else precision)
        for names in found
    ]


class _Wiring:
    """Who reads what, and which group an operator is in."""

    def __init__(self, graph: OperatorGraph) -> None:
        self.graph = graph
        self.owner: dict[int, int] = {}
        self.maker = {tensor: place for place, one in enumerate(graph.operators) for tensor in one.outputs}
        self.readers: dict[str, list[int]] = {}
        for place, one in enumerate(graph.operators):
            for tensor in dict.fromkeys(one.inputs):
                self.readers.setdefault(tensor, []).append(place)

    def take(self, leader: int, more: Sequence[int]) -> None:
        self.owner |= dict.fromkeys((leader, *more), leader)

    def epilogue(self, leader: int) -> list[int]:
        """Element-wise operators that follow on one and are of its shape, as far as a single value leaves all of them."""
        operators = self.graph.operators
        first = operators[leader]
        if len(first.outputs) != 1 or family(first.op) not in (*_LEADING, "elementwise"):
            return []
        shape = self.graph.shapes.get(first.outputs[0])
        inside, accepted = [leader], 1
        while True:
            # The next in order that reads what is made inside.
            near = sorted(
                reader
                for member in inside
                for tensor in operators[member].outputs
                for reader in self.readers.get(tensor, ())
                if reader not in inside and self._joins(reader, shape)
            )
            if not near:
                return inside[1:accepted]
            inside.append(near[0])
            if len(self._leaving(inside)) == 1:
                accepted = len(inside)

    def place_view(self, place: int) -> None:
        """A view goes with what reads it first, else with what it is a view of."""
        one = self.graph.operators[place]
        near = [reader for tensor in one.outputs for reader in self.readers.get(tensor, ())]
        near += [self.maker[tensor] for tensor in one.inputs if tensor in self.maker]
        owners = [self.owner[other] for other in near if other in self.owner]
        if owners:
            self.owner[place] = owners[0]

    def _joins(self, place: int, shape: Shape | None) -> bool:
        one = self.graph.operators[place]
        return (
            place not in self.owner
            and family(one.op) == "elementwise"
            and len(one.outputs) == 1
            and self.graph.shapes.get(one.outputs[0]) == shape
        )

    def _leaving(self, inside: Sequence[int]) -> list[str]:
        """Tensors that are made inside and read outside."""
        made = [tensor for member in inside for tensor in self.graph.operators[member].outputs]
        return [
            tensor
            for tensor in made
            if tensor in self.graph.outputs or not set(self.readers.get(tensor, ())) <= set(inside)
        ]


def _kernel(
    members: Sequence[Operator],
    graph: OperatorGraph,
    shapes: Mapping[str, Shape],
    computed: Collection[str],
    precision: Precision,
) -> Kernel:
    anchor, *others = members
    rest = [member for member in others if not _is_view(member)]
    working = [anchor, *rest]
    made = {tensor for member in working for tensor in member.outputs}
    read = dict.fromkeys(tensor for tensor in anchor.inputs if tensor in shapes)
    more = {tensor: None for member in rest for tensor in member.inputs if tensor in computed and tensor not in made}
    attributes: dict[str, AttributeValue] = dict(resized(anchor, graph, shapes))
    if family(anchor.op) in _LEADING:
        attributes["activation"] = next((base(one.op) for one in rest if base(one.op) in _ACTIVATIONS), "")
        attributes["residual"] = bool(more)
    # A second operand of a product is a matrix that it multiplies with: what the epilogue reads is told by `residual`.
    read |= {} if family(anchor.op) == "gemm" else more
    sources = (graph.sources.get(member.outputs[0]) for member in working)
    return Kernel(
        op="+".join(base(member.op) for member in working),
        family=family(anchor.op),
        inputs=tuple(shapes[tensor] for tensor in read),
        output=shapes[working[-1].outputs[0]],
        attributes=tuple(sorted(attributes.items())),
        precision=precision,
        origin=tuple(dict.fromkeys(source for source in sources if source is not None)),
    )


def _in_float(graph: OperatorGraph, computed: Collection[str]) -> frozenset[str]:
    """Names of operators that an int8 engine for timing computes in float, as `quantizing.quantize_for_timing` leaves them."""
    from edgeprune.backends.onnxruntime.quantizing import BETWEEN, LAYERS

    quantized: set[str] = set()
    found = []
    for one in graph.operators:
        read = {name for name in one.inputs if name in computed}
        # A product of two values holds no weights.
        if (base(one.op) in LAYERS and len(read) == 1) or (base(one.op) in BETWEEN and read and read <= quantized):
            quantized.update(one.outputs)
        else:
            found.append(one.name)
    return frozenset(found)


def _is_view(operator: Operator) -> bool:
    return base(operator.op) in VIEWS
