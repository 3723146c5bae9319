"""What a path that leads nowhere may have meant."""

from __future__ import annotations

import difflib
from pathlib import Path


def near_files(path: Path, *suffixes: str, otherwise: str | None = None) -> str:
    """What to try instead of a file that is not there: one of a like name, there or here, or another path.

    Args:
        path: The file that is not there.
        suffixes: Of files that would do, each with its dot.
        otherwise: What else helps where no name is like it.
    """
    path = path.absolute()
    folders = list(
        dict.fromkeys([path.parent, Path.cwd(), *(other for other in Path.cwd().glob("*/") if other.is_dir())])
    )
    found = [
        other for folder in folders if folder.is_dir() for other in sorted(folder.iterdir()) if other.suffix in suffixes
    ]
    # By their stems: an ending that all have makes no two names alike.
    stems = difflib.get_close_matches(path.stem, [other.stem for other in found], n=1, cutoff=0.5)
    near = next((other for other in found if stems and other.stem == stems[0]), None)
    if near is None:
        elsewhere = f"a path from {Path.cwd()}, or an absolute one"
        return elsewhere if otherwise is None else f"{elsewhere}, or {otherwise}"
    return str(near.relative_to(Path.cwd()) if Path.cwd() in near.parents else near)
