import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune.deployment.artifact import Artifact, staged
from edgeprune.errors import ConfigError, ManifestError


@pytest.fixture
def copy(artifacts, tmp_path):
    return Path(shutil.copytree(artifacts[0].folder, tmp_path / "artifact"))


def test_artifact_loads_what_was_compiled(copy, artifacts):
    loaded = Artifact.load(copy)
    assert loaded.id == artifacts[0].id
    assert loaded.release == loaded.id[:16]
    assert loaded.engine.name == "engine.onnx"
    assert loaded.size_bytes == sum(path.stat().st_size for path in copy.iterdir())
    assert [tensor["shape"] for tensor in loaded.model["outputs"]] == [[1, 10]]


@pytest.mark.parametrize("name", ["engine.onnx", "golden.npz", "model.json"])
def test_one_altered_bit_is_found_and_the_file_is_named(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ManifestError, match=f"'{name}' of artifact .* must have sha256"):
        Artifact.load(copy)


def test_missing_file_is_named(copy):
    (copy / "golden.npz").unlink()
    with pytest.raises(ManifestError, match=r"must hold 'golden\.npz', which is missing"):
        Artifact.load(copy)


@pytest.mark.parametrize("name", ["extra.txt", "folder/extra.txt", "folder/"])
def test_extra_file_or_folder_is_named(copy, name):
    path = copy / name
    if name.endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    with pytest.raises(ManifestError, match=f"found '{name}'"):
        Artifact.load(copy)


@pytest.mark.parametrize("name", ["engine.onnx", "manifest.json"])
def test_symbolic_link_is_refused_even_to_the_right_content(copy, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    (copy / name).rename(elsewhere)
    (copy / name).symlink_to(elsewhere)
    with pytest.raises(ManifestError, match=f"'{name}' of .*artifact.* must be a plain file, found a symbolic link"):
        Artifact.load(copy)


def test_special_file_is_refused_without_being_read(copy):
    (copy / "engine.onnx").unlink()
    os.mkfifo(copy / "engine.onnx")
    with pytest.raises(ManifestError, match="found a special file"):
        Artifact.load(copy)


def test_folder_without_manifest_is_no_artifact(tmp_path):
    with pytest.raises(ManifestError, match="must be a folder, found none"):
        Artifact.load(tmp_path / "nothing")
    with pytest.raises(ManifestError, match=r"must hold a readable 'manifest\.json'"):
        Artifact.load(tmp_path)


def write_artifact(folder, source):
    for path in source.iterdir():
        shutil.copy(path, folder)


def test_staged_replaces_an_artifact_in_one_piece(copy, artifacts):
    with staged(copy) as folder:
        write_artifact(folder, artifacts[1].folder)
        assert Artifact.load(copy).id == artifacts[0].id
    assert Artifact.load(copy).id == artifacts[1].id
    assert [path.name for path in copy.parent.iterdir()] == ["artifact"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_staged_leaves_nothing_when_it_fails(copy, artifacts, error):
    def fail():
        with staged(copy) as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert Artifact.load(copy).id == artifacts[0].id
    assert [path.name for path in copy.parent.iterdir()] == ["artifact"]


@pytest.mark.parametrize("kind", ["other files", "a file", "a link"])
def test_staged_replaces_nothing_but_artifacts(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "other files":
        out.mkdir()
        (out / "thesis.tex").write_text("precious")
    elif kind == "a file":
        out.write_text("precious")
    else:
        out.symlink_to(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="must be new"), staged(out):
        pytest.fail("the block must not run")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_killed_process_left_is_removed_and_what_it_moved_aside_is_put_back(copy, artifacts):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (copy.parent / f".artifact.{dead.pid}.partial").mkdir()
    copy.rename(copy.parent / f".artifact.{dead.pid}.old")
    with pytest.raises(ValueError, match="stop"), staged(copy):
        raise ValueError("stop")
    assert Artifact.load(copy).id == artifacts[0].id
    assert [path.name for path in copy.parent.iterdir()] == ["artifact"]
