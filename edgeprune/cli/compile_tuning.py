"""The part of ``edgeprune compile`` that is about searching schedules, and about whether that was worth it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from edgeprune.cli.console import Output, Progress, command_line
from edgeprune.errors import ConfigError, EdgepruneError

if TYPE_CHECKING:
    import torch

    from edgeprune.backends.tvm.tuning import Tuning
    from edgeprune.boards.board import Board
    from edgeprune.deployment.artifact import Artifact


def tuning_of(tune: str | None, trials: int | None, seed: int) -> Tuning | None:
    """What ``--tune`` and ``--tune-trials`` ask for.

    Raises:
        ConfigError: The time is none, or there are trials and no time.
    """
    if tune is None:
        if trials is not None:
            raise ConfigError(
                "--tune-trials must come with --tune, found it alone.", hint=f"--tune 10min --tune-trials {trials}"
            )
        return None
    from edgeprune.backends.tvm.tuning import Tuning, parse_duration

    return Tuning(parse_duration(tune), trials, seed)


def tuned_backend(name: str, tuning: Tuning) -> Any:
    """The backend of that name, which tunes before it compiles.

    Raises:
        ConfigError: It has nothing to tune.
    """
    if name != "tvm":
        raise ConfigError(f"--tune needs --backend tvm, found {name}.", hint="--backend tvm --tune 10min")
    from edgeprune.backends.tvm.backend import Tvm

    return Tvm(tuning=tuning)


def telling(backend: Any, progress: Progress) -> Any:
    """The backend, whose tuning tells a step of the command line how far it is."""
    tuning = getattr(backend, "tuning", None)
    return (
        backend if tuning is None else backend.with_tuning(replace(tuning, progress=progress.timed, told=progress.said))
    )


def tell_beside(
    output: Output,
    artifact: Artifact,
    module: torch.nn.Module,
    example_inputs: Any,
    compile_words: list[object],
    board: Board | None = None,
) -> dict[str, Any]:
    """Say how many functions of an engine of TVM were searched, and what it takes beside ONNX Runtime's.

    Args:
        output: To say it.
        artifact: What was compiled.
        module: From what.
        example_inputs: Of the module.
        compile_words: The command that compiles the same for ONNX Runtime.
        board: What it was compiled for, open, where both are timed; this machine by default.

    Returns:
        The same, for ``--json``; empty where it is no engine of TVM.
    """
    if artifact.manifest.backend != "tvm":
        return {}
    from edgeprune.backends.tvm.backend import Tvm
    from edgeprune.deployment.beside import beside_onnxruntime

    searched, functions = Tvm().searched(artifact.engine)
    output.say(f"{searched} of {functions} functions have a schedule that tuning has found, the others the rule's")
    if board is None and not artifact.manifest.host_parity:
        return {"searched": searched, "functions": functions}
    try:
        with output.step("time it beside ONNX Runtime") as progress:
            found = beside_onnxruntime(artifact, module, example_inputs, board=board, progress=progress.timed)
    except EdgepruneError as error:
        # The artifact is there: that it was not compared is no reason to refuse it.
        output.say(f"it was not compared with ONNX Runtime: {error.message}")
        return {"searched": searched, "functions": functions}
    output.say(str(found))
    if found.slower:
        output.say(f"ONNX Runtime is the faster there: {command_line(*compile_words)}")
    return {"searched": searched, "functions": functions, "beside_onnxruntime": asdict(found)}
