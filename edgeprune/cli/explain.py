"""``edgeprune explain``: what of a model can be pruned, and why not the rest."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import (
    BackendOption,
    InputOption,
    InputsOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    VerboseOption,
    WeightsOption,
    given,
    input_flags,
)

if TYPE_CHECKING:
    import torch

    from edgeprune.graph.channel_graph import ChannelGraph
    from edgeprune.latency.predictor import Predictor
    from edgeprune.latency.table import LatencyTable


def explain(
    model: ModelArgument,
    input_: InputOption = None,
    inputs: InputsOption = None,
    table: Annotated[
        Path | None, typer.Option("--table", help="Latency table, or settings of `edgeprune fit`: adds latency shares.")
    ] = None,
    backend: BackendOption = "onnxruntime",
    weights: WeightsOption = None,
    seed: SeedOption = 0,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Trace a model and print its channel groups, what is left alone, and why."""
    import edgeprune
    from edgeprune.backends import registry as backends
    from edgeprune.cli.inputs import example_inputs
    from edgeprune.cli.loading import load_model

    if table is not None:
        backends.get(backend)
    measured = None if table is None else _loaded(table)
    out = Output(json_output)
    with out.step("trace"):
        module = load_model(model, weights, seed=seed)
        graph = edgeprune.trace(module, example_inputs(module, input_, inputs, seed=seed))
    shares = None
    if measured is not None:
        with out.step("share out the latency"):
            shares = _shares(measured, backend, graph, module)
    out.say(graph.explain(shares))
    other = backend if backend != "onnxruntime" else None
    flags: list[object] = [*input_flags(input_, inputs), *given(weights=weights, seed=seed or None, backend=other)]
    out.finish(
        {
            "model": model,
            "signature": graph.signature,
            "parts": [part.path for part in graph.parts],
            "failure": graph.failure,
            "groups": [
                {"name": group.name, "size": group.size, "unit": group.unit, **_share(shares, group.nodes)}
                for group in graph.groups
            ],
            "frozen": [
                {
                    "name": axis.name,
                    "size": axis.size,
                    "reason": axis.reason,
                    "op": axis.op,
                    "source": axis.source,
                    **_share(shares, axis.nodes),
                }
                for axis in graph.frozen
            ],
        },
        next_command=command_line("edgeprune", "profile", model, *flags)
        if table is None
        else command_line("edgeprune", "prune", model, *flags, "--table", table, "--latency", "50%"),
    )


def _loaded(path: Path) -> LatencyTable | Predictor:
    """A table that must say what a model is lowered for, or what settings of `edgeprune fit` give."""
    import edgeprune

    loaded = edgeprune.Predictor.load(path) if path.suffix == ".json" else edgeprune.LatencyTable.load(path)
    (loaded if isinstance(loaded, edgeprune.LatencyTable) else loaded.table).target()
    return loaded


def _shares(
    measured: LatencyTable | Predictor, backend: str, graph: ChannelGraph, module: torch.nn.Module
) -> dict[str, float]:
    import edgeprune
    from edgeprune.loop.lowering import precision_of
    from edgeprune.report.collecting import latency_shares

    predictor = edgeprune.fit(measured) if isinstance(measured, edgeprune.LatencyTable) else measured
    device = predictor.table.target()
    with tempfile.TemporaryDirectory(prefix="edgeprune-lower-") as scratch:
        kernel_graph = edgeprune.lower(
            graph, backend, model=module, device=device, precision=precision_of(predictor), workdir=Path(scratch)
        )
        return latency_shares(kernel_graph, predictor)


def _share(shares: dict[str, float] | None, nodes: tuple[str, ...]) -> dict[str, float]:
    """The share of some nodes as a field of the answer, where there is one."""
    return {} if shares is None else {"latency_share": sum(shares.get(node, 0.0) for node in nodes)}
