"""The original program with units masked instead of cut: the other side of every check.

Nothing here is shared with the cut or with the trace's labels. A removed unit is made visible by setting what its layer
produces to NaN. NaN then travels through element-wise, pooling and data movement operations by itself, exactly as far
as the unit's values would. Wherever an operation sums over channels, the channels that the plan removes there are
replaced by zero; a NaN that is still there, or that reaches an output, is a consumer that the plan forgot.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from edgeprune.errors import SurgeryError
from edgeprune.surgery.plan import PruningPlan

_CONVS = ("aten.conv1d", "aten.conv2d", "aten.conv3d")
_TRANSPOSED = ("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
_MEANS = ("aten.mean", "aten.sum", "aten.amax", "aten.amin")
_SOFTMAXES = ("aten.softmax", "aten.log_softmax", "aten._softmax", "aten._log_softmax")
_NORMS = ("aten.batch_norm", "aten.instance_norm")
_DROPOUTS = ("aten.dropout", "aten.alpha_dropout", "aten.feature_dropout")


class MaskedProgram(Interpreter):
    """Interprets a program on original weights while the units that a plan removes are masked.

    Args:
        program: Of the original model, in eval form.
        plan: What stays.
        tensors: Original parameters, buffers and constants by name.
        training: Whether batch and instance norms use the statistics of their input, and update `statistics`.
        cumulative: Paths of batch norms without a momentum, which average over all batches so far; a program in eval
            form does not show them.
    """

    def __init__(
        self,
        program: ExportedProgram,
        plan: PruningPlan,
        tensors: Mapping[str, torch.Tensor],
        training: bool,
        cumulative: Collection[str] = (),
    ) -> None:
        super().__init__(program.graph_module)
        self._training = training
        self._batches = {path: int(tensors[f"{path}.num_batches_tracked"]) for path in cumulative}
        self._target_of: dict[str, str] = {}
        self._placeholders: list[tuple[str, torch.Tensor | None]] = []
        self.statistics: dict[str, torch.Tensor] = {}
        kept_by_tensor = {id(tensors[name]): axes for name, axes in plan.kept.items()}
        self._kept: dict[str, Mapping[int, tuple[int, ...]]] = {}
        for spec in program.graph_signature.input_specs:
            name, target = getattr(spec.arg, "name", ""), spec.target
            if target is None:
                self._placeholders.append((name, None))
                continue
            value = tensors[target] if target in tensors else program.constants[target]
            self._target_of[name] = target
            self._kept[name] = kept_by_tensor.get(id(value), {})
            if target.endswith(("running_mean", "running_var")):
                value = self.statistics.setdefault(target, value.detach().clone())
            self._placeholders.append((name, value.detach() if isinstance(value, torch.Tensor) else value))

    def outputs(self, inputs: list[Any]) -> list[Any]:
        """Flat outputs for flat user inputs.

        Raises:
            SurgeryError: If a removed unit is still read where the plan does not remove it, or reaches an output.
        """
        rest = iter(inputs)
        values = [next(rest) if value is None else value for _, value in self._placeholders]
        with torch.no_grad():
            found = list(self.run(*values))
        for value in found:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.isnan().any():
                raise SurgeryError("an output of the model must not depend on removed units, found one that does.")
        return found

    def run_node(self, n: Node) -> Any:
        """One operation, with masks around it."""
        if n.op != "call_function":
            return super().run_node(n)
        op = str(n.target).rpartition(".")[0]
        positional, keywords = self.fetch_args_kwargs_from_env(n)
        args, kwargs = list(positional), dict(keywords)
        if op.rstrip("_") in _DROPOUTS:
            return args[0]
        if op in _NORMS:
            if self._training and args[3] is not None:
                args[5], args[6] = True, self._momentum(n, args[6])
            return n.target(*args, **kwargs)  # type: ignore[operator]
        if op in (*_CONVS, *_TRANSPOSED, "aten.linear"):
            return self._contract(n, op, args, kwargs)
        for position, argument in enumerate(n.args):
            if isinstance(argument, Node) and self._kept.get(argument.name):
                args[position] = _poisoned(args[position], self._kept[argument.name])
        if op in _MEANS:
            args[0] = _without_nan(args[0], args[1] if len(args) > 1 and _is_dims(args[1]) else None)
        if op in _SOFTMAXES:
            return _softmax(n, args, kwargs)
        return n.target(*args, **kwargs)  # type: ignore[operator]

    def _momentum(self, norm: Node, written: float) -> float:
        """Share of this batch in the running statistics."""
        path = self._target_of.get(getattr(norm.args[3], "name", ""), "").rpartition(".")[0]
        if path not in self._batches:
            return written
        self._batches[path] += 1
        return 1 / self._batches[path]

    def _contract(self, node: Node, op: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        x, weight = args[0], args[1]
        weight_node = node.args[1]
        assert isinstance(weight_node, Node)
        kept = self._kept.get(weight_node.name, {})
        groups = _groups(node, op, args, kwargs)
        transposed = op in _TRANSPOSED
        removed_in, removed_out = _removed(tuple(weight.shape), kept, groups, transposed)
        channel = x.ndim - 1 if op == "aten.linear" else x.ndim - weight.ndim + 1
        gone = x.isnan()
        # Where all that is contracted is NaN, the position was removed along another axis: the result is NaN too.
        elsewhere = gone.all(dim=channel, keepdim=True)
        poisoned = (gone & ~elsewhere).movedim(channel, 0).flatten(1).any(dim=1)
        forgotten = poisoned & ~removed_in.to(poisoned.device)
        if forgotten.any():
            index = int(forgotten.nonzero()[0])
            name = self._target_of.get(weight_node.name, weight_node.name)
            raise SurgeryError(f"{name} must not read units that the plan removes, found input channel {index}.")
        args[0] = x.masked_fill(_along(removed_in, channel, x.ndim).to(x.device) & ~elsewhere, 0.0)
        out = node.target(*args, **kwargs)  # type: ignore[operator]
        channel = out.ndim - 1 if op == "aten.linear" else out.ndim - weight.ndim + 1
        return out.masked_fill(_along(removed_out, channel, out.ndim), float("nan"))


def _groups(node: Node, op: str, args: list[Any], kwargs: dict[str, Any]) -> int:
    if op == "aten.linear":
        return 1
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index("groups")
    return int(args[position] if position < len(args) else kwargs.get("groups", 1))


def _removed(
    shape: tuple[int, ...], kept: Mapping[int, tuple[int, ...]], groups: int, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Removed input and output channels of a contraction, from the kept indices of its weight.

    A weight is [out, in / groups, ...], transposed [in, out / groups, ...]. Where each conv group reads one channel, a
    channel goes when the rows of its group go; else every conv group loses the same channels of its own.
    """
    gone = [torch.ones(shape[axis], dtype=torch.bool) for axis in (0, 1)]
    for axis in (0, 1):
        gone[axis][list(kept.get(axis, range(shape[axis])))] = False
    if transposed:
        return gone[0], _spread(gone[0], shape[1]) if groups > 1 and shape[0] == groups else gone[1].repeat(groups)
    if groups > 1 and shape[1] == 1:
        return gone[0].reshape(groups, -1).all(dim=1), gone[0]
    return gone[1].repeat(groups), gone[0]


def _spread(gone: torch.Tensor, each: int) -> torch.Tensor:
    return gone.repeat_interleave(each)


def _along(mask: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    view = [1] * rank
    view[axis] = -1
    return mask.reshape(view)


def _poisoned(value: torch.Tensor, kept: Mapping[int, tuple[int, ...]]) -> torch.Tensor:
    """A parameter that is used as data: what the plan removes of it becomes NaN."""
    for axis, indices in kept.items():
        gone = torch.ones(value.shape[axis], dtype=torch.bool)
        gone[list(indices)] = False
        value = value.masked_fill(_along(gone, axis, value.ndim), float("nan"))
    return value


def _is_dims(value: Any) -> bool:
    return isinstance(value, int | list | tuple) and not isinstance(value, bool)


def _without_nan(x: torch.Tensor, dims: Any) -> torch.Tensor:
    """Positions of the reduced axes that are not removed: a reduction runs over these only."""
    chosen = range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    for dim in chosen:
        gone = x.isnan().movedim(dim, 0).flatten(1).all(dim=1)
        if gone.any() and not gone.all():
            x = x.index_select(dim, (~gone).nonzero().flatten())
    return x


def _softmax(node: Node, args: list[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """Softmax over the entries that stay; removed entries stay marked."""
    x, dim = args[0], int(args[1])
    gone = x.isnan().movedim(dim, 0).flatten(1).all(dim=1)
    kept = (~gone).nonzero().flatten()
    args[0] = x.index_select(dim, kept)
    found: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return torch.full_like(x, float("nan"), dtype=found.dtype).index_copy(dim, kept, found)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Give biases, scales and batch-norm statistics random values: zero biases would hide a unit that leaks a constant.

    Biases move up and running means down, because a channel that an activation silences on all inputs would hide
    whatever was done to it.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        noise = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return noise.mul(high - low).add(low).to(like)

    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter.add_(uniform(parameter, 0.1, 0.8))
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("running_mean"):
                buffer.add_(uniform(buffer, -0.6, 0.0))
            elif name.endswith("running_var"):
                buffer.mul_(uniform(buffer, 0.5, 1.5))
