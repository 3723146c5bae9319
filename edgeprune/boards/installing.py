"""How a Python package gets onto a board, as a command that its owner can paste there."""

from __future__ import annotations

import shlex

from edgeprune.spec import Fingerprint

ENVIRONMENT = "~/.edgeprune-venv"
"""Virtual environment on a board whose own Python takes no packages."""


def install_command(package: str, fingerprint: Fingerprint) -> str:
    """Commands that install a package for the board's Python.

    Where that Python belongs to the system's package manager (PEP 668: Debian 12, Raspberry Pi OS) pip refuses to install
    into it: then a virtual environment is made, and the board's Python must be named again.

    Args:
        package: As pip takes it, e.g. ``"onnxruntime>=1.15"``.
        fingerprint: Of the board.
    """
    python = shlex.quote(str(fingerprint.facts.get("python_executable") or "python3"))
    if not fingerprint.facts.get("externally_managed"):
        return f"{python} -m pip install {shlex.quote(package)}   (on the board)"
    own = f"{ENVIRONMENT}/bin/python"
    return (
        f"{python} -m venv {ENVIRONMENT} && {own} -m pip install {shlex.quote(package)}   (on the board, whose Python pip "
        f"must not touch; then here: edgeprune device add NAME --ssh ... --replace --python '{own}')"
    )
