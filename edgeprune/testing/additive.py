"""Allocation problems whose costs state their terms, of three kinds: residual networks, concats, attention.

Each is a cost in stairs over linear forms of widths, so that what is proven of an allocation can be compared with trying
every combination.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeprune.allocation.terms import CostTerm
from edgeprune.graph.channel_graph import ChannelGroup
from edgeprune.graph.forms import SizeForm
from edgeprune.spec import smallest_width

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layer:
    """One layer: as slow as its padded input times its padded output, and some time for each.

    Attributes:
        source: Channels in.
        target: Channels out.
        work_ms: For each pair of vectors, milliseconds.
        traffic_ms: For each vector of either side, milliseconds.
        vector: Channels that cost as much as one.
    """

    source: SizeForm
    target: SizeForm
    work_ms: float
    traffic_ms: float = 0.0
    vector: int = 4

    def at(self, source: Ints, target: Ints) -> Floats:
        """Milliseconds at these channels."""
        before, after = -(-source // self.vector), -(-target // self.vector)
        found: Floats = self.work_ms * before * after + self.traffic_ms * (before + after)
        return found

    def parameters_at(self, source: Ints, target: Ints) -> Floats:
        """Weights at these channels."""
        return (source * target).astype(np.float64)


@dataclass(frozen=True)
class LayeredCost:
    """A network of layers.

    Attributes:
        sizes: Group name to size.
        steps: Widths per group that are worth considering, descending.
        layers: What runs.
        fixed_ms: What no width changes, milliseconds.
    """

    sizes: Mapping[str, int]
    steps: Mapping[str, tuple[int, ...]]
    layers: tuple[Layer, ...]
    fixed_ms: float = 0.05

    def ms(self, widths: Mapping[str, int]) -> float:
        """Latency, milliseconds."""
        every = {**self.sizes, **widths}
        return float(self.at({name: np.array([width]) for name, width in every.items()})[0])

    def at(self, widths: Mapping[str, Ints]) -> Floats:
        """Latency at many widths, milliseconds; one array per group, all of one length."""
        total: Floats = np.full(len(next(iter(widths.values()))), self.fixed_ms)
        for layer in self.layers:
            total = total + layer.at(_sizes(layer.source, widths), _sizes(layer.target, widths))
        return total

    def many_ms(self, many: Sequence[Mapping[str, int]]) -> Floats:
        """`ms` of each."""
        return np.array([self.ms(widths) for widths in many])

    def value(self, widths: Mapping[str, int]) -> float:
        """`ms`, where it is a budget besides another latency."""
        return self.ms(widths)

    def candidates(self, group: str) -> tuple[int, ...]:
        """The widths of `steps`."""
        return self.steps[group]

    def terms(self) -> list[CostTerm]:
        """One per layer, and the fixed part."""
        fixed = CostTerm((), lambda: np.array(self.fixed_ms))
        return [fixed, *(CostTerm((layer.source, layer.target), layer.at) for layer in self.layers)]


@dataclass(frozen=True)
class LayeredParameters:
    """Number of weights of a `LayeredCost`."""

    cost: LayeredCost

    def value(self, widths: Mapping[str, int]) -> float:
        """Weights at these widths."""
        every = {**self.cost.sizes, **widths}
        return float(self.at({name: np.array([width]) for name, width in every.items()})[0])

    def at(self, widths: Mapping[str, Ints]) -> Floats:
        """Weights at many widths; one array per group, all of one length."""
        parts = [_sizes(layer.source, widths) * _sizes(layer.target, widths) for layer in self.cost.layers]
        total: Floats = np.sum(parts, axis=0).astype(np.float64)
        return total

    def terms(self) -> list[CostTerm]:
        """One per layer."""
        return [CostTerm((layer.source, layer.target), layer.parameters_at) for layer in self.cost.layers]


@dataclass(frozen=True)
class LayeredInstance:
    """One allocation problem.

    Attributes:
        groups: Channel groups; only names and sizes count.
        damage: Damage curves.
        cost: Latency.
    """

    groups: tuple[ChannelGroup, ...]
    damage: dict[str, Floats]
    cost: LayeredCost

    @property
    def dense(self) -> dict[str, int]:
        """Full widths."""
        return dict(self.cost.sizes)

    @property
    def floor_ms(self) -> float:
        """Latency at the smallest candidate widths, milliseconds."""
        return self.cost.ms({name: steps[-1] for name, steps in self.cost.steps.items()})

    def between_ms(self, share: float) -> float:
        """A budget: the smallest latency plus a share of what lies between it and the dense one, milliseconds."""
        return self.floor_ms + share * (self.cost.ms({}) - self.floor_ms)

    def total_damage(self, widths: Mapping[str, int]) -> float:
        """Sum of the damages at some widths."""
        return float(sum(self.damage[name][width] for name, width in widths.items()))

    def best_damage(self, budget_ms: float, parameters: float = np.inf) -> float:
        """Least total damage within the budgets, by trying every combination of candidate widths."""
        axes = np.meshgrid(*self.cost.steps.values(), indexing="ij")
        every = {name: axis.ravel() for name, axis in zip(self.cost.steps, axes, strict=True)}
        fits = self.cost.at(every) <= budget_ms
        if np.isfinite(parameters):
            fits &= LayeredParameters(self.cost).at(every) <= parameters
        damage = np.sum([self.damage[name][widths] for name, widths in every.items()], axis=0)
        return float(damage[fits].min(initial=np.inf))


def _sizes(form: SizeForm, widths: Mapping[str, Ints]) -> Ints:
    total: Ints = np.full(len(next(iter(widths.values()))), form.constant, dtype=np.int64)
    for groups, coefficient in form.terms:
        total = total + coefficient * np.prod([widths[name] for name in groups], axis=0)
    return total


def width_of(name: str, coefficient: int = 1) -> SizeForm:
    """The form of one width."""
    return SizeForm(0, (((name,), coefficient),))


def sum_of(names: Sequence[str], constant: int = 0) -> SizeForm:
    """The form of a concat."""
    return SizeForm(constant, tuple(((name,), 1) for name in sorted(names)))


def product_of(first: str, second: str, coefficient: int = 1) -> SizeForm:
    """The form of heads times head dimensions."""
    return SizeForm(0, ((tuple(sorted((first, second))), coefficient),))


def chain(seed: int, groups: int = 4, options: int = 5) -> LayeredInstance:
    """Plain layers one after another, with a skip in between."""
    rng = np.random.default_rng(seed)
    sizes = {f"layer{index}": 4 * int(rng.integers(2, options + 2)) for index in range(groups)}
    forms = [SizeForm(3), *(width_of(name) for name in sizes), SizeForm(10)]
    layers = [_layer(rng, first, second) for first, second in itertools.pairwise(forms)]
    skip = rng.choice(groups, 2, replace=False) if groups > 1 else [0, 0]
    names = list(sizes)
    layers.append(_layer(rng, width_of(names[skip[0]]), width_of(names[skip[1]])))
    return _instance(rng, sizes, options, layers)


def densenet(seed: int, layers: int = 3, options: int = 4) -> LayeredInstance:
    """Every layer reads all that was made before it: concats, sums of widths."""
    rng = np.random.default_rng(seed)
    sizes: dict[str, int] = {"stem": 4 * int(rng.integers(2, 5))}
    made, found = ["stem"], [_layer(rng, SizeForm(3), width_of("stem"))]
    for index in range(layers):
        inner, growth = f"layer{index}.inner", f"layer{index}.growth"
        sizes |= {inner: 4 * int(rng.integers(2, 5)), growth: 4 * int(rng.integers(1, 4))}
        found += [_layer(rng, sum_of(made), width_of(inner)), _layer(rng, width_of(inner), width_of(growth))]
        made.append(growth)
    found.append(_layer(rng, sum_of(made), SizeForm(10)))
    return _instance(rng, sizes, options, found)


def attention(seed: int, layers: int = 2, options: int = 4) -> LayeredInstance:
    """Projections from an embedding to heads times head dimensions and back, and a perceptron: products of widths."""
    rng = np.random.default_rng(seed)
    sizes: dict[str, int] = {"embedding": 4 * int(rng.integers(2, 5))}
    embedding, found = width_of("embedding"), []
    for index in range(layers):
        heads, size, inner = f"layer{index}.heads", f"layer{index}.head_size", f"layer{index}.inner"
        sizes |= {heads: int(rng.integers(2, 5)), size: 4 * int(rng.integers(1, 4))}
        found.append(_layer(rng, embedding, product_of(heads, size, 3)))
        found.append(_layer(rng, width_of(heads, 4), width_of(size)))
        found.append(_layer(rng, product_of(heads, size), embedding))
        if index % 2 == 0:
            sizes[inner] = 4 * int(rng.integers(2, 5))
            found += [_layer(rng, embedding, width_of(inner)), _layer(rng, width_of(inner), embedding)]
    return _instance(rng, sizes, options, found)


def residual(seed: int, blocks: Sequence[int] = (3, 4, 6, 3), options: int = 16) -> LayeredInstance:
    """Bottleneck blocks like ResNet-50's: two widths inside each, one for every stage's sums.

    With the default blocks 36 groups, 51 layers between two of them, and a first and a last one.

    Source: K. He et al., "Deep Residual Learning for Image Recognition", 2016, table 1 (50 layers).
    """
    rng = np.random.default_rng(seed)
    sizes: dict[str, int] = {}
    layers = []
    before = SizeForm(3)
    for stage, count in enumerate(blocks):
        inner, pixels = 64 * 2 ** min(stage, 3), (56 >> min(stage, 3)) ** 2
        total = width_of(f"stage{stage}")
        sizes[f"stage{stage}"] = 4 * inner
        layers.append(_conv(rng, before, total, 1, pixels))
        source = before if stage else total
        for block in range(count):
            first, second = f"stage{stage}.{block}.first", f"stage{stage}.{block}.second"
            sizes |= {first: inner, second: inner}
            layers.append(_conv(rng, source, width_of(first), 1, pixels))
            layers.append(_conv(rng, width_of(first), width_of(second), 9, pixels))
            layers.append(_conv(rng, width_of(second), total, 1, pixels))
            source = total
        before = total
    layers.append(_conv(rng, before, SizeForm(1000), 1, 1))
    return _instance(rng, sizes, options, layers)


def _conv(rng: np.random.Generator, source: SizeForm, target: SizeForm, taps: int, pixels: int) -> Layer:
    vector = 4
    work_ms = vector * vector * taps * pixels / 5e7 * float(rng.lognormal(0, 0.25))
    traffic_ms = vector * pixels / 1e7 * float(rng.lognormal(0, 0.25))
    return Layer(source, target, work_ms, traffic_ms, vector)


def _layer(rng: np.random.Generator, source: SizeForm, target: SizeForm) -> Layer:
    return Layer(source, target, float(rng.uniform(0.02, 0.3)), float(rng.uniform(0.0, 0.1)))


def _instance(
    rng: np.random.Generator, sizes: Mapping[str, int], options: int, layers: Sequence[Layer]
) -> LayeredInstance:
    steps, damage = {}, {}
    for name, size in sizes.items():
        least = smallest_width(size)
        shares = np.linspace(size, least, min(options, size - least + 1))
        steps[name] = tuple(sorted({round(share) for share in shares}, reverse=True))
        scores = np.sort(rng.gamma(1.0, 1.0, size)) * float(rng.lognormal(0, 0.7)) / size
        damage[name] = np.concatenate([[0.0], np.cumsum(scores)])[::-1].copy()
    groups = tuple(
        ChannelGroup(name=name, size=size, unit="channel", members=(), nodes=()) for name, size in sizes.items()
    )
    return LayeredInstance(groups, damage, LayeredCost(dict(sizes), steps, tuple(layers)))
