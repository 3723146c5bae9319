"""Which functions an engine really calls when this host runs it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune.backends.tvm.building import MAIN
from edgeprune.errors import CompileError


def executed(engine: Path, description: Mapping[str, Any]) -> list[str]:
    """Names of the engine's own functions in the order in which one run calls them.

    Args:
        engine: An engine for this host.
        description: What stands behind its code.

    Raises:
        CompileError: TVM's runtime on this host refuses it.
    """
    import numpy as np
    import tvm
    from tvm.runtime.vm import VirtualMachine

    own = {name for name, _ in description["calls"]}
    found: list[str] = []

    def note(_: Any, name: str, before: bool, *__: Any) -> int:
        if before and name in own:
            found.append(name)
        return 0

    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        library = Path(folder) / "engine.so"
        library.write_bytes(engine.read_bytes())
        try:
            machine = VirtualMachine(tvm.runtime.load_module(str(library)), tvm.runtime.cpu())
            machine.set_instrument(note)
            machine[MAIN](
                *(
                    tvm.runtime.tensor(np.zeros(tuple(item["shape"]), item["dtype"]))
                    for item in (*description["inputs"], *description["weights"])
                )
            )
        # tvm.error's classes derive from several built-in ones, and which is raised depends on the version.
        except Exception as error:
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise CompileError(f"TVM's runtime on this host must run {engine.name}, it says: {reason}.") from error
    return found
