"""What tracing returns: the channel groups of a model, what is frozen and why, and every shape as a function of widths."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NoReturn

import torch
from torch import nn
from torch.export import ExportedProgram

from edgeprune.errors import ConstraintError, PlanError
from edgeprune.graph.atoms import Ids
from edgeprune.graph.branches import ResidualBranch, residual_branches
from edgeprune.graph.forms import ShapeTable, SizeForm
from edgeprune.graph.modules import ModuleFacts
from edgeprune.graph.train_form import attention_dropout
from edgeprune.parts import Part

if TYPE_CHECKING:
    from edgeprune.graph.constants import Constant
    from edgeprune.surgery.plan import PruningPlan

Role = Literal["output", "input", "vector"]


@dataclass(frozen=True)
class Member:
    """One axis of one parameter or buffer that a group cuts.

    Attributes:
        parameter: Fully qualified name.
        axis: Axis of that tensor.
        indices: Per unit of the group, the indices along the axis that go with it.
        role: ``"output"`` where the axis makes channels, ``"input"`` where it reads them, ``"vector"`` for one entry
            per channel (bias, batch norm).
    """

    parameter: str
    axis: int
    indices: tuple[tuple[int, ...], ...]
    role: Role


@dataclass(frozen=True)
class ChannelGroup:
    """Coupled axes that must be cut together.

    Attributes:
        name: Module path of the layer that makes the channels; ``"conv1 (+4 layers)"`` where several do.
        size: Number of units.
        unit: What one unit is: ``"channel"``, ``"conv-group channel"`` (one channel of each conv group), ``"head"`` of an
            attention, or ``"head dimension"`` (one of each head).
        members: The axes.
        nodes: Program nodes that make the channels.
    """

    name: str
    size: int
    unit: str
    members: tuple[Member, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class FrozenAxis:
    """Channels that were left alone.

    Attributes:
        name: Module path of the layer that makes them, or the input's name.
        size: Number of channels.
        reason: Why, in one sentence.
        op: The operation that is responsible.
        source: ``file:line`` of the user's code, or ``""``.
        nodes: Program nodes that make the channels, or the operation without a rule.
    """

    name: str
    size: int
    reason: str
    op: str
    source: str
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class ChannelGraph:
    """A captured model and the groups of channels that can be cut from it.

    Attributes:
        model: The traced model itself.
        groups: Everything that can be cut, in program order.
        frozen: Everything that was left alone.
        program: The ATen program that was analyzed; it shares its weights with the traced model.
        example_inputs: Flat positional tensors at the deployment batch.
        input_names: Names of the inputs.
        signature: SHA-256 over names and shapes of parameters and buffers: what a plan belongs to.
        modules: Facts of the modules whose attributes follow their parameters.
        batch: Deployment batch.
        dynamic_batch: Whether the captured program works for every batch.
        note: Why the batch is fixed, or ``""``.
        unit_of: Per program node and per parameter, for each axis the (group, unit) codes of every position, shape
            [factors, size]: a position stays as long as all of its units stay. A group's units are numbered from its
            entry in `offset_of`; -1 is none.
        offset_of: First code of each group.
        table: Every shape as a function of the widths.
        parts: What the program consists of where the model as a whole cannot be traced, see `edgeprune.parts`.
        failure: Why the whole cannot be traced, or ``""``.
    """

    model: nn.Module
    groups: tuple[ChannelGroup, ...]
    frozen: tuple[FrozenAxis, ...]
    program: ExportedProgram
    example_inputs: tuple[torch.Tensor, ...]
    input_names: tuple[str, ...]
    signature: str
    modules: Mapping[str, ModuleFacts]
    batch: int
    dynamic_batch: bool
    note: str
    unit_of: Mapping[str, tuple[Ids, ...]]
    offset_of: Mapping[str, int]
    table: ShapeTable
    parts: tuple[Part, ...] = ()
    failure: str = ""

    def __repr__(self) -> str:
        units = sum(group.size for group in self.groups)
        return (
            f"ChannelGraph({type(self.model).__name__}: {len(self.groups)} groups with {units} units, "
            f"{len(self.frozen)} left alone, batch {self.batch})"
        )

    @cached_property
    def branches(self) -> tuple[ResidualBranch, ...]:
        """Residual branches that can be removed as a whole: where all groups of one have width 0."""
        return () if self.parts else residual_branches(self.program, self.groups)

    @cached_property
    def attention_dropout(self) -> dict[str, float]:
        """With which probability fused attention drops in train form, by program node, where it does."""
        return attention_dropout(self)

    def group(self, name: str) -> ChannelGroup:
        """The group of that name, or that begins with the layer of that name.

        Raises:
            PlanError: If there is none; near names are listed.
        """
        wanted = self._whole_name(name)
        for group in self.groups:
            if group.name == wanted:
                return group
        near = near_names(name, [group.name for group in self.groups])
        raise PlanError(f"a group must be one of the model's {len(self.groups)} groups, found {name!r}.", hint=near)

    def named(self, widths: Mapping[str, int]) -> Mapping[str, int]:
        """Widths by the whole names of groups, where some may be named by their first layer: ``"conv1"`` for
        ``"conv1 (+4 layers)"``, if there is only one such group.

        Raises:
            PlanError: If a name is none of a group's, or a group is named twice.
        """
        if not isinstance(widths, Mapping):
            raise PlanError(
                f"widths must be a mapping from names of groups, found {type(widths).__name__}.",
                hint="KernelGraph.of_plan(plan) for a plan",
            )
        if widths.keys() <= self.table.sizes.keys():
            return widths
        found: dict[str, int] = {}
        for name, width in widths.items():
            whole = self.group(name).name
            if whole in found:
                raise PlanError(f"widths must name each group once, found {whole!r} by two names.")
            found[whole] = width
        return found

    def _whole_name(self, name: str) -> str:
        if name in self.table.sizes:
            return name
        begun = [group.name for group in self.groups if group.name.startswith(f"{name} (+")]
        return begun[0] if len(begun) == 1 else name

    def widths(self) -> dict[str, int]:
        """Widths of the dense model."""
        return {group.name: group.size for group in self.groups}

    def shapes(self, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Shape of every program node, parameter and buffer at the given widths and the deployment batch.

        Nodes that hold several tensors (chunk, split) are left out; their parts are nodes of their own.

        Args:
            widths: Units kept per group, at least 1; groups that are not named keep all. Names as in `named`.

        Raises:
            PlanError: If a group is unknown or a width is out of range.
        """
        return self.table.shapes(self.named(widths))

    def size_forms(self) -> dict[str, tuple[SizeForm, ...]]:
        """Every axis that `shapes` returns, as ``constant + sum of coefficient * product of widths``."""
        return self.table.size_forms()

    def constants(self, plan: PruningPlan) -> tuple[Constant, ...]:
        """What removed units would still feed the layers that read them, see `edgeprune.graph.constants`.

        Raises:
            PlanError: If the plan belongs to another model.
        """
        from edgeprune.graph.constants import constants

        return constants(self, plan)

    def explain(self, latency_share: Mapping[str, float] | None = None) -> str:
        """What can be cut, what was left alone and why, as plain text.

        Args:
            latency_share: Per program node its share of the dense latency, of `edgeprune.report.collecting.latency_shares`:
                said of the layers that make each group's channels, and of what was left alone.
        """

        def share(nodes: tuple[str, ...]) -> str:
            if latency_share is None:
                return ""
            return f", {sum(latency_share.get(node, 0.0) for node in nodes):.1%} of the latency"

        lines = [f"channel groups: {len(self.groups)}, with {sum(group.size for group in self.groups)} units"]
        for group in self.groups:
            axes = _counted(len(group.members), "axis")
            units = _counted(group.size, group.unit)
            lines.append(f"  {group.name}: {units}{share(group.nodes)}, cut along {axes} of weights")
        lines.append(f"left alone: {len(self.frozen)}")
        for axis in self.frozen:
            where = f" at {axis.source}" if axis.source else ""
            op = f" ({axis.op}{where})" if axis.op else ""
            lines.append(f"  {axis.name}: {axis.size} wide{share(axis.nodes)}: {axis.reason}{op}")
        if self.branches:
            lines.append(f"residual branches that can be removed as a whole: {len(self.branches)}")
            lines += [f"  {branch.name}: {', '.join(branch.groups)}" for branch in self.branches]
        lines += self._tiles_told()
        if self.parts:
            paths = ", ".join(dict.fromkeys(part.path for part in self.parts))
            lines.append(f"traced in parts: {paths}; what is between and behind them stays as it is ({self.failure})")
        if not self.dynamic_batch:
            lines.append(f"batch fixed at {self.batch}: {self.note}")
        return "\n".join(lines)

    def _tiles_told(self) -> list[str]:
        """Lines on the linear layers that can be cut into tiles, and on those that cannot."""
        from edgeprune.graph.linear_layers import linear_layers

        layers = linear_layers(self.model, self)
        names = [name for name in layers.replaceable if name not in layers.classifiers]
        if self.parts or not names:
            return []
        lines = [f"linear layers that can be cut into tiles: {len(names)}", f"  {_named(names)}"]
        by_reason: dict[str, list[str]] = {}
        for name, reason in layers.others.items():
            by_reason.setdefault(reason, []).append(name)
        return lines + [f"  not {_named(names)}: {reason}" for reason, names in by_reason.items()]


def _named(names: Iterable[str]) -> str:
    """The first few of some names."""
    names = list(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _counted(count: int, what: str) -> str:
    """``"1 axis"``, ``"7 axes"``, ``"32 channels"``."""
    plural = f"{what[:-2]}es" if what.endswith("is") else f"{what}s"
    return f"{count} {what if count == 1 else plural}"


def model_signature(model: nn.Module) -> str:
    """SHA-256 over the names and shapes of all parameters and buffers."""
    shapes: list[tuple[str, list[int]]] = [
        (name, list(tensor.shape)) for name, tensor in model.named_parameters(remove_duplicate=False)
    ]
    shapes += [(name, list(tensor.shape)) for name, tensor in model.named_buffers(remove_duplicate=False)]
    return hashlib.sha256(json.dumps(sorted(shapes), separators=(",", ":")).encode()).hexdigest()


def near_names(name: str, names: Iterable[str]) -> str | None:
    """A hint that lists names that look like the one that was not found."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.3) or names[:4]
    return "one of " + ", ".join(repr(n) for n in near) if near else None


def raise_unknown_pattern(pattern: str, names: Iterable[str], what: str) -> NoReturn:
    """Refuse a pattern that matches nothing.

    Raises:
        ConstraintError: Always.
    """
    raise ConstraintError(
        f"{what} must match at least one group, {pattern!r} matches none.", hint=near_names(pattern, names)
    )
