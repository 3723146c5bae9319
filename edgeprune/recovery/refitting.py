"""What is done at each operation of a cut model to refit it: a layer's rows summed up and solved, a batch norm moved along.

Source: as `edgeprune.recovery.reconstruction`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from edgeprune.criteria.patches import patches
from edgeprune.graph.rules._base import named_arguments
from edgeprune.recovery.least_squares import Moments
from edgeprune.recovery.side_by_side import Look, Side

if TYPE_CHECKING:
    from edgeprune.surgery.plan import PruningPlan

_LAYERS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.linear.", "aten.addmm.")
_BATCH_NORM = "aten.batch_norm."
_SUMS = ("aten.add.Tensor", "aten.add_.Tensor")
_ROWS_PER_COLUMN = 30
_LEAST_ROWS = 4_000
_LEAST_SCALE = 1e-3
"""Channels that a batch norm scales by less than this share of its largest scale say nothing of what comes before it."""


class Refit:
    """What is done at each operation.

    Attributes:
        changed: Parameter or buffer name to its new value.
        errors: Layer to its relative squared error before and after.
    """

    def __init__(
        self,
        dense: Side,
        cut: Side,
        plan: PruningPlan,
        samples: int,
        *,
        ridge: float,
        seed: int,
        most_bytes: int,
        weights: bool = True,
    ) -> None:
        self.changed: dict[str, torch.Tensor] = {}
        self.errors: dict[str, tuple[float, float]] = {}
        self.intercepts: dict[str, torch.Tensor] = {}
        self.dense, self.cut, self.samples, self.ridge, self.seed = dense, cut, samples, ridge, seed
        self.most_bytes, self.weights = most_bytes, weights
        self._plan = plan
        # Rows into which a recomputed attention scale was folded no longer compute what the dense layer does.
        self._folded = {name for rewrite in plan.rewrites for name in rewrite.get("fold", {}).get("rows", {})}

    def look(self, dense: Node, cut: Node) -> Look | None:
        """What is to be seen of the batches to refit a layer, or to move a batch norm along."""
        op = str(dense.target)
        if op.startswith(_LAYERS) and self._refits(dense, cut):
            layer = _Layer(self, dense, cut)
            return layer if self.weights or layer.has_own_bias else None
        if op.startswith(_BATCH_NORM):
            return self._batch_norm(cut)
        return None

    def _refits(self, dense: Node, cut: Node) -> bool:
        named, named_cut = named_arguments(dense), named_arguments(cut)
        source, weight, own, bias = _source(named), _weight(named), _weight(named_cut), _bias(named_cut)
        if source is None or weight is None or own is None or int(named.get("groups", 1)) != 1:
            return False
        if not self.dense.has(source) or not self._private(own) or weight.name not in self.dense.targets:
            return False
        if self.cut.targets[own.name] in self._folded:
            return False
        return bias is None or (isinstance(bias, Node) and self._private(bias))

    def _private(self, node: Node) -> bool:
        """Whether it is a parameter that no other operation uses."""
        return node.name in self.cut.targets and len(node.users) == 1 and self.cut.fixed(node).is_floating_point()

    def _batch_norm(self, cut: Node) -> Look | None:
        named = named_arguments(cut)
        mean, variance = named["running_mean"], named["running_var"]
        if not isinstance(mean, Node) or not isinstance(variance, Node) or len(mean.users) > 1:
            return None
        if cut.name in self.intercepts:
            old = self.cut.fixed(mean)
            self.change(mean, old - self.intercepts[cut.name].to(old.dtype))
            return None
        return _Statistics(self, named["input"], mean, variance)

    def change(self, node: Node, value: torch.Tensor) -> None:
        """Give a parameter or buffer of the cut model another value."""
        self.cut.replace(node, value)
        self.changed[self.cut.targets[node.name]] = value

    def kept(self, weight: Node, axis: int) -> torch.Tensor:
        """Outputs of the dense layer that are left."""
        size = self.dense.fixed(weight).shape[axis]
        kept = self._plan.kept.get(self.dense.targets[weight.name], {}).get(axis)
        device = self.dense.fixed(weight).device
        return (
            torch.arange(size, device=device) if kept is None else torch.tensor(kept, dtype=torch.long, device=device)
        )


class _Layer:
    """The refit of one layer."""

    def __init__(self, refit: Refit, dense: Node, cut: Node) -> None:
        self._refit, self._dense, self._cut = refit, dense, cut
        named, named_cut = named_arguments(dense), named_arguments(cut)
        self._weight, self._source = _needed(_weight(named_cut)), _needed(_source(named_cut))
        self._transposed = "mat2" in named
        self._old = refit.cut.fixed(self._weight)
        self._target = _Target(refit, dense, cut, refit.kept(_needed(_weight(named)), 1 if self._transposed else 0))
        bias = _bias(named_cut)
        self._bias = bias if isinstance(bias, Node) else None
        free = self._bias is not None or self._target.norm is not None
        # A batch norm behind it takes up a change of the mean by itself.
        self.has_own_bias = self._bias is not None and self._target.norm is None
        old = self._old.T if self._transposed else self._old.flatten(1)
        self._sums = Moments(old, centered=free, movable=refit.weights)
        columns = self._sums.weight.shape[1]
        self._positions = -(-max(_LEAST_ROWS, _ROWS_PER_COLUMN * columns) // refit.samples)

    def take(self, batch: int) -> None:
        """Take in its rows."""
        refit = self._refit
        look = torch.Generator()
        look.manual_seed(zlib.crc32(f"{self._dense.name} {batch}".encode()) + refit.seed)
        state = look.get_state()
        read, arguments = refit.cut.of(self._source), refit.cut.arguments(self._cut)
        bias = 0.0 if self._bias is None else refit.cut.fixed(self._bias)
        for part in self._parts(read):
            look.set_state(state)
            rows, _ = patches(read[part], arguments, self._positions, look)
            look.set_state(state)
            self._sums.add(rows[:, 0].flatten(1), self._target.rows(part, self._positions, look) - bias)

    def finish(self) -> None:
        """Solve, and put the weights in place."""
        refit = self._refit
        new, intercept, errors = self._sums.solve(refit.ridge)
        refit.errors[self._dense.name] = errors
        if refit.weights:
            shaped = (new.T if self._transposed else new).reshape(self._old.shape)
            refit.change(self._weight, shaped.to(self._old.dtype))
        if self._bias is not None:
            bias = refit.cut.fixed(self._bias)
            refit.change(self._bias, (bias + intercept).to(bias.dtype))
            intercept = torch.zeros_like(intercept)
        if self._target.norm is not None and refit.weights:
            refit.intercepts[self._target.norm.name] = intercept

    def _parts(self, read: torch.Tensor) -> Iterator[slice]:
        """Samples whose rows are in memory at once."""
        whole = self._target.columns * max(1, self._positions) * 4
        step = max(1, int(self._refit.most_bytes // whole))
        if len(read) <= step or not self._target.by_sample(len(read)):
            yield slice(None)
            return
        yield from (slice(start, start + step) for start in range(0, len(read), step))


class _Statistics:
    """Those of what a batch norm sees, over all batches.

    Source: T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for Computing the Sample Variance", The American Statistician
    37, 1983, equation 2.1.
    """

    def __init__(self, refit: Refit, source: Node, mean: Node, variance: Node) -> None:
        self._refit, self._source, self._mean, self._variance = refit, source, mean, variance
        self._count = 0
        self._average, self._squares = torch.tensor(0.0), torch.tensor(0.0)

    def take(self, batch: int) -> None:
        """Take in its values."""
        values = self._refit.cut.of(self._source).transpose(0, 1).flatten(1)
        average = values.mean(1, dtype=torch.float64)
        squares = torch.stack(
            [((channel.double() - own) ** 2).sum() for channel, own in zip(values, average, strict=True)]
        )
        before, self._count = self._count, self._count + values.shape[1]
        change = average - self._average if before else average
        share = values.shape[1] / self._count
        self._squares = self._squares.to(squares) + squares + change**2 * before * share
        self._average = self._average.to(average) + change * share

    def finish(self) -> None:
        """Put them in place."""
        for node, value in ((self._mean, self._average), (self._variance, self._squares / max(1, self._count - 1))):
            self._refit.change(node, value.to(self._refit.cut.fixed(node).dtype))


class _Target:
    """What a layer is to compute: the dense layer's output, made up for what the other addend of a residual sum has lost."""

    def __init__(self, refit: Refit, dense: Node, cut: Node, kept: torch.Tensor) -> None:
        self._refit, self._dense, self._kept = refit, dense, kept
        weight = refit.dense.fixed(_needed(_weight(named_arguments(dense))))
        self._outputs = weight.shape[1 if "mat2" in named_arguments(dense) else 0]
        self.columns = weight.numel() // self._outputs
        users, users_cut = list(dense.users), list(cut.users)
        followed = len(users) == 1 and str(users[0].target).startswith(_BATCH_NORM)
        norm = users[0] if followed and named_arguments(users[0])["input"] is dense else None
        self.norm = users_cut[0] if norm is not None else None
        self._scale = _scale(refit.dense, norm, kept) if norm is not None else None
        end, end_cut = (dense, cut) if norm is None else (norm, users_cut[0])
        self._other = _other_addend(end, end_cut, refit.dense, refit.cut)

    def by_sample(self, samples: int) -> bool:
        """Whether all that is read has the samples of a batch along axis 0, so that it can be taken in parts."""
        side, arguments = self._refit.dense, named_arguments(self._dense)
        read = [side.of(_needed(_source(arguments)))]
        if self._other is not None:
            read += [side.of(self._other[0]), self._refit.cut.of(self._other[1])]
        whole = "stride" not in arguments or read[0].ndim == side.fixed(_needed(_weight(arguments))).ndim
        return whole and all(len(value) == samples for value in read)

    def rows(self, part: slice, positions: int, look: torch.Generator) -> torch.Tensor:
        """Rows of the target at random output positions of some samples, shape (rows, outputs left)."""
        wanted: torch.Tensor
        state = look.get_state()
        side, node = self._refit.dense, self._dense
        arguments = side.arguments(node)
        rows, weight = patches(side.of(_needed(_source(named_arguments(node))))[part], arguments, positions, look)
        wanted = rows[:, 0].flatten(1) @ weight[0].flatten(1)[self._kept].T
        bias = _bias(arguments)
        if bias is not None:
            wanted = wanted + bias[..., self._kept]
        if self._other is None:
            return wanted
        other, other_cut = self._other
        value, value_cut = side.of(other)[part], self._refit.cut.of(other_cut)[part]
        channels = 1 if "stride" in arguments else value.ndim - 1
        if (value.shape[channels], value_cut.shape[channels]) != (self._outputs, len(self._kept)):
            return wanted  # it is broadcast along the channels
        lost = value.index_select(channels, self._kept) - value_cut
        if "stride" in arguments:
            lost = lost.flatten(2).transpose(1, 2)
        lost = lost.reshape(lost.shape[0], -1, lost.shape[-1])
        look.set_state(state)
        # The same positions as `patches` takes with the same generator.
        places = torch.arange(lost.shape[1])
        if positions < lost.shape[1]:
            places = torch.randperm(lost.shape[1], generator=look)[:positions]
        lost = lost[:, places].reshape(-1, lost.shape[-1])
        if lost.shape == wanted.shape:
            wanted = wanted + (lost if self._scale is None else lost * self._scale)
        return wanted


def _source(named: Mapping[str, Any]) -> Node | None:
    found = named.get("mat1", named.get("input"))
    return found if isinstance(found, Node) else None


def _weight(named: Mapping[str, Any]) -> Node | None:
    found = named.get("mat2", named.get("weight"))
    return found if isinstance(found, Node) else None


def _bias(named: Mapping[str, Any]) -> Any:
    return named["self"] if "mat2" in named else named.get("bias")


def _needed(node: Node | None) -> Node:
    assert node is not None
    return node


def _scale(side: Side, norm: Node, kept: torch.Tensor) -> torch.Tensor | None:
    """What a difference behind a batch norm is before it, per channel that is left; 0 where the norm lets nothing through."""
    named = named_arguments(norm)
    variance = named["running_var"]
    if not isinstance(variance, Node):
        return None
    weight = side.fixed(named["weight"]) if isinstance(named["weight"], Node) else 1.0
    scale = (weight / torch.sqrt(side.fixed(variance) + float(named["eps"])))[kept]
    usable = scale.abs() > _LEAST_SCALE * scale.abs().max()
    return torch.where(usable, 1.0 / torch.where(usable, scale, 1.0), 0.0)


def _other_addend(end: Node, end_cut: Node, dense: Side, cut: Side) -> tuple[Node, Node] | None:
    """The other addend of a plain sum that a value ends in, in both programs, where it is known already."""
    users, users_cut = list(end.users), list(end_cut.users)
    if len(users) != 1 or not str(users[0].target).startswith(_SUMS) or users[0].kwargs.get("alpha", 1) != 1:
        return None
    if str(users_cut[0].target) != str(users[0].target):
        return None  # nothing is added to it any more
    for one, two in zip(users[0].args[:2], users_cut[0].args[:2], strict=True):
        if isinstance(one, Node) and isinstance(two, Node) and one is not end and dense.has(one) and cut.has(two):
            return one, two
    return None
