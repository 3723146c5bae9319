"""Which int8 numbers a processor multiplies best, and which TensorRT takes; which layers they are of no use to.

Sources: docstring of `onnxruntime.quantization.quantize_static`, "Choosing parameters for CPU inference" (ONNX Runtime 1.31.1);
NVIDIA/TensorRT, include/NvInfer.h at v8.6.1, v10.3.0 and v11.1, ``IQuantizeLayer`` and ``IDequantizeLayer``;
onnxruntime/core/optimizer/qdq_transformer/selectors_actions/qdq_selector_action_transformer.cc, ``ConvQDQRules``.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass

from edgeprune.boards.host import host_isa

_X86 = ("x86_64", "amd64", "i686", "i386")


@dataclass(frozen=True)
class Int8Numbers:
    """The form of the numbers of an int8 engine; weights are symmetric int8 per channel everywhere.

    Attributes:
        unsigned: Activations are uint8: x86 multiplies unsigned by signed numbers. ARM multiplies signed ones, int8.
        narrow: Weights have 7 bits: x86 without VNNI adds products in 16 bits, which overflow otherwise.
        symmetric: Every zero point is 0 and nothing but int8 is dequantized: weights are quantized by a node of their own,
            biases stay in float. TensorRT takes no other form.
    """

    unsigned: bool
    narrow: bool
    symmetric: bool = False

    @property
    def dtype(self) -> str:
        """NumPy name of the type of activations."""
        return "uint8" if self.unsigned else "int8"

    @property
    def in_float(self) -> frozenset[str]:
        """Layers (ONNX operations) that the runtime has no integer kernel for: quantized, they would be dequantized and run in
        float all the same, their weights anew with each inference. ONNX Runtime on processors has none, TensorRT has.
        """
        return frozenset() if self.symmetric else frozenset({"ConvTranspose"})

    @classmethod
    def of(cls, architecture: str, isa: Sequence[str]) -> Int8Numbers:
        """For a processor: its architecture as `platform.machine` names it, and its instruction set flags as Linux does."""
        unsigned = architecture.lower() in _X86
        return cls(unsigned, narrow=unsigned and not any("vnni" in flag for flag in isa))

    @classmethod
    def of_tensorrt(cls) -> Int8Numbers:
        """For TensorRT on any GPU."""
        return cls(unsigned=False, narrow=False, symmetric=True)

    @classmethod
    def of_host(cls) -> Int8Numbers:
        """For this machine's processor."""
        return cls.of(platform.machine(), host_isa())
