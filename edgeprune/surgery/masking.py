"""The original program with units masked instead of cut: the other side of every check.

Nothing here is shared with the cut or with the trace's labels. A removed unit is made visible by setting what its layer
produces to NaN. NaN then travels through element-wise, pooling and data movement operations by itself, exactly as far
as the unit's values would. Wherever an operation sums over channels, the channels that the plan removes there are
replaced by zero; a NaN that is still there, or that reaches an output, is a consumer that the plan forgot.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from edgeprune.errors import SurgeryError
from edgeprune.surgery import masked_math, masked_recurrence
from edgeprune.surgery.plan import PruningPlan

_CONVS = ("aten.conv1d", "aten.conv2d", "aten.conv3d")
_TRANSPOSED = ("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
_MEANS = (
    "aten.mean", "aten.sum", "aten.amax", "aten.amin", "aten.var", "aten.std", "aten.linalg_vector_norm",
    "aten.norm", "aten.logsumexp", "aten.prod", "aten.var_mean", "aten.std_mean",
)  # fmt: skip
_EXTREMES = ("aten.max.dim", "aten.min.dim", "aten.max.default", "aten.min.default")
_SOFTMAXES = ("aten.softmax", "aten.log_softmax", "aten._softmax", "aten._log_softmax")
_MATMULS = ("aten.matmul", "aten.bmm", "aten.mm", "aten.mv", "aten.dot", "aten.vdot")
_NORMS = ("aten.batch_norm", "aten.instance_norm")
_REPLACING = (
    "aten.masked_fill", "aten.tril", "aten.triu", "aten.nan_to_num", "aten.where", "aten.zeros_like",
    "aten.ones_like", "aten.full_like", "aten.index_put", "aten.sign", "aten.sgn", "aten.heaviside",
)  # fmt: skip
"""Operations, in place or not, that put other values in the place of some. What overwrites all may find anything there."""
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
        self._additions = {branch["addition"]: branch["kept"] for branch in plan.removed}
        self._live = _live(program, self._additions)
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
            value = value.detach() if isinstance(value, torch.Tensor) else value
            self._placeholders.append((name, _without_tiles(value, plan, target)))

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
        if n.name not in self._live:
            return None
        if n.name in self._additions:
            kept = next(one for one in n.all_input_nodes if one.name == self._additions[n.name])
            return self.fetch_args_kwargs_from_env(n)[0][n.args.index(kept)].clone()
        positional, keywords = self.fetch_args_kwargs_from_env(n)
        args, kwargs = list(positional), dict(keywords)
        if op.rstrip("_") in _DROPOUTS:
            return args[0]
        if op in _NORMS:
            return self._normalize(n, args, kwargs)
        if op in (*_CONVS, *_TRANSPOSED, "aten.linear"):
            return self._contract(n, op, args, kwargs)
        for position, argument in enumerate(n.args):
            args[position] = self._with_marks(argument, args[position])
        if op in _MEANS or (str(n.target) in _EXTREMES and not _tells_positions(n)):
            dims = _named_dims(n, args)
            args[0] = masked_math.left_of(args[0], dims if dims else range(args[0].ndim))[0]
        if op in _MATMULS:
            return masked_math.matmul(args[0], args[1])
        if op in _DEFINED or op in masked_recurrence.STEPS:
            named = {argument.name: argument.default_value for argument in n.target._schema.arguments}  # type: ignore[union-attr]
            named.update(zip(named, args, strict=False))
            if op in masked_recurrence.STEPS:
                return masked_recurrence.recurrence(op, named | kwargs)
            return _DEFINED[op](named | kwargs)
        if op.rstrip("_") in _REPLACING:
            # Before it runs: in place, it overwrites the marks.
            marks = masked_math.marks_of(args)
            return masked_math.marked(n.target(*args, **kwargs), marks, in_place=op.endswith("_"))  # type: ignore[operator]
        return n.target(*args, **kwargs)  # type: ignore[operator]

    def _with_marks(self, argument: Any, value: Any) -> Any:
        """A parameter that is used as data: what the plan removes of it becomes NaN."""
        if isinstance(argument, list | tuple):
            return [self._with_marks(item, own) for item, own in zip(argument, value, strict=True)]
        if not isinstance(argument, Node):
            return value
        for axis, indices in self._kept.get(argument.name, {}).items():
            gone = _gone(value.shape[axis], indices)
            value = value.masked_fill(masked_math.along(gone, axis, value.ndim), float("nan"))
        return value

    def _normalize(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if self._training and args[3] is not None:
            args[5], args[6] = True, self._momentum(node, args[6])
        x = args[0]
        if not args[5]:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        # Statistics of the input run over what is left along the other axes.
        dims = [dim for dim in range(x.ndim) if dim != 1]
        args[0], left = masked_math.left_of(x, dims)
        return masked_math.put_back(node.target(*args, **kwargs), x, dims, left)  # type: ignore[operator]

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
        groups = _groups(node, op, args, kwargs)
        transposed = op in _TRANSPOSED
        if weight_node.name in self._target_of:
            gone_of = [_gone(weight.shape[axis], self._kept.get(weight_node.name, {}).get(axis)) for axis in (0, 1)]
        else:
            gone_of = [masked_math.gone_along(weight, axis) for axis in (0, 1)]
            args[1] = weight.nan_to_num(0.0)
        removed_in, removed_out = _removed(gone_of, groups, transposed)
        channel = x.ndim - 1 if op == "aten.linear" else x.ndim - weight.ndim + 1
        gone = x.isnan()
        # Where all that is contracted is NaN, the position was removed along another axis: the result is NaN too.
        elsewhere = gone.all(dim=channel, keepdim=True)
        poisoned = (gone & ~elsewhere).movedim(channel, 0).reshape(x.shape[channel], -1).any(dim=1)
        forgotten = poisoned & ~removed_in.to(poisoned.device)
        if forgotten.any():
            index = int(forgotten.nonzero()[0])
            name = self._target_of.get(weight_node.name, weight_node.name)
            raise SurgeryError(f"{name} must not read units that the plan removes, found input channel {index}.")
        args[0] = x.masked_fill(masked_math.along(removed_in, channel, x.ndim).to(x.device) & ~elsewhere, 0.0)
        slid = masked_math.gone_along(args[0], -1) if op == "aten.conv1d" else gone.new_zeros(1)
        if slid.any() and not slid.all():
            # Channels along the axis that a kernel slides over: a removed one is what lies beyond the ends.
            args[0] = args[0].masked_fill(slid, 0.0)
        out = node.target(*args, **kwargs)  # type: ignore[operator]
        if slid.any():
            # Where results and what they read lie side by side, the removed ones are the same; else all depend on them.
            out = out.masked_fill(slid if out.shape[-1] == x.shape[-1] else slid.any(), float("nan"))
        channel = out.ndim - 1 if op == "aten.linear" else out.ndim - weight.ndim + 1
        return out.masked_fill(masked_math.along(removed_out, channel, out.ndim), float("nan"))


def _live(program: ExportedProgram, additions: Mapping[str, str]) -> frozenset[str]:
    """Operations that still count when some sums have lost all but one addend."""
    live: set[str] = set()
    for node in reversed(program.graph.nodes):
        readers = set(node.users)
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and node.all_input_nodes:
            # Who reads what it writes to may do so by the tensor's own name.
            readers |= set(node.all_input_nodes[0].users) - {node}
        if (
            not additions
            or node.op != "call_function"
            or any(reader.name in live and additions.get(reader.name, node.name) == node.name for reader in readers)
        ):
            live.add(node.name)
    return frozenset(live)


def _groups(node: Node, op: str, args: list[Any], kwargs: dict[str, Any]) -> int:
    if op == "aten.linear":
        return 1
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index("groups")
    return int(args[position] if position < len(args) else kwargs.get("groups", 1))


def _gone(size: int, kept: tuple[int, ...] | None) -> torch.Tensor:
    """True where an index of an axis is removed."""
    gone = torch.zeros(size, dtype=torch.bool)
    if kept is not None:
        gone[:] = True
        gone[list(kept)] = False
    return gone


def _without_tiles(value: Any, plan: PruningPlan, name: str) -> Any:
    """A weight with zeros where the plan removes a tile; other values as they are."""
    tiles = plan.kept_tiles.get(name)
    if tiles is None:
        return value
    rows, columns = tiles.grid.row_edges, tiles.grid.column_edges
    found = value.clone()
    for row, kept in enumerate(tiles.kept):
        for column in set(range(len(columns) - 1)) - set(kept):
            found[rows[row] : rows[row + 1], columns[column] : columns[column + 1]] = 0.0
    return found


def _removed(gone: list[torch.Tensor], groups: int, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Removed input and output channels of a contraction, from the removed indices of the first two axes of its weight.

    A weight is [out, in / groups, ...], transposed [in, out / groups, ...]. Where each conv group reads one channel, a
    channel goes when the rows of its group go; else every conv group loses the same channels of its own.
    """
    first, second = gone
    if transposed:
        depthwise = groups > 1 and len(first) == groups
        return first, first.repeat_interleave(len(second)) if depthwise else second.repeat(groups)
    if groups > 1 and len(second) == 1:
        return first.reshape(groups, -1).all(dim=1), first
    return second.repeat(groups), first


def _tells_positions(node: Node) -> bool:
    """Whether somebody reads at which position a maximum or minimum is, the second of its results."""
    return any(user.target is operator.getitem and user.args[1] == 1 and bool(user.users) for user in node.users)


def _named_dims(node: Node, args: list[Any]) -> list[int]:
    """The axes that a reduction names; none means all."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    dims = args[names.index("dim")] if "dim" in names and names.index("dim") < len(args) else node.kwargs.get("dim")
    return [dims] if isinstance(dims, int) else list(dims) if isinstance(dims, list | tuple) else []


def _softmax(named: dict[str, Any], log: bool) -> torch.Tensor:
    dtype = named.get("dtype")
    return masked_math.softmax(named["self"], named["dim"], dtype, log=log)


_DEFINED: dict[str, Callable[[dict[str, Any]], torch.Tensor]] = {
    **{op: partial(_softmax, log="log" in op) for op in _SOFTMAXES},
    "aten.layer_norm": lambda a: masked_math.layer_norm(
        a["input"], a["normalized_shape"], a["weight"], a["bias"], a["eps"]
    ),
    "aten.rms_norm": lambda a: masked_math.rms_norm(a["input"], a["normalized_shape"], a["weight"], a["eps"]),
    "aten.group_norm": lambda a: masked_math.group_norm(a["input"], a["num_groups"], a["weight"], a["bias"], a["eps"]),
    "aten.addmm": lambda a: a["beta"] * a["self"] + a["alpha"] * masked_math.matmul(a["mat1"], a["mat2"]),
    "aten.baddbmm": lambda a: a["beta"] * a["self"] + a["alpha"] * masked_math.matmul(a["batch1"], a["batch2"]),
    "aten._weight_norm": lambda a: masked_math.weight_norm(a["v"], a["g"], a["dim"]),
    "aten.bilinear": lambda a: masked_math.bilinear(a["input1"], a["input2"], a["weight"], a["bias"]),
    "aten.constant_pad_nd": lambda a: masked_math.pad(a["self"], a["pad"], "constant", a["value"]),
    "aten.grid_sampler": lambda a: masked_math.sampled(
        a["input"], a["grid"], a["interpolation_mode"], a["padding_mode"], a["align_corners"]
    ),
    "aten.im2col": lambda a: masked_math.windows(a["self"], a["kernel_size"], a["dilation"], a["padding"], a["stride"]),
    "aten.max_unpool2d": lambda a: masked_math.unpooled(a["self"], a["indices"], a["output_size"]),
    "aten.max_unpool3d": lambda a: masked_math.unpooled(
        a["self"], a["indices"], a["output_size"], a["stride"], a["padding"]
    ),
    "aten.pad": lambda a: masked_math.pad(a["self"], a["pad"], a["mode"], a["value"]),
    "aten.einsum": lambda a: masked_math.einsum(a["equation"], a["tensors"]),
    "aten.scaled_dot_product_attention": lambda a: masked_math.attention(
        a["query"], a["key"], a["value"], a["attn_mask"], causal=a["is_causal"], scale=a["scale"]
    ),
}
"""Operations that run over an axis, by what they mean over the rest of it."""


def randomize(model: nn.Module, seed: int = 0, settle: Callable[[], None] = lambda: None) -> None:
    """Give biases, scales, batch-norm statistics and constant weights random values: zeros would hide what is wrong.

    Biases move up and running means down, because a channel that an activation silences on all inputs would hide
    whatever was done to it.

    Args:
        model: Changed in place.
        seed: Of the noise.
        settle: Called when the parameters have changed and before the statistics do, to bring these up to date.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        noise = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return noise.mul(high - low).add(low).to(like)

    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if not parameter.is_floating_point():
                continue
            if parameter.ndim == 1:
                parameter.add_(uniform(parameter, 0.1, 0.8))
            elif bool((parameter == parameter.flatten()[0]).all()):
                # A head that starts at zero would hide all that is before it.
                parameter.add_(uniform(parameter, -0.1, 0.1))
        settle()
        buffers = dict(model.named_buffers())
        for name in sorted(name for name in buffers if name.endswith("running_mean")):
            variance = buffers.get(f"{name.removesuffix('running_mean')}running_var")
            size = buffers[name].new_ones(()) if variance is None else variance.sqrt()
            buffers[name].add_(size * uniform(buffers[name], -0.6, 0.0))
        for name in sorted(name for name in buffers if name.endswith("running_var")):
            buffers[name].mul_(uniform(buffers[name], 0.5, 1.5))
