"""Cut a model by a plan: parameter names, axes and indices alone; nothing is traced."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from edgeprune.copying import copied
from edgeprune.errors import InputError, PlanError, SurgeryError
from edgeprune.surgery.comparing import Beside
from edgeprune.surgery.following import followed
from edgeprune.surgery.plan import PruningPlan
from edgeprune.surgery.program_module import ProgramModule
from edgeprune.surgery.tile_surgery import check_tiled, set_tiles, tiled_program

log = logging.getLogger("edgeprune.surgery")


def apply(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A cut copy of a model; the model itself is not touched.

    Linear layers of which only some tiles stay become `edgeprune.surgery.block_sparse.BlockSparseLinear` at the end.

    Parameters and buffers are cut by name and axis, and the attributes of torch's own layers follow. The copy is then compared
    with the cut program: by the operations that both call, which is a proof, or else by running both on random inputs, with
    the copy's own weights and with random ones. If they disagree, integer attributes
    follow that ``forward`` reads and that equal a size that the plan changes (``num_heads``, ``head_dim``); and where fused
    attention takes its scale from the head dimension, the query weights make up for it, see `edgeprune.surgery.following`. If
    copy and program agree, and the copy runs in train form where the model does, the copy is returned; otherwise
    (``forward`` spells out or computes with sizes in another way) a `ProgramModule`, our module around the cut program, with
    the same parameter names. So it is with a plan that removes whole branches. A plan whose program could not be written
    down leaves nothing to compare with: the copy is returned as it is, unless the plan changes sizes that ``forward`` spells out.

    Args:
        model: The model that the plan was made for.
        plan: What stays.

    Returns:
        The user's class with smaller parameters, or a `ProgramModule`; mode and devices are the model's.

    Raises:
        PlanError: If the plan belongs to another model, or names a module or an operation that it may not.
        SurgeryError: If ``forward`` cannot run at the new sizes and the program cannot be written down either; the
            operation and its source line are named.
    """
    require_own_plan(model, plan)
    check_tiled(model, plan)
    cut = copied(model, {}, SurgeryError)
    return _with_tiles(_narrowed(model, cut, plan), cut, plan)


def described(pruned: nn.Module, plan: PruningPlan) -> str:
    """Which of the two kinds of model `apply` returned, and why where it is the program, as a clause for a person."""
    if not isinstance(pruned, ProgramModule):
        return f"your own class {type(pruned).__name__} with smaller parameters"
    why = (
        "whole branches are gone, which no class can be told to skip"
        if plan.removed
        else f"forward, or its train form, works with sizes that the plan changes ({_places(plan) or 'computed'})"
    )
    return f"the cut program around your weights (ProgramModule): {why}"


def require_own_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Refuse a plan of another model.

    Raises:
        PlanError: If names or shapes of parameters and buffers differ from those that the plan was made for, or what is given
            is no plan.
        InputError: If the model is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model must be a torch.nn.Module, found {type(model).__name__}.")
    if not isinstance(plan, PruningPlan):
        raise PlanError(
            f"a plan must be a PruningPlan, found {type(plan).__name__}.", hint="edgeprune.PruningPlan.load(path)"
        )
    if _signature(model) != plan.signature:
        raise PlanError(
            "a plan must be applied to the model that it was made for, found other parameter names or shapes "
            f"({_first_difference(model, plan)}).",
            hint="trace this model and make a new plan",
        )


def _with_tiles(narrowed: nn.Module, cut: nn.Module, plan: PruningPlan) -> nn.Module:
    """What channels were cut from, with the tiles of a plan; `cut` is the user's class that holds its tensors."""
    if not plan.kept_tiles:
        return narrowed
    training = narrowed.training
    set_tiles(narrowed if not isinstance(narrowed, ProgramModule) else cut, plan)
    if isinstance(narrowed, ProgramModule):
        return ProgramModule.of(cut, tiled_program(narrowed.program, plan)).train(training)
    return narrowed


def _narrowed(model: nn.Module, cut: nn.Module, plan: PruningPlan) -> nn.Module:
    """Cut the channels of a copy; see `apply`."""
    _cut_tensors(cut, plan)
    modules = dict(cut.named_modules(remove_duplicate=False))
    for path, values in plan.attributes.items():
        _set_attributes(modules.get(path), path, values)
    if plan.removed:
        # Nothing in the user's class can be told to skip a branch.
        return _program(cut, plan).train(model.training)
    if plan.program is None and not plan.rewrites:
        return cut
    if plan.program is None:
        raise SurgeryError(
            f"forward must not spell out sizes that the plan changes, found {_places(plan)}; {plan.note}.",
            hint="module.register_buffer(...) for a large tensor that forward uses"
            if "constant" in plan.note
            else None,
        )
    program = ProgramModule.of(cut, plan.program).train(model.training)
    beside = Beside(model, cut, program, plan)
    if beside.agrees(lambda twin: None):
        return cut
    own = followed(model, cut, plan, beside.run, beside.agrees)
    if own is not None:
        return own
    if plan.parts:
        raise SurgeryError(
            "a model that was traced in parts must run at the new sizes as it is written, but it works with sizes that the "
            f"plan changes ({_places(plan) or 'computed'}).",
            hint="sizes taken from the weights or from the input, or edgeprune.Constraints(keep=...)",
        )
    log.info(
        "forward works with sizes that the plan changes (%s): returning the cut program", _places(plan) or "computed"
    )
    return program


def cut_program(model: nn.Module, plan: PruningPlan) -> ProgramModule:
    """The cut program around cut copies of the weights, without asking whether the model's own class can follow.

    Quicker than `apply`, for a model that is looked at once.

    Raises:
        SurgeryError: If the program cannot be written down.
    """
    cut = copied(model, {}, SurgeryError)
    _cut_tensors(cut, plan)
    return cast(ProgramModule, _with_tiles(_program(cut, plan).train(model.training), cut, plan))


def _program(cut: nn.Module, plan: PruningPlan) -> ProgramModule:
    if plan.program is None:
        raise SurgeryError(f"a cut program must be one that can be written down, found one that cannot: {plan.note}.")
    return ProgramModule.of(cut, plan.program)


def _set_attributes(module: nn.Module | None, path: str, values: Mapping[str, int | Sequence[int]]) -> None:
    missing = "no such module" if module is None else ", ".join(name for name in values if not hasattr(module, name))
    if module is None or missing:
        raise PlanError(f"a plan must change attributes that {path!r} has ({', '.join(values)}), found {missing}.")
    for name, value in values.items():
        setattr(module, name, value if isinstance(value, int) else tuple(value))


def _cut_tensors(model: nn.Module, plan: PruningPlan) -> None:
    """Replace every tensor that a plan names, under all names that a tied tensor has."""
    done: dict[int, Any] = {}
    hold: list[torch.Tensor] = []
    by_name = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, axes in plan.kept.items():
        old = by_name[name]
        hold.append(old)
        new = old.detach()
        for axis, indices in axes.items():
            new = new.index_select(axis, torch.tensor(indices, dtype=torch.long, device=new.device))
        new = new.clone(memory_format=torch.contiguous_format)
        done[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    for name, old in by_name.items():
        if id(old) in done:
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            table = owner._parameters if leaf in owner._parameters else owner._buffers
            table[leaf] = done[id(old)]
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            # What its forward reads is a list of its own, which follows attributes only where they are set one by one.
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def _places(plan: PruningPlan) -> str:
    places = [f"{item['op']} at {item['source'] or item['module'] or 'an unknown line'}" for item in plan.rewrites]
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(dict.fromkeys(places[:3])) + more


def _named_shapes(model: nn.Module) -> list[tuple[str, list[int]]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return sorted((name, list(tensor.shape)) for name, tensor in named)


def _signature(model: nn.Module) -> str:
    """The same words as `edgeprune.graph.channel_graph.model_signature`; a plan must apply without the graph package."""
    return hashlib.sha256(json.dumps(_named_shapes(model), separators=(",", ":")).encode()).hexdigest()


def _first_difference(model: nn.Module, plan: PruningPlan) -> str:
    shapes = dict(_named_shapes(model))
    for name, shape in plan.shapes.items():
        if name not in shapes:
            return f"it has no {name!r}"
        if tuple(shapes[name]) != shape:
            return f"{name!r} has shape {tuple(shapes[name])}, the plan expects {shape}"
    return "what differs is not cut by the plan"
