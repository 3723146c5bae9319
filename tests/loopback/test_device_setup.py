"""A bare board behind a real OpenSSH server gets a runtime of its own: real pip, a real inference, tiny wheels.

The wheel of ONNX Runtime here holds only a line that adds this environment's packages, so what runs is the real one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path
from urllib.parse import quote

import pytest

from edgeprune.backends._base import Backend
from edgeprune.boards.board import Board
from edgeprune.boards.downloading import Wheel
from edgeprune.boards.wheels import WheelTarget, version_of
from edgeprune.deployment import environment
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.cleaning import clean
from edgeprune.deployment.environment import STATES, Setup, set_up
from edgeprune.deployment.manifest import Tolerance
from edgeprune.errors import BackendUnavailableError, BoardFullError, CommandError, ParityError
from edgeprune.files import sha256_of
from edgeprune.spec import Fingerprint
from edgeprune.testing import forking
from edgeprune.testing.sshd import OpenSshServer
from edgeprune.testing.wheels import write_wheel

pytestmark = pytest.mark.loopback

SITE = f"{sysconfig.get_path('platlib')}\n".encode()


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the standard library and nothing else, not even pip."""
    folder = tmp_path_factory.mktemp("bare") / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of one ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("index")
    write_wheel(folder, "onnxruntime", onnxruntime.__version__, {"host.pth": SITE})
    return folder


def only_from(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(folder))


class Standing:
    """A board that was set up for real: with pip, and an artifact compiled for it."""

    def __init__(self, url: str, root: Path) -> None:
        self.url, self.root, self.told = url, root, list[str]()
        self.artifact: Artifact
        self.setup: Setup


@pytest.fixture(scope="module")
def standing(
    sshd: OpenSshServer, wheels: Path, bare_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Standing:
    folder = tmp_path_factory.mktemp("standing")
    made = Standing(f"ssh://board?python={quote(str(bare_python))}&root={quote(str(folder / 'root'))}", folder / "root")
    compile_for = environment.small_artifact

    def kept(backend: Backend, fingerprint: Fingerprint, _: Path) -> Artifact:
        made.artifact = compile_for(backend, fingerprint, folder / "artifact")
        return made.artifact

    with pytest.MonkeyPatch.context() as patch:
        only_from(wheels, patch)
        patch.setenv("EDGEPRUNE_SSH_CONFIG", str(sshd.config))
        patch.delenv("EDGEPRUNE_FAULT", raising=False)
        patch.setattr(environment, "small_artifact", kept)
        with Board.open(made.url) as board:
            assert "onnxruntime" not in board.probe().runtimes
        made.setup = set_up(made.url, progress=lambda state, done, total, message: made.told.append(state))
    return made


@pytest.fixture
def index(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip finds anything: one ONNX Runtime."""
    only_from(shutil.copytree(wheels, tmp_path / "index"), monkeypatch)
    return tmp_path / "index"


@pytest.fixture
def root(sshd: OpenSshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder on the board for this test alone; nothing is there yet."""
    monkeypatch.setenv("EDGEPRUNE_SSH_CONFIG", str(sshd.config))
    monkeypatch.setenv("EDGEPRUNE_CONFIG", str(tmp_path / "boards.toml"))
    monkeypatch.delenv("EDGEPRUNE_FAULT", raising=False)
    return tmp_path / "board root"


@pytest.fixture
def url(root: Path, bare_python: Path) -> str:
    return f"ssh://board?python={quote(str(bare_python))}&root={quote(str(root))}"


@pytest.fixture
def before(standing: Standing, root: Path) -> Path:
    """The board of this test was set up before, as `standing` was; what its link says."""
    shutil.copytree(standing.root, root, symlinks=True)
    return (root / "environment").readlink()


@pytest.fixture
def ready(standing: Standing, index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheels of `index` without asking pip, the artifact without compiling it: for tests of what comes after both."""

    def found(wanted: list[str], target: WheelTarget, folder: Path, **_: object) -> tuple[Wheel, ...]:
        (path,) = index.glob("*.whl")
        return (Wheel(path, *version_of(path.name), sha256_of(path), path.stat().st_size),)

    monkeypatch.setattr(environment, "download", found)
    monkeypatch.setattr(environment, "small_artifact", lambda backend, fingerprint, folder: standing.artifact)
    return index


def replace_wheel(index: Path, version: str, files: dict[str, bytes]) -> None:
    for path in index.glob("*.whl"):
        path.unlink()
    write_wheel(index, "onnxruntime", version, files)


def test_a_bare_board_gets_a_runtime_that_later_runs_find(
    standing: Standing, ready: Path, before: Path, url: str, root: Path, bare_python: Path
) -> None:
    import onnxruntime

    made = standing.setup
    assert (made.version, made.changed) == (onnxruntime.__version__, True)
    assert made.parity is not None
    assert made.parity.passed
    assert made.bytes_sent == sum(path.stat().st_size for path in ready.iterdir())
    assert [state for at, state in enumerate(standing.told) if state not in standing.told[:at]] == [
        *("probe", "choose", "compile", "upload", "build", "test", "use", "done")
    ]
    with Board.open(url) as board:
        assert board.base_python == str(bare_python)
        assert board.python == str(root / "environment" / "bin" / "python")
        fingerprint = board.probe()
    assert fingerprint.runtimes["onnxruntime"]["version"] == onnxruntime.__version__
    assert fingerprint.facts["environment"]["packages"] == {"onnxruntime": onnxruntime.__version__}
    again = set_up(url)
    assert (again.changed, again.bytes_sent, again.python) == (False, 0, str(root / "environment" / "bin" / "python"))
    removed = clean(url)
    assert str(root / "environments") in removed.removed
    with Board.open(url) as board:
        assert board.python == str(bare_python)


OFTEN = ("setup:build",)


@pytest.mark.parametrize(
    "state", [pytest.param(state, marks=() if state in OFTEN else pytest.mark.slow) for state in STATES]
)
def test_interrupted_anywhere_the_old_environment_stays_and_a_second_run_converges(
    ready: Path, before: Path, root: Path, url: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    version = f"{onnxruntime.__version__}.post1"
    replace_wheel(ready, version, {"host.pth": SITE})
    monkeypatch.setenv("EDGEPRUNE_FAULT", f"interrupt:{state}")
    with pytest.raises(KeyboardInterrupt):
        set_up(url)
    monkeypatch.delenv("EDGEPRUNE_FAULT")
    assert ((root / "environment").readlink() == before) == (state != "setup:use")
    second = set_up(url)
    assert (second.version, second.changed) == (version, state != "setup:use")
    assert not [path.name for path in (root / "environments").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("package", "error", "message"),
    [
        pytest.param(
            *(b"raise ImportError('GLIBC_2.99 not found')\n", BackendUnavailableError, "GLIBC_2.99 not found"),
            marks=pytest.mark.slow,
        ),
        (b"import os; os.kill(os.getpid(), 4)\n", CommandError, "SIGILL"),
    ],
)
def test_a_runtime_that_does_not_run_there_is_not_used(
    ready: Path, before: Path, root: Path, url: str, package: bytes, error: type[Exception], message: str
) -> None:
    replace_wheel(ready, "9.0", {"onnxruntime/__init__.py": package, "numpy.pth": SITE})
    with pytest.raises(error, match=message) as caught:
        set_up(url)
    assert "The new environment was removed; board board uses the environment that it used." in str(caught.value)
    assert (root / "environment").readlink() == before
    assert [path.name for path in (root / "environments").iterdir()] == [before.name]


def test_an_environment_that_went_bad_is_built_anew(ready: Path, before: Path, root: Path, url: str) -> None:
    (pth,) = (root / "environments").rglob("host.pth")
    pth.unlink()
    assert set_up(url).changed
    assert (root / "environment").readlink() == before.with_name(f"{before.name}-2")


@pytest.mark.slow
def test_numbers_that_differ_are_refused(
    ready: Path, root: Path, url: str, standing: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = standing.artifact.manifest
    strict = manifest.model_copy(update={"tolerance": Tolerance(relative=1e-30, snr_db=1e6)})
    monkeypatch.setattr(environment, "small_artifact", lambda *_: Artifact(standing.artifact.folder, strict))
    with pytest.raises(ParityError, match=r"uses no environment"):
        set_up(url)
    assert not (root / "environment").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_board_without_space_is_refused_before_anything_is_sent(ready: Path, root: Path, url: str) -> None:
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(root)], check=True)
    try:
        with pytest.raises(BoardFullError, match=r"must have .* MB free under .* for the environment, found"):
            set_up(url)
        assert not (root / "store").exists()
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


def test_the_command_line_plans_without_sending_anything(index: Path, root: Path, url: str) -> None:
    planned = forking.run(("device", "setup", url, "--dry-run", "--json"), Path.cwd(), os.environ, 120)
    assert planned.returncode == 0, planned.stderr
    answer = json.loads(planned.stdout)
    assert answer["dry_run"]
    assert answer["bytes_sent"] == sum(path.stat().st_size for path in index.iterdir())
    assert answer["next"].startswith("edgeprune device setup 'ssh://board")
    assert not root.exists()
