"""``edgeprune explain``: what of a model can be pruned, and why not the rest."""

from __future__ import annotations

from edgeprune.cli.console import Output, command_line
from edgeprune.cli.options import (
    InputOption,
    InputsOption,
    JsonOption,
    ModelArgument,
    SeedOption,
    VerboseOption,
    input_flags,
)


def explain(
    model: ModelArgument,
    input_: InputOption = None,
    inputs: InputsOption = None,
    seed: SeedOption = 0,
    json_output: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Trace a model and print its channel groups, what is left alone, and why."""
    import edgeprune
    from edgeprune.cli.inputs import example_inputs
    from edgeprune.cli.loading import load_model

    out = Output(json_output)
    with out.step("trace"):
        module = load_model(model, seed=seed)
        graph = edgeprune.trace(module, example_inputs(module, input_, inputs, seed=seed))
    out.say(graph.explain())
    out.finish(
        {
            "model": model,
            "signature": graph.signature,
            "groups": [{"name": group.name, "size": group.size, "unit": group.unit} for group in graph.groups],
            "frozen": [
                {"name": axis.name, "size": axis.size, "reason": axis.reason, "op": axis.op, "source": axis.source}
                for axis in graph.frozen
            ],
        },
        next_command=command_line("edgeprune", "profile", model, *input_flags(input_, inputs)),
    )
