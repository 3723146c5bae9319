"""The stand-in is as strict as the sources that it was taken from, and knows nothing of our tables."""

import ast
import json
import subprocess
from pathlib import Path

import pytest

from edgeprune.testing import trtexec


def call(program, *words):
    return subprocess.run([program, *words], capture_output=True, text=True, check=False)


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"a model")
    return path


@pytest.mark.parametrize("name", ["trtexec.py", "trtexec_model.py", "trtexec_program.py", "trtexec_says.py"])
def test_it_imports_nothing_of_edgeprune(name):
    tree = ast.parse(Path(trtexec.__file__).with_name(name).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.startswith("edgeprune")]


@pytest.mark.parametrize("version", trtexec.versions())
def test_its_first_line_is_that_of_the_release(stand_in, version):
    done = call(stand_in(version), "--help")
    tag = {"8.6.1": "v8601]", "10.3.0": "v100300]", "11.1.0": "v110100] [b106]"}[version]
    assert done.stdout.splitlines()[0].startswith(f"&&&& RUNNING TensorRT.trtexec [TensorRT {tag} # ")
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("version", "word"),
    [
        ("11.1.0", "--fp16"),
        ("11.1.0", "--best"),
        ("11.1.0", "--int8"),
        ("10.3.0", "--noCudaGraph"),
        ("10.3.0", "--includeDataTransfers"),
        ("10.3.0", "--workspace=64"),
        ("8.6.1", "--noSpinWait"),
        ("8.6.1", "--stronglyTyped"),
        ("8.6.1", "--getPlanVersionOnly"),
        ("8.6.1", "--nonsense"),
    ],
)
def test_an_option_that_the_release_lacks_ends_it(stand_in, model, version, word):
    done = call(stand_in(version), f"--onnx={model}", word)
    assert done.returncode == 1
    assert f"[E] Unknown option: {word.partition('=')[0]}" in done.stderr
    assert "&&&& FAILED" in done.stderr


def test_a_value_needs_an_equals_sign(stand_in, model, tmp_path):
    done = call(stand_in(), f"--onnx={model}", "--saveEngine", str(tmp_path / "engine.plan"))
    assert done.returncode == 1
    assert f"Unknown option: {tmp_path / 'engine.plan'}" in done.stderr
    done = call(stand_in(), f"--onnx={model}", "--iterations", "10")
    assert "[E] stoi" in done.stderr
    done = call(stand_in(), f"--onnx={model}", "--fp16", "--fp16")
    assert "Unknown option: --fp16" in done.stderr
    done = call(stand_in(), f"--onnx={model}", "--profilingVerbosity=loud")
    assert "Unknown profilingVerbosity: loud" in done.stderr


def test_a_profiled_run_has_no_times_of_its_own_before_tensorrt_11(stand_in, model, tmp_path):
    for version, more, there in (
        ("10.3.0", (), False),
        ("10.3.0", ("--separateProfileRun",), True),
        ("11.1.0", (), True),
    ):
        times = tmp_path / "times.json"
        times.unlink(missing_ok=True)
        words = [f"--onnx={model}", f"--exportTimes={times}", f"--exportProfile={tmp_path / 'profile.json'}", *more]
        assert call(stand_in(version), *words).returncode == 0
        assert times.exists() == there, (version, more)


def test_layers_need_detailed_verbosity(stand_in, model, tmp_path):
    layers = tmp_path / "layers.json"
    for more, kind in (((), str), (("--profilingVerbosity=detailed",), dict)):
        call(stand_in(), f"--onnx={model}", "--skipInference", f"--exportLayerInfo={layers}", *more)
        assert isinstance(json.loads(layers.read_text(encoding="utf-8"))["Layers"][0], kind)


def test_two_builds_differ_and_share_a_timing_cache(stand_in, model, tmp_path):
    program, cache = stand_in(), tmp_path / "timing.cache"
    plans, logs = [], []
    for number in range(2):
        plan = tmp_path / f"{number}.plan"
        words = [f"--onnx={model}", f"--saveEngine={plan}", f"--timingCacheFile={cache}", "--skipInference"]
        logs.append(call(program, *words))
        plans.append(plan.read_bytes())
    assert plans[0] != plans[1]
    assert "Could not read timing cache" in logs[0].stderr
    assert "bytes of timing cache from" in logs[1].stdout
