"""Put block-sparse layers in the place of linear layers, in a module or in a written program, by names alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from edgeprune.errors import PlanError
from edgeprune.surgery.block_sparse import BlockSparseLinear
from edgeprune.surgery.operations import operation
from edgeprune.surgery.plan import PruningPlan
from edgeprune.surgery.program_steps import decoded
from edgeprune.surgery.tile_folds import Moved, TiledLinear, tiled_layers
from edgeprune.surgery.tile_layout import TileLayout

_LINEAR = "aten.linear.default"


def check_tiled(model: nn.Module, plan: PruningPlan) -> None:
    """The weights with tiles must be those of linear layers, and their grids must cover them.

    Raises:
        PlanError: If one is not.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    sizes = {name: tiles.grid.size for name, tiles in plan.kept_tiles.items()}
    for fold in plan.folds:
        sizes |= {fold[end]: tuple(shape) for end, shape in zip(("producer", "consumer"), fold["shapes"], strict=True)}
    for name, size in sizes.items():
        module = modules.get(_path(name))
        if not isinstance(module, nn.Linear) or not name.endswith(".weight"):
            kind = "no module" if module is None else type(module).__name__
            raise PlanError(f"kept tiles must be those of an nn.Linear, found {name!r} of {kind} (rule: parameter).")
        if tuple(module.weight.shape) != size:
            raise PlanError(
                f"the grid of {name!r} must cover its shape {tuple(module.weight.shape)}, found {size} "
                "(rule: grid covers the weight)."
            )


def set_tiles(model: nn.Module, plan: PruningPlan) -> None:
    """Replace the linear layers of a cut model that kept tiles change.

    Raises:
        PlanError: If a fold names an operation that it may not.
    """
    layers = tiled_layers(plan)
    biases = {name: _bias(_linear(model, name), layer, model) for name, layer in layers.items()}
    made = {name: _replaced(_linear(model, name), layer, biases[name]) for name, layer in layers.items()}
    for name, replaced in made.items():
        owner, _, leaf = _path(name).rpartition(".")
        setattr(model.get_submodule(owner), leaf, replaced)


def _path(weight: str) -> str:
    return weight.removesuffix("weight").removesuffix(".")


def _linear(model: nn.Module, weight: str) -> nn.Linear:
    module = model.get_submodule(_path(weight))
    assert isinstance(module, nn.Linear)
    return module


def _bias(linear: nn.Linear, layer: TiledLinear, model: nn.Module) -> nn.Parameter | None:
    """The bias that a layer has in the end, with what it reads of units that are constant."""
    weight = linear.weight.detach()
    bias = cast("nn.Parameter | None", linear.bias)
    found = None if bias is None else bias.detach()
    if layer.moved is not None:
        where = list(layer.moved.positions)
        left = torch.as_tensor(layer.kept[:, where], device=weight.device)
        added = (weight[:, where] * left) @ _constants(_linear(model, layer.moved.producer), layer.moved)
        found = added if found is None else found + added
    if found is None:
        return None
    requires_grad = linear.weight.requires_grad if bias is None else bias.requires_grad
    return nn.Parameter(found[list(layer.rows)].clone(), requires_grad=requires_grad)


def _constants(producer: nn.Linear, moved: Moved) -> torch.Tensor:
    """What units are whose weights are all removed."""
    # The bias as it was: what may be added to it is nothing for units that read nothing.
    bias = cast("nn.Parameter | None", producer.bias)
    found = producer.weight.new_zeros(len(producer.weight)) if bias is None else bias
    found = found.detach()[list(moved.positions)]
    for item in moved.operations:
        arguments = {name: decoded(value) for name, value in item["args"].items()}
        try:
            found = operation(item["op"])(**{item["reads"]: found.clone()}, **arguments)
        except (RuntimeError, TypeError, ValueError) as error:
            raise PlanError(f"operations of a fold must run, found {item['op']}: {error} (rule: fold).") from error
    return found


def _replaced(linear: nn.Linear, layer: TiledLinear, bias: nn.Parameter | None) -> nn.Module:
    weight = linear.weight.detach()[list(layer.rows)][:, list(layer.columns)].contiguous()
    parameter = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if not layer.layout.is_dense:
        return BlockSparseLinear.of(layer.layout, parameter, bias).train(linear.training)
    found = nn.Linear(len(layer.columns), len(layer.rows), device="meta").train(linear.training)
    found.weight = parameter
    found.register_parameter("bias", bias)
    return found


def tiled_program(program: Mapping[str, Any], plan: PruningPlan) -> dict[str, Any]:
    """A written program that computes linear layers from kept tiles, as `BlockSparseLinear` does, and names its parameters.

    Args:
        program: As in a plan.
        plan: Which tiles stay.
    """
    inputs: list[Any] = []
    weights: dict[str, tuple[TiledLinear, list[str]]] = {}
    layers = tiled_layers(plan)
    for item in program["inputs"]:
        layer = layers.get(item["target"]) if item["kind"] == "parameter" else None
        if layer is None or layer.layout.is_dense:
            inputs.append(item)
        else:
            names = [f"{item['name']}_tiles_{at}" for at in range(len(layer.layout.products))]
            inputs += [_parameter(name, f"{item['target']}s.{at}") for at, name in enumerate(names)]
        if layer is not None:
            weights[item["name"]] = (layer, [] if layer.layout.is_dense else names)
    nodes: list[Any] = []
    for node in program["nodes"]:
        weight = node["args"].get("weight") if node["op"] == _LINEAR else None
        name = weight["node"] if isinstance(weight, dict) else ""
        if name not in weights:
            nodes.append(node)
            continue
        layer, names = weights[name]
        if layer.moved is not None and node["args"].get("bias") is None:
            # Constants went into a bias that the dense layer did not have.
            target = next(item["target"] for item in program["inputs"] if item["name"] == name)
            inputs.append(_parameter(f"{name}_tiles_bias", f"{_path(target)}.bias"))
            node = {**node, "args": {**node["args"], "bias": {"node": f"{name}_tiles_bias"}}}
        nodes += [node] if layer.layout.is_dense else _Linear(node, layer.layout, names).nodes
    return {**program, "inputs": inputs, "nodes": nodes}


def _parameter(name: str, target: str) -> dict[str, str]:
    return {"name": name, "kind": "parameter", "target": target}


class _Linear:
    """The operations of one layer; the last one has the name of the operation that it replaces."""

    def __init__(self, node: Mapping[str, Any], layout: TileLayout, weights: list[str]) -> None:
        self.nodes: list[dict[str, Any]] = []
        self._name, self._count = node["name"], 0
        x, bias = node["args"]["input"], node["args"].get("bias")
        pieces = self._pieces(x, layout)
        made = []
        for product, weight in zip(layout.products, weights, strict=True):
            y = self._linear(self._cat([pieces[at] for at in product.pieces]), {"node": weight})
            made.append(self._split(y, [end - begin for begin, end in product.rows]))
        if layout.empty_rows:
            nothing = self._add("aten.zeros_like.default", {"self": self._slice(x, (0, 1))})
            made.append([self._padded(nothing, end - begin - 1) for begin, end in layout.empty_rows])
        self._cat([made[at][part] for at, part in layout.order])
        if bias is not None:
            self._add("aten.add.Tensor", {"self": {"node": self.nodes[-1]["name"]}, "other": bias})
        self.nodes[-1]["name"] = node["name"]

    def _pieces(self, x: Any, layout: TileLayout) -> list[Any]:
        if layout.is_split:
            return self._split(x, [end - begin for begin, end in layout.pieces])
        return [x if piece == (0, layout.in_features) else self._slice(x, piece) for piece in layout.pieces]

    def _add(self, op: str, args: dict[str, Any]) -> dict[str, str]:
        name = f"{self._name}_tiles_{self._count}"
        self._count += 1
        self.nodes.append({"name": name, "op": op, "args": args})
        return {"node": name}

    def _slice(self, x: Any, piece: tuple[int, int]) -> dict[str, str]:
        return self._add("aten.slice.Tensor", {"self": x, "dim": -1, "start": piece[0], "end": piece[1], "step": 1})

    def _split(self, x: Any, sizes: list[int]) -> list[Any]:
        if len(sizes) == 1:
            return [x]
        parts = self._add("aten.split_with_sizes.default", {"self": x, "split_sizes": sizes, "dim": -1})
        return [self._add("operator.getitem", {"arg0": parts, "arg1": at}) for at in range(len(sizes))]

    def _cat(self, parts: list[Any]) -> Any:
        return parts[0] if len(parts) == 1 else self._add("aten.cat.default", {"tensors": parts, "dim": -1})

    def _linear(self, x: Any, weight: Any) -> dict[str, str]:
        return self._add(_LINEAR, {"input": x, "weight": weight, "bias": None})

    def _padded(self, x: Any, count: int) -> dict[str, str]:
        return self._add("aten.constant_pad_nd.default", {"self": x, "pad": [0, count], "value": 0})


def shapes_after(plan: PruningPlan) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters that a cut by the plan leaves, as far as the plan tells them, by their names in the cut model."""
    found = {
        name: tuple(len(axes[axis]) if axis in axes else size for axis, size in enumerate(plan.shapes[name]))
        for name, axes in plan.kept.items()
    }
    for name, layer in tiled_layers(plan).items():
        found.pop(name, None)
        found.pop(f"{_path(name)}.bias", None)
        if layer.layout.is_dense:
            found[name] = (len(layer.rows), len(layer.columns))
            continue
        for at, product in enumerate(layer.layout.products):
            found[f"{name}s.{at}"] = (product.outputs, len(layer.layout.columns(product)))
    return found
