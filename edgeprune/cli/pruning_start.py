"""What every pruning run begins with, of channels or of tiles: its table, its model and the example inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.boards.config import require_known
from edgeprune.cli import record as records
from edgeprune.cli.console import Output
from edgeprune.cli.inputs import example_inputs
from edgeprune.cli.loading import load_model
from edgeprune.cli.meant_latency import meant_table
from edgeprune.cli.record import PruneOptions

if TYPE_CHECKING:
    import torch


def begun(options: PruneOptions, out: Path, output: Output) -> tuple[Any, torch.nn.Module, Any]:
    """The table that is meant, the dense model, and its example inputs; what can be refused quickly is refused first.

    Raises:
        ConfigError: The folder is not one to write a run to, or constraints name modules that the model has not.
        EdgepruneError: Whatever else the loading of the arguments raises.
    """
    records.check_out(out)
    if options.board != "none":
        require_known(options.board)
    if options.weights is None:
        output.say("no --weights: the model is taken with the weights that its factory gives it")
    table = meant_table(options)
    # Torch takes seconds to import, the model perhaps minutes to build.
    from edgeprune.surgery.constraints import require_possible

    module = load_model(options.model, options.weights, seed=options.seed)
    require_possible(options.constraints, module)
    return table, module, example_inputs(module, options.input, options.inputs, seed=options.seed)
