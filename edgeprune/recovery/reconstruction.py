"""Layer by layer, the weights of a cut model by least squares: what the dense layer computed, from the inputs that are left.

Source: Y. He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, section 3.1 (the refit after the
selection) and section 3.2 (the target of a residual branch). As there, each layer reads what the layers before it, refitted
already, give; unlike there, weights are drawn towards those that they had, and batch norms stay and are moved along.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from edgeprune.criteria.patches import patches
from edgeprune.criteria.readings import program_inputs
from edgeprune.errors import ConfigError, ReconstructionError
from edgeprune.graph.capture import capture
from edgeprune.graph.rules._base import named_arguments
from edgeprune.recovery.evaluation import RecoveryRecord, StepProgress, evaluate
from edgeprune.recovery.side_by_side import Side, side_by_side
from edgeprune.tasks.batches import batches as unpacked
from edgeprune.tasks.batches import device_of

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.surgery.plan import PruningPlan
    from edgeprune.tasks.task import Batches, Task

_LAYERS = ("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.linear.", "aten.addmm.")
_BATCH_NORM = "aten.batch_norm."
_SUMS = ("aten.add.Tensor", "aten.add_.Tensor")
_ROWS_PER_COLUMN = 30
_LEAST_ROWS = 4_000
_LEAST_SCALE = 1e-3
"""Channels that a batch norm scales by less than this share of its largest scale say nothing of what comes before it."""


def reconstruct(
    module: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    example_inputs: Any,
    loader: Batches,
    *,
    samples: int = 512,
    ridge: float = 1e-3,
    task: Task | None = None,
    seed: int = 0,
    progress: StepProgress | None = None,
) -> RecoveryRecord:
    """Refit the convolutions and linear layers of a cut model, in place, so that they compute what the dense ones did.

    Needs no labels and no gradients. Each layer ``y = W x + b`` that reads something else than in the dense model is solved
    for::

        minimize over W', b':  sum over rows of |y - W' x' - b'| ** 2  +  ridge * mean(x' ** 2) * rows * |W' - W| ** 2

    over random output positions of the calibration samples, with ``x'`` from the layers refitted before it. Without a bias the
    batch norm behind the layer takes ``b'`` over in its running mean (its variance stays, for the target is the dense output);
    without either, ``b'`` is 0. Where the output ends in a residual sum whose other addend is known by then, the target makes
    up for what that one has lost. Other batch norms get the statistics of what they see. Left as they are: grouped,
    depthwise and transposed convolutions, and weights that several operations share.

    Args:
        module: What `edgeprune.apply` made of the plan; changed only when all of it is done.
        graph: The traced dense model, whose weights are the targets'.
        plan: What was cut.
        example_inputs: As the model was traced with.
        loader: Batches of training data; targets are not used.
        samples: Most samples; all of their activations that are still needed are in memory at once.
        ridge: How strongly weights are drawn towards those that they had.
        task: For the metrics before and after in the record.
        seed: Of the choice of positions.
        progress: Told the operations done.

    Returns:
        A record; its details say how many ``layers`` were refitted, and the mean of their relative errors ``before`` and
        ``after``: squared error over the variance of the target.

    Raises:
        ConfigError: There are no samples, or the ridge is negative.
        ReconstructionError: The model was traced in parts, or the cut model runs other operations than the dense one.
        TaskError: The loader is empty, or its batches do not fit the traced model.
    """
    if samples < 1 or ridge < 0:
        raise ConfigError(
            f"reconstruction needs at least 1 sample and a ridge of at least 0, found {samples} and {ridge}."
        )
    captured = capture(module, example_inputs)
    if graph.parts or captured.parts:
        raise ReconstructionError(
            "a model must be traced as a whole to be reconstructed, found one traced in parts.",
            hint="fine-tuning, without reconstruction",
        )
    before = evaluate(module, task) if task is not None else {}
    dense = Side(graph.program, _tensors(graph.model))
    cut = Side(captured.program, _tensors(module))
    batches: list[list[Any]] = []
    count = 0
    for inputs, _ in unpacked(loader, "calibration data", device_of(module)):
        for leaves in program_inputs(graph, inputs):
            taken = _first(leaves, samples - count if graph.dynamic_batch else graph.batch)
            batches.append(taken)
            count += _samples(taken)
            if count >= samples:
                break
        if count >= samples:
            break
    refit = _Refit(dense, cut, plan, count, len(batches), ridge, seed)

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("reconstructing", done, total)

    names = {branch["name"] for branch in plan.removed}
    removed = frozenset[str]().union(*(branch.nodes for branch in graph.branches if branch.name in names))
    side_by_side(dense, cut, batches, refit.visit, tell, removed)
    with torch.no_grad():
        own = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        for name, value in refit.changed.items():
            own[name].copy_(value)
    after = evaluate(module, task) if task is not None else {}
    errors = list(refit.errors.values())
    return RecoveryRecord(
        "reconstruction",
        before,
        after,
        {
            "samples": count,
            "layers": len(errors),
            "before": sum(one for one, _ in errors) / max(1, len(errors)),
            "after": sum(two for _, two in errors) / max(1, len(errors)),
        },
    )


class _Refit:
    """What is done at each operation.

    Attributes:
        changed: Parameter or buffer name to its new value.
        errors: Layer to its relative squared error before and after.
    """

    def __init__(
        self, dense: Side, cut: Side, plan: PruningPlan, samples: int, batches: int, ridge: float, seed: int
    ) -> None:
        self.changed: dict[str, torch.Tensor] = {}
        self.errors: dict[str, tuple[float, float]] = {}
        self._dense, self._cut, self._plan = dense, cut, plan
        self._samples, self._batches, self._ridge, self._seed = samples, batches, ridge, seed
        self._intercepts: dict[str, torch.Tensor] = {}
        # Rows into which a recomputed attention scale was folded no longer compute what the dense layer does.
        self._folded = {name for rewrite in plan.rewrites for name in rewrite.get("fold", {}).get("rows", {})}

    def visit(self, dense: Node, cut: Node) -> None:
        """Refit a layer, or move a batch norm along."""
        op = str(dense.target)
        if op.startswith(_LAYERS):
            self._layer(dense, cut)
        elif op.startswith(_BATCH_NORM):
            self._batch_norm(cut)

    def _layer(self, dense: Node, cut: Node) -> None:
        named, named_cut = named_arguments(dense), named_arguments(cut)
        source, weight = _source(named), _weight(named)
        weight_cut, bias_cut = _weight(named_cut), _bias(named_cut)
        if not self._refits(named, source, weight, weight_cut, bias_cut):
            return
        assert source is not None
        assert weight is not None
        assert weight_cut is not None
        transposed = "mat2" in named
        old = self._cut.fixed(weight_cut)
        target = _Target(self, dense, cut, self._kept(weight, 1 if transposed else 0))
        norm = target.norm
        free = isinstance(bias_cut, Node) or norm is not None
        sums = _Sums(old.T if transposed else old.flatten(1), centered=free)
        bias = self._cut.fixed(bias_cut) if isinstance(bias_cut, Node) else None
        columns = sums.weight.shape[1]
        positions = -(-max(_LEAST_ROWS, _ROWS_PER_COLUMN * columns) // self._samples)
        for batch in range(self._batches):
            look = torch.Generator()
            look.manual_seed(zlib.crc32(f"{dense.name} {batch}".encode()) + self._seed)
            state = look.get_state()
            rows, _ = patches(
                self._cut.of_batches(_needed(_source(named_cut)))[batch],
                self._cut.arguments(cut, batch),
                positions,
                look,
            )
            look.set_state(state)
            wanted = target.rows(batch, positions, look)
            sums.add(rows[:, 0].flatten(1), wanted - (0.0 if bias is None else bias))
        new, intercept, errors = sums.solve(self._ridge)
        self.errors[dense.name] = errors
        self._change(weight_cut, (new.T if transposed else new).reshape(old.shape).to(old.dtype))
        if isinstance(bias_cut, Node):
            assert bias is not None
            self._change(bias_cut, (bias + intercept).to(bias.dtype))
            intercept = torch.zeros_like(intercept)
        if norm is not None:
            self._intercepts[norm.name] = intercept

    def _refits(
        self, named: Mapping[str, Any], source: Node | None, weight: Node | None, own: Node | None, bias: Any
    ) -> bool:
        if source is None or weight is None or own is None or int(named.get("groups", 1)) != 1:
            return False
        if not self._dense.has(source) or not self._private(own) or weight.name not in self._dense.targets:
            return False
        if self._cut.targets[own.name] in self._folded:
            return False
        return bias is None or (isinstance(bias, Node) and self._private(bias))

    def _private(self, node: Node) -> bool:
        """Whether it is a parameter that no other operation uses."""
        return node.name in self._cut.targets and len(node.users) == 1 and self._cut.fixed(node).is_floating_point()

    def _batch_norm(self, cut: Node) -> None:
        named = named_arguments(cut)
        mean, variance = named["running_mean"], named["running_var"]
        if not isinstance(mean, Node) or not isinstance(variance, Node) or len(mean.users) > 1:
            return
        if cut.name in self._intercepts:
            old = self._cut.fixed(mean)
            self._change(mean, old - self._intercepts[cut.name].to(old.dtype))
            return
        values = [value.double().transpose(0, 1).flatten(1) for value in self._cut.of_batches(named["input"])]
        count = sum(value.shape[1] for value in values)
        average = sum(value.sum(1) for value in values) / count
        spread = sum(((value - average[:, None]) ** 2).sum(1) for value in values) / max(1, count - 1)
        self._change(mean, torch.as_tensor(average).to(self._cut.fixed(mean).dtype))
        self._change(variance, torch.as_tensor(spread).to(self._cut.fixed(variance).dtype))

    def _change(self, node: Node, value: torch.Tensor) -> None:
        self._cut.replace(node, value)
        self.changed[self._cut.targets[node.name]] = value

    def _kept(self, weight: Node, axis: int) -> torch.Tensor:
        """Outputs of the dense layer that are left."""
        size = self._dense.fixed(weight).shape[axis]
        kept = self._plan.kept.get(self._dense.targets[weight.name], {}).get(axis)
        device = self._dense.fixed(weight).device
        return (
            torch.arange(size, device=device) if kept is None else torch.tensor(kept, dtype=torch.long, device=device)
        )


class _Target:
    """What a layer is to compute: the dense layer's output, made up for what the other addend of a residual sum has lost."""

    def __init__(self, refit: _Refit, dense: Node, cut: Node, kept: torch.Tensor) -> None:
        self._refit, self._dense, self._kept = refit, dense, kept
        weight = _needed(_weight(named_arguments(dense)))
        self._outputs = refit._dense.fixed(weight).shape[1 if "mat2" in named_arguments(dense) else 0]
        users, users_cut = list(dense.users), list(cut.users)
        followed = len(users) == 1 and str(users[0].target).startswith(_BATCH_NORM)
        norm = users[0] if followed and named_arguments(users[0])["input"] is dense else None
        self.norm = users_cut[0] if norm is not None else None
        self._scale = _scale(refit._dense, norm, kept) if norm is not None else None
        end, end_cut = (dense, cut) if norm is None else (norm, users_cut[0])
        self._other = _other_addend(end, end_cut, refit._dense, refit._cut)

    def rows(self, batch: int, positions: int, look: torch.Generator) -> torch.Tensor:
        """Rows of the target at random output positions, shape (rows, outputs left)."""
        wanted: torch.Tensor
        state = look.get_state()
        side, node = self._refit._dense, self._dense
        arguments = side.arguments(node, batch)
        rows, weight = patches(
            side.of_batches(_needed(_source(named_arguments(node))))[batch], arguments, positions, look
        )
        wanted = rows[:, 0].flatten(1) @ weight[0].flatten(1)[self._kept].T
        bias = _bias(arguments)
        if bias is not None:
            wanted = wanted + bias[..., self._kept]
        if self._other is None:
            return wanted
        other, other_cut = self._other
        value, value_cut = side.of_batches(other)[batch], self._refit._cut.of_batches(other_cut)[batch]
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


class _Sums:
    """Second moments of a layer's input and of what its weights leave of the target."""

    def __init__(self, weight: torch.Tensor, *, centered: bool) -> None:
        self.weight, self._centered = weight.double(), centered
        outputs, columns = weight.shape
        zeros = self.weight.new_zeros
        self._rows = 0
        self._gram, self._cross = zeros(columns, columns), zeros(columns, outputs)
        self._inputs, self._rest, self._targets = zeros(columns), zeros(outputs), zeros(outputs)
        self._rest_squares = self._target_squares = 0.0

    def add(self, inputs: torch.Tensor, target: torch.Tensor) -> None:
        """Take in rows: shapes (rows, columns) and (rows, outputs)."""
        x, y = inputs.double(), target.double()
        rest = y - x @ self.weight.T
        self._rows += len(x)
        self._gram += x.T @ x
        self._cross += x.T @ rest
        self._inputs += x.sum(0)
        self._rest += rest.sum(0)
        self._targets += y.sum(0)
        self._rest_squares += float((rest**2).sum())
        self._target_squares += float((y**2).sum())

    def solve(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
        """The new weight, the intercept (0 where none is free), and the relative squared errors before and after."""
        gram, cross = self._gram, self._cross
        if self._centered:
            gram = gram - torch.outer(self._inputs, self._inputs) / self._rows
            cross = cross - torch.outer(self._inputs, self._rest) / self._rows
        level = max(float(gram.diagonal().mean()), 1e-12)
        eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        change = torch.linalg.solve(gram + (ridge * level + 1e-9 * level) * eye, cross)
        new = self.weight + change.T
        intercept = torch.zeros_like(self._rest)
        explained = 2 * float((change * cross).sum()) - float((change * (gram @ change)).sum())
        left = self._rest_squares
        if self._centered:
            intercept = (self._rest - change.T @ self._inputs) / self._rows
            left -= float((self._rest**2).sum()) / self._rows
        variance = self._target_squares - float((self._targets**2).sum()) / self._rows
        scale = max(variance, 1e-12)
        return new, intercept, (self._rest_squares / scale, max(0.0, left - explained) / scale)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: value.detach() for name, value in module.named_parameters(remove_duplicate=False)}
    return found | {name: value.clone() for name, value in module.named_buffers(remove_duplicate=False)}


def _first(leaves: list[Any], count: int) -> list[Any]:
    """The first samples of a batch."""
    return [leaf[:count] if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf for leaf in leaves]


def _samples(leaves: list[Any]) -> int:
    return next(int(leaf.shape[0]) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim)


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
