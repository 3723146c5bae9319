"""Signatures with real keys, on this machine and on a board that has a list of its own."""

import shutil
import subprocess

import pytest

from edgeprune.boards.board import Board
from edgeprune.deployment.artifact import Artifact
from edgeprune.deployment.deploying import deploy
from edgeprune.deployment.signing import require_signed, sign
from edgeprune.deployment.status import rollback, status
from edgeprune.deployment.verifying import verify
from edgeprune.errors import (
    ConfigError,
    DeployError,
    InconsistentBoardError,
    ManifestError,
    ParityError,
    SignatureError,
)

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen on this machine")


@pytest.fixture
def keys(tmp_path):
    """Two keys; only the first is on the list of signers."""
    folder = tmp_path / "keys; $(id) 'of' ann"
    folder.mkdir()
    for name in ("ann", "eve"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)], check=True
        )
    public = (folder / "ann.pub").read_text().split()
    (folder / "allowed_signers").write_text(f"ann@example.org {public[0]} {public[1]}\n")
    return folder


@pytest.fixture
def artifact(artifacts, tmp_path):
    """A copy of an artifact that may be signed."""
    return Artifact.load(shutil.copytree(artifacts[1].folder, tmp_path / "copy of net1"))


def test_signature_by_a_listed_key_passes_and_leaves_the_artifact_what_it_is(artifact, keys):
    sign(artifact, keys / "ann")
    again = Artifact.load(artifact.folder)
    assert again.id == artifact.id
    assert require_signed(again, keys / "allowed_signers") == "ann@example.org"
    assert require_signed(again, None) is None


def test_artifact_that_is_not_signed_signed_by_another_or_altered_is_refused_before_the_board_is_asked(
    artifact, keys, root, forge
):
    signers = keys / "allowed_signers"
    with pytest.raises(SignatureError, match=r"must be signed by one of .*, found no signature\.") as caught:
        deploy(artifact, "local", rounds=1, signers=signers)
    assert caught.value.exit_code == 5
    sign(artifact, keys / "eve")
    with pytest.raises(SignatureError, match="found a signature by another key"):
        deploy(artifact, "local", rounds=1, signers=signers)
    sign(artifact, keys / "ann")
    other = forge(artifact, "renamed", name="another name")
    with pytest.raises(SignatureError, match=r"by ann@example\.org that is not of this manifest"):
        deploy(other, "local", rounds=1, signers=signers)
    with (artifact.folder / "engine.onnx").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ManifestError, match="must have sha256"):
        deploy(artifact.folder, "local", rounds=1, signers=signers)
    assert not (root / "releases").exists()


def test_signature_for_another_purpose_is_refused(artifact, keys):
    manifest = (artifact.folder / "manifest.json").read_bytes()
    command = ["ssh-keygen", "-Y", "sign", "-q", "-n", "git", "-f", str(keys / "ann")]
    done = subprocess.run(command, input=manifest, capture_output=True, check=True)
    (artifact.folder / "manifest.json.sig").write_bytes(done.stdout)
    with pytest.raises(SignatureError, match="not of this manifest"):
        require_signed(artifact, keys / "allowed_signers")


def lines_of_one_key(keys):
    """A list that has ann's key for another purpose, for a time that is over, and, as somebody else, for this."""
    public = " ".join((keys / "ann.pub").read_text().split()[:2])
    path = keys / "two lines"
    path.write_text(
        f'# of ann\nann@git namespaces="git" {public}\nann@old valid-before="20200101" {public}\n\nann@here {public}\n'
    )
    return path


def test_a_key_that_is_listed_twice_signs_by_the_line_that_allows_it(artifact, keys, board):
    signers = lines_of_one_key(keys)
    sign(artifact, keys / "ann")
    assert require_signed(artifact, signers) == "ann@here"
    # The same on a board with a list of its own, whose runner asks as it stages.
    board.root.mkdir()
    shutil.copy(signers, board.root / "allowed_signers")
    (board.root / "store").mkdir()
    files = {}
    for path in artifact.folder.iterdir():
        digest = board.digest(path.read_bytes())
        shutil.copy(path, board.root / "store" / digest)
        files[path.name] = {"sha256": digest, "size_bytes": path.stat().st_size}
    assert board.call("stage", release=artifact.release, files=files)["folder"] == artifact.release
    signers.write_text(signers.read_text().replace("ann@here", 'ann@mail namespaces="mail"'))
    with pytest.raises(SignatureError, match="by ann@git that is not of this manifest"):
        require_signed(artifact, signers)
    shutil.copy(signers, board.root / "allowed_signers")
    refused = board.call("stage", release=artifact.release, files=files)
    assert (refused["event"], refused["error"]) == ("error", "SignatureError")
    assert "one by ann@git of something else" in refused["message"]


def test_list_that_is_empty_admits_nobody(artifact, keys):
    sign(artifact, keys / "ann")
    (keys / "none").write_text("")
    with pytest.raises(SignatureError, match="signature by another key"):
        require_signed(artifact, keys / "none")


def test_signature_covers_the_manifest_that_is_deployed_whatever_the_file_holds_by_then(artifact, keys, forge):
    sign(artifact, keys / "ann")
    other = forge(artifact, "renamed", name="another name")
    (other.folder / "manifest.json").write_bytes(artifact.manifest.canonical())
    with pytest.raises(SignatureError, match="not of this manifest"):
        require_signed(other, keys / "allowed_signers")


@pytest.mark.slow
def test_board_with_a_list_of_its_own_takes_only_what_its_signers_signed(artifact, artifacts, running, keys):
    (running / "allowed_signers").write_text("")
    with pytest.raises(SignatureError, match=r"found none\. Board local still runs .*\(net0\)\."):
        deploy(artifact, "local", rounds=1)
    sign(artifact, keys / "eve")
    shutil.copy(keys / "allowed_signers", running / "allowed_signers")
    with pytest.raises(SignatureError, match="a key that is not in"):
        deploy(artifact, "local", rounds=1)
    sign(artifact, keys / "ann")
    deploy(artifact, "local", rounds=1)
    assert verify("local").signer == "ann@example.org"
    with pytest.raises(SignatureError, match="found none"):
        verify("local", release="previous")


def test_release_that_is_there_gets_the_signature_that_it_came_with_later(artifacts, running, keys, tmp_path):
    artifact = Artifact.load(shutil.copytree(artifacts[0].folder, tmp_path / "copy of net0"))
    with pytest.raises(SignatureError, match="found no signature"):
        verify("local", signers=keys / "allowed_signers")
    sign(artifact, keys / "ann")
    assert not deploy(artifact, "local", rounds=1, signers=keys / "allowed_signers").changed
    assert verify("local", signers=keys / "allowed_signers").signer == "ann@example.org"


@pytest.mark.parametrize("key", ["missing", "allowed_signers", "two\nlines"])
def test_key_that_cannot_sign_is_named(artifact, keys, key):
    with pytest.raises(ConfigError, match="must be one that ssh-keygen can use, found"):
        sign(artifact, keys / key)
    assert not (artifact.folder / "manifest.json.sig").exists()


def test_verify_says_what_is_there_and_runs_the_golden_inputs_on_request(running, artifacts):
    found = verify("local", parity=True)
    assert (found.release, found.name, found.signer) == (artifacts[0].release, "net0", None)
    assert found.files == len(artifacts[0].manifest.files) + 1
    assert found.parity.passed
    assert verify("local", release=artifacts[0].release).parity is None


@pytest.mark.parametrize("change", ["altered", "missing", "extra", "link"])
def test_verify_names_the_file_that_is_not_as_it_was(running, tmp_path, change):
    folder = running / "current"
    engine = folder / "engine.onnx"
    name = "engine.onnx"
    if change == "altered":
        engine.chmod(0o644)
        engine.write_bytes(b"other")
    elif change == "extra":
        name = "left $(id)\nthere"
        (folder / name).write_text("")
    else:
        engine.rename(tmp_path / "engine.onnx")
        if change == "link":
            engine.symlink_to(tmp_path / "engine.onnx")
    with pytest.raises(InconsistentBoardError, match="must be what its manifest says") as caught:
        verify("local")
    assert name in caught.value.message
    assert status("local").current.name == "net0", "nothing is changed"


def test_verify_finds_numbers_that_changed_though_the_files_did_not(running, monkeypatch):
    """A runtime that computes something else: here, one whose outputs are moved a little."""
    folder = running.parent / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import numpy\ntrue = numpy.load\n"
        "class Moved(dict):\n    def __enter__(self): return self\n    def __exit__(self, *_): pass\n"
        "def load(*a, **k):\n    found = Moved(true(*a, **k))\n"
        "    found['output_0'] = found['output_0'] * 1.01\n    return found\n"
        "numpy.load = load\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    with pytest.raises(ParityError, match=r"\(net0\) on board local must agree with the golden outputs"):
        verify("local", parity=True)


@pytest.mark.slow
def test_verify_with_parity_is_of_one_release_though_holding_the_board_ends_a_trial(artifacts, running, tmp_path):
    deploy(artifacts[1], "local", rounds=1)
    rollback("local")
    # The way back takes longer than a board that says nothing is waited for.
    reload = f"grep -q net1 '{running}/current/manifest.json' || sleep 5"
    window = {"id": "0" * 16, "seconds": 60, "health": None, "reload": reload}
    with Board.open("local") as board:
        board.call("activate", {"folder": artifacts[1].release, "window": window, "owner": {"host": "gone", "pid": 1}})
        assert status(board).window is not None
        board._hold._patience_s = 4.0
        found = verify(board, parity=True)
    assert (found.release, found.name) == (artifacts[0].release, "net0")
    assert found.parity.passed


@pytest.mark.parametrize("release", ["../../etc", "0" * 16, "a b", "$(id)", ""])
def test_verify_of_a_release_that_is_not_there_says_so(running, release):
    with pytest.raises(DeployError, match=r"must hold release|must be named by its id") as caught:
        verify("local", release=release)
    assert caught.value.exit_code == 5
