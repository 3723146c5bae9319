"""A pruning plan: which indices of which parameter axes stay. It applies by names alone, without any trace."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import ConfigError, EmptyPlanError, PlanError
from edgeprune.files import write_text
from edgeprune.spec import Constraints

if TYPE_CHECKING:
    import torch
    from torch import nn

    from edgeprune.graph.channel_graph import ChannelGraph, ChannelGroup
    from edgeprune.parts import Part
    from edgeprune.surgery.kept_tiles import KeptTiles

SCHEMA = 5
"""Version of the plan's JSON format."""


@dataclass(frozen=True)
class PruningPlan:
    """What is left of a model.

    Attributes:
        signature: Of the model that the plan belongs to, see `edgeprune.graph.channel_graph.model_signature`.
        groups: Group name to ``{"size": units, "kept": [units]}``; nothing is kept of a group whose branch is removed.
        kept: Parameter or buffer name to axis to the indices that stay; whole axes are left out.
        shapes: Dense shape of every tensor in `kept`.
        forms: Like `kept`, the length that is left: ``{"constant": n, "terms": [[groups, positions per combination]]}``.
        kept_tiles: Weights of linear layers of which only some tiles stay. Tiles count the rows and columns of the dense weight,
            also those that `kept` leaves out: what stays is in both.
        folds: Pairs of linear layers one of which has kept tiles, and that have only element-wise operations between them:
            ``{"producer", "consumer", "shapes", "operations"}``, see `edgeprune.surgery.tile_folds`.
        removed: Residual branches that go as a whole: ``{"name", "addition", "kept", "tensors"}``, the sum's program node, that
            of the addend that stays, and parameters and buffers that go.
        attributes: Module path to attribute to new value, a list where the attribute is a tuple.
        frozen: ``{"name", "reason"}`` of what the trace left alone.
        inputs: ``{"name", "shape", "dtype"}`` of the example inputs at the deployment batch.
        program: The cut program as JSON values, or None.
        rewrites: Sizes written into the user's forward that the cut changes, with operation and source line.
        parts: What the program consists of where the model was traced in parts, see `edgeprune.parts`; its inputs are theirs.
        note: Why there is no program, or ``""``.
        predicted: Free information, such as predicted milliseconds.
    """

    signature: str
    groups: Mapping[str, Mapping[str, Any]]
    kept: Mapping[str, Mapping[int, tuple[int, ...]]]
    shapes: Mapping[str, tuple[int, ...]]
    forms: Mapping[str, Mapping[int, Mapping[str, Any]]]
    kept_tiles: Mapping[str, KeptTiles] = field(default_factory=dict)
    folds: tuple[Mapping[str, Any], ...] = ()
    removed: tuple[Mapping[str, Any], ...] = ()
    attributes: Mapping[str, Mapping[str, int | Sequence[int]]] = field(default_factory=dict)
    frozen: tuple[Mapping[str, str], ...] = ()
    inputs: tuple[Mapping[str, Any], ...] = ()
    program: Mapping[str, Any] | None = None
    rewrites: tuple[Mapping[str, Any], ...] = ()
    parts: tuple[Part, ...] = ()
    note: str = ""
    predicted: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the model's signature (its parameters' names and shapes), the kept indices and tiles, what is removed."""
        kept = {name: {str(axis): list(ids) for axis, ids in axes.items()} for name, axes in self.kept.items()}
        content: dict[str, Any] = {"signature": self.signature, "kept": kept}
        if self.removed:
            content["removed"] = [dict(branch) for branch in self.removed]
        if self.kept_tiles:
            content["kept_tiles"] = {name: tiles.to_json() for name, tiles in self.kept_tiles.items()}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def widths(self) -> dict[str, int]:
        """Units kept per group."""
        return {name: len(group["kept"]) for name, group in self.groups.items()}

    def empty_inputs(self) -> tuple[torch.Tensor, ...]:
        """Zeros in place of the example inputs; true where they are booleans (a mask that hides nothing).

        Raises:
            PlanError: If an input has a dtype that torch does not know.
        """
        import torch

        found = []
        for spec in self.inputs:
            dtype = getattr(torch, spec["dtype"], None)
            if not isinstance(dtype, torch.dtype):
                raise PlanError(f"inputs of a plan must have a dtype of torch, found {spec['dtype']!r}.")
            found.append((torch.ones if dtype == torch.bool else torch.zeros)(spec["shape"], dtype=dtype))
        return tuple(found)

    def traced(self, model: nn.Module, example_inputs: Any) -> tuple[nn.Module, Any]:
        """What of a model the plan's program computes, with example inputs: the model itself, or its parts and zeros.

        Args:
            model: The model that the plan was made for, or a cut one.
            example_inputs: As for `edgeprune.trace`.

        Raises:
            PlanError: If the model does not have the parts that the plan names.
        """
        from edgeprune.parts import core_of

        return (core_of(model, self.parts), self.empty_inputs()) if self.parts else (model, example_inputs)

    def with_prediction(self, **information: Any) -> PruningPlan:
        """The same plan with more information in `predicted`."""
        return replace(self, predicted={**self.predicted, **information})

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; an existing file is replaced in one step."""
        from edgeprune.surgery.plan_format import to_json

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(to_json(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan and check every rule that it must obey.

        Raises:
            PlanError: If the file is missing, is not a plan, has a newer schema, or breaks a rule; the message names
                the group or parameter and the rule.
        """
        from edgeprune.surgery.plan_format import from_json

        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"a plan must be a readable JSON file, found {path}: {error}") from error
        return from_json(values)


def make_plan(
    graph: ChannelGraph,
    kept_units: Mapping[str, Sequence[int]],
    *,
    kept_tiles: Mapping[str, KeptTiles] | None = None,
    predicted: Mapping[str, Any] | None = None,
    allow_empty: bool = False,
) -> PruningPlan:
    """Turn kept units into a plan.

    Args:
        graph: The traced model.
        kept_units: Group name to the units that stay; groups that are not named stay whole. Where all groups of a residual
            branch (`ChannelGraph.branches`) keep none, the branch is removed.
        kept_tiles: Weights of linear layers of which only some tiles stay.
        predicted: Free information for the plan.
        allow_empty: Accept a plan that removes nothing.

    Raises:
        PlanError: If a group is unknown or frozen, its units are duplicate or out of range, or it keeps none and other groups
            of its branch do, or it lies in no branch; if a weight can have no tiles, or its grid does not cover it.
        EmptyPlanError: If nothing is removed.
    """
    from edgeprune.graph.branches import removed_branches
    from edgeprune.graph.editing import edited_program, masks_of, written_chains
    from edgeprune.graph.modules import attribute_of, attributes_after
    from edgeprune.surgery.kept_tiles import checked_tiles

    whole = {name: _group(graph, name).size for name in kept_units}
    kept_units = {name: _listed(name, units) for name, units in kept_units.items()}
    removed = removed_branches(graph.branches, {name: len(units) for name, units in kept_units.items()})
    gone = {name for branch in removed for name in branch.tensors}
    emptied = {name for branch in removed for name in branch.groups}
    tiles = checked_tiles(graph, kept_tiles or {}, gone)
    masks = {
        name: np.ones(whole[name], bool) if name in emptied else _mask(graph.group(name), units)
        for name, units in kept_units.items()
    }
    if all(mask.all() for mask in masks.values()) and not removed and not tiles and not allow_empty:
        why = "no group can be pruned" if not graph.groups else "every group keeps all of its units"
        raise EmptyPlanError(f"a plan must remove at least one unit, but {why}.", hint="edgeprune explain MODEL")
    kept = masks_of(graph, masks)
    table: dict[str, dict[int, tuple[int, ...]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    forms: dict[str, dict[int, dict[str, Any]]] = {}
    sizes = graph.size_forms()
    for name in dict.fromkeys(member.parameter for group in graph.groups for member in group.members):
        for axis, form in enumerate(sizes[name] if name not in gone else ()):
            mask = kept.masks(name, axis)
            if not mask.all():
                table.setdefault(name, {})[axis] = tuple(np.flatnonzero(mask).tolist())
                terms = [[list(groups), count] for groups, count in form.terms]
                forms.setdefault(name, {})[axis] = {"constant": form.constant, "terms": terms}
                shapes[name] = tuple(codes.shape[1] for codes in graph.unit_of[name])
    attributes: dict[str, dict[str, int | list[int]]] = {}
    for name, old in shapes.items():
        path, leaf = attribute_of(graph.model, name, old)
        if path in graph.modules and leaf in ("weight", "running_mean", "weight_ih_l0"):
            new = tuple(len(table[name].get(axis, range(size))) for axis, size in enumerate(old))
            attributes[path] = attributes_after(graph.modules[path], old, new, kept.masks(name, 0))
    program, rewrites, note = edited_program(graph, kept, removed)
    if program is not None and (refusal := _refusal(program)):
        program, note = None, refusal
    return PruningPlan(
        signature=graph.signature,
        groups={
            group.name: {
                "size": group.size,
                "kept": []
                if group.name in emptied
                else np.flatnonzero(masks.get(group.name, np.ones(group.size, bool))).tolist(),
            }
            for group in graph.groups
        },
        kept=table,
        shapes=shapes,
        forms=forms,
        kept_tiles=tiles,
        folds=tuple(fold for fold in written_chains(graph, tiles) if not gone & {fold["producer"], fold["consumer"]}),
        removed=tuple(
            {"name": one.name, "addition": one.addition, "kept": one.kept, "tensors": list(one.tensors)}
            for one in removed
        ),
        attributes=attributes,
        frozen=tuple({"name": axis.name, "reason": axis.reason} for axis in graph.frozen),
        inputs=tuple(
            {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in zip(graph.input_names, graph.example_inputs, strict=True)
        ),
        program=program,
        rewrites=tuple(rewrites),
        parts=graph.parts,
        note=note,
        predicted=dict(predicted or {}),
    )


def uniform_plan(
    graph: ChannelGraph,
    ratio: float,
    constraints: Constraints | None = None,
    scores: Mapping[str, npt.NDArray[Any]] | None = None,
    multiple_of: int = 1,
) -> PruningPlan:
    """Remove the same share of every group, the least important units first.

    Args:
        graph: The traced model.
        ratio: Share of the units to remove, in [0, 1).
        constraints: What must be respected.
        scores: Group name to importance per unit, shape [size]; L2 norm of the producing weights when left out.
        multiple_of: Kept widths are rounded to the nearest multiple where the group is larger than it.

    Raises:
        ConfigError: If the ratio is not in [0, 1), or the graph is none.
        ConstraintError: If a pattern matches nothing.
        EmptyPlanError: If nothing is removed.
        PlanError: If scores are missing, of another shape, or NaN.
    """
    from edgeprune.surgery.constraints import resolve
    from edgeprune.surgery.magnitude import l2_norms

    if not hasattr(graph, "groups"):
        raise ConfigError(
            f"a plan must be made for the graph of a model, found {type(graph).__name__}.",
            hint="edgeprune.trace(model, example_inputs)",
        )
    given: Any = ratio
    if isinstance(given, bool) or not isinstance(given, Real) or not 0 <= float(given) < 1:
        raise ConfigError(f"the ratio must lie in [0, 1), found {ratio!r}.")
    rules = resolve(constraints or Constraints(), graph)
    importance = scores if scores is not None else l2_norms(graph)
    widths: dict[str, int] = {}
    for group in graph.groups:
        rule = rules[group.name]
        wanted = round(group.size * (1 - ratio))
        widths[group.name] = rule.width(wanted, group.size, also_multiple_of=multiple_of)
    for group in graph.groups:
        tied = rules[group.name].tied_to
        if tied is not None and not rules[group.name].frozen:
            widths[group.name] = widths[tied]
    kept = {}
    for group in graph.groups:
        values = np.asarray(importance.get(group.name, ()))
        if values.shape != (group.size,):
            raise PlanError(f"scores of {group.name!r} must have shape ({group.size},), found {values.shape}.")
        if np.isnan(values).any():
            raise PlanError(f"scores of {group.name!r} must be numbers, found NaN.")
        best = np.argsort(-values, kind="stable")[: widths[group.name]]
        kept[group.name] = sorted(best.tolist())
    return make_plan(graph, kept)


def _refusal(program: Mapping[str, Any]) -> str:
    """Why a written program could not be read again, or ``""``."""
    from edgeprune.nesting import read_nesting
    from edgeprune.surgery.operations import operation

    try:
        for spec in ("in_spec", "out_spec"):
            read_nesting(program[spec])
        for op in {node["op"] for node in program["nodes"]}:
            operation(op)
    except PlanError as error:
        return error.message.removesuffix(".")
    return ""


def _group(graph: ChannelGraph, name: str) -> ChannelGroup:
    for axis in graph.frozen:
        if axis.name == name and name not in graph.offset_of:
            raise PlanError(f"a plan must not name a frozen group, found {name!r}: {axis.reason}.")
    return graph.group(name)


def _listed(name: str, units: Any) -> list[int]:
    """Units as whole numbers."""
    if isinstance(units, str | bytes | Mapping) or not isinstance(units, Iterable):
        raise PlanError(
            f"units of group {name!r} must be a list of whole numbers, found {type(units).__name__} (rule: whole numbers)."
        )
    found = list(units)
    for unit in found:
        if isinstance(unit, bool | np.bool_) or not hasattr(unit, "__index__"):
            raise PlanError(
                f"units of group {name!r} must be whole numbers, found {unit!r} (rule: whole numbers).",
                hint="numpy.flatnonzero(mask), where it is a mask" if isinstance(unit, bool | np.bool_) else None,
            )
    return [operator.index(unit) for unit in found]


def _mask(group: ChannelGroup, units: Sequence[int]) -> npt.NDArray[np.bool_]:
    check_units(group.name, group.size, list(units))
    mask = np.zeros(group.size, dtype=bool)
    mask[list(units)] = True
    return mask


def check_units(name: str, size: int, units: Sequence[int]) -> None:
    """The rules that the kept units of one group must obey.

    Raises:
        PlanError: If there are none, or one is duplicate or out of range.
    """
    if not len(units):
        raise PlanError(f"group {name!r} must keep at least one unit, found none (rule: emptied group).")
    outside = [unit for unit in units if not 0 <= unit < size]
    if outside:
        raise PlanError(f"units of group {name!r} must lie in [0, {size}), found {outside[0]} (rule: out of range).")
    if len(set(units)) != len(units):
        twice = next(unit for unit in units if list(units).count(unit) > 1)
        raise PlanError(f"units of group {name!r} must be named once, found {twice} again (rule: duplicate).")
