"""Report data as a JSON file, so that the page can be made again later, with what was measured since."""

from __future__ import annotations

import json
from pathlib import Path

from edgeprune.errors import ConfigError
from edgeprune.files import write_text
from edgeprune.report.data import ReportData

SCHEMA = 1
FILE_NAME = "report.json"


def save(data: ReportData, path: Path) -> Path:
    """Write report data, whole or not at all; returns `path`."""
    from pydantic import TypeAdapter

    document = {"schema": SCHEMA, "report": TypeAdapter(ReportData).dump_python(data, mode="json")}
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def load(path: Path) -> ReportData:
    """Read report data.

    Raises:
        ConfigError: The file is missing, damaged, or of another schema.
    """
    from pydantic import TypeAdapter, ValidationError

    if not path.is_file():
        raise ConfigError(f"a report needs {FILE_NAME} of a pruning run, there is no {path}.", hint="edgeprune prune")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ConfigError(f"{path} must have schema {SCHEMA}, found {document['schema']!r}.")
        return TypeAdapter(ReportData).validate_python(document["report"])
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} must hold report data, found something else.", hint="edgeprune prune") from error
