"""Unpacking a wheel into a virtual environment, every file checked against the wheel's own list. Python >= 3.6, stdlib only.

Boards often have no pip, no ``venv`` with ``ensurepip`` and no network; a wheel needs none of them.

Source: the binary distribution format, packaging.python.org/specifications/binary-distribution-format.
"""

import base64
import csv
import hashlib
import io
import os
import re
import zipfile
import zlib

from failures import Failure

UNLISTED = re.compile(r"[^/]+\.dist-info/RECORD(\.jws|\.p7s)?$")
_CHUNK_BYTES = 1 << 20


def unpack(path, name, target, site):
    """Unpack one wheel.

    Args:
        path: The file.
        name: What errors call it.
        target: Root folder of the environment, for scripts and data.
        site: Its ``site-packages``.

    Returns:
        Bytes that were written.

    Raises:
        Failure: TransferError when the file is no wheel, holds a path that leaves the environment, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _unpack(archive, name, target, site)
    except (zipfile.BadZipfile, zlib.error, EOFError, KeyError, RuntimeError, csv.Error, ValueError) as error:
        # A KeyError: no RECORD; a RuntimeError: it is encrypted, or compressed in a way that this Python does not know.
        raise _refusal(name, "be a whole wheel", str(error.args[0] if error.args else error))


def _unpack(archive, name, target, site):
    infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
    described = [info.filename for info in infos if re.match(r"[^/]+\.dist-info/WHEEL$", info.filename)]
    if len(described) != 1:
        raise _refusal(name, "describe itself in one .dist-info folder", "%d" % len(described))
    told = archive.read(described[0]).decode("utf-8")
    version = re.search(r"^Wheel-Version:\s*(\d+)\.", told, re.M)
    if version is None or version.group(1) != "1":
        raise _refusal(name, "have version 1 of the format", version.group(1) if version else "none")
    hashes = _hashes(archive, described[0].rpartition("/")[0])
    folders = {"purelib": site, "platlib": site, "data": target, "scripts": os.path.join(target, "bin")}
    folders["headers"] = os.path.join(target, "include", name.split("-")[0])
    written = 0
    for info in infos:
        place = _place(info.filename, name, site, folders)
        listed = hashes.get(info.filename)
        if listed is None and not UNLISTED.match(info.filename):
            raise _refusal(name, "list all of its files", "%s unlisted" % info.filename)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        # An earlier wheel may hold the same name; a link or a running library must not be written through.
        if os.path.lexists(place):
            os.unlink(place)
        written += _write(archive, info, place, listed, name)
        script = os.path.dirname(place) == folders["scripts"]
        os.chmod(place, 0o755 if script or (info.external_attr >> 16) & 0o111 else 0o644)
    return written


def _hashes(archive, dist_info):
    """File to (algorithm, digest) as the wheel lists them."""
    text = archive.read(dist_info + "/RECORD").decode("utf-8")
    found = {}
    for row in csv.reader(io.StringIO(text)):
        if len(row) >= 2 and row[1]:
            algorithm, _, digest = row[1].partition("=")
            found[row[0]] = (algorithm, digest)
    return found


def _place(filename, name, site, folders):
    """Absolute path of one file of the wheel."""
    parts = filename.split("/")
    if "\\" in filename or "\0" in filename or any(part in ("", ".", "..") for part in parts):
        raise _refusal(name, "keep its files inside the environment", "%r" % filename)
    if parts[0].endswith(".data") and len(parts) > 2:
        if parts[1] not in folders:
            raise _refusal(name, "use the folders %s for its data" % ", ".join(sorted(folders)), parts[1])
        return os.path.join(folders[parts[1]], *parts[2:])
    return os.path.join(site, *parts)


def _write(archive, info, place, listed, name):
    """Write one file while it is hashed; its size."""
    if listed is not None and listed[0] not in ("sha256", "sha384", "sha512"):
        raise _refusal(name, "hash its files with SHA-2", listed[0])
    digest = hashlib.new(listed[0]) if listed is not None else None
    size = 0
    with archive.open(info) as reader, open(place, "wb") as writer:
        for chunk in iter(lambda: reader.read(_CHUNK_BYTES), b""):
            size += len(chunk)
            writer.write(chunk)
            if digest is not None:
                digest.update(chunk)
    if digest is not None:
        found = base64.urlsafe_b64encode(digest.digest()).decode("ascii").rstrip("=")
        if found != listed[1].rstrip("="):
            raise _refusal(name, "hold %s as it lists it" % info.filename, "other content")
    return size


def _refusal(name, must, found):
    return Failure(
        "TransferError",
        "wheel %s must %s, found %s." % (name, must, found),
        "set the board up again; if it fails again, look at the package index that the wheel came from",
    )
