"""A latency table as a Parquet file: the header is JSON in the schema's metadata, the content carries its own hash."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import TableFileMissingError, TableFormatError
from edgeprune.files import replacing
from edgeprune.latency.table_rows import COLUMNS, OPTIONAL, Row
from edgeprune.near_files import near_files

if TYPE_CHECKING:
    import pyarrow

HEADER_KEY, HASH_KEY = b"edgeprune.latency_table", b"edgeprune.sha256"


def write(path: Path, header: Mapping[str, Any], rows: Sequence[Row], digest: str) -> None:
    """Write a table so that `path` holds either its former content or all of the new one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {HEADER_KEY: json.dumps(header, sort_keys=True, allow_nan=False).encode(), HASH_KEY: digest.encode()}
    schema = _schema().with_metadata(metadata)
    table = pa.Table.from_pydict({name: [row[name] for row in rows] for name in COLUMNS}, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft, draft.open("wb") as stream:
        pq.write_table(table, stream, compression="zstd", write_page_checksum=True)


def read(path: Path) -> tuple[dict[str, Any], list[Row], str]:
    """Header, rows and stored hash of a file; rows are typed but not yet checked against each other.

    Raises:
        TableFileMissingError: There is no such file.
        TableFormatError: It is not a latency table, or it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise TableFileMissingError(
            f"there must be a latency table at {path}, found no such file.",
            hint=near_files(path, ".parquet", otherwise="edgeprune profile MODEL --board NAME for a new one"),
        )
    try:
        # All on this thread: where a worker of Arrow's gives up its hold on a Python file while the interpreter ends, the
        # process aborts (https://github.com/apache/arrow/issues/34314).
        with (
            path.open("rb") as stream,
            pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False) as file,
        ):
            schema = file.schema_arrow
            metadata = dict(schema.metadata or {})
            if HEADER_KEY in metadata:
                _check_columns(schema, path)
                header = json.loads(metadata[HEADER_KEY])
                rows = file.read(use_threads=False).to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        if isinstance(error, TableFormatError):
            raise
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise TableFormatError(
            f"a latency table must be a whole Parquet file written by edgeprune, found {path} ({reason}).",
            hint="copy it again, or edgeprune profile",
        ) from error
    if HEADER_KEY not in metadata:
        raise TableFormatError(f"a latency table must carry edgeprune's header, found a foreign Parquet file {path}.")
    return header, rows, metadata.get(HASH_KEY, b"").decode("ascii", "replace")


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    numbers = pa.list_(pa.float64())
    types = {"text": pa.string(), "number": pa.float64(), "numbers": numbers, "samples": numbers, "count": pa.int64()}
    return pa.schema([pa.field(name, types[kind], nullable=False) for name, kind in COLUMNS.items()])


def _check_columns(schema: pyarrow.Schema, path: Path) -> None:
    import pyarrow.types as types

    missing = [name for name in COLUMNS if name not in schema.names and name not in OPTIONAL]
    unknown = [name for name in schema.names if name not in COLUMNS]
    if missing or unknown:
        found = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(unknown)}"
        raise TableFormatError(f"latency table {path} must have the columns {', '.join(COLUMNS)}; {found}.")
    accepted = {
        "text": lambda t: types.is_string(t) or types.is_large_string(t),
        "number": types.is_float64,
        "numbers": _are_numbers,
        "samples": _are_numbers,
        "count": types.is_int64,
    }
    for name, kind in COLUMNS.items():
        if name not in schema.names:
            continue
        found_type = schema.field(name).type
        if not accepted[kind](found_type):
            raise TableFormatError(
                f"column {name} of latency table {path} must hold {_TYPE_NAMES[kind]}, found {found_type}."
            )


def _are_numbers(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    return bool((types.is_list(kind) or types.is_large_list(kind)) and types.is_float64(kind.value_type))


_TYPE_NAMES = {
    "text": "text",
    "number": "64-bit floats",
    "numbers": "lists of 64-bit floats",
    "samples": "lists of 64-bit floats",
    "count": "64-bit integers",
}
