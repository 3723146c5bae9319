"""A journal of a measuring run: one JSON record per line, on disk before the next one is measured.

A run that is killed at any instant can be opened again: what was recorded is not measured twice, and a line that the
kill cut in half is dropped. A journal belongs to one request; a file that belongs to another is put aside, never mixed in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

logger = logging.getLogger("edgeprune.profiling")

SCHEMA = 1

Record = dict[str, Any]


def request_hash(request: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of what is measured and how."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Journal:
    """Append-only records of one request, kept in a file or, without a path, only in memory.

    Args:
        path: The file; made when missing, continued when it belongs to the same request, else renamed
            ``<name>.other-<n>`` and begun anew.
        request: What is measured and how (JSON-ready). Two requests are the same when these are equal.

    Attributes:
        records: What earlier runs of this request recorded, then what this one appends.
        resumed: How many records came from earlier runs.
    """

    def __init__(self, path: Path | None, request: Mapping[str, Any]) -> None:
        self.path = path
        self.request = request_hash(request)
        self.records: list[Record] = []
        self._file: IO[bytes] | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.records = self._recover(path)
            self._file = path.open("ab")
            if self._file.tell() == 0:
                self._write({"kind": "header", "schema": SCHEMA, "request": self.request})
                _sync_folder(path.parent)
        self.resumed = len(self.records)

    def append(self, record: Record) -> None:
        """Add one record; it is on disk when this returns.

        Raises:
            OSError: It cannot be written; what was recorded before stays, and a later run goes on from it.
        """
        self._write(record)
        self.records.append(record)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file is not None:
            # Every record was flushed: only one that could not be written is left, and that was told.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def discard(self) -> None:
        """Close the journal and delete its file: what it held is stored elsewhere now."""
        self.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, record: Record) -> None:
        if self._file is not None:
            # One write per line: a kill leaves at most one line without its end.
            try:
                self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:  # a full disk: which one must be told
                raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _recover(self, path: Path) -> list[Record]:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return []
        whole = content.rfind(b"\n") + 1
        records = _parse(content[:whole])
        if records and records[0] == {"kind": "header", "schema": SCHEMA, "request": self.request}:
            if whole < len(content):
                logger.info("dropped %d bytes of an unfinished record from %s", len(content) - whole, path)
                with path.open("r+b") as file:
                    file.truncate(whole)
            return records[1:]
        if not content[:whole]:
            # Killed while the header was written: nothing was measured.
            path.unlink()
            return []
        aside = _free_name(path)
        path.rename(aside)
        logger.warning("%s is a journal of another run or is damaged; it was moved to %s", path, aside)
        return []


def _parse(content: bytes) -> list[Record] | None:
    try:
        records = [json.loads(line) for line in content.splitlines()]
    except ValueError:
        return None
    return records if all(isinstance(record, dict) for record in records) else None


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.other-{number}")).exists():
        number += 1
    return aside


def _sync_folder(folder: Path) -> None:
    # Only some systems let a folder be opened; where they do not, the file's own sync is all there is.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
