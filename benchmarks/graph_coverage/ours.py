"""One model through edgeprune: trace, cut half of every group, and everything that a cut model must be able to do."""

from __future__ import annotations

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

import edgeprune
from edgeprune.backends.onnxruntime.attention import with_four_axes
from edgeprune.graph import tracing
from edgeprune.graph.capture import call_arguments, capture
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.surgery.plan import PruningPlan
from graph_coverage import zoo
from graph_coverage.recording import Record, without_folders

RATIO = 0.5
CLOSE = 1e-4
"""Largest difference of cut and masked model in float32, as a share of the largest value."""
_SGD_STEPS = 3


def measure(name: str, record: Record, limit_s: float, times_only: bool) -> None:
    """Write down what edgeprune makes of a model.

    Args:
        name: The model, see `graph_coverage.zoo`.
        record: Where to.
        limit_s: Not used here: the caller ends the process.
        times_only: Stop when the model is cut.
    """
    del limit_s
    with record.step("build"):
        model, inputs = zoo.build(name)
    _warm_up()
    with _export_timed(record), record.step("trace"):
        graph = edgeprune.trace(model, inputs)
    if not times_only:
        record.say(**_graph_facts(model, graph))
    with record.step("plan"):
        plan = edgeprune.uniform_plan(graph, ratio=RATIO)
    with record.step("apply"):
        pruned = edgeprune.apply(model, plan)
    if times_only:
        return
    record.say(**_plan_facts(model, plan, pruned))
    with record.attempt("run") as step:
        # On copies: some models put things aside in their first forward.
        dense, cut = copy.deepcopy(model), copy.deepcopy(pruned)
        if graph.parts:
            # How many boxes are found depends on the weights: what is compared then is what the parts give.
            _outputs(cut, inputs)
            dense, cut = (plan.traced(module, None)[0] for module in (dense, cut))
        whole = graph.example_inputs if graph.parts else inputs
        record.say(same_shapes=_shapes(dense, whole) == _shapes(cut, whole))
    if step.failed:
        return
    with record.attempt("check"):
        worst = edgeprune.check(model, plan, inputs, dtype=torch.float32, relative=True)
        record.say(difference=worst)
        if not worst < CLOSE:
            # Statistics of a batch, taken over few values, can make rounding large: is it that, or is the cut wrong?
            in_eval = edgeprune.check(model, plan, inputs, dtype=torch.float32, relative=True, train_form=False)
            in_double = edgeprune.check(model, plan, inputs, relative=True)
            record.say(difference_eval=in_eval, difference_float64=in_double)
    # Of a model that was traced in parts, the parts are exported and trained.
    if graph.parts:
        record.say(parts=[part.path for part in graph.parts])
        pruned, model = (plan.traced(module, None)[0] for module in (pruned, model))
        inputs = graph.example_inputs
    with record.attempt("onnx") as step:
        record.say(**_onnx(pruned, inputs, record))
    if step.failed:
        with record.attempt("dense_onnx"):
            _onnx(model, inputs, record)
    with record.attempt("train") as step:
        record.say(**_train(pruned, inputs, graph.dynamic_batch))
    if step.failed:
        with record.attempt("dense_train"):
            _train(copy.deepcopy(model), inputs, graph.dynamic_batch)


def _warm_up() -> None:
    """Import what the first trace imports: the figures are those of a process that has traced before."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    sample = torch.randn(1, 3, 8, 8)
    edgeprune.apply(net, edgeprune.uniform_plan(edgeprune.trace(net, sample), ratio=RATIO))


@contextlib.contextmanager
def _export_timed(record: Record) -> Iterator[None]:
    """Time the export inside of `trace` by itself; the rest is edgeprune's own work."""
    original = tracing.capture

    def timed(model: nn.Module, example_inputs: Any) -> Any:
        with record.step("export"):
            return original(model, example_inputs)

    tracing.capture = timed
    try:
        yield
    finally:
        tracing.capture = original


def _graph_facts(model: nn.Module, graph: ChannelGraph) -> dict[str, Any]:
    reasons: Counter[tuple[str, str]] = Counter()
    for axis in graph.frozen:
        if axis.op != "input":
            reasons[axis.reason, axis.op] += axis.size
    frozen = [{"reason": reason, "op": op, "channels": count} for (reason, op), count in reasons.most_common(3)]
    return {
        "parameters": _count(model),
        "groups": len(graph.groups),
        "units": sum(group.size for group in graph.groups),
        "nodes": len(graph.program.graph.nodes),
        "dynamic_batch": graph.dynamic_batch,
        "note": without_folders(graph.note)[:300],
        "frozen": frozen,
        "prunable": prunable_share(model, graph),
    }


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def prunable_share(model: nn.Module, graph: ChannelGraph) -> float:
    """Share of the parameters' elements that at least one group can remove; tied parameters count once."""
    named = dict(model.named_parameters(remove_duplicate=False))
    free: dict[int, dict[int, set[int]]] = {}
    for group in graph.groups:
        for member in group.members:
            if member.parameter in named:
                axes = free.setdefault(id(named[member.parameter]), {})
                axes.setdefault(member.axis, set()).update(np.ravel(np.array(member.indices)).tolist())
    stays = 0.0
    for parameter in model.parameters():
        axes = free.get(id(parameter), {})
        shares = (1 - len(indices) / parameter.shape[axis] for axis, indices in axes.items())
        stays += parameter.numel() * math.prod(shares)
    return 1 - stays / _count(model)


def _plan_facts(model: nn.Module, plan: PruningPlan, pruned: nn.Module) -> dict[str, Any]:
    """Groups that are off the asked width by more than one unit, and what is left."""
    off = {
        name: [group["size"], len(group["kept"])]
        for name, group in plan.groups.items()
        if abs(len(group["kept"]) - group["size"] * (1 - RATIO)) > 1
    }
    left = _count(pruned)
    return {
        "off_width": dict(list(off.items())[:5]),
        "off_width_count": len(off),
        "left": left,
        "removed": 1 - left / _count(model),
        "kind": "own class" if type(pruned) is type(model) else "program",
    }


def _shapes(model: nn.Module, inputs: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in _outputs(model, inputs)]


def _outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    args, kwargs = call_arguments(inputs)
    with torch.no_grad():
        leaves = pytree.tree_leaves(model.eval()(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _resized(inputs: Any, batch: int) -> Any:
    """The example inputs at another batch; pixels and samples are random, tokens are repeated."""
    generator = torch.Generator().manual_seed(batch)

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([tensor] * batch)
        return torch.randn(wide.shape, generator=generator) if wide.is_floating_point() else wide

    return pytree.tree_map_only(torch.Tensor, fill, inputs)


def _onnx(model: nn.Module, inputs: Any, record: Record) -> dict[str, Any]:
    """Export with a free batch (a fixed one where the model has no other), reload, and compare at batch 1 and 3."""
    import onnxruntime

    captured = capture(model, inputs)
    with_four_axes(captured.program)
    with torch.no_grad():
        exported = torch.onnx.export(captured.program, dynamo=True, verbose=False)
    assert exported is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        exported.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    worst = 0.0
    for batch in (1, 3) if captured.dynamic_batch else (1,):
        feed = _resized(inputs, batch) if captured.dynamic_batch else inputs
        tensors = [leaf for leaf in pytree.tree_leaves(feed) if isinstance(leaf, torch.Tensor)]
        names = [spec.name for spec in session.get_inputs()]
        values = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        for expected, found in zip(_outputs(model, feed), session.run(None, values), strict=True):
            worst = max(worst, _relative(expected, torch.from_numpy(np.asarray(found))))
    return {"onnx_difference": worst, "onnx_free_batch": captured.dynamic_batch}


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    if expected.shape != found.shape:
        raise ValueError(f"an output of the reloaded ONNX file has shape {found.shape}, not {expected.shape}.")
    if not expected.numel():
        return 0.0
    largest = max(expected.double().abs().max().item(), 1e-6)
    distance = (expected.double() - found.double()).abs().max().item() / largest
    return distance if math.isfinite(distance) else math.inf


def _train(model: nn.Module, inputs: Any, free_batch: bool) -> dict[str, Any]:
    """Three steps of SGD towards outputs of one, at batch 2 where the batch is free."""
    args, kwargs = call_arguments(_resized(inputs, 2) if free_batch else inputs)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    reached = [False] * len(parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    losses = []
    for _ in range(_SGD_STEPS):
        leaves = pytree.tree_leaves(model(*args, **kwargs))
        floats = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        loss = torch.stack([(leaf - 1).square().mean() for leaf in floats]).sum()
        optimizer.zero_grad()
        loss.backward()
        # Not whether values change: behind a layer scale of 1e-5 a step is smaller than what float32 can add.
        reached = [
            seen or (parameter.grad is not None and bool(parameter.grad.any()))
            for seen, parameter in zip(reached, parameters, strict=True)
        ]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    finite = all(map(math.isfinite, losses)) and all(bool(parameter.isfinite().all()) for parameter in parameters)
    return {"losses": losses, "finite": finite, "reached": sum(reached) / max(1, len(parameters))}
