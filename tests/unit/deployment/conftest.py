"""Small real models, compiled once; a board of this machine in a folder of the test's own."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgeprune.boards

torch = pytest.importorskip("torch")


def small_net(seed=0, classes=10):
    """A convolutional classifier that compiles in a second."""
    torch.manual_seed(seed)
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def example():
    return torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory):
    """Two artifacts of different weights, verified on this host."""
    from edgeprune import compile as compile_artifact

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("artifacts")
    return [compile_artifact(small_net(seed), example(), folder / f"net{seed}", name=f"net{seed}") for seed in (0, 1)]


@pytest.fixture
def forge(tmp_path):
    """Copies of an artifact with another engine or other manifest fields, whose hashes are right again."""
    from edgeprune.backends import registry
    from edgeprune.deployment.artifact import Artifact, describe_file
    from edgeprune.deployment.manifest import Manifest

    def forged(artifact, folder, *, engine=None, **changes):
        shutil.copytree(artifact.folder, folder := tmp_path / folder)
        if engine is not None:
            registry.get("onnxruntime").export(engine, (example(),), folder / "engine.onnx")
        files = {name: describe_file(folder / name) for name in artifact.manifest.files}
        manifest = Manifest.model_validate({**dict(artifact.manifest), **changes, "files": files})
        (folder / "manifest.json").write_bytes(manifest.canonical())
        return Artifact.load(folder)

    return forged


@pytest.fixture
def net():
    """Makes the modules that `artifacts` were compiled from: ``net(seed, classes=10)``."""
    return small_net


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Root folder of the board ``local``, empty; what this machine remembers is apart too."""
    folder = tmp_path / "board root"
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(folder))
    monkeypatch.setenv("EDGEPRUNE_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("EDGEPRUNE_FAULT", raising=False)
    return folder


@pytest.fixture(scope="session")
def _deployed(tmp_path_factory, artifacts):
    """Root folder of a board to which the first artifact was deployed."""
    from edgeprune import deploy

    folder = tmp_path_factory.mktemp("deployed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPRUNE_ROOT", str(folder / "root"))
        patch.setenv("EDGEPRUNE_STATE", str(folder / "state"))
        deploy(artifacts[0], "local", rounds=1)
    return folder / "root"


@pytest.fixture
def running(root, _deployed):
    """As `root`, but the board runs the first artifact already."""
    shutil.copytree(_deployed, root, symlinks=True)
    return root


class Runner:
    """A board's folder, driven through the runner: one process per verb, as on a board."""

    program = Path(edgeprune.boards.__file__).parent / "onboard"

    def __init__(self, root: Path) -> None:
        self.root = root

    def call(self, verb, **request):
        done = subprocess.run(
            [sys.executable, str(self.program), verb],
            input=json.dumps({"root": str(self.root), **request}) + "\n",
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode == 137:
            return "killed"
        event = json.loads(done.stdout.splitlines()[-1])
        return event["result"] if event["event"] == "result" else event

    def blobs(self, text):
        """Put the files of a release called `text` into the store; the request fields of `stage`."""
        contents = {"engine.onnx": text.encode() * 1000, "data/extra.bin": b"shared"}
        files = {name: {"sha256": self.digest(data), "size_bytes": len(data)} for name, data in contents.items()}
        manifest = json.dumps({"files": files, "name": text, "created": "2026-01-01T00:00:00Z"}).encode()
        contents["manifest.json"] = manifest
        files["manifest.json"] = {"sha256": self.digest(manifest), "size_bytes": len(manifest)}
        (self.root / "store").mkdir(parents=True, exist_ok=True)
        for data in contents.values():
            (self.root / "store" / self.digest(data)).write_bytes(data)
        return {"release": self.digest(manifest)[:16], "files": files}

    def release(self, text, **options):
        """Stage and activate a release; its folder."""
        folder = self.call("stage", **self.blobs(text))["folder"]
        result = self.call("activate", folder=folder, **options)
        assert result == "killed" or result["current"] == folder
        return folder

    def target(self, name="current"):
        link = self.root / name
        return link.readlink().name if link.is_symlink() else None

    def assert_valid(self, *allowed):
        """`current` is one whole release of `allowed`, or absent where None is allowed."""
        current = self.target()
        assert current in allowed
        if current is not None:
            assert self.damaged(self.root / "current") == []

    @staticmethod
    def digest(data):
        return hashlib.sha256(data).hexdigest()

    @staticmethod
    def damaged(folder):
        """Names of files of a release that are not as its manifest says."""
        files = json.loads((folder / "manifest.json").read_text())["files"]
        there = {
            str(path.relative_to(folder)): Runner.digest(path.read_bytes())
            for path in folder.rglob("*")
            if path.is_file()
        }
        assert there.pop("manifest.json").startswith(folder.resolve().name[:16])
        listed = {name: entry["sha256"] for name, entry in files.items()}
        return sorted(name for name in {*there, *listed} if there.get(name) != listed.get(name))


@pytest.fixture(scope="session")
def runner():
    """Makes empty boards' folders, driven through the runner: ``runner(path)``."""
    return Runner


@pytest.fixture
def board(tmp_path):
    """An empty board's folder, driven through the runner."""
    return Runner(tmp_path / "board root")
