"""What every pruning run begins with, of channels or of tiles: table, model, inputs, and what an interrupted one left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.boards.config import require_known
from edgeprune.cli import record as records
from edgeprune.cli.console import Output
from edgeprune.cli.inputs import example_inputs
from edgeprune.cli.loading import load_model, source_hash
from edgeprune.cli.meant_latency import meant_table
from edgeprune.cli.record import PruneOptions

if TYPE_CHECKING:
    import torch

    from edgeprune.loop.interruption import Interruption


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
    table = checked_table(options, output)
    # Torch takes seconds to import, the model perhaps minutes to build.
    from edgeprune.surgery.constraints import require_possible

    module = load_model(options.model, options.weights, seed=options.seed)
    require_possible(options.constraints, module)
    return table, module, example_inputs(module, options.input, options.inputs, seed=options.seed)


def checked_table(options: PruneOptions, output: Output) -> Any:
    """The table of `meant_table`, which must be of the run's backend and board: told before anything takes long.

    Raises:
        TableMismatchError: It is of another device or runtime, or lacks facts of its device; names them.
        ConfigError: The board lets us use fewer cores than the table has threads.
        RemoteError: The board cannot be reached.
    """
    table = meant_table(options)
    if table is None:
        return None
    from edgeprune.boards.board import Board
    from edgeprune.loop.lowering import require_backend
    from edgeprune.loop.verification import require_same_device

    table.target()
    require_backend(table, options.backend)
    if options.board != "none":
        with output.step(f"look at {options.board}"), Board.open(options.board) as board:
            require_same_device(table, board)
    return table


def interruption_of(options: PruneOptions, out: Path, output: Output) -> Interruption:
    """What an interrupted run of the same options goes on from; where there is an interrupted one, that is told.

    Args:
        options: Of this run.
        out: Its folder.
        output: Where to tell it.
    """
    from edgeprune.loop.interruption import Interruption
    from edgeprune.recovery.checkpoint import different

    asked = options.model_dump(mode="json")
    sources = {
        "source of the model": source_hash(options.model),
        "source of the task": None if options.task is None else source_hash(options.task),
    }
    found = Interruption(out / records.TUNING_FOLDER, {"options": asked, "sources": sources}, sources)
    if options.task is not None and (before := records.interrupted(out)) is not None:
        known = (found.read() or {}).get("information", {}).get("sources", {})
        differs = different({**before.model_dump(mode="json"), **known}, {**asked, **sources})
        if differs:
            output.say(f"the interrupted run in {out} differs in {', '.join(differs)}: this one begins anew")
        else:
            output.say(f"going on with the interrupted run in {out}")
    return found
