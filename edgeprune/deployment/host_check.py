"""What the compiling host can check of an artifact: its engine, or where it cannot run that the model as it was exported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.backends import registry
from edgeprune.boards.runner_events import crash, error_of, parse_event
from edgeprune.boards.runner_package import runner_package
from edgeprune.boards.transport import CommandResult
from edgeprune.deployment import agreement
from edgeprune.deployment.agreement import Parity
from edgeprune.deployment.artifact import GOLDEN_NAME, MODEL_NAME
from edgeprune.deployment.manifest import TOLERANCES, Manifest
from edgeprune.errors import CompileError, ParityError

if TYPE_CHECKING:
    import torch

EXPORTED = "onnxruntime"
"""The backend whose engine is the exported model itself."""

_TIMEOUT_S = 600.0


def host_parity(folder: Path, manifest: Manifest, *, threads: int = 1) -> Parity:
    """Run an artifact's engine on its golden inputs on this host, in a process of its own, as a board would.

    Raises:
        EdgepruneError: As the runner reports it, e.g. BackendUnavailableError.
        CommandError: The runner died.
        CompileError: It did not end in time.
    """
    package = runner_package()
    request = {"folder": str(folder.resolve()), "root": str(folder.resolve())}
    request.update(agreement.request(manifest, threads=threads))
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch:
        runner = Path(scratch) / package.name
        runner.write_bytes(package.content)
        try:
            done = subprocess.run(
                [sys.executable, str(runner), "parity"],
                input=json.dumps(request).encode() + b"\n",
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise CompileError(
                f"the engine must run on this host within {_TIMEOUT_S:.0f} s, found it still running."
            ) from error
    events = [event for line in done.stdout.decode().splitlines() if (event := parse_event(line)) is not None]
    if not events or events[-1]["event"] not in ("result", "error"):
        raise crash("parity", CommandResult(done.returncode, done.stdout, done.stderr))
    if events[-1]["event"] == "error":
        raise error_of(events[-1])
    return Parity.from_result(events[-1]["result"], manifest)


def export_parity(
    folder: Path, manifest: Manifest, module: torch.nn.Module, inputs: Sequence[torch.Tensor], *, threads: int = 1
) -> dict[str, Any]:
    """Run the exported model of an engine that only its board can run, in fp32, on the golden inputs: a difference that the board
    finds later is then the engine's, or its runtime's.

    Args:
        folder: Of the artifact, with its golden data and ``model.json``.
        manifest: Of the artifact; its backend compiles what is exported to ONNX.
        module: What was compiled.
        inputs: Example inputs.
        threads: Threads inside one operation.

    Returns:
        ``max_abs``, ``relative`` and ``snr_db``, see `Parity`.

    Raises:
        ParityError: The exported model computes something else than the module.
        ExportError: The module cannot be exported.
    """
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch:
        for name in (GOLDEN_NAME, MODEL_NAME):
            shutil.copyfile(folder / name, Path(scratch) / name)
        backend = registry.get(EXPORTED)
        engine = f"exported{backend.suffix}"
        backend.export(module, tuple(inputs), Path(scratch) / engine)
        changed = {"backend": EXPORTED, "engine": engine, "tolerance": TOLERANCES["fp32"], "tasks": {}}
        found = host_parity(Path(scratch), manifest.model_copy(update=changed), threads=threads)
    if not found.passed:
        raise ParityError(
            f"the model of {manifest.name!r} as it is exported to ONNX {found.complaint()}.",
            hint="edgeprune doctor, then the same command with --verbose, and report what it prints",
        )
    return {"max_abs": found.max_abs, "relative": found.relative, "snr_db": found.snr_db}
