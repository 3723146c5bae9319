"""Whether a release on the board is still what its manifest says. Python >= 3.6, stdlib only; reads only."""

import os

import release_files
import releases
import signature


def main(request, emit):
    """Verb ``verify``.

    Request: ``release`` (``"current"``, ``"previous"`` or a folder). Result: ``folder``, ``damaged`` (names of files that are
    missing, altered, extra, or no plain files), ``manifest`` and ``signature`` (texts; None where there is none), ``signer`` (who
    signed it, by the board's own list; None without one).
    """
    root = request["root"]
    path = os.path.realpath(releases.resolve(root, request["release"]))
    damaged = release_files.damaged(path)
    text = release_files.manifest(path)[0]
    signed = os.path.join(path, signature.NAME)
    signer = None
    if not damaged:
        signer = signature.require(root, os.path.join(path, release_files.MANIFEST), signed)
    return {
        "folder": os.path.basename(path),
        "damaged": damaged,
        "manifest": text.decode("utf-8"),
        "signature": _text(signed),
        "signer": signer,
    }


def _text(path):
    try:
        with open(path, "rb") as stream:
            return stream.read(65536).decode("ascii", "replace")
    except OSError:
        return None
