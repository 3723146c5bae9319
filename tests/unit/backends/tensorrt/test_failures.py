"""Recorded failures of trtexec become typed errors with the next step."""

import subprocess

import pytest

from edgeprune.backends.tensorrt import failures
from edgeprune.errors import CompileError, IncompatibleTargetError


def log_of(program, *words):
    done = subprocess.run([program, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return done.stdout.decode(), done.returncode


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"a model")
    return path


def test_too_little_memory_names_what_was_asked_for(stand_in, model):
    log, code = log_of(stand_in(failing="memory"), f"--onnx={model}")
    error = failures.failure(log, code, step="build", version="10.3.0")
    assert isinstance(error, CompileError)
    assert "memory" in error.message
    assert "15485 MB" in error.message
    assert error.hint
    assert error.log_tail[-1].startswith("&&&& FAILED")


def test_a_node_without_an_implementation_is_named(stand_in, model):
    log, code = log_of(stand_in(failing="node"), f"--onnx={model}")
    error = failures.failure(log, code, step="build", version="10.3.0")
    assert isinstance(error, CompileError)
    assert "/model/model.6/Conv + PWN(/model/model.7/LeakyRelu)" in error.message


def test_the_older_form_of_that_line_is_read_too():
    log = "[04/26/2024-10:00:00] [E] Error[10]: Could not find any implementation for node /model.22/Range_2.\n[E] more"
    error = failures.failure(log, 1, step="build", version="8.6.1")
    assert error.message.endswith("found none of /model.22/Range_2.")


@pytest.mark.parametrize(("builder", "loader"), [("8.6.1", "10.3.0"), ("10.3.0", "8.6.1"), ("11.1.0", "10.3.0")])
def test_an_engine_of_another_release_is_refused_with_both(stand_in, model, tmp_path, builder, loader):
    plan = tmp_path / "engine.plan"
    _, code = log_of(stand_in(builder), f"--onnx={model}", f"--saveEngine={plan}", "--skipInference")
    assert code == 0
    log, code = log_of(stand_in(loader), f"--loadEngine={plan}")
    error = failures.failure(log, code, step="time", version=loader)
    assert isinstance(error, IncompatibleTargetError)
    assert loader in error.needed
    assert error.found.startswith("serialization version")
    assert "compile" in error.hint


def test_what_is_no_engine_is_refused(stand_in, model):
    log, code = log_of(stand_in(), f"--loadEngine={model}")
    error = failures.failure(log, code, step="time", version="10.3.0")
    assert isinstance(error, IncompatibleTargetError)


def test_an_unknown_option_is_named(stand_in, model):
    log, code = log_of(stand_in("11.1.0"), f"--onnx={model}", "--fp16")
    error = failures.failure(log, code, step="build", version="11.1.0")
    assert isinstance(error, CompileError)
    assert "--fp16" in error.message


def test_a_killed_build_points_at_memory(stand_in, model):
    log, code = log_of(stand_in(failing="killed"), f"--onnx={model}")
    assert code == -9
    error = failures.failure(log, code, step="build", version="10.3.0")
    assert "SIGKILL" in error.message
    assert "dmesg" in error.hint


def test_anything_else_is_told_by_its_first_error_and_the_end_of_the_log():
    log = "\n".join(
        [*(f"[11/21/2026-08:00:0{n}] [I] line {n}" for n in range(9)), "[E] [TRT] first cause.", "[E] later"]
    )
    error = failures.failure(log, 1, step="build", version="10.3.0")
    assert isinstance(error, CompileError)
    assert "first cause" in error.message
    assert "later" not in error.message
    assert error.log_tail[0] == "[I] line 0"
    assert error.log_tail[-1] == "[E] later"
    silent = failures.failure("", 3, step="build", version="10.3.0")
    assert "exit code 3" in silent.message
