"""What the stand-in for TensorRT's Python module models of its classes; see `edgeprune.testing.tensorrt_module`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any


class World:
    """What all objects of one module share."""

    def __init__(self, setting: dict[str, Any], says: ModuleType, module: dict[str, Any], cuda: Any) -> None:
        self.setting, self.says, self.module, self.cuda = setting, says, module, cuda
        self.severities: list[str] = []

    def log(self, logger: Any, severity: str, text: str) -> None:
        logger.log(self.severities.index(severity), text)

    def made(self, name: str, *arguments: Any) -> Any:
        """An object that another one makes: the bindings have no constructor of it."""
        found = object.__new__(self.module[name])
        found._begin(*arguments)
        return found


class _Strict:
    """An object that has what the bindings have, and nothing else."""

    _known: dict[str, Any]
    _world: World

    def __getattr__(self, name: str) -> Any:
        known = type(self)._known
        if any(name in known.get(kind, ()) for kind in ("methods", "properties", "readonly")):
            raise NotImplementedError(f"the stand-in does not model {type(self).__name__}.{name}")
        raise AttributeError(f"'tensorrt.tensorrt.{type(self).__name__}' object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in type(self)._known.get("properties", ()):
            raise AttributeError(f"'tensorrt.tensorrt.{type(self).__name__}' object has no settable attribute {name!r}")
        object.__setattr__(self, name, value)


class _Subclassed:
    """A class of the bindings that users derive from; the real one refuses one whose constructor did not call it."""

    _ready = False

    def __init__(self) -> None:
        self._ready = True

    @staticmethod
    def _require(given: Any) -> None:
        if not getattr(given, "_ready", False):
            raise TypeError(f"{type(given).__name__}.__init__() must be called when overriding __init__")


class _ILogger(_Subclassed):
    def log(self, severity: int, msg: str) -> None:
        raise NotImplementedError


class _IProfiler(_Subclassed):
    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


class _IHostMemory(_Strict):
    def _begin(self, content: bytes) -> None:
        self._content = content

    def __bytes__(self) -> bytes:
        return self._content

    @property
    def nbytes(self) -> int:
        return len(self._content)


class _ITimingCache(_Strict):
    def _begin(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> Any:
        return self._world.made("IHostMemory", self._content)


class _IBuilderConfig(_Strict):
    def _begin(self) -> None:
        self._flags = {"TF32"}
        self._cache: Any = None

    def set_flag(self, flag: Any) -> None:
        self._flags.add(self._world.module["BuilderFlag"](flag).name)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(self._world.module["BuilderFlag"](flag).name)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._world.module["MemoryPoolType"](pool)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        return self._world.made("ITimingCache", bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


class _Network:
    """Of INetworkDefinition only what its maker and its parser say."""

    def __init__(self, explicit: bool) -> None:
        self.explicit, self.model = explicit, b""


class _Builder(_Strict):
    def __init__(self, logger: Any) -> None:
        _Subclassed._require(logger)
        self._logger = logger

    def create_network(self, flags: int = 0) -> _Network:
        # Since TensorRT 10 a network's batch is always explicit.
        return _Network(not self._world.setting["version"].startswith("8.") or bool(flags & 1))

    def create_builder_config(self) -> Any:
        return self._world.made("IBuilderConfig")

    def build_serialized_network(self, network: _Network, config: Any) -> Any:
        world, says = self._world, self._world.says
        failing = world.setting["failing"]
        if failing is not None:
            for line in says.RECORDED[failing]:
                severity, _, text = line.partition("] ")
                # Lines without a number are the program's own.
                if text.startswith(("Error[", "[TRT]", "IBuilder")):
                    world.log(self._logger, {"[E": "ERROR", "[W": "WARNING"}[severity], text.removeprefix("[TRT] "))
            return None
        complaint = says.refused(network.model, world.setting["version"], int8="INT8" in config._flags)
        if complaint is not None:
            world.log(self._logger, "ERROR", complaint)
            return None
        if config._cache is not None:
            config._cache._content += b"timed"
        verbosity = getattr(config, "profiling_verbosity", world.module["ProfilingVerbosity"].LAYER_NAMES_ONLY)
        detailed = verbosity == world.module["ProfilingVerbosity"].DETAILED
        made = bytes([*map(int, world.setting["version"].split(".")), detailed])
        salt = random.randbytes(says.HEADER - 8)
        return world.made("IHostMemory", says.MAGIC + salt + made + network.model)


class _ParserError(_Strict):
    def _begin(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class _OnnxParser(_Strict):
    def __init__(self, network: _Network, logger: Any) -> None:
        _Subclassed._require(logger)
        self._network, self._errors = network, list[str]()

    def parse_from_file(self, model: str) -> bool:
        import onnx

        if not self._network.explicit:
            self._errors.append(
                "This version of the ONNX parser only supports TensorRT INetworkDefinitions with an explicit batch dimension."
            )
            return False
        try:
            content = Path(model).read_bytes()
            onnx.checker.check_model(onnx.load_from_string(content))
        except (OSError, onnx.checker.ValidationError, ValueError) as error:
            self._errors.append(f"Failed to parse ONNX model from file: {model} ({type(error).__name__})")
            return False
        except Exception as error:  # noqa: BLE001 - protobuf's own class is not public
            self._errors.append(f"Failed to parse ONNX model from file: {model} ({type(error).__name__})")
            return False
        refusal = self._world.says.unparsed(content, self._world.setting["version"])
        if refusal is not None:
            self._errors.append(refusal)
            return False
        self._network.model = content
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._world.made("ParserError", self._errors[index])


class _Runtime(_Strict):
    def __init__(self, logger: Any) -> None:
        _Subclassed._require(logger)
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        says, plan = self._world.says, bytes(serialized_engine)
        wrong = says.mismatch(plan, self._world.setting["version"])
        if wrong is not None:
            self._world.log(self._logger, "ERROR", wrong.removeprefix("[E] ").removeprefix("[TRT] "))
            return None
        return self._world.made("ICudaEngine", plan)


class _ICudaEngine(_Strict):
    def _begin(self, plan: bytes) -> None:
        import onnxruntime

        header = self._world.says.HEADER
        self._detailed = bool(plan[header - 1])
        self._session = onnxruntime.InferenceSession(plan[header:], providers=["CPUExecutionProvider"])
        self._tensors = {value.name: value for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._inputs = [value.name for value in self._session.get_inputs()]

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return str(list(self._tensors)[index])

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._world.module["TensorIOMode"]
        return modes.INPUT if name in self._inputs else modes.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        kind = self._tensors[name].type.removeprefix("tensor(").removesuffix(")")
        if kind == "int64" and self._world.setting["version"].startswith("8."):
            kind = "int32"
        known = {
            "float": "FLOAT",
            "float16": "HALF",
            "int8": "INT8",
            "int32": "INT32",
            "int64": "INT64",
            "bool": "BOOL",
        }
        return self._world.module["DataType"][known[kind]]

    def create_execution_context(self) -> Any:
        return self._world.made("IExecutionContext", self)

    def create_engine_inspector(self) -> Any:
        return self._world.made("EngineInspector", self._detailed)


class _EngineInspector(_Strict):
    def _begin(self, detailed: bool) -> None:
        self._detailed = detailed

    def get_engine_information(self, format: Any) -> str:  # noqa: A002 - the bindings call it so
        assert self._world.module["LayerInformationFormat"](format).name == "JSON"
        text = Path(self._world.setting["layers"]).read_text(encoding="utf-8")
        if self._detailed:
            return text
        found = json.loads(text)
        return json.dumps({"Layers": [layer["Name"] for layer in found["Layers"]], "Bindings": found["Bindings"]})


class _IExecutionContext(_Strict):
    def _begin(self, engine: Any) -> None:
        self._engine, self._addresses = engine, dict[str, int]()

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return name in self._engine._tensors

    def execute_async_v3(self, stream_handle: int) -> bool:
        if set(self._addresses) < set(self._engine._tensors):
            return False
        return bool(self._world.cuda.enqueue(stream_handle, self._compute))

    def _compute(self) -> None:
        import numpy as np

        engine, cuda, wide = self._engine, self._world.cuda, {"INT64": "int64", "INT32": "int32", "BOOL": "bool"}
        given = {}
        for name in engine._inputs:
            kind = engine.get_tensor_dtype(name).name
            dtype = np.dtype({"FLOAT": "float32", "HALF": "float16", "INT8": "int8", **wide}[kind])
            shape = engine.get_tensor_shape(name)
            content = cuda.read(self._addresses[name], int(np.prod(shape)) * dtype.itemsize)
            own = "int64" if "int64" in engine._tensors[name].type else dtype
            given[name] = np.frombuffer(content, dtype).reshape(shape).astype(own)
        outputs = [name for name in engine._tensors if name not in engine._inputs]
        for name, value in zip(outputs, engine._session.run(outputs, given), strict=True):
            narrow = engine.get_tensor_dtype(name).name == "INT32"
            cuda.write(self._addresses[name], (value.astype("int32") if narrow else value).tobytes())
        profiler = self.__dict__.get("profiler")
        if profiler is not None:
            _Subclassed._require(profiler)
            rows = json.loads(Path(self._world.setting["profile"]).read_text(encoding="utf-8"))
            for row in rows[1:]:
                profiler.report_layer_time(row["name"], row["averageMs"])


MODELLED = (
    *(
        _ILogger,
        _IProfiler,
        _IHostMemory,
        _ITimingCache,
        _IBuilderConfig,
        _Builder,
        _ParserError,
        _OnnxParser,
        _Runtime,
    ),
    *(_ICudaEngine, _EngineInspector, _IExecutionContext),
)
"""By name, but for the leading underscore."""
