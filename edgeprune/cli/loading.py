"""From ``package.module:factory`` or ``file.py:factory`` on the command line to a model or a task."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edgeprune.errors import FactoryError, ModelError, TaskError
from edgeprune.files import sha256_of
from edgeprune.near_files import near_files

if TYPE_CHECKING:
    import torch

    from edgeprune.tasks.task import Task

FORM = "package.module:factory or file.py:factory"
_NAMED_KEYS = 3
_STATE_DICT_NAMES = ("state_dict", "model_state_dict", "model")


def load_model(reference: str, weights: Path | None = None, *, seed: int = 0) -> torch.nn.Module:
    """Build the user's model, in eval form.

    Args:
        reference: ``package.module:factory`` or ``file.py:factory``; the factory is called without arguments. A module
            object under that name is taken as it is.
        weights: State dict to load strictly: ``.safetensors``, or a torch file without code in it.
        seed: Of torch while the factory runs, so that a model without weights is the same in every verb.

    Raises:
        FactoryError: If the factory does not import, fails, or returns something else than a ``torch.nn.Module``.
        ModelError: If the weights cannot be read or do not fit.
    """
    import torch

    product = _produce(reference, as_it_is=torch.nn.Module, before=lambda: torch.manual_seed(seed))
    if not isinstance(product, torch.nn.Module):
        raise FactoryError(
            f"a model factory must return a torch.nn.Module, {reference} returned {_describe(product)}.",
            hint="return the model itself from the factory",
        )
    if weights is not None:
        _load_weights(product, weights)
    return product.eval()


def load_task(reference: str) -> Task:
    """Build the user's task.

    Raises:
        TaskError: If the factory does not import, fails, or returns something else than an `edgeprune.Task`.
    """
    from edgeprune.tasks.task import Task

    try:
        product = _produce(reference, as_it_is=Task)
    except FactoryError as error:
        raise TaskError(error.message, hint=error.hint) from error
    if not isinstance(product, Task):
        raise TaskError(
            f"a task factory must return an edgeprune.Task, {reference} returned {_describe(product)}.",
            hint="return edgeprune.Task.single(train=..., validation=..., loss=..., metric=...)",
        )
    return product


def source_hash(reference: str) -> str | None:
    """SHA-256 of the file that a factory comes from, to see whether it was edited; None where there is no such file.

    Args:
        reference: Of a factory that was loaded already.
    """
    where, _, _ = reference.rpartition(":")
    if where.endswith(".py"):
        path = Path(where)
    else:
        path = Path(getattr(sys.modules.get(where), "__file__", None) or where)
    return sha256_of(path) if path.is_file() else None


def _produce(reference: str, *, as_it_is: type, before: Callable[[], object] = lambda: None) -> Any:
    """What the factory returns; an `as_it_is` under that name needs no call. `before` runs before user code."""
    where, separator, name = reference.rpartition(":")
    if not separator or not where or not name:
        raise FactoryError(
            f"a factory must be written {FORM}, found {reference!r}.",
            hint=f"{reference.rstrip(':') or 'file.py'}:build",
        )
    with _importable(where):
        before()
        module = _import(where, reference)
        target = _attribute(module, name, reference)
        if isinstance(target, as_it_is):
            return target
        if not callable(target):
            raise FactoryError(
                f"{reference} must be a callable, found {_describe(target)}.",
                hint="name a function that returns the model",
            )
        _check_needs_no_arguments(target, reference)
        before()
        try:
            return target()
        except (Exception, SystemExit) as error:
            raise FactoryError(
                f"{reference} must run without errors, it raised {_line(error)}.",
                hint="call it in Python to see where",
            ) from error


@contextmanager
def _importable(where: str) -> Iterator[None]:
    """The file's folder (or the working directory) is on the import path while the user's code runs."""
    folder = str(Path(where).resolve().parent if where.endswith(".py") else Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _import(where: str, reference: str) -> ModuleType:
    if where.endswith(".py"):
        return _import_file(Path(where), reference)
    try:
        return importlib.import_module(where)
    except (Exception, SystemExit) as error:
        hint = f"python -c 'import {where}', and mend what it says"
        if isinstance(error, ModuleNotFoundError) and error.name and where.split(".")[0] == error.name:
            near = sorted(path.name for path in Path.cwd().glob("*.py"))[:_NAMED_KEYS]
            hint = f"{near[0]}:factory for a file here" if near else f"{FORM}, with the package installed"
        raise FactoryError(f"{where} of {reference} must import, it raised {_line(error)}.", hint=hint) from error


def _import_file(path: Path, reference: str) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise FactoryError(f"{reference} must name a file, there is no {path}.", hint=near_files(path, ".py"))
    # A name that no import statement can reach: the user's `model.py` must not shadow anybody's module `model`.
    name = f"edgeprune_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FactoryError(f"{reference} must name a Python file, {path} is none.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch look their module up while it is being run
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise FactoryError(
            f"{path} must import, it raised {_line(error)}.",
            hint=f"python {shlex.quote(str(path))}, and mend what it says",
        ) from error
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(module: ModuleType, name: str, reference: str) -> Any:
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            public = [other for other in vars(target) if not other.startswith("_")]
            near = difflib.get_close_matches(part, public, n=2)
            callables = [other for other in public if callable(getattr(target, other))]
            hint = " or ".join(near) if near else (", ".join(callables[:5]) or None)
            raise FactoryError(f"{reference} must name something in the module, there is no {part!r}.", hint=hint)
        target = getattr(target, part)
    return target


def _check_needs_no_arguments(target: Callable[..., Any], reference: str) -> None:
    try:
        inspect.signature(target).bind()
    except TypeError as error:
        raise FactoryError(
            f"{reference} must be callable without arguments: {error}.",
            hint="a small factory of your own: def build(): return Net(10)",
        ) from error
    except ValueError:  # a builtin without a signature; calling it will tell
        return


def _load_weights(model: torch.nn.Module, path: Path) -> None:
    state = read_state_dict(path)
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
        parts = [f"missing {_few(missing)}"] if missing else []
        parts += [f"unexpected {_few(unexpected)}"] if unexpected else []
        raise ModelError(f"the weights in {path} must have the model's names: {', '.join(parts)}.")
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if state[name].shape != value.shape
    ]
    if wrong:
        raise ModelError(f"the weights in {path} must have the model's shapes: {_few(wrong)}.")
    model.load_state_dict(state, strict=True)


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name, from safetensors or from a torch file that holds nothing but tensors.

    Raises:
        ModelError: If the file is missing, of another format, or would run code.
    """
    import torch

    if not path.is_file():
        raise ModelError(
            f"the weights must be a file, there is no {path}.", hint=near_files(path, ".safetensors", ".pt", ".pth")
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ModelError(f"{path} must be a safetensors file: {_line(error)}.") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(
            f"{path} must be a torch file with tensors only, reading it without running code failed.",
            hint="torch.save(model.state_dict(), path), or safetensors",
        ) from error
    for name in _STATE_DICT_NAMES:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ModelError(f"{path} must hold a state dict, found {_describe(loaded)}.")
    return dict(loaded)


def _few(names: list[str]) -> str:
    more = len(names) - _NAMED_KEYS
    return ", ".join(names[:_NAMED_KEYS]) + (f" and {more} more" if more > 0 else "")


def _describe(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"a {type(value).__name__}"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
