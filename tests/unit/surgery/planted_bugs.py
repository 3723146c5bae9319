"""Surgery bugs to plant: each makes a cut model that is wrong in one place."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from edgeprune.graph.channel_graph import ChannelGraph, Member
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import PruningPlan, make_plan
from edgeprune.surgery.program_module import ProgramModule

Cut = Callable[[nn.Module, PruningPlan], nn.Module]
Dice = random.Random


@dataclass(frozen=True)
class Bug:
    """One bug.

    Attributes:
        kind: What is wrong.
        where: In which place.
        believed: The plan that the masked side follows: the right one, or the wrong one as well.
        cut: What cuts a model with the bug.
    """

    kind: str
    where: str
    believed: PruningPlan
    cut: Cut


def planted(graph: ChannelGraph, plan: PruningPlan, dice: Dice) -> list[Bug]:
    """All bugs for one plan."""
    found: list[Bug] = []
    for kind, where, wrong in [*_wrong_indices(plan, dice), *_wrong_units(graph, plan, dice)]:
        cut: Cut = lambda model, _, wrong=wrong: apply(model, wrong)  # noqa: E731
        found.append(Bug(kind, where, plan, cut))
        if kind in ("forgotten", "wrong axis"):
            found.append(Bug(f"{kind}, believed by both sides", where, wrong, cut))
    for kind, where, program in _wrong_programs(graph, plan):
        cut = lambda model, plan, program=program: ProgramModule.of(apply(model, plan), program)  # noqa: E731
        found.append(Bug(kind, where, plan, cut))
    return [*found, *(Bug(kind, where, plan, cut) for kind, where, cut in _wrong_norms(plan))]


# Wrong indices along one axis of one tensor


def with_kept(plan: PruningPlan, name: str, axis: int, indices: list[int] | None) -> PruningPlan:
    """The plan with other indices in one place; None where it forgets the place."""
    kept = {key: dict(axes) for key, axes in plan.kept.items()}
    if indices is None:
        del kept[name][axis]
    else:
        kept[name][axis] = tuple(indices)
    return replace(plan, kept=kept)


def _off_by_one(plan: PruningPlan, name: str, axis: int, dice: Dice) -> PruningPlan | None:
    indices, size = list(plan.kept[name][axis]), plan.shapes[name][axis]
    moves = [(i, i + 1) for i in indices if i + 1 < size and i + 1 not in indices]
    if not moves:
        return None
    old, new = dice.choice(moves)
    return with_kept(plan, name, axis, sorted(new if i == old else i for i in indices))


def _permuted(plan: PruningPlan, name: str, axis: int, dice: Dice) -> PruningPlan | None:
    indices = list(plan.kept[name][axis])
    if len(indices) < 2:
        return None
    a, b = dice.sample(range(len(indices)), 2)
    indices[a], indices[b] = indices[b], indices[a]
    return with_kept(plan, name, axis, indices)


def _first(plan: PruningPlan, name: str, axis: int, dice: Dice) -> PruningPlan | None:
    indices = list(plan.kept[name][axis])
    first = list(range(len(indices)))
    return None if first == indices else with_kept(plan, name, axis, first)


def _forgotten(plan: PruningPlan, name: str, axis: int, dice: Dice) -> PruningPlan | None:
    return with_kept(plan, name, axis, None)


def _wrong_axis(plan: PruningPlan, name: str, axis: int, dice: Dice) -> PruningPlan | None:
    shape = plan.shapes[name]
    if len(shape) < 2 or max(plan.kept[name][axis]) >= shape[1 - axis]:
        return None
    kept = {key: dict(axes) for key, axes in plan.kept.items()}
    first, second = kept[name].get(0), kept[name].get(1)
    kept[name] = {a: ids for a, ids in ((0, second), (1, first)) if ids is not None and max(ids) < shape[a]}
    return None if kept[name] == dict(plan.kept[name]) else replace(plan, kept=kept)


INDICES: dict[str, Callable[[PruningPlan, str, int, Dice], PruningPlan | None]] = {
    "off by one": _off_by_one,
    "permuted": _permuted,
    "first instead of chosen": _first,
    "forgotten": _forgotten,
    "wrong axis": _wrong_axis,
}


def _wrong_indices(plan: PruningPlan, dice: Dice) -> Iterator[tuple[str, str, PruningPlan]]:
    for name, axes in plan.kept.items():
        for axis in axes:
            for kind, plant in INDICES.items():
                wrong = plant(plan, name, axis, dice)
                if wrong is not None:
                    yield kind, f"{name} axis {axis}", wrong


# Another unit in one layer than in the others: a head that is cut in the queries, but not in the values


def _wrong_units(graph: ChannelGraph, plan: PruningPlan, dice: Dice) -> Iterator[tuple[str, str, PruningPlan]]:
    for group in graph.groups:
        kept = plan.groups[group.name]["kept"]
        removed = sorted({*range(group.size)} - {*kept})
        if not removed:
            continue
        old, new = dice.choice(kept), dice.choice(removed)
        layers = {member.parameter.rpartition(".")[0] for member in group.members if member.role == "output"}
        for layer in sorted(layers):
            own = [m for m in group.members if m.parameter.rpartition(".")[0] == layer and m.role != "input"]
            for kind, share in (("another unit", 0.0), ("another unit in the last third", 2 / 3)):
                wrong = plan
                for member in own:
                    wrong = _exchanged(wrong, member, old, new, share)
                if dict(wrong.kept) != dict(plan.kept):
                    yield kind, f"{layer}, unit {new} for {old} of {group.name!r}", wrong


def _exchanged(plan: PruningPlan, member: Member, old: int, new: int, share: float) -> PruningPlan:
    """The positions of one unit for those of another, behind a share of the axis."""
    start = share * plan.shapes[member.parameter][member.axis]
    pairs = zip(member.indices[old], member.indices[new], strict=True)
    other = {i: j for i, j in pairs if min(i, j) >= start}
    indices = [other.get(i, i) for i in plan.kept[member.parameter][member.axis]]
    return with_kept(plan, member.parameter, member.axis, sorted(indices))


# Wrong arguments in the program


def _wrong_programs(graph: ChannelGraph, plan: PruningPlan) -> Iterator[tuple[str, str, dict[str, Any]]]:
    assert plan.program is not None
    dense = make_plan(graph, {}, allow_empty=True).program
    assert dense is not None
    before = {node["name"]: node for node in dense["nodes"]}
    for index, node in enumerate(plan.program["nodes"]):
        for kind, args in _wrong_arguments(before[node["name"]], node):
            program = copy.deepcopy(dict(plan.program))
            program["nodes"][index]["args"] = {**node["args"], **args}
            yield kind, node["name"], program


def _wrong_arguments(dense: dict[str, Any], node: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    op, args = node["op"].split(".")[1], node["args"]
    for name, value in args.items():
        if op == dense["op"].split(".")[1] and value != dense["args"].get(name):
            yield "argument not rewritten", {name: dense["args"][name]}
        if isinstance(value, float) and value and op in ("mul", "div", "scaled_dot_product_attention"):
            yield "wrong scale", {name: value * math.sqrt(2)}
    sizes = next((args[name] for name in ("size", "shape", "sizes") if isinstance(args.get(name), list)), [])
    plain = [at for at, size in enumerate(sizes) if isinstance(size, int) and size > 1]
    if op in ("view", "reshape", "unflatten"):
        for one, other in pairwise(plain):
            if sizes[one] != sizes[other]:
                swapped = list(sizes)
                swapped[one], swapped[other] = sizes[other], sizes[one]
                yield "sizes swapped", {next(n for n in ("size", "shape", "sizes") if n in args): swapped}
    if op == "cat" and args["tensors"] != args["tensors"][::-1]:
        yield "joined in the wrong order", {"tensors": args["tensors"][::-1]}
    pieces = next((name for name in ("split_size", "split_sizes") if isinstance(args.get(name), list)), None)
    if op in ("split", "split_with_sizes") and pieces and args[pieces] != args[pieces][::-1]:
        yield "pieces swapped", {pieces: args[pieces][::-1]}
    if op == "slice" and isinstance(args.get("start"), int) and args["start"] > 0 and args.get("step", 1) == 1:
        yield "slice off by one", {"start": args["start"] - 1, "end": _moved(args["end"])}
    if op == "group_norm" and args["num_groups"] > 1:
        yield "wrong number of norm groups", {"num_groups": 1}
    if op.startswith("conv") and args.get("groups", 1) > 1:
        yield "wrong number of conv groups", {"groups": 1}


def _moved(end: Any) -> Any:
    return end - 1 if isinstance(end, int) and end < 1 << 30 else -1


# Norms over the wrong entries


class _WrongNorm(TorchFunctionMode):
    """The norm of one turn leaves the last entry out of its statistics, or divides by how many there were before."""

    def __init__(self, turn: int, count: float | None) -> None:
        super().__init__()
        self.turn, self.count = turn, count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_norm(func):
            return func(*args, **kwargs)
        self.turn -= 1
        if self.turn != -1:
            return func(*args, **kwargs)
        x, found = args[0], func(*args, **kwargs)
        if self.count is not None:
            return found * math.sqrt(self.count / x.shape[-1])
        left = torch.cat([x[..., :-1], x[..., :-1].mean(-1, keepdim=True)], -1)
        return func(left, *args[1:], **kwargs)


def is_norm(function: Any) -> bool:
    """Whether a function normalizes over the last axis."""
    return str(getattr(function, "__name__", function)).partition(".")[0] in ("layer_norm", "rms_norm")


def _wrong_norms(plan: PruningPlan) -> Iterator[tuple[str, str, Cut]]:
    assert plan.program is not None
    norms = [node for node in plan.program["nodes"] if node["op"].split(".")[1] in ("layer_norm", "rms_norm")]
    for turn, node in enumerate(norms):
        for kind, count in (("norm without its last entry", None), ("norm over the dense width", 2.0)):
            scale = None if count is None else count * node["args"]["normalized_shape"][-1]
            yield kind, node["name"], _with_wrong_norm(turn, scale)


def _with_wrong_norm(turn: int, count: float | None) -> Cut:
    def cut(model: nn.Module, plan: PruningPlan) -> nn.Module:
        assert plan.program is not None
        pruned = ProgramModule.of(apply(model, plan), plan.program)

        class Wrong(ProgramModule):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                with _WrongNorm(turn, count):
                    return super().forward(*args, **kwargs)

        pruned.__class__ = Wrong
        return pruned

    return cut
