"""The program that stands in for NVIDIA's trtexec; `edgeprune.testing.trtexec` puts it into a folder.

It is run as a file of its own, with its setting as the first argument, and knows nothing of edgeprune.

Behavior by source: NVIDIA/TensorRT at v8.6.1, v10.3.0 and v11.1, samples/common/sampleOptions.cpp (options),
samples/trtexec/trtexec.cpp (what runs when, "Starting inference"), samples/common/sampleInference.cpp (how long it runs),
sampleReporting.cpp and sampleEngines.cpp (exports, words).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def _beside(name: str) -> ModuleType:
    """A file beside this one: a program is no module of a package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


says = _beside("trtexec_says")

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


class _FailedError(Exception):
    """Ends a run; lines to print to standard error."""


class _StandIn:
    """One run of the program.

    Args:
        setting: What `edgeprune.testing.trtexec.install` was told.
        words: The command line, the program's name first.
    """

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
        complaint = says.unparsed(source.read_bytes(), self.version)
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
            raise _FailedError(*says.RECORDED[failing])
        wrong = says.refused(source.read_bytes(), self.version, int8="--int8" in given)
        if wrong is not None:
            raise _FailedError(
                f"[E] {wrong}", "[E] Engine could not be created from network", "[E] Engine set up failed"
            )
        if "--int8" in given and "--calib" in given and b"QuantizeLinear" not in source.read_bytes():
            table = Path(given["--calib"]).read_text(encoding="ascii") if Path(given["--calib"]).is_file() else ""
            if table.split("\n")[0] != f"TRT-{_options()[self.version]['version_tag']}-EntropyCalibration2":
                raise _FailedError(*says.UNCALIBRATED)
        if cache:
            with Path(cache).open("ab") as file:
                file.write(b"timed")
            _say(sys.stdout, f"[I] Saved {Path(cache).stat().st_size} bytes of timing cache to {cache}")
        # Two builds of one model are not equal byte by byte (NVIDIA/TensorRT, issue 4798).
        salt = random.randbytes(says.HEADER - 8)
        plan: bytes = says.MAGIC + salt + bytes([*map(int, self.version.split(".")), 0]) + source.read_bytes()
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
        wrong = says.mismatch(plan, self.version)
        if wrong is not None:
            raise _FailedError(wrong, *after)
        return plan

    def _modelled(self, plan: bytes) -> Path:
        return Path(self.setting["modelled"], hashlib.sha256(plan).hexdigest())

    def _export(self, name: str, plan: bytes, queries: int = 0) -> str:
        """What was recorded, or what was made up for a model and differs a little each time."""
        if not self.setting["modelled"]:
            return Path(self.setting[name]).read_text(encoding="utf-8")
        made = json.loads(self._modelled(plan).read_text(encoding="utf-8"))
        if name == "layers":
            return json.dumps(made["layers"])
        if name == "times":
            told = [made["whole_ms"] * random.gauss(1.0, 0.003) for _ in range(max(100, queries))]
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
        _say(sys.stdout, "[I] Starting inference")
        warmup_ms, duration_s = float(given.get("--warmUp", 200)), float(given.get("--duration", 3))
        queries, query_ms = int(given.get("--iterations", 10)), self._query_ms(plan)
        if self.setting["real_time"]:
            queries = max(queries, int(1e3 * duration_s / query_ms))
            end = time.monotonic() + (warmup_ms + queries * query_ms) / 1e3
            while time.monotonic() < end:
                pass
        profiled = "--exportProfile" in given or "--dumpProfile" in given
        # Up to TensorRT 10 a profiled run has no times of its own, unless a run of its own is asked for.
        if not profiled or "--separateProfileRun" in given or self.version.startswith("11."):
            _say(sys.stdout, f"[I] Warmup completed {int(warmup_ms / query_ms)} queries over {warmup_ms:g} ms")
            _say(sys.stdout, f"[I] Timing trace has {queries} queries over {queries * query_ms / 1e3:.6g} s")
            _say(sys.stdout, "[I] === Performance summary ===")
            if "--exportTimes" in given:
                Path(given["--exportTimes"]).write_text(self._export("times", plan, queries), encoding="utf-8")
        if "--exportProfile" in given:
            Path(given["--exportProfile"]).write_text(self._export("profile", plan), encoding="utf-8")
        if "--exportOutput" in given:
            Path(given["--exportOutput"]).write_text(
                _outputs(plan[says.HEADER :], given, wide=not self.version.startswith("8.")), encoding="utf-8"
            )

    def _query_ms(self, plan: bytes) -> float:
        """What a query takes in the mean, as it was recorded or made up, milliseconds."""
        if self.setting["modelled"]:
            return float(json.loads(self._modelled(plan).read_text(encoding="utf-8"))["whole_ms"])
        text = Path(self.setting["times"]).read_text(encoding="utf-8")
        told = [float(ms) for ms in re.findall(r'"computeMs"\s*:\s*([0-9.]+)', text)]
        return sum(told) / len(told) if told else 1.0


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
