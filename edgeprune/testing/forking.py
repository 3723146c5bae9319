"""Command lines in processes forked from one that has imported what they need: a start takes no seconds.

Each is a process of its own, with a session, folder, environment, streams and exit code of its own; what is left out is the start
of the interpreter and the import of libraries. Tests of the start itself, and of what a signal does to it, must not use it.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from multiprocessing.context import ForkServerContext
from pathlib import Path

_LIBRARIES = (
    *("networkx", "onnx", "onnx.reference", "onnxruntime", "onnxscript.rewriter", "pandas", "plotly.graph_objects"),
    *("pyarrow.parquet", "pydantic", "rich.table", "safetensors.torch", "scipy.optimize", "sklearn.ensemble"),
    *("sklearn.linear_model", "sympy", "torch", "torch._dynamo", "torch.distributed", "torch.export"),
    *("torch.fx.experimental.symbolic_shapes", "torch.onnx._internal.exporter._compat", "typer"),
)
"""What commands import, the exporters' own parts among it; what an installation lacks is left out."""
_LEFT_OUT = ("edgeprune.boards.onboard", "edgeprune.testing", "edgeprune.backends.tvm")


def run(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run one command line of ``edgeprune``.

    Args:
        arguments: Without the program's name.
        folder: Working directory.
        environment: All of it.
        timeout_s: Deadline, seconds.

    Raises:
        subprocess.TimeoutExpired: It had not ended by then; it was killed.
    """
    with tempfile.TemporaryDirectory(prefix="command-") as streams:
        out, err = Path(streams) / "out", Path(streams) / "err"
        process = _forks().Process(
            target=_command, args=(list(arguments), str(folder), dict(environment), str(out), str(err))
        )
        process.start()
        try:
            process.join(timeout_s)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(["edgeprune", *arguments], timeout_s)
        finally:
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
        said, complained = (path.read_text(encoding="utf-8") if path.exists() else "" for path in (out, err))
    return subprocess.CompletedProcess(list(arguments), process.exitcode, said, complained)


@lru_cache(maxsize=1)
def _forks() -> ForkServerContext:
    import edgeprune

    modules = (one.name for one in pkgutil.walk_packages(edgeprune.__path__, "edgeprune."))
    context = multiprocessing.get_context("forkserver")
    # What runs the tests is imported again in each process, so it had better be there.
    context.set_forkserver_preload(
        ["pytest", *_LIBRARIES, *(name for name in modules if not name.startswith(_LEFT_OUT))]
    )
    return context


def _command(arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """In the process of its own: begin as a new interpreter would, and end as it does."""
    gc.freeze()  # what was there before the fork stays shared, and no collection looks through it
    os.setsid()
    streams = ((os.devnull, os.O_RDONLY), (out, os.O_WRONLY | os.O_CREAT), (err, os.O_WRONLY | os.O_CREAT))
    for number, (path, mode) in enumerate(streams):
        opened = os.open(path, mode, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None  # it remembers that of the process that this one was forked from
    sys.path.insert(0, folder)
    sys.argv = ["edgeprune", *arguments]
    from edgeprune.cli.main import run as main

    try:
        code = main()
    finally:
        atexit._run_exitfuncs()
    sys.exit(code)
