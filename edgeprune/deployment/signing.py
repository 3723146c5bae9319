"""Who made an artifact: a signature of its manifest with an SSH key, checked against a list of signers.

The format is OpenSSH's own (``ssh-keygen -Y``, PROTOCOL.sshsig; since OpenSSH 8.1), so keys in agents and on security tokens
serve, and nothing needs to be installed. The manifest names every other file by its hash, so its signature covers them all.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.deployment.manifest import SIGNATURE_NAME
from edgeprune.errors import ConfigError, SignatureError
from edgeprune.files import write_text

if TYPE_CHECKING:
    from edgeprune.deployment.artifact import Artifact

NAMESPACE = "edgeprune"
"""What the signature is for; one that the same key made of a mail or a commit does not pass as one of an artifact."""

_TIMEOUT_S = 120.0


def sign(artifact: Artifact, key: str | Path) -> Path:
    """Sign an artifact's manifest; a signature that is there already is replaced.

    Args:
        artifact: The artifact.
        key: Private key file, or the public one of a key that the agent holds.

    Returns:
        The signature, ``manifest.json.sig`` beside the manifest.

    Raises:
        ConfigError: The key cannot be used.
    """
    path = Path(key).expanduser()
    done = _keygen(["sign", "-q", "-f", str(path.absolute()), "-n", NAMESPACE], artifact.manifest.canonical())
    text = done.stdout.decode("ascii", "replace")
    if done.returncode != 0 or "BEGIN SSH SIGNATURE" not in text:
        raise ConfigError(
            f"the key to sign with must be one that ssh-keygen can use, found {path}: {_said(done)}.",
            hint="ssh-keygen -t ed25519 -f KEY, or the .pub file of a key that the agent holds",
        )
    target = artifact.folder / SIGNATURE_NAME
    write_text(target, text)
    return target


def require_signer(manifest: bytes, signature: str | None, signers: Path, *, what: str) -> str:
    """Refuse a manifest that none of the signers has signed.

    Args:
        manifest: Bytes of ``manifest.json``.
        signature: Text of ``manifest.json.sig``, or None.
        signers: File in the format of ssh-keygen's manual, section ALLOWED SIGNERS.
        what: What errors call it.

    Returns:
        Who signed it.

    Raises:
        SignatureError: It is not signed, by nobody of the list, or the signature is of something else.
        ConfigError: There is no list, or no ssh-keygen.
    """
    if not signers.is_file():
        raise ConfigError(f"the list of signers must be a file, found none at {signers}.", hint="device add --signers")
    wanted = f"{what} must be signed by one of {signers}"
    if signature is None:
        raise SignatureError(f"{wanted}, found no signature.", hint="edgeprune compile --sign KEY")
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        kept = Path(folder) / SIGNATURE_NAME
        kept.write_text(signature)
        named = _named(signers, kept)
        if not named:
            raise SignatureError(
                f"{wanted}, found a signature by another key.", hint="sign with a listed key, or list the key"
            )
        for one in (signers, *_single_lines(signers, Path(folder))):
            for who in named if one == signers else _named(one, kept):
                arguments = ["verify", "-f", str(one), "-I", who, "-n", NAMESPACE, "-s", str(kept)]
                if _keygen(arguments, manifest).returncode == 0:
                    return who
    raise SignatureError(
        f"{wanted}, found a signature by {named[0]} that is not of this manifest.", hint="compile and sign again"
    )


def _named(signers: Path, signature: Path) -> list[str]:
    """Whom a list names for the key of a signature: of several lines with that key, those of the first."""
    found = _keygen(["find-principals", "-s", str(signature), "-f", str(signers)])
    return found.stdout.decode("utf-8", "replace").split("\n")[:-1] if found.returncode == 0 else []


def _single_lines(signers: Path, folder: Path) -> Iterator[Path]:
    """Each line of a list as one of its own: a key may be listed twice, first for another purpose or time."""
    for line in signers.read_bytes().splitlines():
        if line.strip() and not line.lstrip().startswith(b"#"):
            path = folder / "signers"
            path.write_bytes(line + b"\n")
            yield path


def signature_of(artifact: Artifact) -> str | None:
    """Text of an artifact's signature, or None."""
    path = artifact.folder / SIGNATURE_NAME
    return path.read_text(encoding="ascii", errors="replace") if path.is_file() else None


def require_signed(artifact: Artifact, signers: Path | None) -> str | None:
    """`require_signer` of an artifact; None where nobody asks for a signature."""
    if signers is None:
        return None
    # What was loaded, and is deployed; the file may be another one by now.
    text = artifact.manifest.canonical()
    return require_signer(text, signature_of(artifact), signers, what=f"artifact {artifact.folder}")


def _keygen(arguments: Sequence[str], content: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            ["ssh-keygen", "-Y", *arguments], input=content, capture_output=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"signatures need ssh-keygen on this machine, found: {error}.", hint="install OpenSSH's client"
        ) from error


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    return " ".join(done.stderr.decode("utf-8", "replace").split())[:200].rstrip(".") or f"exit code {done.returncode}"
