"""A stand-in trtexec on a local board of the test's own, and exports recorded of the real one."""

import os
import shutil
from pathlib import Path

import pytest

from edgeprune.testing import trtexec

DATA = Path(__file__).parents[3] / "data" / "trtexec"


@pytest.fixture
def recorded():
    """Text of a recorded export, e.g. ``recorded("resnet18.layers.json")``."""
    return lambda name: (DATA / name).read_text(encoding="utf-8")


@pytest.fixture
def model():
    """An ONNX model of one node, with what the backend knows of it."""
    onnx = pytest.importorskip("onnx")
    from edgeprune.backends.tensorrt.building import Model

    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"], name="node_relu")
    tensors = [info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "g", tensors[:1], tensors[1:])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    made.ir_version = 8
    return Model(made.SerializeToString(), {"node_relu": "Relu"}, {"node_relu": "relu"})


@pytest.fixture
def build():
    """Builds a model's engine on the board `local`, with the TensorRT that is found there; returns the record."""
    from edgeprune.backends.tensorrt import building
    from edgeprune.backends.tensorrt.flags import BuildOptions
    from edgeprune.boards.board import Board

    def made(model, path, options=None, gpu=None):
        with Board.open("local") as board:
            version = building.version_on(board)
            return building.build(board, version, model, options or BuildOptions(), path, gpu=gpu)

    return made


@pytest.fixture(scope="session")
def known_libraries(tmp_path_factory):
    """What a probe remembers of the runtimes of this machine: importing them takes seconds."""
    return tmp_path_factory.mktemp("known") / "libraries.json"


@pytest.fixture
def stand_in(tmp_path, monkeypatch, known_libraries):
    """Puts a stand-in of a release first in PATH; the board `local` gets a folder of its own."""
    folder, remembered = tmp_path / "bin", tmp_path / "root" / "libraries.json"
    if known_libraries.exists():
        remembered.parent.mkdir()
        shutil.copy(known_libraries, remembered)
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def put(version="10.3.0", model="resnet18", **options):
        return trtexec.install(
            folder,
            version,
            layers=options.pop("layers", DATA / f"{model}.layers.json"),
            profile=options.pop("profile", DATA / f"{model}.profile.json"),
            times=options.pop("times", DATA / "resnet18.times.json"),
            **options,
        )

    yield put
    if remembered.exists():
        shutil.copy(remembered, known_libraries)
