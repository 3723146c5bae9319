"""The command line as a process: exit codes, one line per error, nothing heavy imported, Ctrl-C at awkward moments."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgeprune.cli.commands import VERBS
from edgeprune.cli.console import print_json
from edgeprune.criteria.registry import CRITERIA

COMMAND = [sys.executable, "-m", "edgeprune"]


def run(*arguments: str, cwd: Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "EDGEPRUNE_CONFIG": str(cwd / "boards.toml"),
        "EDGEPRUNE_ROOT": str(cwd / "board"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    return subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def assert_one_line_error(result: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert result.returncode == code, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]
    assert "Traceback" not in result.stdout + result.stderr


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(
        "import os, signal, sys, torch\n"
        "def build(): return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))\n"
        "def interrupted(): os.kill(os.getpid(), signal.SIGINT); return build()\n"
        "def swallowed():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        for _ in range(10**6): pass\n"
        "    except BaseException:\n"
        "        raise RuntimeError('a library that mistakes Ctrl-C for a failure')\n"
        "def chatty():\n"
        "    import logging, warnings\n"
        "    print('hello from the factory')\n"
        "    os.system('echo hello from a child process')\n"
        "    warnings.warn('a warning of a library')\n"
        "    logging.getLogger('some.library').warning('a log line of a library')\n"
        "    return build()\n"
        "def interrupted_in_destructor():\n"
        "    class Loud:\n"
        "        def __del__(self): os.kill(os.getpid(), signal.SIGINT); sum(range(1000))\n"
        "    Loud()\n"
        "    import time; time.sleep(5)\n"
        "    return build()\n"
    )
    return path


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_explains_itself(verb: str, tmp_path: Path) -> None:
    result = run(verb, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert f"Usage: edgeprune {verb}" in result.stdout
    if verb not in ("device", "table"):
        assert "--json" in result.stdout


def test_prune_names_every_criterion(tmp_path: Path) -> None:
    words = set(re.findall(r"\w+", run("prune", "--help", cwd=tmp_path).stdout))
    assert set(CRITERIA.builtin) <= words


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("torch", "pandas", "sklearn", "scipy", "numpy", "paramiko", "onnx", "onnxruntime", "plotly", "pydantic")
    code = (
        "import sys\n"
        "from edgeprune.cli.main import run\n"
        "assert run(['--help']) == 0\n"
        f"found = [name for name in {heavy!r} if name in sys.modules]\n"
        "sys.stderr.write(','.join(found))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path.cwd(), capture_output=True, text=True, timeout=60, check=True
    )
    # typer itself imports pydantic in some versions; what counts is that none of the heavy ones comes along.
    assert set(result.stderr.split(",")) <= {"", "pydantic"}
    for verb, row in VERBS.items():
        assert verb in result.stdout
        assert row.help.split()[0] in result.stdout


def test_the_entry_point_imports_nothing_but_the_standard_library() -> None:
    code = "import sys; import edgeprune.cli.main; sys.stdout.write(' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    foreign = {name.split(".")[0] for name in result.stdout.split()} & {"typer", "rich", "click", "torch", "pydantic"}
    assert not foreign


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["proune"], ["error: No such command 'proune'", "'prune'", "Try: edgeprune --help"]),
        (["fit"], ["error: Missing argument", "Try: edgeprune fit --help"]),
        (["fit", "x.parquet", "--nonsense"], ["error: No such option", "--nonsense"]),
        (["profile", "net.py:build", "--threads", "zero"], ["error: Invalid value", "threads"]),
        (["device", "proub"], ["No such command 'proub'", "edgeprune device --help"]),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    result = run(*arguments, cwd=tmp_path)
    assert_one_line_error(result, 2, *parts)
    assert result.stdout == ""


def test_errors_are_an_object_on_stdout_with_json(tmp_path: Path) -> None:
    result = run("explain", "missing.py:build", "--input", "x=1x4", "--json", cwd=tmp_path)
    assert_one_line_error(result, 2, "error: missing.py:build must name a file")
    error = json.loads(result.stdout)
    assert error["error"] == "FactoryError"
    assert error["exit_code"] == 2
    assert error["message"].startswith("missing.py:build must name a file")
    usage = json.loads(run("fit", "--json", cwd=tmp_path).stdout)
    assert usage["error"] == "UsageError"


def test_json_holds_null_where_a_figure_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("-inf"), 1.5]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5]}


def test_what_libraries_and_the_user_code_say_stays_out_of_the_way(model_file: Path, tmp_path: Path) -> None:
    silent = run("explain", f"{model_file}:chatty", "--input", "x=1x4", "--json", cwd=tmp_path)
    assert json.loads(silent.stdout)["groups"]
    assert silent.stderr.splitlines() == ["hello from the factory", "hello from a child process"]
    loud = run("explain", f"{model_file}:chatty", "--input", "x=1x4", "--verbose", cwd=tmp_path)
    assert "hello from the factory" in loud.stdout
    assert "a warning of a library" in loud.stderr
    assert "a log line of a library" in loud.stderr


@pytest.mark.parametrize("factory", ["interrupted", "swallowed", "interrupted_in_destructor"])
def test_ctrl_c_in_user_code_is_one_line_and_exit_130(factory: str, model_file: Path, tmp_path: Path) -> None:
    result = run("explain", f"{model_file}:{factory}", "--input", "x=1x4", cwd=tmp_path)
    assert_one_line_error(result, 130, "interrupted", "run the same command again to go on")


@pytest.mark.parametrize("after_s", [0.1, 0.7])
def test_ctrl_c_while_libraries_are_imported_is_one_line_and_exit_130(
    after_s: float, model_file: Path, tmp_path: Path
) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time, torch\ndef build(): time.sleep(60)\n")
    started = tmp_path / "started"
    # The clock starts when our entry point does: what an interrupt does to the interpreter's own start is not ours.
    code = (
        "import sys, pathlib\nfrom edgeprune.cli.main import run\n"
        f"pathlib.Path({str(started)!r}).touch()\n"
        f"sys.exit(run(['explain', {f'{slow}:build'!r}, '--input', 'x=1x4']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not started.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert len(err.splitlines()) == 1, err
    assert err.startswith("interrupted")


@pytest.mark.parametrize("arguments", [["--help"], ["device", "list", "--json"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(arguments: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    assert err == b""


def test_an_unexpected_failure_is_one_line_and_a_traceback_on_request(tmp_path: Path) -> None:
    (tmp_path / "broken_verb.py").write_text(
        "def broken(verbose: bool = False):\n    raise ZeroDivisionError('on purpose')\n"
    )
    code = (
        "import sys\nfrom edgeprune.cli import commands, main\n"
        "commands.VERBS['broken'] = commands.Verb('broken_verb:broken', 'Fail.', 'Look')\n"
        "sys.exit(main.run(['broken', *sys.argv[1:]]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-c", code]
    quiet = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert_one_line_error(quiet, 1, "ZeroDivisionError: on purpose", "--verbose")
    loud = subprocess.run(
        [*command, "--verbose"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert loud.returncode == 1
    assert "Traceback" in loud.stderr


def test_the_version_is_the_package_version(tmp_path: Path) -> None:
    import edgeprune

    assert run("--version", cwd=tmp_path).stdout.strip() == f"edgeprune {edgeprune.__version__}"
