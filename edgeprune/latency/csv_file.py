"""The text of a CSV file: which columns it has, and its rows, each with the line at which an editor shows it."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TextIO

from edgeprune.errors import ConfigError, TableFileMissingError, TableFormatError
from edgeprune.near_files import near_files

AGAIN = "the path, or the file written anew by the program that it comes from"


class CsvFile(NamedTuple):
    """A file that was read.

    Attributes:
        name: Without its folder.
        digest: SHA-256 of its bytes (of the text as UTF-8, where there are no bytes).
        text: All of it.
        delimiter: What stands between two cells.
        columns: Names, in order.
    """

    name: str
    digest: str
    text: str
    delimiter: str
    columns: tuple[str, ...]

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Line from 1 and cells of every row below the names of the columns; blank lines are none.

        Raises:
            TableFormatError: A line is not CSV.
        """
        rows = _rows(self.text, self.delimiter, self.name)
        next(rows, None)
        return rows

    def named(self, cells: list[str], place: str) -> Mapping[str, str]:
        """Column to cell of one row.

        Raises:
            TableFormatError: There are more or fewer cells than columns, so which is which cannot be told.
        """
        if len(cells) == len(self.columns):
            return dict(zip(self.columns, cells, strict=True))
        left_out = "skip_invalid=True leaves such rows out, and counts them"
        split = len(cells) > len(self.columns) and self.delimiter == ","
        raise TableFormatError(
            f"{place}: a row must have as many cells as there are columns, {len(self.columns)}, found {len(cells)}.",
            hint=f"decimal points where there are decimal commas, for these split a cell in two; or {left_out}"
            if split
            else left_out,
        )


def opened(source: str | Path | TextIO) -> CsvFile:
    """Read a file and the names of its columns.

    Raises:
        TableFileMissingError: There is no such file.
        TableFormatError: It is no UTF-8 text, or empty.
        ConfigError: It was opened for bytes.
    """
    name, text, digest = _content(source)
    text = text.removeprefix("\ufeff")
    try:
        delimiter = csv.Sniffer().sniff(text.lstrip().partition("\n")[0][:4096], delimiters=",;\t").delimiter
    except csv.Error:
        delimiter = ","
    _, names = next(_rows(text, delimiter, name), (0, []))
    columns = tuple(column.strip() for column in names)
    if not any(columns):
        raise TableFormatError(
            f"{name} must hold a line of column names and rows below it, found an empty file.", hint=AGAIN
        )
    return CsvFile(name, digest, text, delimiter, columns)


def _rows(text: str, delimiter: str, name: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=delimiter, skipinitialspace=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            # A cell in quotes may go over several lines: its row is where it begins.
            line = reader.line_num + 1
    except csv.Error as error:
        raise TableFormatError(
            f"{name} must be a CSV file, found line {reader.line_num} that is not ({error}).", hint=AGAIN
        ) from error


def _content(source: str | Path | TextIO) -> tuple[str, str, str]:
    """Name, text, SHA-256."""
    if hasattr(source, "read"):
        text = source.read()
        if not isinstance(text, str):
            raise ConfigError(
                "a file to import must be open as text, found one of bytes.", hint='open(path, newline="")'
            )
        label = getattr(source, "name", None)
        name = Path(label).name if isinstance(label, str) else "the given file"
        return name, text, hashlib.sha256(text.encode()).hexdigest()
    path = Path(source)
    if not path.is_file():
        raise TableFileMissingError(
            f"there must be a CSV file at {path}, found no such file.", hint=near_files(path, ".csv", ".tsv", ".txt")
        )
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
        hint = f"iconv -f {'UTF-16' if wide else 'LATIN1'} -t UTF-8 {path.name} > utf8.csv"
        if b"\0" in content and not wide:  # a workbook, an archive
            hint = "the file saved as CSV by the program that it comes from"
        raise TableFormatError(
            f"a table to import must be UTF-8 text, found {path} ({error.reason}).", hint=hint
        ) from error
    return path.name, text, hashlib.sha256(content).hexdigest()
