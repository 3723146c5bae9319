"""What do int8 models as TensorRT takes them lose? Trained CIFAR-10 ResNets, their quantize nodes computed by ONNX Runtime.

Zero points are 0 and biases stay in float there, unlike in the int8 engines of `benchmarks/int8.py`. TensorRT itself runs on
boards with a GPU alone; it computes what these nodes say, so the accuracy is *emulated*, and no time is taken.

    python benchmarks/int8_tensorrt.py --data cifar10 --weights resnet20_jpeg.safetensors resnet56_jpeg.safetensors

Data and weights are those of `benchmarks/damage_curves.py`. Pillow must be installed, and ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from damage_curves import images, load_model

from edgeprune.backends.onnxruntime import exporting
from edgeprune.backends.tensorrt import model as tensorrt_model
from edgeprune.backends.tensorrt import versions
from edgeprune.deployment.compiling import INT8_SAMPLES, INT8_SNR_DB
from edgeprune.files import write_text

RESULTS = Path(__file__).parent / "results" / "int8_tensorrt.json"
TEST_IMAGES = 10_000
RELEASE = "10.3.0"


def accuracy(model: onnx.ModelProto, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 of a model of batch 1."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    right = [
        int(session.run(None, {name: picture[None].numpy()})[0].argmax()) == int(label)
        for picture, label in zip(pictures, labels, strict=True)
    ]
    return sum(right) / len(right)


def row(weights: Path, train: torch.Tensor, test: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    """One network."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-benchmark-") as folder:
        path = Path(folder) / "float.onnx"
        exporting.export(load_model(weights).eval(), (torch.zeros(1, 3, 32, 32),), path)
        exact = tensorrt_model.prepared(onnx.load(path), versions.dialect(versions.parse(RELEASE)), "int8")
    cases = [(picture[None].numpy(),) for picture in train]
    int8, told = tensorrt_model.quantized(exact, cases, INT8_SNR_DB)
    return {
        "weights": weights.stem,
        "quantization": told,
        "fp32": accuracy(exact, *test),
        "int8": accuracy(int8, *test),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the images")
    parser.add_argument("--weights", type=Path, nargs="+", required=True, help="checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, _ = images(arguments.data / "train.parquet", INT8_SAMPLES)
    test = images(arguments.data / "test.parquet", TEST_IMAGES)
    found = [row(weights, train, test) for weights in arguments.weights]
    write_text(RESULTS, json.dumps(found, indent=1) + "\n")
    print("| network | layers in int8 | SNR, dB | accuracy fp32 | int8 |\n|---|---|---|---|---|")
    for one in found:
        told = one["quantization"]
        layers = f"{told['layers'] - len(told['kept'])} of {told['layers']}"
        print(f"| {one['weights']} | {layers} | {told['snr_db']:.1f} | {one['fp32']:.2%} | {one['int8']:.2%} |")


if __name__ == "__main__":
    main()
