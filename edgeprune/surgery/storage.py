"""Save and load cut models: safetensors and JSON, never pickle.

A folder holds ``weights.safetensors``, ``model.json`` (kind, names of tied tensors, dtype facts) and, where there is
one, ``plan.json``. With the original class a saved model is reloaded as class + plan + weights; without it as a
`ProgramModule` from the program that the plan carries.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from edgeprune.errors import PlanError
from edgeprune.files import replacing, write_text
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import PruningPlan
from edgeprune.surgery.program_module import ProgramModule
from edgeprune.surgery.tile_surgery import shapes_after, tiled_program

WEIGHTS, PLAN, MODEL = "weights.safetensors", "plan.json", "model.json"
SCHEMA = 1


def save(module: nn.Module, folder: str | Path, plan: PruningPlan | None = None) -> None:
    """Write a cut model.

    Args:
        module: What `edgeprune.apply` returned, trained further or not.
        folder: Where to; files of an earlier save are replaced.
        plan: The plan that it was cut by; without it, only a `ProgramModule` can be loaded without the original class.

    Raises:
        PlanError: If the module was not cut by the plan.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(module)
    if plan is not None:
        _require_cut_by(tensors, plan)
    unique: dict[int, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        first = unique.setdefault(id(tensor), name)
        if first != name:
            aliases[name] = first
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if name not in aliases}
    program = dict(module.program) if isinstance(module, ProgramModule) and plan is None else None
    description = {"schema": SCHEMA, "aliases": aliases, "program": program}
    with replacing(folder / WEIGHTS) as draft:
        save_file(stored, draft)
    write_text(folder / MODEL, json.dumps(description, indent=1) + "\n")
    if plan is not None:
        plan.save(folder / PLAN)
    else:
        (folder / PLAN).unlink(missing_ok=True)


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read what `save` wrote: JSON and safetensors. No archive of torch (``.pt``, ``.pt2``) is opened.

    Args:
        folder: Where `save` wrote to.
        model: The original, uncut model (its weights do not matter); without it a `ProgramModule` is returned.

    Raises:
        PlanError: If files are missing or damaged, the plan belongs to another model, the weights do not fit, or there
            is neither a model nor a program.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / MODEL).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        aliases, program, schema = description["aliases"], description["program"], description["schema"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise PlanError(f"a saved model must have {MODEL} and {WEIGHTS}, found in {folder}: {error}") from error
    if not isinstance(schema, int) or schema > SCHEMA:
        raise PlanError(f"a saved model must have schema {SCHEMA} or older, found {schema!r}.")
    if not isinstance(aliases, dict) or not tensors.keys() >= set(map(str, aliases.values())):
        raise PlanError(f"other names of tied tensors must be those of stored ones, found {aliases!r}.")
    if program is not None and not isinstance(program, dict):
        raise PlanError(f"the program of a saved model must be a JSON object, found {type(program).__name__}.")
    plan = PruningPlan.load(folder / PLAN) if (folder / PLAN).exists() else None
    tensors.update({name: tensors[first] for name, first in aliases.items()})
    if model is not None:
        module = apply(model, plan) if plan is not None else model
        _fill(module, tensors)
        return module
    program = tiled_program(plan.program, plan) if plan is not None and plan.program is not None else program
    if program is None:
        why = f" ({plan.note})" if plan is not None and plan.note else ""
        raise PlanError(
            f"a saved model without a program needs its original class, found none{why}.",
            hint="load(folder, model=MyModel())",
        )
    return ProgramModule(program, tensors).eval()


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return dict(named)


def _require_cut_by(tensors: dict[str, torch.Tensor], plan: PruningPlan) -> None:
    for name, shape in shapes_after(plan).items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise PlanError(
                f"a model must be saved with the plan that cut it: {name!r} must have {shape}, found {found}."
            )


def _fill(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _tensors(module).items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                found = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise PlanError(
                    f"saved weights must fit the model: {name!r} must have {tuple(tensor.shape)}, found {found}."
                )
            tensor.copy_(tensors[name])
