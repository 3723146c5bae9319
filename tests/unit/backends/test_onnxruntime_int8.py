"""Int8 engines of ONNX Runtime: real ranges, real noises, real files."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgeprune.backends.onnxruntime.backend import OnnxRuntime
from edgeprune.backends.onnxruntime.int8_numbers import Int8Numbers
from edgeprune.backends.onnxruntime.quantizing import QUANTIZATION_KEY, quantization, quantize
from edgeprune.backends.tvm.backend import Tvm
from edgeprune.errors import CompileError, ConfigError

HERE = Int8Numbers.of_host()


class Residual(nn.Module):
    """A convolution whose sum with its input is a skip connection, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.body(x)).mean((2, 3)))


class Product(nn.Module):
    """A product of two activations, as in attention, beside a layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x):
        x = self.layer(x)
        return x @ x.transpose(1, 2)


def cases(count=16, shape=(1, 3, 12, 12), seed=0):
    dice = np.random.default_rng(seed)
    return [(dice.standard_normal(shape).astype(np.float32),) for _ in range(count)]


def floating(module, tmp_path, shape=(1, 3, 12, 12)):
    torch.manual_seed(0)
    path = tmp_path / "float.onnx"
    OnnxRuntime().export(module().eval(), (torch.randn(shape),), path)
    return path


def signal_to_noise(exact, found):
    return 10 * np.log10(np.square(exact).sum() / np.square(exact - found).sum())


def test_an_int8_engine_computes_in_int8_and_says_what_it_lost(tmp_path):
    engine = floating(Residual, tmp_path)
    said = []
    found = quantize(engine, cases(128), tmp_path / "int8.onnx", needed_db=20, numbers=HERE, told=said.append)
    assert (found.layers, found.kept, found.cases) == (3, (), 112)
    assert any("ranges" in line for line in said)
    model = onnx.load(str(tmp_path / "int8.onnx"))
    onnx.checker.check_model(model, full_check=True)
    weights = [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    assert sorted(tuple(tensor.dims) for tensor in weights) == [(10, 16), (16, 3, 3, 3), (16, 16, 3, 3)]
    assert {entry.domain for entry in model.opset_import} == {""}
    assert model.ir_version == onnx.load(str(engine)).ir_version
    assert quantization(tmp_path / "int8.onnx") == found
    assert quantization(engine) is None

    exact, quantized = (OnnxRuntime().session(path) for path in (engine, tmp_path / "int8.onnx"))
    unseen = cases(seed=7)
    ratio = signal_to_noise(*(np.stack([run(list(case))[0] for case in unseen]) for run in (exact, quantized)))
    # Not less than that: a single number beyond the range of the calibration data is clipped, and costs as much.
    assert 30 < found.snr_db - 6 < ratio < found.snr_db + 6


def test_loud_layers_stay_in_float_until_the_ratio_is_reached(tmp_path):
    engine = floating(Residual, tmp_path)
    plain = quantize(engine, cases(), tmp_path / "plain.onnx", needed_db=10, numbers=HERE)
    careful = quantize(engine, cases(), tmp_path / "careful.onnx", needed_db=plain.snr_db + 2, numbers=HERE)
    assert plain.kept == ()
    assert 0 < len(careful.kept) < careful.layers
    assert set(careful.kept) < {"stem", "body", "head"}
    assert careful.snr_db >= plain.snr_db + 2


def test_a_layer_whose_input_has_outliers_is_the_one_that_stays(tmp_path):
    class Hostile(Residual):
        """One channel a thousand times the others, which the next layer scales back: the others round to nothing."""

        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.stem.weight[0] *= 1000
                self.body.weight[:, 0] /= 1000

        def forward(self, x):
            return self.head(torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3)))

    found = quantize(floating(Hostile, tmp_path), cases(), tmp_path / "int8.onnx", needed_db=25, numbers=HERE)
    assert "body" in found.kept
    assert found.snr_db >= 25


def test_products_of_activations_stay_in_float(tmp_path):
    engine = floating(Product, tmp_path, (1, 5, 12))
    found = quantize(engine, cases(shape=(1, 5, 12)), tmp_path / "int8.onnx", needed_db=10, numbers=HERE)
    assert found.layers == 1
    model = onnx.load(str(tmp_path / "int8.onnx"))
    quantized = {name for node in model.graph.node if node.op_type == "QuantizeLinear" for name in node.input}
    assert quantized & set(model.graph.node[-1].output) == set()
    (product,) = (node for node in model.graph.node if node.output[0] == model.graph.output[0].name)
    assert product.op_type == "MatMul"


def test_what_cannot_be_quantized_is_refused(tmp_path):
    engine = floating(Residual, tmp_path)
    with pytest.raises(CompileError, match="every layer would have to stay in float"):
        quantize(engine, cases(), tmp_path / "int8.onnx", needed_db=120, numbers=HERE)
    with pytest.raises(ConfigError, match="at least 2 deployment batches of calibration data, found 1"):
        quantize(engine, cases(1), tmp_path / "int8.onnx", needed_db=20, numbers=HERE)
    with pytest.raises(CompileError, match="convolutions or linear layers"):
        quantize(floating(nn.ReLU, tmp_path), cases(), tmp_path / "int8.onnx", needed_db=20, numbers=HERE)
    with pytest.raises(ConfigError, match="need calibration data"):
        OnnxRuntime().for_precision("int8").export(
            Residual().eval(), (torch.randn(1, 3, 12, 12),), tmp_path / "int8.onnx"
        )
    assert not (tmp_path / "int8.onnx").exists()


def test_only_int8_takes_calibration_data():
    for backend in (OnnxRuntime(), Tvm()):
        with pytest.raises(ConfigError, match="only int8 engines take calibration data"):
            backend.calibrated(cases(), needed_db=20)


@pytest.mark.parametrize(
    ("architecture", "isa", "most", "activations"),
    [
        ("x86_64", ["avx2"], 64, onnx.TensorProto.UINT8),
        ("x86_64", ["avx2", "avx512_vnni"], 128, onnx.TensorProto.UINT8),
        ("aarch64", ["asimd"], 128, onnx.TensorProto.INT8),
    ],
)
def test_numbers_are_those_that_the_board_multiplies_best(tmp_path, architecture, isa, most, activations):
    board = {"runtime": "onnxruntime", "runtime_version": "1.20.1", "architecture": architecture, "isa": isa}
    backend = OnnxRuntime().for_board(board).for_precision("int8").calibrated(cases(), needed_db=10)
    torch.manual_seed(0)
    backend.export(Residual().eval(), (torch.randn(1, 3, 12, 12),), tmp_path / "int8.onnx")
    model = onnx.load(str(tmp_path / "int8.onnx"))
    assert any(entry.key == QUANTIZATION_KEY for entry in model.metadata_props)
    largest = max(
        int(np.abs(onnx.numpy_helper.to_array(tensor).astype(np.int32)).max())
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    )
    assert most // 2 < largest <= most
    points = {
        tensor.data_type
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
        for tensor in model.graph.initializer
        if tensor.name == node.input[2]
    }
    assert points == {activations}
