"""A predictor's file: its settings as JSON, beside the table that it is fitted to anew."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import ConfigError, TableFileMissingError, TableFormatError, TableMismatchError
from edgeprune.files import write_text
from edgeprune.latency.predictor import FitSettings
from edgeprune.latency.table import LatencyTable
from edgeprune.near_files import near_files

if TYPE_CHECKING:
    from edgeprune.latency.predictor import Predictor

logger = logging.getLogger("edgeprune.latency")

SCHEMA = 1


def write(predictor: Predictor, path: Path) -> Path:
    """See `Predictor.save`."""
    import sklearn

    if path.suffix != ".json":
        raise ConfigError(
            f"predictor settings must be a .json file, found {path}.", hint=f"{path.with_suffix('.json')}"
        )
    table = predictor.table.save(path.with_suffix(".parquet"))
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "table": table.name,
        "table_hash": predictor.table_hash,
        "settings": asdict(predictor.settings),
        "scikit_learn": sklearn.__version__,
    }
    if predictor.source is not None:
        document["source"] = write(predictor.source, path.with_suffix(".source.json")).name
    write_text(path, json.dumps(document, indent=2, sort_keys=True) + "\n")
    return path


def require_settings(path: Path) -> None:
    """See that there is a file.

    Raises:
        TableFileMissingError: There is none.
    """
    if not path.is_file():
        raise TableFileMissingError(
            f"there must be a predictor at {path}, found no file.",
            hint=near_files(path, ".json", otherwise="edgeprune fit"),
        )


def read(path: Path) -> Predictor:
    """See `Predictor.load`."""
    import sklearn

    from edgeprune.latency.fitting import fit_with

    require_settings(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        settings = FitSettings(**document["settings"])
        name, digest = str(document["table"]), str(document["table_hash"])
        lender = None if document.get("source") is None else path.parent / str(document["source"])
    except (ValueError, KeyError, TypeError) as error:
        raise TableFormatError(
            f"a predictor must be JSON written by Predictor.save, found {path} ({error}).", hint="edgeprune fit"
        ) from error
    if document.get("schema") != SCHEMA or settings.method != FitSettings.method:
        raise TableFormatError(
            f"predictor {path} must have schema {SCHEMA} and method {FitSettings.method}, found "
            f"{document.get('schema')!r} and {settings.method!r}.",
            hint="edgeprune fit",
        )
    table = LatencyTable.load(path.parent / name)
    if table.hash != digest:
        raise TableMismatchError(
            f"predictor {path} must stand beside the table it was fitted to ({digest[:12]}), found {table.hash[:12]}.",
            hint="edgeprune fit",
        )
    if document.get("scikit_learn") != sklearn.__version__:
        logger.info("fitted with scikit-learn %s, now %s", document.get("scikit_learn"), sklearn.__version__)
    return fit_with(table, settings, None if lender is None else read(lender))
