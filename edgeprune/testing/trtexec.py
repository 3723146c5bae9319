"""A stand-in for NVIDIA's trtexec, for boards without a GPU: `install` puts one into a folder.

It is strict where the real one is: an option that is not in the list of its version (``trtexec_options.json``, taken from
NVIDIA's sources) is refused, ``--option value`` instead of ``--option=value`` leaves an unknown word behind, and a number that is
missing ends it with the real one's words. It fails with lines that were recorded of the real one (`trtexec_says`). What it
exports was recorded of the real one too, so layers and times have nothing to do with the model that it was given, unless it is
told to make them up (`trtexec_model`): then they are *modelled*, those of no device. Outputs are always the model's, from ONNX
Runtime, rounded to the six digits that the real one prints. It knows nothing of what edgeprune believes about trtexec. What it
does is in ``trtexec_program.py``.
"""

from __future__ import annotations

import json
import shlex
import stat
import sys
from pathlib import Path
from typing import Literal

Failing = Literal["memory", "node", "killed"]

_OPTIONS, _PROGRAM = (Path(__file__).with_name(name) for name in ("trtexec_options.json", "trtexec_program.py"))


def versions() -> list[str]:
    """Releases that it can stand in for."""
    return list(json.loads(_OPTIONS.read_text(encoding="utf-8")))


def install(
    folder: Path,
    version: str,
    *,
    layers: Path,
    profile: Path,
    times: Path,
    failing: Failing | None = None,
    build_s: float = 0.0,
    name: str = "trtexec",
    modelled: bool = False,
    real_time: bool = False,
) -> Path:
    """Put a stand-in into a folder.

    Args:
        folder: Where to; made if need be.
        version: One of `versions`.
        layers: Recorded export to give for ``--exportLayerInfo``.
        profile: For ``--exportProfile``.
        times: For ``--exportTimes``.
        failing: How every build fails: too little memory, a node without an implementation, or killed by the kernel.
        build_s: Time that a build takes, seconds.
        name: Of the program.
        modelled: Whether layers and times are made up for the model that it is given, by ``trtexec_model.py``.
        real_time: Whether inferences keep a core busy for as long as they are told to go on; else they take no time.

    Returns:
        The program.
    """
    folder.mkdir(parents=True, exist_ok=True)
    setting = folder / f"{name}.json"
    told = {
        "version": version,
        "layers": str(layers.resolve()),
        "profile": str(profile.resolve()),
        "times": str(times.resolve()),
        "failing": failing,
        "build_s": build_s,
        "modelled": str((folder / "modelled").resolve()) if modelled else None,
        "real_time": real_time,
    }
    setting.write_text(json.dumps(told), encoding="utf-8")
    program = folder / name
    command = shlex.join([sys.executable, str(_PROGRAM.resolve()), str(setting.resolve())])
    program.write_text(f'#!/bin/sh\nexec {command} "$0" "$@"\n', encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program
