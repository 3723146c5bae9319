"""From a float engine to an int8 one: quantize and dequantize nodes around the layers, ranges from calibration data.

Ranges, zero points and the nodes themselves are ONNX Runtime's own (`onnxruntime.quantization`). What is added is the choice of
the layers that stay in float: each layer is quantized by itself, the noise that it makes at the outputs is measured on cases that
the ranges do not come from, and as noises of different layers add up (they are nearly uncorrelated), the loudest layers are left
in float until the signal-to-noise ratio that was asked for is reached.

Weights are symmetric int8 per channel, which costs little time and helps layers whose channels differ much; what else depends on
the processor is in `int8_numbers`. Layers for which the runtime has no integer kernel stay in float too.
"""

from __future__ import annotations

import io
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.backends._base import CALIBRATION, Case, Told
from edgeprune.backends.onnxruntime.exporting import module_paths
from edgeprune.backends.onnxruntime.int8_numbers import Int8Numbers
from edgeprune.backends.onnxruntime.runtime import onnxruntime
from edgeprune.errors import CompileError, ConfigError
from edgeprune.files import replacing

if TYPE_CHECKING:
    import onnx

QUANTIZATION_KEY = "edgeprune.quantization"
"""Key of the model's metadata: a `Quantization` as JSON."""
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""What may hold weights. A product of two activations (attention) is none of ours; it is computed in int8 only where the runtime
fuses it with the numbers that it reads, if those are int8 already."""
BETWEEN = (
    *("Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Relu"),
    *("Reshape", "Resize", "Split", "Squeeze", "Transpose", "Unsqueeze"),
)
"""What is quantized where it lies between layers, so that numbers stay int8 from one layer to the next."""
_METHODS = ("MinMax", "Percentile")
"""How ranges follow from the data; both are tried. Percentile cuts off the rarest 0.01 % of the values."""
_SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True, "AddQDQPairToWeight": True, "QuantizeBias": False}
"""Options of the quantizer for `Int8Numbers.symmetric`."""
_MOST_CASES = 128
"""Of calibration; more change the ranges by little and take time."""
_AT_ONCE = 4
"""Cases whose activations are in memory together: the calibrator keeps all that it is given at once."""
_JUDGED = 16
"""Cases that noises are measured on."""


@dataclass(frozen=True)
class Quantization:
    """What became of the layers of an engine.

    Attributes:
        layers: How many layers (convolutions, products with weights) the model has.
        kept: Module paths of those that stay in float; names of nodes where no module called them.
        no_kernel: Those of `kept` that the runtime would compute in float in any case.
        snr_db: Signal-to-noise ratio of the worst output against the float engine, decibel, on cases that the ranges do not
            come from; None where they are equal.
        method: How the ranges follow from the data.
        cases: How many calibration cases the ranges come from.
    """

    layers: int
    kept: tuple[str, ...]
    snr_db: float | None
    method: str
    cases: int
    no_kernel: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """As a manifest has it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def quantize(
    engine: Path, cases: Sequence[Case], path: Path, *, needed_db: float, numbers: Int8Numbers, told: Told | None = None
) -> Quantization:
    """Write the int8 engine of a float one.

    Args:
        engine: The float engine, with weights inside.
        cases: Calibration data, at least two cases: three quarters of them (at most 128) give the ranges, the others (at most 16)
            judge. Real data: ranges of random data are not those of the deployed model.
        path: File to write; it appears whole or not at all.
        needed_db: Signal-to-noise ratio that the outputs must reach on the judging cases, decibel.
        numbers: Form of the numbers.
        told: Told what happens.

    Raises:
        CompileError: There is no layer with weights that the runtime computes in int8, or the ratio is only reached with every
            layer in float.
        ConfigError: There are too few cases.
    """
    import onnx

    tell = told or (lambda message: None)
    model = onnx.load(str(engine))
    layers, floating = _required_layers(model, numbers)
    if len(cases) < 2:
        raise ConfigError(
            f"int8 engines need at least 2 deployment batches of calibration data, found {len(cases)}.",
            hint=CALIBRATION,
        )
    judged = min(_JUDGED, max(1, len(cases) // 4))
    given, held = cases[: len(cases) - judged][:_MOST_CASES], cases[len(cases) - judged :]
    with tempfile.TemporaryDirectory(prefix="edgeprune-int8-") as folder:
        judge = _Judge(model, held)
        attempts = []
        for method in _METHODS:
            tell(f"int8: ranges of {len(given)} batches, {method}")
            work = _Work(model, _ranges(engine, given, method, Path(folder)), numbers)
            whole = work.quantized(set(layers))
            attempts.append((judge.noise(whole), method, work, whole))
        noise, method, work, result = min(attempts, key=lambda one: one[0])
        kept: list[str] = []
        limit = 10 ** (-needed_db / 10)
        if noise > limit:
            kept = _loudest(work, judge, layers, limit, tell)
            result = work.quantized(set(layers) - set(kept))
            noise = judge.noise(result)
        if len(kept) == len(layers):
            raise CompileError(
                f"int8 must reach {needed_db:.0f} dB against float, found that every layer would have to stay in float.",
                hint="more calibration data of the real kind, --snr with a smaller ratio, or --precision fp32",
            )
        found = Quantization(
            layers=len(layers) + len(floating),
            kept=tuple(_module_paths(model, [*kept, *floating])),
            no_kernel=tuple(_module_paths(model, floating)),
            snr_db=None if noise == 0 else -10 * math.log10(noise),
            method=method,
            cases=len(given),
        )
    onnx.checker.check_model(result, full_check=True)
    entry = result.metadata_props.add()
    entry.key, entry.value = QUANTIZATION_KEY, json.dumps(found.facts(), sort_keys=True)
    with replacing(path) as partial:
        partial.write_bytes(result.SerializeToString())
    return found


def quantize_for_timing(engine: Path, case: Case | None, path: Path, *, numbers: Int8Numbers) -> None:
    """Write an int8 engine of a float one for timing only: every layer that may be is quantized, with the ranges of one case.

    The time of an inference does not depend on ranges, as long as all that can be quantized is; the outputs mean nothing.

    Args:
        engine: The float engine, with weights inside.
        case: Any inputs that it takes; without them every tensor has one and the same range.
        path: File to write; it appears whole or not at all.
        numbers: Form of the numbers.

    Raises:
        CompileError: There is no layer with weights that the runtime computes in int8.
    """
    import onnx

    model = onnx.load(str(engine))
    layers, _ = _required_layers(model, numbers)
    with tempfile.TemporaryDirectory(prefix="edgeprune-int8-") as folder:
        ranges = _one_range(model) if case is None else _ranges(engine, [case], "MinMax", Path(folder))
        made = _Work(model, ranges, numbers).quantized(set(layers))
    with replacing(path) as partial:
        partial.write_bytes(made.SerializeToString())


def quantization(engine: Path) -> Quantization | None:
    """What an engine says of itself; None where it is no int8 engine of ours."""
    import onnx

    for entry in onnx.load(str(engine), load_external_data=False).metadata_props:
        if entry.key == QUANTIZATION_KEY:
            fields = json.loads(entry.value)
            named = {name: tuple(fields.get(name, ())) for name in ("kept", "no_kernel")}
            return Quantization(**{**fields, **named})
    return None


def _required_layers(model: onnx.ModelProto, numbers: Int8Numbers) -> tuple[list[str], list[str]]:
    """Names of the nodes that hold weights, in their order: those that may be int8, at least one, and those that may not."""
    weights = {tensor.name for tensor in model.graph.initializer}
    found = {
        node.name: node.op_type for node in model.graph.node if node.op_type in LAYERS and weights & set(node.input)
    }
    floating = [name for name, op in found.items() if op in numbers.in_float]
    layers = [name for name in found if name not in floating]
    if not layers:
        only = (
            f"only {', '.join(sorted(numbers.in_float))}, which the runtime computes in float" if floating else "none"
        )
        raise CompileError(
            f"int8 needs a model with convolutions or linear layers that hold weights, found {only}.",
            hint="--precision fp32",
        )
    return layers, floating


def _module_paths(model: onnx.ModelProto, names: Sequence[str]) -> list[str]:
    """Which modules called some nodes; the name of a node that none has called."""
    paths = module_paths(model)
    return [paths.get(name, name) for name in names]


def _loudest(work: _Work, judge: _Judge, layers: Sequence[str], limit: float, tell: Told) -> list[str]:
    """The fewest layers, loudest first, without which the noise is at most `limit`."""
    noises = {}
    for number, layer in enumerate(layers):
        tell(f"int8: noise of layer {number + 1} of {len(layers)}")
        noises[layer] = judge.noise(work.quantized({layer}))
    order = sorted(layers, key=lambda layer: (-noises[layer], layer))
    left = sum(noises.values())
    count = 0
    while count < len(order) and left > limit:
        left -= noises[order[count]]
        count += 1
    # Noises add up only nearly, so what was foreseen is measured.
    while 0 < count < len(order) and judge.noise(work.quantized(set(order[count:]))) > limit:
        count += 1
    return order[: max(count, 1)]


class _Work:
    """Makes models of which chosen layers are quantized, always with the same ranges."""

    def __init__(self, model: onnx.ModelProto, ranges: Any, numbers: Int8Numbers) -> None:
        self._model, self._ranges, self._numbers = model, ranges, numbers

    def quantized(self, chosen: set[str]) -> onnx.ModelProto:
        import onnx
        from onnxruntime.quantization import QDQQuantizer, QuantType
        from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        quantizer = QDQQuantizer(
            save_and_reload_model_with_shape_infer(model),
            per_channel=True,
            reduce_range=self._numbers.narrow,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8 if self._numbers.unsigned else QuantType.QInt8,
            tensors_range=self._ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=_in_float(model, chosen),
            op_types_to_quantize=[*LAYERS, *BETWEEN],
            extra_options=_SYMMETRIC if self._numbers.symmetric else {},
        )
        with _quiet():
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        made: onnx.ModelProto = quantizer.model.model
        # The quantizer's imports would ask boards for operators that no node uses.
        used = {node.domain for node in made.graph.node}
        kept = [entry for entry in made.opset_import if entry.domain in used or entry.domain in ("", "ai.onnx")]
        del made.opset_import[:]
        made.opset_import.extend(kept)
        made.ir_version = self._model.ir_version
        return made


def _in_float(model: onnx.ModelProto, chosen: set[str]) -> list[str]:
    """Nodes that stay in float: layers that are not chosen, products of activations, and what reads a number of theirs."""
    constants = {tensor.name for tensor in model.graph.initializer} | {""}
    quantized: set[str] = set()
    left = []
    for node in model.graph.node:
        read = set(node.input) - constants
        if node.name in chosen or (node.op_type in BETWEEN and read and read <= quantized):
            quantized.update(node.output)
        else:
            left.append(node.name)
    return left


class _Judge:
    """Noise of a model at its outputs, as a share of the float engine's signal: the worst output's."""

    def __init__(self, model: onnx.ModelProto, cases: Sequence[Case]) -> None:
        self._names = [value.name for value in model.graph.input]
        self._cases = cases
        self._exact = self._run(model)

    def noise(self, model: onnx.ModelProto) -> float:
        worst = 0.0
        for exact, found in zip(self._exact, self._run(model), strict=True):
            signal = float(np.square(exact).sum())
            gap = float(np.square(exact - found).sum())
            if not math.isfinite(gap):
                return math.inf
            worst = max(worst, gap / signal if signal else float(gap > 0))
        return worst

    def _run(self, model: onnx.ModelProto) -> list[np.ndarray[Any, Any]]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        runs = [session.run(None, dict(zip(self._names, case, strict=True))) for case in self._cases]
        return [
            np.stack([run[place] for run in runs]).astype(np.float64)
            for place, output in enumerate(session.get_outputs())
            if output.type == "tensor(float)"
        ]


def _ranges(engine: Path, cases: Sequence[Case], method: str, folder: Path) -> Any:
    """The range of every tensor over the cases."""
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    options = {"percentile": 99.99} if method == "Percentile" else {}
    calibrator = create_calibrator(
        str(engine),
        [*LAYERS, *BETWEEN],
        augmented_model_path=str(folder / f"{method}.onnx"),
        calibrate_method=CalibrationMethod[method],
        extra_options=options,
    )
    with _quiet():
        for start in range(0, len(cases), _AT_ONCE):
            calibrator.collect_data(_reader(engine, cases[start : start + _AT_ONCE]))
        return calibrator.compute_data()


def _one_range(model: onnx.ModelProto) -> Any:
    """A range for every tensor that is computed, or given."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData

    names = [value.name for value in model.graph.input] + [name for node in model.graph.node for name in node.output]
    return TensorsData(CalibrationMethod.MinMax, dict.fromkeys(filter(None, names), (np.float32(-1), np.float32(1))))


def _reader(engine: Path, cases: Sequence[Case]) -> Any:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    names = [value.name for value in onnx.load(str(engine), load_external_data=False).graph.input]

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # the package has no types
        def __init__(self) -> None:
            self._left: Iterator[Case] = iter(cases)

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            case = next(self._left, None)
            return None if case is None else dict(zip(names, case, strict=True))

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer logs advice on steps that the exporter already did, through the root logger, and prints what it does."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)
