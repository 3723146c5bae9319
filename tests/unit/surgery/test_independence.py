"""The masked side of `check` shares no code with the cut, and a plan applies without the graph package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SURGERY = Path(__file__).parents[3] / "edgeprune" / "surgery"


def _imports(name: str) -> set[str]:
    tree = ast.parse((SURGERY / f"{name}.py").read_text())
    return {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_masking_imports_neither_the_cut_nor_the_labels() -> None:
    found = _imports("masking") | _imports("masked_math") | _imports("masked_recurrence")
    assert {m for m in found if m.startswith("edgeprune")} == {
        "edgeprune.errors",
        "edgeprune.surgery",
        "edgeprune.surgery.masked_math",
        "edgeprune.surgery.plan",
    }


@pytest.mark.parametrize("name", ["cutting", "program_module", "program_steps", "storage", "plan_format"])
def test_applying_and_loading_do_not_import_the_trace(name: str) -> None:
    assert not any(module.startswith("edgeprune.graph") for module in _imports(name))
