"""A trainable module around a cut program that is given as plain JSON values."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from edgeprune.errors import PlanError, SurgeryError
from edgeprune.nesting import read_nesting
from edgeprune.surgery.program_steps import Reference, Step, constant, decoded, names_in, resolved, steps_of

FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""What a forward with wrong sizes may raise."""

_BATCH_NORM = torch.ops.aten.batch_norm.default
_LAYERS = {torch.ops.aten.linear.default, *(getattr(torch.ops.aten, f"conv{dim}d").default for dim in (1, 2, 3))}
_RUNNING_MEAN, _RUNNING_VAR, _TRAINING, _MOMENTUM = 3, 4, 5, 6
"""Positions among the arguments of ``aten.batch_norm``."""


class RunningStatistics(NamedTuple):
    """Buffers of one batch norm of a program; `counter` of batches is None where it has none."""

    mean: torch.Tensor
    variance: torch.Tensor
    counter: torch.Tensor | None


@dataclass(frozen=True)
class _Frame:
    """How arguments and results are nested; immutable, so copies of a module share it."""

    inputs: pytree.TreeSpec
    outputs: pytree.TreeSpec

    def __deepcopy__(self, memo: dict[int, Any]) -> _Frame:
        return self


class ProgramModule(nn.Module):
    """A cut model whose forward is the rewritten program instead of the user's code.

    Parameters and buffers have the names of the original model. Unlike ``ExportedProgram.module()`` it has both forms:
    ``train()`` turns dropout on and lets norms with running statistics use and update those of the batch; the batch is
    free where the model was captured with a dynamic batch.

    Attributes:
        program: The program as JSON values.
    """

    def __init__(self, program: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Build from a program and the tensors that it names.

        Raises:
            PlanError: If the program is damaged, names an operation that this version of torch does not have or that a
                program may not name, or a tensor is missing.
        """
        super().__init__()
        self.program = program
        self._look: Callable[[str, torch.Tensor], None] | None = None
        self._see: Callable[[str, torch.Tensor], None] | None = None
        self._seen: frozenset[str] = frozenset()
        try:
            self._build(program, tensors)
        except PlanError:
            raise
        except FORWARD_ERRORS as error:
            raise PlanError(
                f"a program must be complete, found one that cannot be read ({type(error).__name__}: {error}).",
                hint="make the plan again",
            ) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        """A copy of the tensors; the program never changes, and is shared."""
        memo[id(self.program)] = self.program
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _build(self, program: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self._inputs: list[str] = []
        self._fixed: dict[str, Any] = {}
        self._tensors: dict[str, str] = {}
        placed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        device = next((tensor.device for tensor in tensors.values()), None)
        for item in program["inputs"]:
            name, kind, target = item["name"], item["kind"], item["target"]
            if kind == "input":
                self._inputs.append(name)
                if "value" in item:
                    self._fixed[name] = decoded(item["value"])
                continue
            self._tensors[name] = target
            if kind == "constant":
                value = constant(program["constants"][target], device)
            elif target in tensors:
                value = tensors[target]
            else:
                raise PlanError(f"the weights must hold every tensor of the program, found no {target!r}.")
            if id(value) not in placed:
                placed[id(value)] = (value, _parameter(value) if kind == "parameter" else value)
            self._place(target, placed[id(value)][1], kind)
        self._frame = _Frame(read_nesting(program["in_spec"]), read_nesting(program["out_spec"]))
        self._outputs = [decoded(item) for item in program["outputs"]]
        self._steps = steps_of(program)

    @classmethod
    def of(cls, model: nn.Module, program: Mapping[str, Any]) -> ProgramModule:
        """Build from the (cut) tensors of a model, which are shared."""
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return cls(program, dict(named))

    def arguments(self, inputs: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of ``forward`` from flat tensors; what is no tensor is as it was traced.

        Raises:
            SurgeryError: If forward takes another number of tensors.
        """
        count = len(self._inputs) - len(self._fixed)
        if len(inputs) != count:
            raise SurgeryError(f"forward must be given its {count} tensors, found {len(inputs)}.")
        rest = iter(inputs)
        leaves = [self._fixed[name] if name in self._fixed else next(rest) for name in self._inputs]
        args, kwargs = pytree.tree_unflatten(leaves, self._frame.inputs)
        return tuple(args), dict(kwargs)

    def in_order(self, named: Mapping[str, Any]) -> tuple[Any, ...]:
        """Inputs by the name of their parameter of ``forward``, as the program takes them by position.

        Raises:
            SurgeryError: If one is missing, or forward has no such parameter.
        """
        names = [name for name in self._inputs if name not in self._fixed]
        if set(names) != set(named):
            raise SurgeryError(
                f"forward must be given {', '.join(names)}, found {', '.join(sorted(named)) or 'nothing'}."
            )
        return tuple(named[name] for name in names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; arguments as the original model's forward.

        Raises:
            SurgeryError: If an argument that is no tensor is another than when the model was traced, which it is part of.
        """
        return self.finished(self.begun(0, *args, **kwargs), 0)

    def begun(self, count: int, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run the first operations; what `finished` needs of their values, by name, without the tensors of the model.

        Args:
            count: How many operations.
            args: As those of the original model's forward.
            kwargs: The same.
        """
        leaves = pytree.tree_leaves((args, self._ordered(kwargs)))
        values: dict[str, Any] = dict(zip(self._inputs, leaves, strict=True))
        for name, value in self._fixed.items():
            if type(values[name]) is not type(value) or values[name] != value:
                raise SurgeryError(
                    f"argument {name!r} must be {value!r}, as when the model was traced, found {values[name]!r}.",
                    hint="trace and cut the model with that value",
                )
        self._run(values, self._steps[:count])
        return {name: value for name, value in values.items() if name not in self._tensors}

    def advanced(self, begun: Mapping[str, Any], start: int, stop: int, kept: Collection[str] = ()) -> dict[str, Any]:
        """What `begun` would have given after more operations.

        Args:
            begun: Its result, or one of this; it stays as it is where no operation works in place.
            start: How many operations that was of.
            stop: After how many.
            kept: Values that stay although no later operation of this program reads them.
        """
        values = dict(begun)
        self._run(values, self._steps[start:stop], kept)
        return {name: value for name, value in values.items() if name not in self._tensors}

    def finished(self, begun: Mapping[str, Any], count: int) -> Any:
        """Run the other operations, on what `begun` gave, of this model or one whose first operations compute the same.

        Args:
            begun: Its result; it stays as it is where no operation works in place (`works_in_place`).
            count: As it was given.
        """
        values = dict(begun)
        steps = self._steps[count:]
        self._run(values, steps)
        if not steps:  # outputs may be tensors of the model
            values |= {name: self._tensor(target) for name, target in self._tensors.items()}
        return pytree.tree_unflatten([resolved(item, values) for item in self._outputs], self._frame.outputs)

    def again(
        self, values: Mapping[str, Any], operations: Collection[str], kept: Collection[str] = ()
    ) -> tuple[Any, dict[str, Any]]:
        """Run only some operations, on values of the others that are known.

        Args:
            values: What those operations, and the outputs, need of inputs and of operations that are not run, by name; it stays
                as it is where no operation works in place (`works_in_place`).
            operations: Which.
            kept: Values that are given back.

        Returns:
            What the model returns, and the values that were asked for, as far as they were computed.
        """
        found = dict(values)
        self._run(found, [step for step in self._steps if step.name in operations], kept)
        for name, target in self._tensors.items():  # outputs may be tensors of the model
            found[name] = self._tensor(target)
        outputs = pytree.tree_unflatten([resolved(item, found) for item in self._outputs], self._frame.outputs)
        return outputs, {name: found[name] for name in kept if name in operations}

    def differing(self, other: ProgramModule) -> frozenset[str] | None:
        """Names of the operations that are others in another module, or have other tensors; None where names are not the same."""
        pairs = list(zip(self.program["nodes"], other.program["nodes"], strict=False))
        alike = len(self._steps) == len(other._steps) and all(own["name"] == its["name"] for own, its in pairs)
        if not alike:
            return None
        same = self._compared(other)
        return frozenset(
            own["name"]
            for own, its in pairs
            if own != its or not all(same(name) for name in names_in(own["args"]) if name in self._tensors)
        )

    def _compared(self, other: ProgramModule) -> Callable[[str], bool]:
        """Whether a tensor is the same in another module, by its name in the program; each is compared once."""
        compared: dict[str, bool] = {}

        def same(name: str) -> bool:
            if name not in compared:
                one, two = self._tensor(self._tensors[name]), other._tensor(other._tensors[name])
                compared[name] = one is two or (one.shape == two.shape and torch.equal(one, two))
            return compared[name]

        return same

    @property
    def works_in_place(self) -> bool:
        """Whether an operation changes one of its arguments."""
        schemas = (getattr(step.function, "_schema", None) for step in self._steps)
        return any(schema is not None and schema.is_mutable for schema in schemas)

    def _run(self, values: dict[str, Any], steps: Sequence[Step], kept: Collection[str] = ()) -> None:
        if not steps:
            return
        for name, target in self._tensors.items():
            values[name] = self._tensor(target)
        for step in steps:
            arguments = [resolved(value, values) for value in step.args]
            if step.training is not None and self.training:
                arguments[step.training] = step.in_training
            if step.counter is not None:
                self._count(step, arguments)
            if self._look is not None and step.function is _BATCH_NORM and arguments[_RUNNING_MEAN] is not None:
                self._look(self._tensors[step.args[_RUNNING_MEAN].name], arguments[0])
                arguments[_TRAINING], arguments[_MOMENTUM] = True, 0.0
            keywords = {name: resolved(value, values) for name, value in step.kwargs.items()}
            values[step.name] = step.function(*arguments, **keywords)
            if self._see is not None and step.name in self._seen:
                self._see(step.name, values[step.name])
            for name in step.last_use:
                if name not in kept:
                    del values[name]

    @property
    def operations(self) -> tuple[str, ...]:
        """Names of its operations, in order: those of the traced program's nodes."""
        return tuple(step.name for step in self._steps)

    @property
    def weights(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """Weight and bias of every linear layer and convolution, by the operation's name; its output is proportional to both."""
        found = {}
        for step in self._steps:
            if step.function in _LAYERS and all(isinstance(item, Reference | None) for item in step.args[1:3]):
                targets = [self._tensors.get(item.name) for item in step.args[1:3] if isinstance(item, Reference)]
                if None not in targets:
                    found[step.name] = tuple(self._tensor(cast(str, target)) for target in targets)
        return found

    def reads_once(self, operations: Collection[str]) -> bool:
        """Whether every weight of some operations (of `weights`) is read by one operation alone."""
        readers: Counter[int] = Counter()
        for node in self.program["nodes"]:
            read = {name for name in names_in(node["args"]) if name in self._tensors}
            readers.update({id(self._tensor(self._tensors[name])) for name in read})
        weights = self.weights
        return all(readers[id(tensor)] == 1 for name in operations for tensor in weights[name])

    @contextmanager
    def seen(self, names: Collection[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
        """Values of some operations are shown as they are computed.

        Args:
            names: Of operations.
            see: Called with the name and the value itself.
        """
        self._seen, self._see = frozenset(names), see
        try:
            yield
        finally:
            self._seen, self._see = frozenset(), None

    def batch_norms(self) -> dict[str, RunningStatistics]:
        """The running statistics of every batch norm that has some, by the name of its mean: operations may share them."""
        found = {}
        for step in self._steps:
            if step.function is _BATCH_NORM and isinstance(step.args[_RUNNING_MEAN], Reference):
                mean, variance = (
                    self._tensor(self._tensors[step.args[at].name]) for at in (_RUNNING_MEAN, _RUNNING_VAR)
                )
                counter = None if step.counter is None else self._tensor(step.counter)
                found[self._tensors[step.args[_RUNNING_MEAN].name]] = RunningStatistics(mean, variance, counter)
        return found

    @contextmanager
    def watched(self, look: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
        """Batch norms with running statistics normalize by the batch meanwhile, and leave those statistics alone.

        Args:
            look: Called with the name of the running mean and what is normalized, shape (batch, channels, ...).
        """
        self._look = look
        try:
            yield
        finally:
            self._look = None

    def _count(self, step: Step, arguments: list[Any]) -> None:
        """Count the batch; without a momentum, the batch norm averages over all batches so far."""
        counter = self._tensor(cast(str, step.counter))
        if self.training:
            counter.add_(1)
        if arguments[_MOMENTUM] is None:
            arguments[_MOMENTUM] = 1.0 / float(counter) if self.training else 0.0

    def _ordered(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        names = self._frame.inputs.child(1).context or []
        if not names and all(name in self._inputs for name in kwargs):
            # Traced by position: an input has the name of its parameter of forward.
            names = self._inputs
        return {name: kwargs[name] for name in names if name in kwargs} | kwargs

    def get_submodule(self, target: str) -> nn.Module:
        """As of every module, also where the user's one has the name of a method of this class."""
        owner: nn.Module = self
        for part in target.split(".") if target else ():
            inner = owner._modules.get(part)
            if inner is None:
                return super().get_submodule(target)
            owner = inner
        return owner

    def _tensor(self, target: str) -> torch.Tensor:
        path, _, leaf = target.rpartition(".")
        owner = self.get_submodule(path)
        for table in (owner._parameters, owner._buffers):
            if (found := table.get(leaf)) is not None:
                return found
        return cast(torch.Tensor, getattr(owner, leaf))

    def _place(self, target: str, value: torch.Tensor, kind: str) -> None:
        """Put a tensor where the user's model has it; `register_parameter` refuses names that this class has as well."""
        owner: nn.Module = self
        *path, leaf = target.split(".")
        for part in path:
            owner = cast(nn.Module, owner._modules.setdefault(part, nn.Module()))
        if kind == "parameter":
            owner._parameters[leaf] = cast(nn.Parameter, value)
            return
        owner._buffers[leaf] = value
        if kind != "buffer":
            owner._non_persistent_buffers_set.add(leaf)

    def extra_repr(self) -> str:
        """How many operations the program has."""
        return f"{len(self._steps)} operations"


def _parameter(value: torch.Tensor) -> nn.Parameter:
    if isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value, requires_grad=value.is_floating_point())
