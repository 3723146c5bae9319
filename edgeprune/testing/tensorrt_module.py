"""A stand-in for TensorRT's Python module, with one for CUDA's library, for boards without a GPU; `install` puts it there.

It is strict where the real ones are: a class, method, property or enumerator that is not in the bindings of its release
(``tensorrt_api.json``, taken from NVIDIA's sources) does not exist, and what the bindings have but this does not model says so.
What it tells of layers was recorded of the real one, so they have nothing to do with the model; outputs are the model's, from
ONNX Runtime. It fails with the lines that `edgeprune.testing.trtexec_says` has. It knows nothing of what edgeprune believes of
TensorRT.

Behavior by source: NVIDIA/TensorRT at v8.6.1, v10.3.0 and v11.1, python/src and python/docstrings.
"""

from __future__ import annotations

import enum
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

Failing = Literal["memory", "node"]

_API = Path(__file__).with_name("tensorrt_api.json")
_SAYS, _LIBRARY, _CLASSES = (
    Path(__file__).with_name(name) for name in ("trtexec_says.py", "cudart.py", "tensorrt_classes.py")
)
_LOADER = """
import importlib.util
_spec = importlib.util.spec_from_file_location("tensorrt_stand_in", {path!r})
_made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_made)
globals().update(_made.names({setting!r}))
"""


def install(
    folder: Path,
    version: str,
    *,
    layers: Path,
    profile: Path,
    failing: Failing | None = None,
) -> Path:
    """Put a stand-in into a folder, for ``PYTHONPATH``.

    Args:
        folder: Where to; made if need be.
        version: One of `edgeprune.testing.trtexec.versions`.
        layers: Recorded export to tell of an engine.
        profile: Recorded times of layers.
        failing: How every build fails: too little memory, or a node without an implementation.

    Returns:
        The module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    setting = {
        "version": version,
        "layers": str(layers.resolve()),
        "profile": str(profile.resolve()),
        "failing": failing,
    }
    module = folder / "tensorrt.py"
    module.write_text(_LOADER.format(path=str(Path(__file__).resolve()), setting=setting), encoding="utf-8")
    return module


def api(version: str) -> dict[str, Any]:
    """Classes and enumerations of a release's bindings."""
    found: dict[str, Any] = json.loads(_API.read_text(encoding="utf-8"))[version]
    return found


def names(setting: dict[str, Any]) -> dict[str, Any]:
    """What the module of a release has in it; CUDA's library is found by `ctypes` from then on."""
    known = api(setting["version"])
    module: dict[str, Any] = {
        name: enum.IntEnum(name, {value: number for number, value in enumerate(values)})
        for name, values in known["enums"].items()
        if name != "Severity"
    }
    library, classes = _sibling(_LIBRARY), _sibling(_CLASSES)
    world = classes.World(setting, _sibling(_SAYS), module, library.Cudart())
    for model in classes.MODELLED:
        name = model.__name__.lstrip("_")
        if name in known["classes"]:
            module[name] = _bound(model, name, known["classes"][name], world)
    for number, value in enumerate(known["enums"]["Severity"]):
        setattr(module["ILogger"], value, number)
    world.severities = known["enums"]["Severity"]
    library.found_by_ctypes(world.cuda)
    return {**module, "__version__": setting["version"]}


def _bound(model: type, name: str, known: dict[str, Any], world: Any) -> type:
    """A class as a release's bindings have it: of what is modelled, what they know."""
    public = {*known.get("methods", ()), *known.get("properties", ()), *known.get("readonly", ())}
    body = {key: value for key, value in vars(model).items() if key.startswith("_") or key in public}
    for key in ("__dict__", "__weakref__"):
        body.pop(key, None)
    return type(name, (model.__mro__[1],), {**body, "_known": known, "_world": world})


def _sibling(path: Path) -> ModuleType:
    """A file beside this one: the classes, what TensorRT says and the form of an engine, or CUDA."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_stand_in", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
