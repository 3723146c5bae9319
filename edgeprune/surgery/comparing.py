"""A cut copy of a model beside the cut program: do they compute the same?"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from edgeprune.surgery.plan import PruningPlan
from edgeprune.surgery.precision import as_exact_as
from edgeprune.surgery.program_module import FORWARD_ERRORS, ProgramModule
from edgeprune.surgery.value_numbers import WithoutValues

log = logging.getLogger("edgeprune.surgery")

Change = Callable[[nn.Module], None]
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_DRAWS, _DRAWS_OF_LARGE, _LARGE = 4, 2, 1_000_000
"""Comparisons by numbers: one with the model's own weights, the others with random ones; fewer above so many parameters."""


class Beside:
    """A cut copy beside the cut program, in eval form: by the operations that they call, or else by numbers.

    The numbers are in float64, on random inputs, with the copy's own weights and with random ones. Fresh weights hide mistakes:
    scores of an attention that are nearly zero look the same at any scale, and so do very large ones. Random ones are scaled so
    that every layer gives values of unit size. They can still hide something in a small network whose units they turn off; so
    there are several draws, of a large one two.
    """

    def __init__(self, model: nn.Module, cut: nn.Module, program: ProgramModule, plan: PruningPlan) -> None:
        """Put them side by side.

        Args:
            model: The uncut model.
            cut: The copy; it is not touched.
            program: Around the tensors of the copy; it is not touched either.
            plan: Whose example inputs they are run on.
        """
        self._dense, self._cut, self._program, self._plan = model, cut, program, plan
        self._device = next((tensor.device for tensor in cut.parameters()), torch.device("cpu"))

    def agrees(self, change: Change) -> bool:
        """Whether the cut copy computes what the program does once it is changed, and runs in train form as the model does.

        False where nothing that they compute is finite.

        Raises:
            SurgeryError: If forward also takes things that are not tensors.
        """
        known = self._agrees_by_operations(change)
        if known is not None:
            return known
        size = sum(parameter.numel() for parameter in self._cut.parameters())
        draws = _DRAWS if size < _LARGE else _DRAWS_OF_LARGE
        return all(self._agrees_in_numbers(change, draw) for draw in range(draws))

    def run(self, model: nn.Module, change: Change) -> None:
        """Run a copy of a model, or the parts of it that were traced, once it is changed: without values where that goes.

        Raises:
            SurgeryError: If forward also takes things that are not tensors.
        """
        try:
            self._run_without_values(model, change)
        except FORWARD_ERRORS as error:
            log.debug("forward needs values: %s", error)
            twin = copy.deepcopy(model).double().eval()
            change(twin)
            self._run(twin, 0)

    def _agrees_by_operations(self, change: Change) -> bool | None:
        """True if both call the same operations on the same tensors, False if the copy cannot run; None tells nothing."""
        if self._operations is None:
            return None
        twins, (args, kwargs), expected = self._operations
        try:
            cut = twins.copy(self._cut)
            with twins.running() as numbering:
                change(cut.eval())
                own = self._plan.traced(cut, None)[0]
                found = numbering.of(pytree.tree_leaves(own(*args, **kwargs)))
        except FORWARD_ERRORS as error:
            log.debug("the cut copy does not run without values: %s", error)
            return False if self._dense_runs_without_values else None
        if expected != found:
            return None
        try:
            with twins.running():
                cut.train()
                own(*args, **kwargs)
        except FORWARD_ERRORS as error:
            log.debug("train form does not run without values: %s", error)
            twin = copy.deepcopy(self._cut).double()
            change(twin)
            return self._runs(twin.train()) or not self._dense_trains
        return True

    @cached_property
    def _operations(self) -> tuple[WithoutValues, _Arguments, Hashable] | None:
        """The tensors and arguments without values, and what the program makes of them."""
        twins = WithoutValues()
        args, kwargs = self._arguments(twins)
        try:
            program = twins.copy(self._program).eval()
            with twins.running() as numbering:
                return twins, (args, kwargs), numbering.of(pytree.tree_leaves(program(*args, **kwargs)))
        except FORWARD_ERRORS as error:
            log.debug("the program needs values: %s", error)
            return None

    @cached_property
    def _dense_runs_without_values(self) -> bool:
        try:
            self._run_without_values(self._dense, lambda twin: None)
        except FORWARD_ERRORS as error:
            log.debug("forward needs values: %s", error)
            return False
        return True

    def _run_without_values(self, model: nn.Module, change: Change, *, training: bool = False) -> None:
        twins = WithoutValues()
        args, kwargs = self._arguments(twins)
        twin = twins.copy(model).train(training)
        with twins.running():
            change(twin)
            self._plan.traced(twin, None)[0](*args, **kwargs)

    def _arguments(self, twins: WithoutValues) -> _Arguments:
        return self._program.arguments(twins.inputs(self._plan.empty_inputs()))

    def _agrees_in_numbers(self, change: Change, draw: int) -> bool:
        shared: dict[int, Any] = {}
        twin = copy.deepcopy(self._cut, shared).double().eval()
        try:
            # Before the change: the program shares the parameters of the copy.
            expected = self._drawn(twin, shared, draw) if draw else self._expected
            change(twin)
            found = pytree.tree_leaves(self._run(twin, draw))
            equal = _equal(expected, found, finite=draw > 0)
        except FORWARD_ERRORS as error:
            log.debug("the cut copy does not run: %s", error)
            return False
        return equal and (draw > 0 or self._trains(change, twin))

    def _trains(self, change: Change, twin: nn.Module) -> bool:
        """Whether the changed copy, which `twin` is with values, runs in train form, or the uncut model does not either."""
        try:
            self._run_without_values(self._cut, change, training=True)
        except FORWARD_ERRORS as error:
            log.debug("train form needs values: %s", error)
            return self._runs(twin.train()) or not self._dense_trains
        return True

    @cached_property
    def _expected(self) -> list[Any]:
        """What the program computes with the weights of the copy."""
        return pytree.tree_leaves(self._forward(copy.deepcopy(self._program).double().eval(), 0))

    def _drawn(self, twin: nn.Module, shared: dict[int, Any], draw: int) -> list[Any]:
        """What the program computes once the copy has random weights, which it shares."""
        program = copy.deepcopy(self._program, shared).double().eval()
        _set_random_weights(twin, draw)
        scaled = _UnitDeviations(program.weights)
        with program.seen(scaled.weights, scaled.scale):
            outputs = self._forward(program, draw)
        if not program.reads_once(scaled.weights):
            # What read a weight before it was scaled must read it again.
            outputs = self._forward(program, draw)
        return pytree.tree_leaves(outputs)

    @cached_property
    def _dense_trains(self) -> bool:
        """Whether the uncut model runs in train form on these inputs: a batch norm may want a larger batch."""
        return self._runs(copy.deepcopy(self._dense).double().train())

    def _runs(self, model: nn.Module) -> bool:
        try:
            self._run(model, 0)
        except FORWARD_ERRORS as error:
            log.debug("train form does not run: %s", error)
            return False
        return True

    def _run(self, model: nn.Module, seed: int) -> Any:
        return self._forward(self._plan.traced(model, None)[0], seed)

    def _forward(self, module: nn.Module, seed: int) -> Any:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            inputs = [
                (torch.randn_like(tensor, dtype=torch.float64) + 0.5 if tensor.is_floating_point() else tensor)
                for tensor in self._plan.empty_inputs()
            ]
            args, kwargs = self._program.arguments([tensor.to(self._device) for tensor in inputs])
            with as_exact_as(module.parameters()):
                return module(*args, **kwargs)


def _equal(expected: Sequence[Any], found: Sequence[Any], *, finite: bool) -> bool:
    """Whether tensors are equal but for rounding; `finite`: and some of the values of each are finite."""
    pairs = [(x, y) for x, y in zip(expected, found, strict=False) if isinstance(x, torch.Tensor)]
    return len(expected) == len(found) and all(
        isinstance(y, torch.Tensor)
        and x.shape == y.shape
        and (not finite or not x.numel() or bool(x.isfinite().any()))
        and torch.allclose(x, y, rtol=1e-6, atol=1e-9, equal_nan=True)
        for x, y in pairs
    )


def _set_random_weights(model: nn.Module, seed: int) -> None:
    """Other weights; buffers are left alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, dtype=parameter.dtype).to(parameter.device)
            if parameter.ndim > 1 and len(parameter) > 1:
                # He et al., 2015, equation 10: what keeps the variance through a ReLU.
                parameter.copy_(noise * math.sqrt(2 * len(parameter) / parameter.numel()))
            else:
                parameter.add_(0.3 * noise)


class _UnitDeviations:
    """Scales weight and bias of each layer, and what it has just given, to a standard deviation of one.

    Mishkin and Matas, "All you need is a good init", 2016 (layer-sequential unit variance).
    """

    def __init__(self, weights: Mapping[str, Sequence[torch.Tensor]]) -> None:
        self.weights = weights

    def scale(self, name: str, value: torch.Tensor) -> None:
        """Called with the name of a layer's operation and what it has just given."""
        deviation = float(value.std()) if value.numel() > 1 else 0.0
        if math.isfinite(deviation) and deviation > 0:
            for tensor in (value, *self.weights[name]):
                tensor.div_(deviation)
