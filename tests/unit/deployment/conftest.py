"""Small real models, compiled once; a board of this machine in a folder of the test's own."""

import shutil

import pytest

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
