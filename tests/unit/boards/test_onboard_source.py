"""What is copied to a board must run there: Python 3.6, the standard library, and nothing else."""

from __future__ import annotations

import ast
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import edgeprune.boards
from edgeprune.boards.carrying import carried
from edgeprune.boards.runner_package import runner_package

FOLDER = Path(edgeprune.boards.__file__).parent / "onboard"
FILES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")
OWN = {path.stem for path in FILES}
FOREIGN_INSIDE_FUNCTIONS = {
    "engines": {"numpy", "onnxruntime"},
    "infer": {"numpy", "onnxruntime"},
    "parity": {"numpy", "onnxruntime"},
    "trtpython": {"tensorrt"},
    "tvm_engine": {"tvm"},
}


def imports(tree: ast.AST) -> dict[str, bool]:
    """Top-level module name to whether some import of it runs at import time."""
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            top = name.split(".")[0]
            found[top] = found.get(top, False) or node not in inside
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_onboard_file_is_python_3_6(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), path.name, feature_version=(3, 6))
    for node in ast.walk(tree):
        # The grammar of `feature_version` lets some newer things pass.
        assert not isinstance(node, ast.NamedExpr), f"{path.name}:{node.lineno}: walrus"
        if isinstance(node, ast.keyword):
            assert node.arg not in ("capture_output", "text"), f"{path.name}:{node.value.lineno}: {node.arg}="
        if isinstance(node, ast.ImportFrom):
            assert node.module not in ("__future__", "dataclasses"), f"{path.name}:{node.lineno}: {node.module}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("removeprefix", "removesuffix", "fromisoformat", "time_ns", "perf_counter_ns")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_onboard_file_imports_the_standard_library_alone(path: Path) -> None:
    found = imports(ast.parse(path.read_text(encoding="utf-8")))
    for name, at_import_time in found.items():
        if name in OWN or name in sys.stdlib_module_names:
            continue
        assert name in FOREIGN_INSIDE_FUNCTIONS.get(path.stem, set()), f"{path.name} imports {name}"
        assert not at_import_time, f"{path.name} imports {name} outside of functions"


def test_no_onboard_module_hides_one_of_the_standard_library() -> None:
    assert not (OWN - {"__main__"}) & set(sys.stdlib_module_names)


def test_every_verb_names_a_module_of_the_package_that_has_a_main() -> None:
    tree = ast.parse((FOLDER / "__main__.py").read_text(encoding="utf-8"))
    table = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "VERBS"
    )
    verbs = ast.literal_eval(table)
    assert {
        "probe",
        "store",
        "lock",
        "bench",
        "power",
        "energy",
        "parity",
        "stage",
        "activate",
        "rollback",
        "status",
    } <= set(verbs)
    for module in set(verbs.values()):
        body = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8")).body
        main = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "main")
        assert [argument.arg for argument in main.args.args] == ["request", "emit"], module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_table_names_a_key_twice(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            assert len(keys) == len(set(keys)), f"{path.name}:{node.lineno}"


def test_the_package_is_the_same_bytes_each_time_and_named_by_their_hash() -> None:
    first = runner_package()
    runner_package.cache_clear()
    second = runner_package()
    assert first == second
    assert first is not second
    with zipfile.ZipFile(io.BytesIO(first.content)) as archive:
        assert archive.namelist() == sorted(path.name for path in FILES)
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def oldest_python() -> str | None:
    """A Python 3.6 of this machine that starts, or None."""
    candidates = [shutil.which("python3.6"), *sorted(Path.home().glob(".pyenv/versions/3.6.*/bin/python3.6"))]
    for candidate in candidates:
        if candidate is None:
            continue
        done = subprocess.run(
            [candidate, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True
        )
        if done.stdout.strip() == "(3, 6)":
            return str(candidate)
    return None


@pytest.mark.skipif(oldest_python() is None, reason="no Python 3.6 on this machine")
def test_the_runner_runs_under_a_real_python_3_6(tmp_path: Path) -> None:
    package = tmp_path / runner_package().name
    package.write_bytes(runner_package().content)
    python = oldest_python()
    assert python is not None
    for verb, request in [
        ("probe", {}),
        ("store", {"action": "missing", "blobs": {"0" * 64: 1}}),
        ("lock", {"purpose": "test"}),
        ("power", {}),
        ("power", {"action": "sample", "names": ["meter meter"], "meter": "while echo 3.5; do sleep 0.02; done"}),
        ("status", {}),
    ]:
        line = json.dumps({"root": str(tmp_path / "root"), **request}) + "\n"
        done = subprocess.run([python, str(package), verb], input=line, capture_output=True, text=True, timeout=60)
        events = [json.loads(text) for text in done.stdout.splitlines()]
        assert events[-1]["event"] == "result", (verb, done.stdout, done.stderr)
        assert done.returncode == 0
    # The same without a file of it on the board.
    words, stdin = carried(
        python, "probe", json.dumps({"root": str(tmp_path / "none"), "untouched": True}).encode() + b"\n"
    )
    done = subprocess.run(words, input=stdin, capture_output=True, timeout=60)
    assert json.loads(done.stdout.splitlines()[-1])["result"]["python"].startswith("3.6."), done.stderr
    assert not (tmp_path / "none").exists()
    modules = [name for name in OWN if name != "__main__"]
    code = "import sys; sys.path.insert(0, sys.argv[1])\n" + "\n".join(f"import {name}" for name in sorted(modules))
    done = subprocess.run([python, "-c", code, str(package)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
