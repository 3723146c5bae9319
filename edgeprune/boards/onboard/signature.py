"""Signatures of manifests by ``ssh-keygen -Y``, checked where the release is put together. Python >= 3.6, stdlib only.

A board that has ``<root>/allowed_signers`` (the format is that of ssh-keygen's manual, section ALLOWED SIGNERS) takes no release
that none of them has signed. The signature covers the manifest, and the manifest every other file by its hash.
"""

import itertools
import os
import subprocess
import tempfile

from failures import Failure

NAME = "manifest.json.sig"
SIGNERS = "allowed_signers"
NAMESPACE = "edgeprune"

_LIMIT_S = 30.0


def signers_of(root):
    """The board's list of signers, or None."""
    path = os.path.join(root, SIGNERS)
    return path if os.path.lexists(path) else None


def require(root, manifest, signature):
    """Refuse what none of the board's signers has signed; without a list everything passes.

    Args:
        manifest: Path of the manifest.
        signature: Path of its signature; it need not exist.

    Returns:
        Who signed it, or None where the board has no list.

    Raises:
        Failure: SignatureError.
    """
    signers = signers_of(root)
    if signers is None:
        return None
    if not os.path.isfile(signature):
        raise _refusal("none", "edgeprune compile --sign KEY, then deploy again")
    named = _named(signers, signature)
    if not named:
        raise _refusal("one of a key that is not in %s" % signers, "sign with a key that is, or add the key to it")
    with open(manifest, "rb") as stream:
        text = stream.read()
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        for one in itertools.chain([signers], _single_lines(signers, folder)):
            for who in named if one == signers else _named(one, signature):
                if _keygen(["verify", "-f", one, "-I", who, "-n", NAMESPACE, "-s", signature], text) is not None:
                    return who
    raise _refusal("one by %s of something else" % named[0], "compile and sign again")


def _named(signers, signature):
    """Whom a list names for the key of a signature: of several lines with that key, those of the first."""
    found = _keygen(["find-principals", "-s", signature, "-f", signers], None)
    return [name.strip() for name in (found or "").split("\n") if name.strip()]


def _single_lines(signers, folder):
    """Each line of a list as one of its own: a key may be listed twice, first for another purpose or time."""
    with open(signers, "rb") as file:
        lines = file.read().splitlines()
    for line in lines:
        if line.strip() and not line.lstrip().startswith(b"#"):
            path = os.path.join(folder, SIGNERS)
            with open(path, "wb") as file:
                file.write(line + b"\n")
            yield path


def _keygen(arguments, content):
    """Standard output of ``ssh-keygen -Y``, or None where it refuses."""
    try:
        done = subprocess.run(
            ["ssh-keygen", "-Y"] + arguments,
            input=content if content is not None else b"",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failure(
            "SignatureError",
            "the board must be able to check signatures, found that ssh-keygen does not run there (%s)." % error,
            "install OpenSSH's client there (8.1 or newer), or remove its %s and have hosts check: device add --signers" % SIGNERS,
        )
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def _refusal(found, hint):
    return Failure("SignatureError", "the release must have a signature by one of the board's signers, found %s." % found, hint)
