"""`edgeprune compile --precision int8`, from the command line to the artifact."""

import json

import pytest

from edgeprune.cli.commands import root
from edgeprune.errors import EdgepruneError

NET = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def growing():
    torch.manual_seed(0)
    up, pool = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), up, nn.ReLU(), pool, nn.Flatten(), nn.Linear(6, 4)).eval()


def task():
    import edgeprune

    dice = torch.Generator().manual_seed(1)
    data = [(torch.randn(16, 3, 12, 12, generator=dice), torch.randn(16, 4, generator=dice)) for _ in range(4)]
    loss = nn.functional.mse_loss
    error = lambda outputs, targets: float(loss(outputs, targets))
    return edgeprune.Task.single(train=data, validation=data, loss=loss, metric=error, name="error", higher_is_better=False)
"""


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return ["compile", "net.py:build", "--input", "x=1x3x12x12", "--out", "int8", "--precision", "int8"]


def test_int8_says_what_it_lost(words, tmp_path, capsys):
    root().main([*words, "--task", "net.py:task", "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["quantization"]["layers"] == 2
    assert found["metrics"]["error"]["engine"] == pytest.approx(found["metrics"]["error"]["module"], rel=0.01)
    manifest = json.loads((tmp_path / "int8" / "manifest.json").read_text())
    assert (manifest["precision"], manifest["quantization"]) == ("int8", found["quantization"])

    root().main([*words, "--task", "net.py:task", "--snr", "35", "--metric-loss", "5%"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "int8 in " in said
    assert " dB against float" in said
    assert "error: " in said


def test_layers_without_a_kernel_are_told_apart(words, capsys):
    words[1] = "net.py:growing"
    root().main([*words, "--task", "net.py:task", "--metric-loss", "5%"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "int8 in 2 of 3 layers, " in said
    assert "  in float too, since the runtime has no int8 kernel for them: 2\n" in said
    assert "in float stay" not in said


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "int8 engines need calibration data, found none. Try: --task FACTORY"),
        (["--task", "net.py:task", "--snr", "-3"], "--snr must be a positive number of decibel, found -3"),
        (["--task", "net.py:task", "--metric-loss", "0.9"], "--metric-loss must be a share or percentage points"),
        (["--task", "net.py:task", "--metric-loss", "-1%"], "points, found '-1%'. Try: --metric-loss 1%"),
        (["--precision", "fp32", "--snr", "30"], "--snr and --metric-loss are of int8 engines, found --precision fp32"),
        (["--backend", "tensorrt"], "int8 engines need calibration data, found none"),
        (["--precision", "fp16"], "onnxruntime must be one of fp32, int8, found 'fp16'"),
    ],
)
def test_bad_input_is_one_sentence(words, tmp_path, more, sentence):
    with pytest.raises(EdgepruneError) as found:
        root().main([*words, *more], standalone_mode=False)
    assert sentence in str(found.value)
    assert found.value.exit_code == 2
    assert not (tmp_path / "int8").exists()
