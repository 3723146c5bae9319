"""A model, a task and its inputs, as the command line names them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from edgeprune.cli.inputs import example_inputs
from edgeprune.cli.loading import load_model, load_task, read_state_dict
from edgeprune.errors import FactoryError, InputError, ModelError, TaskError

MODEL_FILE = """
import torch
import sibling_of_net

class Net(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, width, 3)
    def forward(self, image):
        return self.conv(image)

class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)
    def forward(self, left, right):
        return self.linear(left + right)

def build():
    import sibling_used_late
    return Net(sibling_of_net.WIDTH + sibling_used_late.EXTRA)

def build_two(): return Two()
def needs(width): return Net(width)
def wrong(): return "no model"
def fails(): raise RuntimeError("first line\\nsecond line")
def leaves(): raise SystemExit(3)
ready = Net()
number = 7
"""


@pytest.fixture
def net_file(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "sibling_of_net.py").write_text("WIDTH = 5\n")
    (tmp_path / "sibling_used_late.py").write_text("EXTRA = 1\n")
    path = tmp_path / "net.py"
    path.write_text(MODEL_FILE)
    yield path
    for name in ("sibling_of_net", "sibling_used_late"):
        sys.modules.pop(name, None)


def test_a_file_factory_builds_the_model_in_eval_form_with_its_siblings(net_file: Path) -> None:
    before, modules = list(sys.path), set(sys.modules)
    model = load_model(f"{net_file}:build")
    assert model.conv.out_channels == 6
    assert not model.training
    assert sys.path == before
    new = set(sys.modules) - modules
    assert "net" not in new, "the file's own name must stay free for others"


def test_a_module_factory_and_a_ready_module_are_taken(net_file: Path) -> None:
    assert isinstance(load_model("torch.nn:Identity"), torch.nn.Identity)
    assert load_model(f"{net_file}:ready").conv.out_channels == 4


def test_the_same_seed_builds_the_same_weights(net_file: Path) -> None:
    first, second = (load_model(f"{net_file}:build", seed=3).conv.weight for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, load_model(f"{net_file}:build", seed=4).conv.weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("biuld", "there is no 'biuld'. Try: build"),
        ("wrong", "must return a torch.nn.Module, .* returned a str"),
        ("fails", "raised RuntimeError: first line second line"),
        ("leaves", "raised SystemExit: 3"),
        ("number", "must be a callable, found a int"),
        ("needs", "callable without arguments: missing a required argument: 'width'"),
    ],
)
def test_a_factory_that_cannot_be_used_is_named(net_file: Path, name: str, message: str) -> None:
    with pytest.raises(FactoryError, match=message):
        load_model(f"{net_file}:{name}")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("net", "must be written package.module:factory or file.py:factory, found 'net'"),
        (":build", "must be written"),
        ("net.py:", "must be written"),
        ("no_such_package.sub:build", "no_such_package.sub of .* must import, it raised ModuleNotFoundError"),
        ("/nowhere/net.py:build", "there is no /nowhere/net.py"),
    ],
)
def test_a_reference_that_leads_nowhere_is_named(reference: str, message: str) -> None:
    with pytest.raises(FactoryError, match=message):
        load_model(reference)


def test_a_file_that_fails_to_import_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\nraise ValueError('on purpose')\n")
    modules = set(sys.modules)
    with pytest.raises(FactoryError, match="must import, it raised ValueError: on purpose"):
        load_model(f"{path}:build")
    assert not {name for name in set(sys.modules) - modules if "broken" in name}
    path.write_text("import torch\ndef build(): return torch.nn.Identity()\n")
    assert isinstance(load_model(f"{path}:build"), torch.nn.Identity)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_loaded_strictly(net_file: Path, tmp_path: Path, suffix: str) -> None:
    state = load_model(f"{net_file}:build", seed=9).state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        save_file(state, path)
    model = load_model(f"{net_file}:build", path)
    assert torch.equal(model.conv.weight, state["conv.weight"])

    save_file({"conv.weight": state["conv.weight"], "other": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"missing conv\.bias, unexpected other"):
        load_model(f"{net_file}:build", tmp_path / "other.safetensors")
    state["conv.bias"] = torch.ones(2)
    save_file(state, tmp_path / "shape.safetensors")
    with pytest.raises(ModelError, match=r"conv\.bias \(2,\) instead of \(6,\)"):
        load_model(f"{net_file}:build", tmp_path / "shape.safetensors")


class _RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


def test_weights_never_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": _RunsCode()}, "bad.pt")
    with pytest.raises(ModelError, match="tensors only"):
        read_state_dict(Path("bad.pt"))
    assert not Path("ran").exists()
    Path("noise.pt").write_bytes(b"\x00not a torch file")
    with pytest.raises(ModelError, match="tensors only"):
        read_state_dict(Path("noise.pt"))
    Path("noise.safetensors").write_bytes(b"\x00\x01")
    with pytest.raises(ModelError, match="safetensors file"):
        read_state_dict(Path("noise.safetensors"))
    with pytest.raises(ModelError, match="there is no"):
        read_state_dict(Path("missing.pt"))


def test_a_task_factory_must_return_a_task(tmp_path: Path) -> None:
    path = tmp_path / "task.py"
    path.write_text(
        "import edgeprune, torch\n"
        "batches = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))]\n"
        "def task(): return edgeprune.Task.single(train=batches, validation=batches,\n"
        "    loss=torch.nn.functional.cross_entropy, metric=lambda out, y: 1.0)\n"
        "def other(): return 3\n"
    )
    assert load_task(f"{path}:task").objectives
    with pytest.raises(TaskError, match=r"must return an edgeprune\.Task, .* returned a int"):
        load_task(f"{path}:other")
    with pytest.raises(TaskError, match="there is no 'taks'"):
        load_task(f"{path}:taks")


def test_inputs_by_parameter_name_become_keywords_and_others_positions(net_file: Path) -> None:
    model = load_model(f"{net_file}:build_two")
    with pytest.raises(
        InputError, match=r"as the parameters of forward are \(left, right\), or none of them, found left, rihgt"
    ):
        example_inputs(model, ["left=1x4", "rihgt=1x4"], None)
    named = example_inputs(model, ["right=1x4", "left=1x4:float32"], None)
    assert isinstance(named, dict)
    assert list(named) == ["left", "right"], "in the order of forward"
    placed = example_inputs(model, ["a=1x4", "b=1x4"], None)
    assert isinstance(placed, tuple)
    assert [tuple(value.shape) for value in placed] == [(1, 4), (1, 4)]


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ("1x4x8x8", "the first layer 0 (Conv2d) takes batch x 3 x height x width"),
        ("1x3x9x9", "the layer 2 (Linear) takes 144 features last, which comes of another size of the input"),
    ],
)
def test_a_shape_that_does_not_fit_is_told_by_the_layer_that_refused_it(shape: str, said: str) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2))
    with pytest.raises(InputError) as caught:
        example_inputs(net, [f"x={shape}"], None)
    assert caught.value.hint is not None
    assert caught.value.hint.endswith(said)


def test_inputs_come_from_a_file_of_arrays(net_file: Path, tmp_path: Path) -> None:
    model = load_model(f"{net_file}:build")
    array = np.arange(3 * 8 * 8, dtype=np.float32).reshape(1, 3, 8, 8)
    np.savez(tmp_path / "inputs.npz", image=array)
    inputs = example_inputs(model, None, tmp_path / "inputs.npz")
    assert isinstance(inputs, dict)
    assert np.array_equal(inputs["image"].numpy(), array)
    np.savez(tmp_path / "objects.npz", image=np.array([{}], dtype=object))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("objects.npz", "text.npz"):
        with pytest.raises(InputError, match=r"must be an \.npz file of plain arrays"):
            example_inputs(model, None, tmp_path / name)
    with pytest.raises(InputError, match="there is no"):
        example_inputs(model, None, tmp_path / "missing.npz")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["image=1x4x8x8"], "with image 1x4x8x8 it raised RuntimeError: .*channels"),
        (["image=8"], "must run on its example inputs"),
        (["image=1x3x8x8:float99"], "dtype of input 'image' must be one of"),
        (["image:1x3x8x8"], "must be written NAME=1x3x32x32:float32, found 'image:1x3x8x8'"),
        (["image=1x3x0x8"], "must be at least 1"),
        (["image=1x3x8x8", "image=1x3x8x8"], "given twice"),
        ([], "from --input or from --inputs, found neither"),
    ],
)
def test_inputs_that_do_not_fit_are_told_in_one_sentence(net_file: Path, specs: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        example_inputs(load_model(f"{net_file}:build"), specs, None)
    assert "\n" not in str(caught.value)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from(["float32", "int64", "bool", "float64"]),
    seed=st.integers(0, 100),
)
def test_any_written_shape_and_dtype_comes_back_as_that_tensor(shape: list[int], dtype: str, seed: int) -> None:
    text = f"x={'x'.join(map(str, shape))}:{dtype}"
    model = torch.nn.Identity()
    first = example_inputs(model, [text], None, seed=seed)
    again = example_inputs(model, [text], None, seed=seed)
    assert isinstance(first, tuple)
    assert isinstance(again, tuple)
    assert tuple(first[0].shape) == tuple(shape)
    assert first[0].dtype == getattr(torch, dtype)
    assert torch.equal(first[0], again[0])
