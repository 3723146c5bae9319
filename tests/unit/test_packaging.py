"""What holds for the package as a whole: lazy names, import directions, no pickle, nothing forgotten."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgeprune

PACKAGE = Path(edgeprune.__file__).parent
ROOT = PACKAGE.parent
HEAVY = (
    "torch",
    "pandas",
    "sklearn",
    "scipy",
    "numpy",
    "onnx",
    "onnxruntime",
    "paramiko",
    "plotly",
    "pydantic",
    "typer",
)


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    ).stdout


def _modules() -> list[str]:
    """All modules of the package; what is copied to boards is not imported on the host."""
    names = [module.name for module in pkgutil.walk_packages([str(PACKAGE)], "edgeprune.", onerror=_raise)]
    return [name for name in names if not name.startswith("edgeprune.boards.onboard.") and name != "edgeprune.__main__"]


def _raise(name: str) -> None:
    raise AssertionError(f"{name} cannot be imported")


def test_importing_the_package_imports_nothing_heavy() -> None:
    found = _python(f"import edgeprune, sys; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert found.strip() == "[]"


def test_every_public_name_loads_and_is_listed() -> None:
    assert sorted(edgeprune.__all__) == list(edgeprune.__all__)
    listed = set(dir(edgeprune))
    for name in edgeprune.__all__:
        assert getattr(edgeprune, name) is not None
        assert name in listed
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        _ = edgeprune.prunes  # type: ignore[attr-defined]


def test_no_public_name_is_shadowed_by_a_submodule() -> None:
    before = {name: getattr(edgeprune, name) for name in edgeprune.__all__}
    for name in _modules():
        importlib.import_module(name)
    for name, value in before.items():
        assert getattr(edgeprune, name) is value, f"importing a submodule replaced edgeprune.{name}"


def test_imports_flow_one_way() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    found = str(tool) if tool.exists() else shutil.which("lint-imports")
    assert found is not None, "import-linter must be installed: pip install -e '.[dev]'"
    result = subprocess.run([found, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_can_load_pickles_or_prints_by_itself(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    onboard = "onboard" in path.parts  # there, standard output is the protocol
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert onboard or "print" not in calls
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "torch":
                assert any(
                    word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True
                    for word in node.keywords
                ), "torch.load must be called with weights_only=True"


def test_package_data_is_there() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert (PACKAGE / "report" / "templates" / "report.html.j2").is_file()
    assert list((ROOT / "devices").glob("*.toml")) or list((PACKAGE / "_data" / "devices").glob("*.toml"))


def test_pins_cover_every_dependency_and_torch_comes_first() -> None:
    tomllib = pytest.importorskip("tomllib") if sys.version_info >= (3, 11) else importlib.import_module("tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["onnxruntime"]]
    wanted += project["optional-dependencies"]["dev"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins[0].startswith("torch==")
    pinned = {pin.partition("==")[0] for pin in pins}
    for requirement in wanted:
        name = requirement.split(";")[0].strip().split(">")[0].split("=")[0].split("[")[0].strip().lower()
        assert name in pinned, f"{name} has no pin in constraints.txt"


def test_a_source_distribution_holds_what_its_two_commands_need() -> None:
    tomllib = pytest.importorskip("tomllib") if sys.version_info >= (3, 11) else importlib.import_module("tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = set(project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
    assert {"Makefile", ".ci", "constraints.txt", "README.md", "CONTRIBUTING.md", "edgeprune", "tests"} <= included
    for name in included - {"benchmarks"}:
        assert (ROOT / name).exists(), f"{name} is to be packed and is not there"
    assert project["project"]["dynamic"] == ["version"], "the version stands in edgeprune/__init__.py alone"


def test_the_verbs_of_the_command_line_are_in_the_documentation() -> None:
    from edgeprune.cli.commands import VERBS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in VERBS:
        assert f"edgeprune {verb}" in readme, f"README.md does not mention edgeprune {verb}"
    errors = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    from edgeprune import errors as tree

    for name, value in vars(tree).items():
        if isinstance(value, type) and issubclass(value, tree.EdgepruneError):
            assert f"`{name}`" in errors, f"docs/errors.md does not mention {name}"
