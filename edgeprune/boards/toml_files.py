"""Reading a TOML file against a schema, with errors that name the file, the line or the key, and the rule."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from edgeprune.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Schema = TypeVar("Schema", bound=BaseModel)


def read_toml(path: Path, schema: type[Schema], error_class: type[ConfigError], *, hint: str | None = None) -> Schema:
    """Read and validate one file.

    Raises:
        ConfigError: As `error_class`: the file cannot be read, is not TOML (with the line), or breaks a rule (with the
            key and what was found there).
    """
    try:
        content = path.read_bytes().decode("utf-8")
        return schema.model_validate(tomllib.loads(content))
    except OSError as error:
        raise error_class(f"{path} must be a readable file, found: {error.strerror}.", hint=hint) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise error_class(f"{path} must be UTF-8 text, found other bytes in line {line}.", hint=hint) from error
    except tomllib.TOMLDecodeError as error:
        raise error_class(f"{path} must be valid TOML, found: {error}.", hint=hint) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        found = "" if first["type"] == "missing" else f", found {first['input']!r}"
        rule = first["msg"].removeprefix("Value error, ")
        raise error_class(f"{path}: {key} breaks a rule ({rule}){found}.", hint=hint) from error
