"""`check`: the cut model computes what the original computes with the same units masked."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from edgeprune.copying import copied
from edgeprune.errors import InputError, SurgeryError, TraceError
from edgeprune.graph.capture import call_arguments, capture
from edgeprune.surgery.cutting import apply, cut_program, require_own_plan
from edgeprune.surgery.masking import MaskedProgram, randomize
from edgeprune.surgery.plan import PruningPlan
from edgeprune.surgery.precision import as_exact_as
from edgeprune.surgery.program_module import FORWARD_ERRORS, ProgramModule

log = logging.getLogger("edgeprune.surgery")

_BATCH = 3


class PrecisionError(SurgeryError):
    """The original model does not run in the precision of the comparison, for instance because forward casts."""


def check(
    model: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    *,
    tolerance: float | None = None,
    cut: Callable[[nn.Module, PruningPlan], nn.Module] = apply,
    dtype: torch.dtype = torch.float64,
    relative: bool = False,
    train_form: bool = True,
) -> float:
    """Compare the masked original with the cut model.

    Both run in eval form and with batch and instance norms in train form (statistics of kept channels are compared too;
    dropout is off), on the given weights and on a copy with random biases, scales and batch-norm statistics, on random
    inputs with a mean that is not zero. In float64 all of forward is, what it casts to float32 too, so that rounding does not
    hide a difference. The masked side interprets the original program (`edgeprune.surgery.masking`). Of a
    model that was traced in parts the parts are compared, and the cut model as a whole has to run.

    Args:
        model: The original model; it is not touched.
        plan: What stays.
        example_inputs: As for `edgeprune.trace`.
        tolerance: Largest difference to accept.
        cut: What cuts the model, `edgeprune.apply` by default.
        dtype: Precision of the comparison; ``torch.float32`` for models that insist on it.
        relative: Differences are shares of the largest absolute value in their tensor, where that is above 1.
        train_form: Also with norms in train form; without, only in eval form.

    Returns:
        Largest absolute difference of any output or statistic.

    Raises:
        PlanError: If the plan belongs to another model.
        PrecisionError: If the model does not run in `dtype`.
        SurgeryError: If the cut model does not run, if a removed unit is still read, or if the difference exceeds the
            tolerance.
    """
    require_own_plan(model, plan)
    original = example_inputs
    twin = copied(model, {}, SurgeryError)._apply(partial(_cast, dtype=dtype))  # type: ignore[no-untyped-call]

    def cast(values: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, lambda t: _cast(t, dtype), call_arguments(values))

    if plan.parts:
        try:
            _run(twin, cast(example_inputs), training=False)
        except SurgeryError as error:
            raise _unfit(dtype, error.message) from error
        _run(cut(twin, plan), cast(example_inputs), training=False)
    traced, example_inputs = plan.traced(twin, example_inputs)
    args, kwargs = cast(example_inputs)
    try:
        captured = capture(traced, kwargs or args)
    except (TraceError, InputError) as error:
        # Inputs that do not fit fail in any precision, and then that is what is wrong.
        capture(*plan.traced(model, original))
        raise _unfit(dtype, error.message) from error
    if captured.failure is not None:
        raise _unfit(dtype, captured.failure.message)
    training_forms = (False, True) if train_form and _has_statistics(captured.program) else (False,)
    worst = 0.0
    made: nn.Module | None = None
    for randomized in (False, True):
        if randomized:
            randomize(twin, settle=partial(_settle, traced, _random_inputs((args, kwargs), captured.dynamic_batch, 4)))
        # Where the program comes back it does for any weights, without asking again whether the own class could.
        known = cut is apply and isinstance(made, ProgramModule)
        made = cut_program(twin, plan) if known else cut(twin, plan)
        pruned, _ = plan.traced(made, None)
        for training in training_forms:
            inputs = _random_inputs((args, kwargs), captured.dynamic_batch, seed=2 * randomized + training)
            found = difference(captured.program, twin, pruned, plan, inputs, training=training, relative=relative)
            worst = max(worst, found)
    if tolerance is not None and not worst <= tolerance:
        raise SurgeryError(
            f"the cut model must equal the masked one within {tolerance:g}, found a difference of {worst:g}.",
            hint="report this model: the plan cuts something that the trace misread",
        )
    return worst


def difference(
    program: ExportedProgram,
    model: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    training: bool,
    relative: bool = False,
) -> float:
    """Largest absolute difference between the masked program and a cut model in one form.

    Raises:
        PrecisionError: If the original program does not run on these tensors.
        SurgeryError: If the cut model does not run or has other outputs, or a removed unit is still read.
    """
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    cumulative = [
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm) and module.momentum is None and module.track_running_stats
    ]
    masked = MaskedProgram(program, plan, tensors, training, cumulative)
    leaves = pytree.tree_leaves(inputs)
    try:
        with as_exact_as(tensors.values()), _same_draws():
            expected = masked.outputs(pytree.tree_map_only(torch.Tensor, torch.clone, leaves))
    except SurgeryError:
        raise
    except FORWARD_ERRORS as error:
        dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float64)
        raise _unfit(dtype, f"{type(error).__name__}: {error}") from error
    found, statistics = _run(pruned, inputs, training)
    if len(expected) != len(found):
        raise SurgeryError(f"the cut model must have {len(expected)} outputs, found {len(found)}.")
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        if isinstance(one, torch.Tensor):
            worst = max(worst, _distance(one, other, "an output", relative))
    if training:
        gone = {name for branch in plan.removed for name in branch["tensors"]}
        for name, value in masked.statistics.items():
            if name in gone:
                continue
            kept = _kept_axis(plan, model, name, len(value))
            worst = max(worst, _distance(value[kept], statistics.get(name), f"statistic {name!r}", relative))
    return worst


def _settle(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    """Running statistics become those of a batch: random scales of many norms in a row would make values, and rounding, huge."""
    norms = {module: module.momentum for module in model.modules() if isinstance(module, _BatchNorm)}
    modes = {module: module.training for module in model.modules()}
    counters = {module: module.num_batches_tracked for module in norms}
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum, norm.num_batches_tracked = 1.0, None
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
    try:
        with torch.no_grad(), _NoDropout():
            model(*args, **kwargs)
    except FORWARD_ERRORS as error:
        log.debug("statistics are left as they are: %s", error)
    finally:
        for norm, momentum in norms.items():
            norm.momentum, norm.num_batches_tracked = momentum, counters[norm]
        for module, training in modes.items():
            module.training = training


def _unfit(dtype: torch.dtype, found: str) -> PrecisionError:
    name = str(dtype).removeprefix("torch.")
    return PrecisionError(
        f"the original model must run in {name} to be compared in it, found: {found}",
        hint="check(..., dtype=torch.float32, relative=True)" if dtype == torch.float64 else None,
    )


def _run(
    pruned: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], training: bool
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Flat outputs and the buffers after one forward of a copy, norms in train form if asked."""
    twin = copy.deepcopy(pruned).eval()
    if training and isinstance(twin, ProgramModule):
        twin.train()
    elif training:
        for module in twin.modules():
            if isinstance(module, _NormBase):
                module.train()
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
    try:
        with torch.no_grad(), _NoDropout(), as_exact_as(pruned.parameters()), _same_draws():
            outputs = twin(*args, **kwargs)
    except FORWARD_ERRORS as error:
        raise SurgeryError(f"the cut model must run, found {type(error).__name__}: {error}") from error
    return pytree.tree_leaves(outputs), dict(twin.named_buffers(remove_duplicate=False))


@contextmanager
def _same_draws() -> Iterator[None]:
    """Both sides draw the same random numbers, where forward draws some in eval form."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


_DROPPING = {
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), (5, "dropout")),
    "scaled_dot_product_attention": (4, "dropout_p"),
}
"""Functions that drop inside, with the place and the name of the probability."""


class _NoDropout(TorchFunctionMode):
    """Dropout passes its input through, however it is called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(getattr(func, "__name__", func)).partition(".")[0]
        if name.rstrip("_123d") in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"):
            return args[0] if args else kwargs["input"]
        kwargs = dict(kwargs or {})
        if name in _DROPPING:
            place, word = _DROPPING[name]
            args = (*args[:place], 0.0, *args[place + 1 :]) if len(args) > place else args
            kwargs |= {word: 0.0} if word in kwargs else {}
        return func(*args, **kwargs)


def _distance(expected: torch.Tensor, found: Any, what: str, relative: bool) -> float:
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise SurgeryError(f"{what} of the cut model must have shape {tuple(expected.shape)}, found {shape}.")
    if not expected.numel():
        return 0.0
    distance = (expected.double() - found.double()).abs().max().item()
    if relative:
        distance /= max(1.0, expected.double().abs().max().item())
    return distance if distance == distance else float("inf")


def _kept_axis(plan: PruningPlan, model: nn.Module, name: str, size: int) -> list[int]:
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for other, axes in plan.kept.items():
        if other == name or buffers.get(other) is buffers[name]:
            return list(axes.get(0, range(size)))
    return list(range(size))


def _has_statistics(program: ExportedProgram) -> bool:
    return any(str(node.target).startswith(("aten.batch_norm", "aten.instance_norm")) for node in program.graph.nodes)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.is_complex():  # `Module.to` would drop the imaginary part
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _random_inputs(inputs: Any, dynamic: bool, seed: int) -> Any:
    """Wide enough that activations see both signs, with a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if dynamic and tensor.ndim:
            tensor = torch.cat([tensor] * -(-_BATCH // len(tensor)))[:_BATCH]
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).mul(3).add(1).to(tensor)

    return pytree.tree_map_only(torch.Tensor, fill, inputs)
