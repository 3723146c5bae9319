"""``einsum`` and bilinear layers: axes that carry one letter go together, wherever they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import Node

from edgeprune.graph.atoms import Ids
from edgeprune.graph.labels import Label
from edgeprune.graph.rules._base import Call, Rule

if TYPE_CHECKING:
    from edgeprune.graph.propagation import Propagation

_COMBINED = "it is multiplied with values that keep their size"


def _einsum(walk: Propagation, call: Call) -> Label:
    nodes = list(call.tensor_nodes())
    ranks = [len(node.meta["val"].shape) for node in nodes]
    terms, result = _letters(str(call["equation"]), ranks)
    made = _roles(walk, nodes, terms, result)
    labels = [walk.label(node) for node in nodes]
    event = walk.event(call, _COMBINED, *labels)
    of_letter: dict[str, Ids | None] = {}
    sizes: dict[str, int] = {}
    for term, label in zip(terms, labels, strict=True):
        for letter, ids, size in zip(term, label.axes, label.shape, strict=True):
            if sizes.get(letter, 1) == 1:
                # Seen nowhere yet, or only with the length 1 that is broadcast.
                of_letter[letter], sizes[letter] = ids, size
            elif size > 1:
                of_letter[letter] = walk.meet(of_letter[letter], ids, event)
    _mark(walk, terms, result, of_letter)
    for letter, parameter in made.items():
        ids = of_letter[letter]
        if ids is not None:
            walk.produce(call, ids, "", weight=parameter)
    found = tuple(of_letter[letter] for letter in result)
    return Label(found, call.shape(), event if any(of_letter[letter] is None for letter in sizes) else -1)


def _roles(walk: Propagation, nodes: list[Node], terms: list[list[str]], result: list[str]) -> dict[str, str]:
    """Name the axes of parameters; returns the letters of the channels that a parameter makes, as only it has them."""
    made: dict[str, str] = {}
    for node, term in zip(nodes, terms, strict=True):
        name = walk.parameters.get(node.name)
        for axis, letter in enumerate(term if name is not None else ()):
            assert name is not None
            alone = letter in result and sum(letter in other for other in terms) == 1
            made |= {letter: name} if alone else {}
            walk.axis(name, axis, "output" if alone else "vector" if letter in result else "input")
    return made


def _letters(equation: str, ranks: list[int]) -> tuple[list[list[str]], list[str]]:
    """Letters per axis of every operand and of the result; axes of an ellipsis are named by their place from its end."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    written = left.split(",")
    hidden = [rank - len(term.replace("...", "")) for term, rank in zip(written, ranks, strict=True)]

    def axes(term: str, count: int) -> list[str]:
        before, dots, after = term.partition("...")
        return [*before, *(f"...{place}" for place in range(count, 0, -1) if dots), *after]

    terms = [axes(term, count) for term, count in zip(written, hidden, strict=True)]
    if not arrow:
        named = left.replace(",", "").replace("...", "")
        right = ("..." if "..." in left else "") + "".join(sorted(x for x in set(named) if named.count(x) == 1))
    return terms, axes(right, max(hidden))


def _mark(walk: Propagation, terms: list[list[str]], result: list[str], of_letter: dict[str, Ids | None]) -> None:
    """Letters of several operands that the result keeps are heads, as in a batched product."""
    heads = {letter for letter in result if sum(letter in term for term in terms) > 1}
    if any(of_letter[letter] is not None for letter in heads):
        for letter, ids in of_letter.items():
            walk.mark(ids, "head" if letter in heads else "head dimension")


def _bilinear(walk: Propagation, call: Call) -> Label:
    """``x1 weight x2 + bias`` with weight [out, in1, in2], along the last axes."""
    one, other = walk.of(call, "input1"), walk.of(call, "input2")
    event = walk.event(call, _COMBINED, one, other)
    walk.bind(call, "weight", 1, one.axes[-1], "input", event)
    walk.bind(call, "weight", 2, other.axes[-1], "input", event)
    outputs = walk.made(call, "weight", 0)
    walk.produce(call, outputs)
    walk.bind(call, "bias", 0, outputs, "vector", event)
    shape, last = call.shape(), len(one.shape) - 1
    lead = walk.together([one.without(last), other.without(last)], shape[:-1], event)
    return Label((*lead.axes, outputs), shape, lead.event)


TABLE = {
    "aten.einsum.default": Rule(_einsum),
    "aten.bilinear.default": Rule(_bilinear),
}
