"""Sentences for a sentence transformer: descriptions of Debian packages, and docstrings of the standard library.

Both are on any Debian or Ubuntu machine. A package, or a top-level module, is in one split only.

    apt-cache dumpavail > packages.txt
    python benchmarks/block_quality_text.py --packages packages.txt --out sentences.json --calibration 4000 --held-out 2000
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

FEWEST_WORDS, MOST_WORDS = 5, 40


def described(text: str) -> Iterator[tuple[str, str]]:
    """Sentences of the descriptions in a list of packages, with the source package that they come from."""
    for paragraph in re.split(r"\n\s*\n", text):
        name = re.search(r"^Package: (\S+)", paragraph, re.MULTILINE)
        source = re.search(r"^Source: (\S+)", paragraph, re.MULTILINE)
        body = re.search(r"^Description(?:-en)?: (.*(?:\n .*)*)", paragraph, re.MULTILINE)
        if name is None or body is None:
            continue
        short, *long = body[1].split("\n")
        prose = " ".join(line.strip() for line in long if not line.startswith("  ") and line.strip() != ".")
        for sentence in [short, *sentences(prose)]:
            yield f"debian {(source or name)[1]}", sentence


def documented(folder: Path) -> Iterator[tuple[str, str]]:
    """Sentences of the docstrings below a folder of Python files, with the top-level module that they come from."""
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).parts
        if {"site-packages", "test", "tests", "idlelib", "__pycache__"} & set(parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                # Only the first paragraph is sure to be prose.
                opening = (ast.get_docstring(node) or "").split("\n\n")[0]
                for sentence in sentences(" ".join(opening.split())):
                    yield f"python {parts[0].removesuffix('.py')}", sentence


def sentences(prose: str) -> list[str]:
    """A paragraph cut at the ends of its sentences."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", prose.strip())


def usable(sentence: str) -> bool:
    """Whether it is about a sentence, and not an example or a list."""
    words = sentence.split()
    letters = sum(sign.isalpha() or sign.isspace() for sign in sentence)
    return FEWEST_WORDS <= len(words) <= MOST_WORDS and letters >= 0.85 * len(sentence)


def split(found: list[tuple[str, str]], calibration: int, held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Random sentences, half from either kind of source as far as there are; no package and no sentence is in both splits.

    Returns:
        Sentences for calibration, and held-out ones.
    """
    draw = random.Random(seed)
    unique = {sentence: package for package, sentence in reversed(found) if usable(sentence)}
    by_package: dict[str, list[str]] = {}
    for sentence, package in sorted(unique.items()):
        by_package.setdefault(package, []).append(sentence)
    splits: tuple[list[str], list[str]] = ([], [])
    for kind in ("debian", "python"):
        packages = sorted(package for package in by_package if package.startswith(kind))
        draw.shuffle(packages)
        share = calibration / (calibration + held_out)
        at = round(share * len(packages))
        for some, packages_of, wanted in (
            (splits[0], packages[:at], calibration),
            (splits[1], packages[at:], held_out),
        ):
            pool = [sentence for package in packages_of for sentence in by_package[package]]
            draw.shuffle(pool)
            # The second kind of source makes up for what the first lacks.
            some += pool[: wanted // 2 if kind == "debian" else wanted - len(some)]
    for some, wanted in zip(splits, (calibration, held_out), strict=True):
        if len(some) < wanted:
            raise SystemExit(
                f"{wanted} sentences are wanted for a split, found {len(some)}: give a longer list of packages."
            )
        draw.shuffle(some)
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--packages", type=Path, required=True, help="output of apt-cache dumpavail, or /var/lib/dpkg/status"
    )
    parser.add_argument("--docstrings", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=4_000)
    parser.add_argument("--held-out", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = [*described(arguments.packages.read_text(errors="replace")), *documented(arguments.docstrings)]
    calibration, held_out = split(found, arguments.calibration, arguments.held_out, arguments.seed)
    arguments.out.write_text(json.dumps({"calibration": calibration, "held_out": held_out}, indent=0) + "\n")
    print(f"{len(calibration)} sentences for calibration, {len(held_out)} held out, in {arguments.out}")


if __name__ == "__main__":
    main()
