"""A stand-in for NVIDIA's trtexec, for boards without a GPU: `install` puts one into a folder.

It is strict where the real one is: an option that is not in the list of its version (``trtexec_options.json``, taken from
NVIDIA's sources) is refused, ``--option value`` instead of ``--option=value`` leaves an unknown word behind, and a number that is
missing ends it with the real one's words. It fails with lines that were recorded of the real one. What it exports was recorded
of the real one too, so layers and times have nothing to do with the model that it was given, unless it is told to make them up
(`trtexec_model`): then they are *modelled*, those of no device. Outputs are always the model's, from ONNX Runtime, rounded to
the six digits that the real one prints. It knows nothing of what edgeprune believes about trtexec.

Behavior by source: NVIDIA/TensorRT at v8.6.1, v10.3.0 and v11.1, samples/common/sampleOptions.cpp (options),
samples/trtexec/trtexec.cpp (what runs when), samples/common/sampleReporting.cpp and sampleEngines.cpp (exports, words),
include/NvInfer.h (``IDequantizeLayer``: types and zero points).
Recorded lines, on github.com: NVIDIA/TensorRT issues 4258 (memory), 3898 (version tags), 1384 (magic tag), 2774 and 4698 (zero
points), yuvraj108c/ComfyUI-Dwpose-Tensorrt issue 5 (version tags of TensorRT 10), yuvraj108c/ComfyUI-Upscaler-Tensorrt issue 36
(no implementation of a node), NVIDIA/Deep-Learning-Accelerator-SW issue 26 (a calibration table of another release).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Failing = Literal["memory", "node", "killed"]

MAGIC = b"ftrt"
_HEADER = 28
_OPTIONS = Path(__file__).with_name("trtexec_options.json")
_REPEATABLE = frozenset(
    {
        "--plugins",
        "--staticPlugins",
        "--setPluginsToSerialize",
        "--dynamicPlugins",
        "--safetyPlugins",
        "--output",
        "--uffInput",
    }
)
_WORDS = {
    "--profilingVerbosity": ("layer_names_only", "none", "detailed", "default", "verbose"),
    "--sparsity": ("disable", "enable", "force"),
}
_SERIALIZATION = {"8.6.1": 236, "10.3.0": 239, "11.1.0": 243}
"""Serialization versions: 236 and 239 as recorded; no log of TensorRT 11 was found, 243 only differs from them."""
_RECORDED = {
    "memory": (
        "[E] Error[1]: [defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)",
        "[W] [TRT] Requested amount of GPU memory (15485030400 bytes) could not be allocated. There may not be enough free "
        "memory for allocation to succeed.",
        "[E] Error[9]: Error Code: 9: Skipping tactic 0x0000000000000000 due to exception [tunable_graph.cpp:create:117] "
        "autotuning: User allocator error allocating 15485030400-byte buffer",
        "[E] Error[10]: IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation "
        "for node {ForeignNode[/1/Constant_36_output_0.../1/Slice_4]}.)",
        "[E] Engine could not be created from network",
        "[E] Building engine failed",
        "[E] Failed to create engine from model or file.",
        "[E] Engine set up failed",
    ),
    "node": (
        "[E] IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any implementation for node "
        "/model/model.6/Conv + PWN(/model/model.7/LeakyRelu).)",
        "[E] Engine could not be created from network",
        "[E] Building engine failed",
        "[E] Failed to create engine from model or file.",
        "[E] Engine set up failed",
    ),
}
_TAG_MISMATCH = {
    "8": "[E] [TRT] 1: [stdArchiveReader.cpp::StdArchiveReaderInitCommon::46] Error Code 1: Serialization (Serialization "
    "assertion stdVersionRead == serializationVersion failed.Version tag does not match. Note: Current Version: {0}, "
    "Serialized Engine Version: {1})",
    "later": "[E] IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion stdVersionRead == "
    "kSERIALIZATION_VERSION failed.Version tag does not match. Note: Current Version: {0}, Serialized Engine Version: {1})",
}

_UNCALIBRATED = (
    "[E] Error[3]: IExecutionContext::executeV2: Error Code 3: API Usage Error (Parameter check failed, condition: "
    'nullPtrAllowed. Tensor "input" is bound to nullptr, which is allowed only for an empty input tensor, shape tensor, or an '
    "output tensor associated with an IOuputAllocator.)",
    "[E] Engine could not be created from network",
    "[E] Engine set up failed",
)

_ASYMMETRIC = {
    "8": "ERROR: builtin_op_importers.cpp:1235 In function QuantDequantLinearHelper: [6] Assertion failed: "
    'shiftIsAllZeros(zeroPoint) && "TRT only supports symmetric quantization - zeroPt must be all zeros"',
    "later": "ModelImporter.cpp:141: ERROR: onnxOpImporters.cpp:1584 In function QuantDequantLinearHelper: [6] Assertion failed: "
    "shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported. Please set "
    "kENABLE_UINT8_AND_ASYMMETRIC_QUANTIZATION_DLAto enable asymmetric quantization if it is on DLA.",
}


def versions() -> list[str]:
    """Releases that it can stand in for."""
    return list(_options())


def install(
    folder: Path,
    version: str,
    *,
    layers: Path,
    profile: Path,
    times: Path,
    failing: Failing | None = None,
    build_s: float = 0.0,
    name: str = "trtexec",
    modelled: bool = False,
) -> Path:
    """Put a stand-in into a folder.

    Args:
        folder: Where to; made if need be.
        version: One of `versions`.
        layers: Recorded export to give for ``--exportLayerInfo``.
        profile: For ``--exportProfile``.
        times: For ``--exportTimes``.
        failing: How every build fails: too little memory, a node without an implementation, or killed by the kernel.
        build_s: Time that a build takes, seconds.
        name: Of the program.
        modelled: Whether layers and times are made up for the model that it is given, by ``trtexec_model.py``.

    Returns:
        The program.
    """
    folder.mkdir(parents=True, exist_ok=True)
    setting = folder / f"{name}.json"
    told = {
        "version": version,
        "layers": str(layers.resolve()),
        "profile": str(profile.resolve()),
        "times": str(times.resolve()),
        "failing": failing,
        "build_s": build_s,
        "modelled": str((folder / "modelled").resolve()) if modelled else None,
    }
    setting.write_text(json.dumps(told), encoding="utf-8")
    program = folder / name
    command = shlex.join([sys.executable, str(Path(__file__).resolve()), str(setting.resolve())])
    program.write_text(f'#!/bin/sh\nexec {command} "$0" "$@"\n', encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


class _FailedError(Exception):
    """Ends a run; lines to print to standard error."""


class _StandIn:
    def __init__(self, setting: Mapping[str, Any], words: Sequence[str]) -> None:
        self.setting = setting
        self.version = str(setting["version"])
        entry = _options()[self.version]
        self.types = {name: kind for kind, names in entry["options"].items() for name in names}
        build = " [b106]" if self.version.startswith("11.") else ""
        self.title = f"TensorRT.trtexec [TensorRT v{entry['version_tag']}]{build} # {' '.join(words)}"
        self.words = words[1:]

    def main(self) -> int:
        _say(sys.stdout, f"&&&& RUNNING {self.title}", stamp=False)
        try:
            given = self._parsed()
            if "--help" in given or "-h" in given or not self.words:
                _say(sys.stdout, "\n".join(f"  {name}" for name in sorted(self.types)), stamp=False)
                return 0
            self._checked(given)
            if "--getPlanVersionOnly" in given:
                plan = Path(given["--loadEngine"]).read_bytes()
                _say(sys.stdout, "[I] Plan was created with TensorRT version " + ".".join(map(str, plan[24:28])))
            elif "--loadEngine" in given:
                self._infer(given, self._loaded(Path(given["--loadEngine"])))
            else:
                plan = self._built(given)
                self._layers(given, plan)
                if "--skipInference" in given:
                    _say(sys.stdout, "[I] Skipped inference phase since --skipInference is added.")
                else:
                    self._infer(given, plan)
        except _FailedError as failure:
            for line in failure.args:
                _say(sys.stderr, line)
            _say(sys.stderr, f"&&&& FAILED {self.title}", stamp=False)
            return 1
        _say(sys.stdout, f"&&&& PASSED {self.title}", stamp=False)
        return 0

    def _parsed(self) -> dict[str, str]:
        """Arguments as ``argsToArgumentsMap`` and ``getAndDelOption`` read them: what is left over is unknown."""
        given: dict[str, str] = {}
        left: list[str] = []
        for word in self.words:
            name, _, value = word.partition("=")
            if name not in self.types or (name in given and name not in _REPEATABLE):
                left.append(f"[E] Unknown option: {name} {value}")
                continue
            given[name] = value
            reads: dict[str, Callable[[str], object]] = {"integer": int, "number": float}
            if (read := reads.get(self.types[name])) is not None:
                try:
                    read(value)
                except ValueError:
                    raise _FailedError(f"[E] {'stoi' if self.types[name] == 'integer' else 'stof'}") from None
            if value and value not in _WORDS.get(name, (value,)):
                raise _FailedError(f"[E] Unknown {name[2:]}: {value}")
        if left:
            _say(sys.stdout, "=== Model Options ===\n  --onnx=<file>               ONNX model", stamp=False)
            raise _FailedError(*left)
        return given

    def _checked(self, given: Mapping[str, str]) -> None:
        if "--loadEngine" not in given and "--onnx" not in given:
            raise _FailedError("[E] Model missing or format not recognized")
        if "--loadEngine" in given and "--saveEngine" in given:
            raise _FailedError("[E] Incompatible load and save engine options selected")
        for pool in filter(None, given.get("--memPoolSize", "").split(",")):
            name, _, size = pool.partition(":")
            if name not in ("workspace", "dlaSRAM", "dlaLocalDRAM", "dlaGlobalDRAM", "tacticSharedMem"):
                raise _FailedError(f"[E] Unknown memory pool: {name}")
            if not size[:1].isdigit():
                raise _FailedError(
                    "[E] stod conversion failure: failed to parse --memPoolSize. Please double check your input string."
                )

    def _built(self, given: Mapping[str, str]) -> bytes:
        _say(sys.stdout, "[I] Selected Device: NVIDIA GeForce RTX 3060 Laptop GPU")
        _say(sys.stdout, "[I] Compute Capability: 8.6")
        _say(sys.stdout, f"[I] TensorRT version: {self.version}")
        source = Path(given["--onnx"])
        if not source.is_file():
            raise _FailedError(
                f"[E] [TRT] ModelImporter.cpp:735: Failed to parse ONNX model from file: {source}",
                "[E] Failed to parse onnx file",
                "[E] Parsing model failed",
                "[E] Failed to create engine from model or file.",
                "[E] Engine set up failed",
            )
        complaint = unparsed(source.read_bytes(), self.version)
        if "--useDLACore" in given and b"QuantizeLinear" in source.read_bytes():
            # NVIDIA/TensorRT issue 2222: no such layer runs there. The words are the stand-in's own.
            complaint = complaint or "a DLA takes no QuantizeLinear"
        if complaint is not None:
            raise _FailedError(f"[E] [TRT] {complaint}", "[E] Failed to parse onnx file", "[E] Engine set up failed")
        _say(sys.stdout, "[I] Finished parsing network model. Parse time: 0.0704936")
        cache = given.get("--timingCacheFile")
        if cache and Path(cache).is_file():
            _say(sys.stdout, f"[I] Loaded {Path(cache).stat().st_size} bytes of timing cache from {cache}")
        elif cache:
            _say(
                sys.stderr,
                f"[W] Could not read timing cache from: {cache}. A new timing cache will be generated and written.",
            )
        time.sleep(float(self.setting["build_s"]))
        failing = self.setting["failing"]
        if failing == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if failing is not None:
            raise _FailedError(*_RECORDED[failing])
        wrong = refused(source.read_bytes(), self.version, int8="--int8" in given)
        if wrong is not None:
            raise _FailedError(
                f"[E] {wrong}", "[E] Engine could not be created from network", "[E] Engine set up failed"
            )
        if "--int8" in given and "--calib" in given and b"QuantizeLinear" not in source.read_bytes():
            table = Path(given["--calib"]).read_text(encoding="ascii") if Path(given["--calib"]).is_file() else ""
            if table.split("\n")[0] != f"TRT-{_options()[self.version]['version_tag']}-EntropyCalibration2":
                raise _FailedError(*_UNCALIBRATED)
        if cache:
            with Path(cache).open("ab") as file:
                file.write(b"timed")
            _say(sys.stdout, f"[I] Saved {Path(cache).stat().st_size} bytes of timing cache to {cache}")
        # Two builds of one model are not equal byte by byte (NVIDIA/TensorRT, issue 4798).
        salt = random.randbytes(_HEADER - 8)
        plan = MAGIC + salt + bytes([*map(int, self.version.split(".")), 0]) + source.read_bytes()
        if self.setting["modelled"]:
            model = Path(__file__).with_name("trtexec_model.py")
            done = subprocess.run(
                [sys.executable, str(model)], input=source.read_bytes(), capture_output=True, check=True
            )
            self._modelled(plan).parent.mkdir(exist_ok=True)
            self._modelled(plan).write_bytes(done.stdout)
        if "--saveEngine" in given:
            Path(given["--saveEngine"]).write_bytes(plan)
        _say(sys.stdout, f"[I] Created engine with size: {len(plan) / 2**20:.6g} MiB")
        return plan

    def _loaded(self, path: Path) -> bytes:
        after = ("[E] Engine deserialization failed", "[E] Got invalid engine!", "[E] Inference set up failed")
        if not path.is_file():
            raise _FailedError(f"[E] Error opening engine file: {path}", *after)
        plan = path.read_bytes()
        wrong = mismatch(plan, self.version)
        if wrong is not None:
            raise _FailedError(wrong, *after)
        return plan

    def _modelled(self, plan: bytes) -> Path:
        return Path(self.setting["modelled"], hashlib.sha256(plan).hexdigest())

    def _export(self, name: str, plan: bytes) -> str:
        """What was recorded, or what was made up for a model and differs a little each time."""
        if not self.setting["modelled"]:
            return Path(self.setting[name]).read_text(encoding="utf-8")
        made = json.loads(self._modelled(plan).read_text(encoding="utf-8"))
        if name == "layers":
            return json.dumps(made["layers"])
        if name == "times":
            told = [made["whole_ms"] * random.gauss(1.0, 0.003) for _ in range(100)]
            return json.dumps([{"latencyMs": ms, "computeMs": ms} for ms in told])
        rows = [{"name": row, "averageMs": ms * random.gauss(1.0, 0.005)} for row, ms in made["profile"]]
        return json.dumps([{"count": 1000}, *rows])

    def _layers(self, given: Mapping[str, str], plan: bytes) -> None:
        if "--exportLayerInfo" not in given:
            return
        text = self._export("layers", plan)
        if given.get("--profilingVerbosity") != "detailed":
            found = json.loads(text)
            text = json.dumps({"Layers": [layer["Name"] for layer in found["Layers"]], "Bindings": found["Bindings"]})
        Path(given["--exportLayerInfo"]).write_text(text, encoding="utf-8")

    def _infer(self, given: Mapping[str, str], plan: bytes) -> None:
        if "--loadEngine" in given:
            self._layers(given, plan)
        profiled = "--exportProfile" in given or "--dumpProfile" in given
        # Up to TensorRT 10 a profiled run has no times of its own, unless a run of its own is asked for.
        if not profiled or "--separateProfileRun" in given or self.version.startswith("11."):
            _say(sys.stdout, "[I] === Performance summary ===")
            self._exported(given, "--exportTimes", "times", plan)
        self._exported(given, "--exportProfile", "profile", plan)
        if "--exportOutput" in given:
            Path(given["--exportOutput"]).write_text(
                _outputs(plan[_HEADER:], given, wide=not self.version.startswith("8.")), encoding="utf-8"
            )

    def _exported(self, given: Mapping[str, str], option: str, name: str, plan: bytes) -> None:
        if option in given:
            Path(given[option]).write_text(self._export(name, plan), encoding="utf-8")


def mismatch(plan: bytes, version: str) -> str | None:
    """What a release says of an engine that is none of its own."""
    if plan[:4] != MAGIC or len(plan) < _HEADER:
        return (
            "[E] [TRT] 1: [stdArchiveReader.cpp::StdArchiveReader::30] Error Code 1: Serialization (Serialization assertion "
            "magicTagRead == kMAGIC_TAG failed.Magic tag does not match)"
        )
    made = ".".join(map(str, plan[24:27]))
    if made == version:
        return None
    line = _TAG_MISMATCH["8" if version.startswith("8.") else "later"]
    return line.format(_SERIALIZATION[version], _SERIALIZATION.get(made, 0))


def unparsed(model: bytes, version: str) -> str | None:
    """What the ONNX parser of a release says of quantization that TensorRT does not have: only int8 with zero points of 0."""
    if b"QuantizeLinear" not in model:
        return None
    import onnx

    graph = onnx.load_from_string(model).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zeros = constants[node.input[2]] if len(node.input) > 2 else None
        if zeros is not None and zeros.any():
            return _ASYMMETRIC["8" if version.startswith("8.") else "later"]
        # "Its data type must be DataType::kINT8", of the zero point and of what is dequantized. The words are the stand-in's own.
        read = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if any(array is not None and array.dtype != "int8" for array in (zeros, read)):
            return f"In node {node.name} ({node.op_type}): UNSUPPORTED_NODE: the type of {node.input[0]} must be kINT8"
    return None


def refused(model: bytes, version: str, *, int8: bool) -> str | None:
    """What the builder says of a model with quantize nodes, where types are not the graph's and nobody asked for int8.

    No recorded line of it was found: these words are the stand-in's own.
    """
    if int8 or version.startswith("11.") or b"QuantizeLinear" not in model:
        return None
    return (
        "Error[4]: IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (INT8 is not enabled in the builder.)"
    )


def _outputs(model: bytes, given: Mapping[str, str], *, wide: bool) -> str:
    """What the model computes, in the form of ``exportJSONOutput``.

    Before TensorRT 10 (not `wide`) integers of 64 bits are made such of 32 bits when a model is parsed.
    """
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    files = dict(pair.split(":", 1) for pair in given.get("--loadInputs", "").split(",") if pair)
    arrays = {}
    for tensor in session.get_inputs():
        own = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool"}[tensor.type]
        dtype = "int32" if own == "int64" and not wide else own
        if tensor.name in files:
            content = Path(files.pop(tensor.name)).read_bytes()
            size = int(np.prod(tensor.shape)) * np.dtype(dtype).itemsize
            if len(content) != size:
                raise _FailedError(
                    f"[E] Uncaught exception detected: Unexpected file size for input file. Note: Input binding size is: {size} "
                    f"bytes but the file size is {len(content)} bytes."
                )
            arrays[tensor.name] = np.frombuffer(content, dtype).reshape(tensor.shape).astype(own)
        else:
            arrays[tensor.name] = np.ones(tensor.shape, own)
    if files:
        raise _FailedError("[E] Invalid tensor names found in --loadInputs flag.")
    names = [tensor.name for tensor in session.get_outputs()]
    parts = []
    for name, value in zip(names, session.run(names, arrays), strict=True):
        shape = "x".join(str(size) for size in value.shape)
        values = ", ".join(f"{float(number):g}" for number in value.reshape(-1))
        parts.append(f'{{ "name" : "{name}"\n  , "dimensions" : "{shape}"\n  , "values" : [ {values} ]\n  }}')
    return "[\n  " + "\n, ".join(parts) + "\n]\n"


def _options() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_OPTIONS.read_text(encoding="utf-8"))
    return found


def _say(stream: Any, line: str, *, stamp: bool = True) -> None:
    prefix = time.strftime("[%m/%d/%Y-%H:%M:%S] ") if stamp else ""
    stream.write(f"{prefix}{line}\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(_StandIn(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[2:]).main())
