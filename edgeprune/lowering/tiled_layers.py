"""Which operations of a traced program a plan computes from tiles, and the widths that this leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.errors import UnsupportedKernelError
from edgeprune.graph.linear_layers import readers_of_parameters
from edgeprune.surgery.tile_folds import tiled_layers

if TYPE_CHECKING:
    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.surgery.plan import PruningPlan
    from edgeprune.surgery.tile_layout import TileLayout


def tiled_nodes(graph: ChannelGraph, plan: PruningPlan) -> tuple[dict[str, int], dict[str, TileLayout]]:
    """Widths of a plan, without hidden units that its tiles make superfluous, and the layout of each call of a tiled layer.

    Raises:
        UnsupportedKernelError: A hidden unit goes along an axis that is no group of its own, or its constant goes into a
            bias that the layer does not have.
    """
    layers = tiled_layers(plan)
    widths = plan.widths()
    forms = graph.size_forms()
    biased = dict(graph.model.named_parameters(remove_duplicate=False)).keys()
    for fold in plan.folds:
        layer = layers.get(fold["producer"])
        if layer is None:
            continue
        form = forms[fold["producer"]][0]
        left = layer.layout.out_features
        if form.at({**graph.widths(), **widths}) != left:
            if form.constant or len(form.terms) != 1 or len(form.terms[0][0]) != 1 or form.terms[0][1] != 1:
                raise UnsupportedKernelError(
                    f"hidden units that tiles make superfluous must be a group, those of {fold['producer']!r} are not."
                )
            widths[form.terms[0][0][0]] = left
    for name, layer in layers.items():
        if layer.moved is not None and f"{name.removesuffix('weight')}bias" not in biased:
            raise UnsupportedKernelError(f"a layer that constants go into must have a bias, {name!r} has none.")
    readers = readers_of_parameters(graph)
    return widths, {
        node.name: layer.layout for name, layer in layers.items() if not layer.layout.is_dense for node in readers[name]
    }
