"""Put block-sparse layers in the place of linear layers, in a module or in a written program, by names alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from edgeprune.errors import PlanError
from edgeprune.surgery.block_sparse import BlockSparseLinear
from edgeprune.surgery.plan import PruningPlan
from edgeprune.surgery.tile_layout import TileLayout, tile_layout

_LINEAR = "aten.linear.default"


def layouts(plan: PruningPlan) -> dict[str, TileLayout]:
    """How each weight with kept tiles is computed in the cut model, by its name; those that are dense after all are left out."""
    found = {}
    for name, tiles in plan.kept_tiles.items():
        axes = plan.kept.get(name, {})
        rows, columns = (axes.get(axis, range(size)) for axis, size in enumerate(tiles.grid.size))
        layout = tile_layout(tiles, rows, columns)
        if not layout.is_dense:
            found[name] = layout
    return found


def check_tiled(model: nn.Module, plan: PruningPlan) -> None:
    """The weights with tiles must be those of linear layers, and their grids must cover them.

    Raises:
        PlanError: If one is not.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tiles in plan.kept_tiles.items():
        module = modules.get(name.removesuffix("weight").removesuffix("."))
        if not isinstance(module, nn.Linear) or not name.endswith("weight"):
            kind = "no module" if module is None else type(module).__name__
            raise PlanError(f"kept tiles must be those of an nn.Linear, found {name!r} of {kind} (rule: parameter).")
        if tuple(module.weight.shape) != tiles.grid.size:
            raise PlanError(
                f"the grid of {name!r} must cover its shape {tuple(module.weight.shape)}, found {tiles.grid.size} "
                "(rule: grid covers the weight)."
            )


def set_tiles(model: nn.Module, plan: PruningPlan) -> None:
    """Replace the linear layers of a cut model whose weights have kept tiles."""
    for name, layout in layouts(plan).items():
        path = name.removesuffix("weight").removesuffix(".")
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        layer = BlockSparseLinear.of(layout, linear.weight, linear.bias).train(linear.training)
        # A layer that is called by several names is one layer.
        for other, module in list(model.named_modules(remove_duplicate=False)):
            if module is linear:
                owner, _, leaf = other.rpartition(".")
                setattr(model.get_submodule(owner), leaf, layer)


def tiled_program(program: Mapping[str, Any], plan: PruningPlan) -> dict[str, Any]:
    """A written program that computes linear layers from kept tiles, as `BlockSparseLinear` does, and names its parameters.

    Args:
        program: As in a plan.
        plan: Which tiles stay.
    """
    inputs: list[Any] = []
    weights: dict[str, tuple[TileLayout, list[str]]] = {}
    found = layouts(plan)
    for item in program["inputs"]:
        layout = found.get(item["target"]) if item["kind"] == "parameter" else None
        if layout is None:
            inputs.append(item)
            continue
        names = [f"{item['name']}_tiles_{at}" for at in range(len(layout.products))]
        weights[item["name"]] = (layout, names)
        inputs += [
            {"name": name, "kind": "parameter", "target": f"{item['target']}s.{at}"} for at, name in enumerate(names)
        ]
    nodes: list[Any] = []
    for node in program["nodes"]:
        weight = node["args"].get("weight") if node["op"] == _LINEAR else None
        if isinstance(weight, dict) and weight.get("node") in weights:
            nodes += _Linear(node, *weights[weight["node"]]).nodes
        else:
            nodes.append(node)
    return {**program, "inputs": inputs, "nodes": nodes}


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


def tensors_after(tiled: Mapping[str, TileLayout]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters that stand in for weights with kept tiles, by their names in the cut model."""
    return {
        f"{name}s.{at}": (product.outputs, len(layout.columns(product)))
        for name, layout in tiled.items()
        for at, product in enumerate(layout.products)
    }
