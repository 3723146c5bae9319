"""The operations of a written program: what to call with which arguments, and which values nobody reads any more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from edgeprune.errors import PlanError
from edgeprune.surgery.operations import operation

_TRAINING_ARGUMENT = {
    "aten.batch_norm.default": "training",
    "aten.instance_norm.default": "use_input_stats",
    "aten.dropout.default": "train",
    "aten.dropout_.default": "train",
    "aten.alpha_dropout.default": "train",
    "aten.feature_dropout.default": "train",
    "aten.gru.input": "train",
    "aten.lstm.input": "train",
    "aten.rnn_relu.input": "train",
    "aten.rnn_tanh.input": "train",
    "aten.scaled_dot_product_attention.default": "dropout_p",
}
"""What is true in train form; of attention, the probability that the program says."""
_ATTENTION = "aten.scaled_dot_product_attention.default"


@dataclass(frozen=True)
class Reference:
    """The result of an operation, an input or a tensor, by its name in the program."""

    name: str


@dataclass(frozen=True)
class Step:
    """One operation: what to call, its arguments in order, and what changes in train form; copies of a module share it."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: int | None = None
    in_training: Any = True
    counter: str | None = None
    last_use: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        return self


def steps_of(program: Mapping[str, Any]) -> list[Step]:
    """The operations of a program, in order.

    Raises:
        PlanError: If one is named that this version of torch does not have or that a program may not name, or lacks an argument.
    """
    last: dict[str, int] = {}
    for index, node in enumerate(program["nodes"]):
        for name in names_in(node["args"]):
            last[name] = index
    stays = set(names_in(program["outputs"])) | {item["name"] for item in program["inputs"]}
    done: dict[int, list[str]] = {}
    for name in last.keys() - stays:
        done.setdefault(last[name], []).append(name)
    found = []
    for index, node in enumerate(program["nodes"]):
        function = operation(node["op"])
        args, kwargs, training = _bound(node["op"], function, node["args"])
        last_use = tuple(done.get(index, ()))
        in_training: Any = True
        if node["op"] == _ATTENTION:
            training, in_training = (training, float(node["dropout"])) if "dropout" in node else (None, None)
        found.append(Step(node["name"], function, args, kwargs, training, in_training, node.get("counter"), last_use))
    return found


def _bound(
    op: str, function: Callable[..., Any], named: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], int | None]:
    """Arguments in the order of the operation's schema."""
    if op.startswith("operator."):
        return tuple(decoded(value) for value in named.values()), {}, None
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    training = None
    for argument in function._schema.arguments:  # type: ignore[attr-defined]
        if argument.name in named:
            value = decoded(named[argument.name])
        elif argument.has_default_value():
            value = argument.default_value
        else:
            raise PlanError(f"operation {op} of a program must have an argument {argument.name!r}.")
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            if argument.name == _TRAINING_ARGUMENT.get(op):
                training = len(args)
            args.append(value)
    return tuple(args), kwargs, training


def decoded(value: Any) -> Any:
    """A value from its form in a written program.

    Raises:
        PlanError: If it has none that is known.
    """
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return Reference(content)
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, content, None)
    if kind in ("dtype", "memory_format", "layout") and isinstance(found, getattr(torch, kind)):
        return found
    raise PlanError(f"a program holds a value that is not known, {value!r}.")


def constant(written: Mapping[str, Any], device: torch.device | None) -> torch.Tensor:
    """A constant of forward from its form in a written program; complex numbers are pairs there."""
    kind: torch.dtype = getattr(torch, written["dtype"])
    if kind.is_complex:
        return torch.view_as_complex(torch.tensor(written["data"], dtype=kind.to_real(), device=device))
    return torch.tensor(written["data"], dtype=kind, device=device)


def resolved(value: Any, values: Mapping[str, Any]) -> Any:
    """An argument with values in the place of references."""
    if isinstance(value, Reference):
        return values[value.name]
    if isinstance(value, list):
        return [resolved(item, values) for item in value]
    return value


def names_in(value: Any) -> list[str]:
    """Everything that a written value refers to."""
    if isinstance(value, list):
        return [name for item in value for name in names_in(item)]
    if isinstance(value, dict):
        if set(value) == {"node"}:
            return [value["node"]]
        return [name for item in value.values() for name in names_in(item)]
    return []
