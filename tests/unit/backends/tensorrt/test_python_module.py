"""A board with TensorRT's Python module and no trtexec: a stand-in that has what each release's bindings have, and no more."""

import functools
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from edgeprune.backends.tensorrt import building, flags, versions
from edgeprune.backends.tensorrt.flags import BuildOptions
from edgeprune.boards.board import Board
from edgeprune.errors import BackendUnavailableError, CompileError, IncompatibleTargetError
from edgeprune.files import sha256_of
from edgeprune.testing import tensorrt_classes, tensorrt_module, trtexec

DATA = Path(__file__).parents[3] / "data" / "trtexec"
ONBOARD = Path(trtexec.__file__).parents[1] / "boards" / "onboard"
RELEASES = trtexec.versions()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Puts the module of a release before all others; the board `local` gets a folder of its own, and no trtexec."""
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    # The stand-in's times mean nothing, so it need not take any.
    for name, value in (("WARM_UP_MS", 0), ("DURATION_S", 0), ("ITERATIONS", 20)):
        monkeypatch.setattr(flags, name, value)

    def put(version="10.3.0", **options):
        folder = tmp_path / f"site {version}"
        monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(building.__file__).parents[3]}")
        return tensorrt_module.install(
            folder, version, layers=DATA / "resnet18.layers.json", profile=DATA / "resnet18.profile.json", **options
        )

    return put


@pytest.fixture
def build(build):
    """The same for a board that is not asked for its GPU."""
    return functools.partial(build, gpu={"gpu": "Orin"})


@pytest.mark.parametrize(
    ("version", "options"),
    [("8.6.1", BuildOptions("fp16", workspace_mib=64, dla_core=0)), ("11.1.0", BuildOptions("fp16"))],
)
def test_an_engine_is_built_timed_recorded_and_run_as_with_trtexec(module, build, model, tmp_path, version, options):
    module(version)
    path = tmp_path / "engine.plan"
    record = build(model, path, options)
    assert record["tensorrt"] == version
    assert record["engine_sha256"] == sha256_of(path)
    assert record["unread"] == []
    assert len(record["kernels"]) == 26
    assert sum(entry["average_ms"] is not None for entry in record["kernels"]) > 20
    assert record["latency"]["queries"] == 20
    assert record["latency"]["by"].startswith("TensorRT's Python module on the board")
    assert (tmp_path / "root" / "tensorrt" / f"timing-{version}.cache").read_bytes() == b"timed"
    # What is finished is taken up: two builds differ, so an equal hash says that there was one.
    assert build(model, tmp_path / "again.plan", options)["engine_sha256"] == record["engine_sha256"]


def test_outputs_have_all_their_digits_and_times_are_the_devices(module, build, model, tmp_path, monkeypatch):
    module()
    path = tmp_path / "engine.plan"
    build(model, path)
    given = np.float32([[-1.5, 0.1, 1 / 3, 1e-8]])
    with Board.open("local") as board:
        request = {"engine": str(path), "arrays": {"x": given.tolist()}}
        code = (
            "import json, sys; sys.path.insert(0, sys.argv[1]); sys.argv[0] = sys.argv[1]; import numpy, trtexec_engine; "
            "asked = json.load(sys.stdin); engine = trtexec_engine.TrtexecEngine(asked['engine']); "
            "engine.bind(); timed = engine.timed(0.01, 0.001, 3); "
            "found = engine.compute({'x': numpy.float32(asked['arrays']['x'])}); "
            "print(json.dumps([found['y'].tolist(), timed['times_ms']]))"
        )
        done = subprocess.run(
            [board.python, "-c", code, str(ONBOARD)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
        )
    assert "Traceback" not in done.stderr
    found, times = json.loads(done.stdout)
    np.testing.assert_array_equal(np.float32(found), np.maximum(given, 0))
    assert len(times) == 3
    assert all(0 < ms < 1000 for ms in times)


@pytest.mark.parametrize(
    ("failing", "named"), [("memory", "must have memory to build"), ("node", "none of /model/model.6/Conv")]
)
def test_a_build_that_fails_tells_what_trtexec_would(module, build, model, tmp_path, failing, named):
    module(failing=failing)
    with pytest.raises(CompileError, match=named) as caught:
        build(model, tmp_path / "engine.plan")
    assert not (tmp_path / "engine.plan").exists()
    assert caught.value.log_tail


def test_an_engine_of_another_release_is_refused(module, build, model, tmp_path):
    module("8.6.1")
    path = tmp_path / "engine.plan"
    build(model, path)
    module("10.3.0")
    with Board.open("local") as board, pytest.raises(IncompatibleTargetError, match="serialization version 236"):
        building._run(board, building.version_on(board), "0" * 32, "time", [f"--loadEngine={path}"], [], timeout_s=60)


def test_a_module_that_does_not_load_is_told_with_its_own_words(module, tmp_path):
    module().write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')\n")
    with Board.open("local") as board, pytest.raises(BackendUnavailableError, match=r"libnvinfer\.so\.10: cannot open"):
        building.version_on(board)


def test_the_probe_tells_the_release_of_the_module(module):
    module("8.6.1")
    with Board.open("local") as board:
        assert board.probe().runtimes["tensorrt"]["version"] == "8.6.1"


@pytest.mark.parametrize("version", RELEASES)
def test_it_knows_every_option_that_trtexec_is_given(version, monkeypatch):
    monkeypatch.syspath_prepend(str(ONBOARD))
    import trtpython  # the folder is no package of this process

    places = {"onnx": "model.onnx", "engine": "engine.plan", "layers": "layers.json", "cache": "cache"}
    for options in (BuildOptions(), BuildOptions("fp16", dla_core=1, workspace_mib=64)):
        release = versions.parse(version)
        assert "--onnx" in trtpython.parsed(flags.build(release, options, **places))
        timing = flags.time(release, options, engine="engine.plan", profile="profile.json", times="times.json")
        assert "--loadEngine" in trtpython.parsed(timing)
    with pytest.raises(trtpython.Refused, match="Unknown option: --best"):
        trtpython.parsed(["--onnx=model.onnx", "--best"])


@pytest.mark.parametrize("version", RELEASES)
def test_the_stand_in_has_no_name_and_no_argument_that_the_bindings_lack(version):
    known = tensorrt_module.api(version)["classes"]
    for made in tensorrt_classes.MODELLED:
        methods = known[made.__name__.lstrip("_")].get("methods", {})
        for name, function in vars(made).items():
            if callable(function) and (name in methods) and name != "deserialize_cuda_engine":  # it has overloads
                arguments = list(inspect.signature(function).parameters)[1:]
                assert arguments == methods[name][: len(arguments)], f"{made.__name__}.{name}"


def test_what_a_release_lacks_does_not_exist_in_the_stand_in(module):
    asked = (
        "import json, tensorrt as t\n"
        "class Log(t.ILogger):\n"
        "    def __init__(self):\n        t.ILogger.__init__(self)\n    def log(self, severity, msg):\n        pass\n"
        "config = t.Builder(Log()).create_builder_config()\n"
        "said = [hasattr(t.BuilderFlag, 'FP16'), hasattr(t.NetworkDefinitionCreationFlag, 'EXPLICIT_BATCH')]\n"
        "for change in ('config.max_workspace_size = 1', 'config.nothing', 'config.num_optimization_profiles = 2'):\n"
        "    try:\n        exec(change)\n    except AttributeError:\n        said.append('refused')\n"
        "class Bare(t.ILogger):\n    def __init__(self):\n        pass\n"
        "try:\n    t.Builder(Bare())\nexcept TypeError:\n    said.append('not called')\n"
        "print(json.dumps(said))\n"
    )
    for version, has in (("10.3.0", [True, True]), ("11.1.0", [False, False])):
        module(version)
        done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == [*has, "refused", "refused", "refused", "not called"]


def test_a_replay_is_one_of_the_module_too(module, build, model, tmp_path):
    module("11.1.0")
    build(model, tmp_path / "engine.plan")
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); sys.argv[0] = sys.argv[1]; import trtexec_engine; "
        "trtexec_engine.REPLAY_MORE_S = 0.2\n"
        "child = trtexec_engine.TrtexecEngine(sys.argv[2]).repeated(0.02, 0.2)\n"
        "with child:\n"
        "    child.begin(); known = [child.infers(), child.query_s(), child.infers()]\n"
        "print(json.dumps(known))"
    )
    with Board.open("local") as board:
        command = [board.python, "-c", code, str(ONBOARD), str(tmp_path / "engine.plan")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    before, query_s, after = json.loads(done.stdout)
    assert (before, after) == (True, False)
    assert 0 < query_s < 0.1
