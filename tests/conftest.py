"""Fixtures that several folders of tests use."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.register_assert_rewrite("edgeprune.testing")

from edgeprune.testing.sshd import MissingSshdError, OpenSshServer  # noqa: E402 (after the registration)

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.deployment.artifact import Artifact


HERE = Path(__file__).parent


def pytest_runtest_setup() -> None:
    """Programs under test must feel Ctrl-C, also where the tests were started as a background job, which ignores it, and where
    a test before this one ran what ignores it at its end, as the command line does."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


ALONE = (
    "unit/cli/test_verbs.py",
    "unit/loop/test_closing_on_a_board.py",
    "unit/loop/test_pruning_on_a_board.py",
    "unit/profiling/test_bench.py",
    "unit/profiling/test_comparing.py",
    "unit/profiling/test_measuring.py",
    "unit/profiling/test_run.py",
    "unit/profiling/test_run_conditions.py",
    "unit/profiling/test_run_refined.py",
    "unit/profiling/test_sustaining.py",
)
"""Files, and folders of files, whose tests assert what was timed: a neighbor disturbs them. A board that is only held, or a
deployment that is only watched, has a root folder and so a lock of its own, and goes beside others."""


def _is_alone(path: Path) -> bool:
    return any(path.is_relative_to(HERE / each) for each in ALONE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files of which `-m` leaves out every test, before they are imported with all that they need."""
    expression = f" {config.option.markexpr} "
    if collection_path.suffix != ".py" or " alone " not in expression or " or " in expression:
        return None
    return True if _is_alone(collection_path) == (" not alone " in expression) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark these tests; a path that is gone is an error."""
    if gone := [path for path in ALONE if not (HERE / path).exists()]:
        raise pytest.UsageError(f"ALONE must name tests that are there, found {gone}.")
    for item in items:
        if _is_alone(item.path):
            item.add_marker(pytest.mark.alone)
    _leave_torch_untraced()


def pytest_runtest_logstart() -> None:
    """As after the collection, where a test before this one was the first to import torch."""
    _leave_torch_untraced()


def _leave_torch_untraced() -> None:
    """Keep pytest's handlers off torch's trace, which they would turn on: it describes each tensor of an export with its stack.

    pytest gives its handlers to every logger that does not propagate, torch writes its trace as soon as that logger has one.
    """
    logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenSshServer]:
    """A real OpenSSH server on the loopback address that runs for the whole session; tests must not stop it."""
    try:
        server = OpenSshServer(tmp_path_factory.mktemp("sshd"))
    except MissingSshdError as error:
        if os.environ.get("EDGEPRUNE_REQUIRE_SSHD") == "1":
            pytest.fail(f"EDGEPRUNE_REQUIRE_SSHD=1, but: {error}")
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture
def host_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes this process a host of its own, whose SSH knows what a configuration says: no boards yet, and nothing remembered."""

    def made(ssh_config: Path) -> None:
        monkeypatch.setenv("EDGEPRUNE_SSH_CONFIG", str(ssh_config))
        monkeypatch.setenv("EDGEPRUNE_CONFIG", str(tmp_path / "boards.toml"))
        monkeypatch.setenv("EDGEPRUNE_STATE", str(tmp_path / "state"))
        monkeypatch.delenv("EDGEPRUNE_FAULT", raising=False)

    return made


@pytest.fixture(scope="session")
def two_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Artifact]]:
    """Compiles a network twice, with different weights: artifacts ``net0`` and ``net1``."""
    import torch

    from edgeprune.deployment.compiling import compile as compile_artifact

    def made(network: Callable[[], nn.Module], *shape: int) -> list[Artifact]:
        torch.set_num_threads(1)
        folder, found = tmp_path_factory.mktemp("artifacts"), []
        for seed in (0, 1):
            torch.manual_seed(seed)
            found.append(compile_artifact(network(), torch.randn(shape), folder / f"net{seed}", name=f"net{seed}"))
        return found

    return made


@pytest.fixture(scope="session")
def tiny_artifacts(two_of: Callable[..., list[Artifact]]) -> list[Artifact]:
    """Two artifacts of a network that is one layer."""
    from torch import nn

    return two_of(lambda: nn.Linear(20, 10), 1, 20)
