"""The JSON form of a plan, and every rule that a plan file must obey."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from edgeprune.errors import PlanError
from edgeprune.parts import parts_from_json
from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.plan import SCHEMA, PruningPlan, check_units
from edgeprune.surgery.tile_folds import check_fold

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "hash": str,
    "content_sha256": str,
    "signature": str,
    "groups": dict,
    "kept": dict,
    "shapes": dict,
    "forms": dict,
    "kept_tiles": dict,
    "folds": list,
    "removed": list,
    "attributes": dict,
    "frozen": list,
    "inputs": list,
    "program": (dict, type(None)),
    "rewrites": list,
    "parts": list,
    "note": str,
    "predicted": dict,
}
_OLDEST = 4
"""Oldest schema that can still be read."""
_ADDED: tuple[tuple[int, str, Any], ...] = ((5, "kept_tiles", {}), (5, "folds", []))
"""Fields that a schema has added, and what they are in older plans."""
_ATTRIBUTES = (
    *("in_features", "out_features", "num_features", "num_parameters", "in_channels", "out_channels", "groups"),
    *("num_channels", "num_groups", "normalized_shape", "input_size", "hidden_size"),
)
"""Attributes of torch's layers that follow their parameters."""


def content_sha256(values: Mapping[str, Any]) -> str:
    """SHA-256 of everything that a plan file says, except this hash itself."""
    content = {name: value for name, value in values.items() if name != "content_sha256"}
    # Keys become text first: numbers among them would be sorted in another order than when they are read again.
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def to_json(plan: PruningPlan) -> dict[str, Any]:
    """The plan as JSON values."""
    values = {
        "schema": SCHEMA,
        "hash": plan.hash,
        "signature": plan.signature,
        "groups": {name: dict(group) for name, group in plan.groups.items()},
        "kept": {name: {str(axis): list(ids) for axis, ids in axes.items()} for name, axes in plan.kept.items()},
        "shapes": {name: list(shape) for name, shape in plan.shapes.items()},
        "forms": {name: {str(axis): form for axis, form in axes.items()} for name, axes in plan.forms.items()},
        "kept_tiles": {name: tiles.to_json() for name, tiles in plan.kept_tiles.items()},
        "folds": [dict(fold) for fold in plan.folds],
        "removed": [dict(branch) for branch in plan.removed],
        "attributes": {path: dict(values) for path, values in plan.attributes.items()},
        "frozen": [dict(item) for item in plan.frozen],
        "inputs": [dict(item) for item in plan.inputs],
        "program": plan.program,
        "rewrites": [dict(item) for item in plan.rewrites],
        "parts": [part.to_json() for part in plan.parts],
        "note": plan.note,
        "predicted": dict(plan.predicted),
    }
    return {**values, "content_sha256": content_sha256(values)}


def from_json(values: Any) -> PruningPlan:
    """A plan from JSON values.

    Raises:
        PlanError: If a rule is broken; the message names the group or parameter and the rule.
    """
    if not isinstance(values, dict):
        raise PlanError(f"a plan must be a JSON object, found {type(values).__name__}.")
    schema = values.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise PlanError(f"a plan must have an integer 'schema', found {schema!r}.")
    if schema > SCHEMA:
        raise PlanError(f"a plan must have schema {SCHEMA}, found {schema}.", hint="pip install --upgrade edgeprune")
    if schema < _OLDEST:
        raise PlanError(f"a plan must have schema {SCHEMA}, found {schema}.", hint="make the plan again")
    written = values
    values = {**{name: value for since, name, value in _ADDED if schema < since}, **values}
    missing, unknown = sorted(_FIELDS.keys() - values.keys()), sorted(values.keys() - _FIELDS.keys())
    if missing or unknown:
        raise PlanError(f"a plan must have exactly the fields of schema {SCHEMA}, found {missing=} {unknown=}.")
    for name, kind in _FIELDS.items():
        if not isinstance(values[name], kind):
            raise PlanError(f"field {name!r} of a plan has the wrong type, found {type(values[name]).__name__}.")
    for branch in values["removed"]:
        _check_removed(branch)
    for name, group in values["groups"].items():
        _check_group(name, group, may_go=bool(values["removed"]))
    kept, shapes, forms = _by_axis(values["kept"]), values["shapes"], _by_axis(values["forms"])
    widths = {name: len(group["kept"]) for name, group in values["groups"].items()}
    for name, axes in kept.items():
        for axis, indices in axes.items():
            _check_axis(name, axis, indices, shapes.get(name), forms.get(name, {}).get(axis), widths)
    tiles = {name: KeptTiles.from_json(name, item) for name, item in values["kept_tiles"].items()}
    for name, item in tiles.items():
        if name in shapes and list(item.grid.size) != shapes[name]:
            raise PlanError(
                f"the grid of {name!r} must cover its shape {tuple(shapes[name])}, found {item.grid.size} "
                "(rule: grid covers the weight)."
            )
    for fold in values["folds"]:
        check_fold(fold, tiles)
    for path, attributes in values["attributes"].items():
        if not isinstance(attributes, dict) or not all(
            _is_index(value) or (isinstance(value, list) and all(map(_is_index, value)))
            for value in attributes.values()
        ):
            raise PlanError(
                f"attributes of module {path!r} must be whole numbers or lists of them, found {attributes!r}."
            )
        unknown = sorted(attributes.keys() - set(_ATTRIBUTES))
        if unknown:
            raise PlanError(
                f"attributes of module {path!r} must be among {', '.join(_ATTRIBUTES)}, found {unknown[0]!r}."
            )
    for item in values["inputs"]:
        if (
            not isinstance(item, dict)
            or item.keys() != {"name", "shape", "dtype"}
            or not isinstance(item["dtype"], str)
        ):
            raise PlanError(f"inputs of a plan must have 'name', 'shape' and 'dtype', found {item!r}.")
        if not isinstance(item["shape"], list) or not all(_is_index(size) for size in item["shape"]):
            raise PlanError(f"inputs of a plan must have whole numbers as shape, found {item['shape']!r}.")
    for item in values["rewrites"]:
        if not isinstance(item, dict) or not {"op", "module", "source"} <= item.keys():
            raise PlanError(f"rewrites of a plan must have 'op', 'module' and 'source', found {item!r}.")
        if not isinstance(item.get("from"), dict) or not isinstance(item.get("to"), dict):
            raise PlanError(f"rewrites of a plan must say what they change ('from' and 'to'), found {item!r}.")
        if "fold" in item and not _is_fold(item["fold"]):
            raise PlanError(f"a fold of a plan must be a factor and rows of parameters, found {item['fold']!r}.")
    plan = PruningPlan(
        signature=values["signature"],
        groups=values["groups"],
        kept={name: {axis: tuple(ids) for axis, ids in axes.items()} for name, axes in kept.items()},
        shapes={name: tuple(shape) for name, shape in shapes.items()},
        forms=forms,
        kept_tiles=tiles,
        folds=tuple(values["folds"]),
        removed=tuple(values["removed"]),
        attributes=values["attributes"],
        frozen=tuple(values["frozen"]),
        inputs=tuple(values["inputs"]),
        program=values["program"],
        rewrites=tuple(values["rewrites"]),
        parts=parts_from_json(values["parts"], len(values["inputs"])),
        note=values["note"],
        predicted=values["predicted"],
    )
    if plan.hash != values["hash"]:
        raise PlanError(
            f"a plan's hash must match its contents, found {values['hash'][:12]} for {plan.hash[:12]} (rule: hash).",
            hint="make the plan again; its indices were edited",
        )
    if content_sha256(written) != values["content_sha256"]:
        raise PlanError(
            "a plan must be as it was saved, found one that was edited (rule: content_sha256).",
            hint="make the plan again",
        )
    return plan


def _check_removed(branch: Any) -> None:
    if (
        not isinstance(branch, dict)
        or branch.keys() != {"name", "addition", "kept", "tensors"}
        or not all(isinstance(branch[name], str) for name in ("name", "addition", "kept"))
        or not isinstance(branch["tensors"], list)
        or not all(isinstance(name, str) for name in branch["tensors"])
    ):
        raise PlanError(
            f"a removed branch of a plan must have 'name', 'addition', 'kept' and 'tensors', found {branch!r}."
        )


def _check_group(name: str, group: Any, *, may_go: bool) -> None:
    if not isinstance(group, dict) or group.keys() != {"size", "kept"} or not _is_index(group["size"]):
        raise PlanError(f"group {name!r} must have 'size' and 'kept', found {group!r}.")
    if not isinstance(group["kept"], list) or not all(_is_index(unit) for unit in group["kept"]):
        raise PlanError(f"units of group {name!r} must be whole numbers, found {group['kept']!r} (rule: out of range).")
    if group["kept"] or not may_go:
        check_units(name, group["size"], group["kept"])


def _check_axis(name: str, axis: int, indices: Any, shape: Any, form: Any, widths: Mapping[str, int]) -> None:
    where = f"axis {axis} of {name!r}"
    if not isinstance(shape, list) or not 0 <= axis < len(shape):
        raise PlanError(f"{where} must be an axis of a tensor in 'shapes', found shape {shape!r}.")
    if not isinstance(indices, list) or not all(_is_index(index) for index in indices):
        raise PlanError(f"indices of {where} must be whole numbers, found {indices!r} (rule: out of range).")
    terms = form.get("terms") if isinstance(form, dict) else None
    constant = form.get("constant") if isinstance(form, dict) else None
    if not _is_index(constant) or not isinstance(terms, list) or not all(_is_term(t, widths) for t in terms):
        raise PlanError(f"{where} must have a form over groups of the plan, found {form!r}.")
    groups = ", ".join(dict.fromkeys(repr(group) for names, _ in terms for group in names))
    if not indices:
        raise PlanError(f"{where} (group {groups}) must keep at least one index (rule: emptied group).")
    outside = [index for index in indices if index >= shape[axis]]
    if outside:
        raise PlanError(
            f"indices of {where} (group {groups}) must lie in [0, {shape[axis]}), found {outside[0]} (rule: out of range)."
        )
    if len(set(indices)) != len(indices) or sorted(indices) != indices:
        raise PlanError(f"indices of {where} (group {groups}) must be ascending and named once (rule: duplicate).")
    expected = form["constant"] + sum(count * math.prod(widths[group] for group in names) for names, count in terms)
    if len(indices) != expected:
        raise PlanError(
            f"{where} must keep {expected} indices, as its group {groups} says, found {len(indices)} "
            "(rule: unequal counts)."
        )


def _is_term(term: Any, widths: Mapping[str, int]) -> bool:
    """``[[group, ...], positions per combination of their units]``."""
    if not isinstance(term, list) or len(term) != 2 or not isinstance(term[0], list) or not _is_index(term[1]):
        return False
    return bool(term[0]) and all(isinstance(group, str) and group in widths for group in term[0])


def _is_fold(fold: Any) -> bool:
    """``{"factor": number, "rows": {parameter: [indices]}}``."""
    return (
        isinstance(fold, dict)
        and isinstance(fold.get("factor"), float)
        and math.isfinite(fold["factor"])
        and isinstance(fold.get("rows"), dict)
        and all(isinstance(rows, list) and all(map(_is_index, rows)) for rows in fold["rows"].values())
    )


def _by_axis(values: dict[str, Any]) -> dict[str, dict[int, Any]]:
    try:
        return {name: {int(axis): value for axis, value in axes.items()} for name, axes in values.items()}
    except (ValueError, AttributeError) as error:
        raise PlanError(f"a plan must name axes by numbers, found {error}.") from error


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
