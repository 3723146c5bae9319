"""The manifest of an artifact: what it holds, what it needs of a board, what it costs, and how exact it must be.

It is canonical JSON (keys sorted, no spaces, one line end), so equal contents are equal bytes, and the sha256 of the file is
the identity of the artifact: it covers every other file through its hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgeprune.errors import ManifestError
from edgeprune.spec import Precision

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.json.sig"

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)


def _relative_path(name: str) -> str:
    """A path that cannot leave its folder and means the same on every board."""
    if not all(_SEGMENT.fullmatch(segment) for segment in name.split("/")):
        raise ValueError(
            f"file name {name!r} must stay inside the artifact's folder: letters, digits, '.', '_', '-', parts joined by '/'"
        )
    if name in (MANIFEST_NAME, SIGNATURE_NAME):
        raise ValueError(f"file name {name!r} is the manifest's or its signature's own")
    return name


FileName = Annotated[str, AfterValidator(_relative_path)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PositiveMs = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveCount = Annotated[int, Field(gt=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Record):
    """Hash and size of one file."""

    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0)]


class PredictedCost(_Record):
    """What the predictor said before the engine was timed."""

    latency_ms: PositiveMs
    low_ms: PositiveMs | None = None
    high_ms: PositiveMs | None = None
    table: str | None = None
    """sha256 of the latency table."""
    threads: PositiveCount | None = None
    """Threads of the runtime that it holds for."""


class MeasuredCost(_Record):
    """What a board measured; a number without the board that it was measured on says nothing."""

    latency_ms: PositiveMs
    dense_ms: PositiveMs | None = None
    """The dense model, in the same rounds."""
    conditions: Annotated[str, Field(pattern=r"^(measured on|emulated|replayed)\b")]
    """E.g. ``"measured on local (AMD EPYC, 1 thread)"``."""
    threads: PositiveCount | None = None
    """Threads of the runtime that it was measured with."""


class SourceModel(_Record):
    """What the engine was made of."""

    weights_sha256: Sha256
    """See `edgeprune.deployment.weights.sha256_of_weights`."""
    seed: int
    """Of random golden inputs."""


class Tolerance(_Record):
    """How far outputs may be from the golden ones.

    Attributes:
        relative: Largest absolute difference, as a share of the output's scale (its largest golden magnitude).
        snr_db: Smallest signal-to-noise ratio over the golden samples, decibel.
    """

    relative: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    snr_db: Annotated[float, Field(allow_inf_nan=False)]


class TaskOutputs(_Record):
    """What one task of a network with several reads.

    Attributes:
        outputs: Names of its outputs in ``model.json``.
        tolerance: What parity demands of them; None: what it demands of all.
    """

    outputs: Annotated[list[str], Field(min_length=1)]
    tolerance: Tolerance | None = None


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(relative=1e-4, snr_db=80.0),
    "fp16": Tolerance(relative=2e-2, snr_db=45.0),
    "int8": Tolerance(relative=2e-1, snr_db=20.0),
}
"""Defaults per precision; 24, 11 and 8 bits of mantissa less what a deep network's sums lose."""


class Manifest(_Record):
    """Everything that a board, or a person a year later, must know of an artifact.

    Attributes:
        schema_version: Version of this format.
        name: What a person calls the model.
        backend: Name of the backend whose runtime executes the engine.
        engine: File name of the engine.
        precision: Arithmetic precision of the engine.
        files: Every other file of the folder: name to hash and size.
        requires: What a board must have; `edgeprune.backends` and `edgeprune.deployment.preflight` read it.
        tolerance: What the parity check on a board demands.
        tasks: By task the outputs that it reads, and what parity demands of them, where there are several tasks.
        quantization: Of an int8 engine: how many layers it has, and which stay in float.
        metrics: Of an int8 engine: by objective of its task the metric of the module, of the engine on the compiling host, and
            the worst that was acceptable.
        host_parity: What the check on the compiling host found, as `edgeprune.deployment.agreement.Parity` states it; empty where
            that host cannot run the engine.
        export_parity: Then the same of the exported model, as far as `edgeprune.deployment.host_check.export_parity` states it.
        versions: Of edgeprune and of everything that made the engine.
        plan_hash: Hash of the pruning plan, None for a dense model.
        source: The weights that it was made of; None in artifacts of versions that did not say so.
        predicted: Predicted cost, where there was a predictor.
        measured: Measured cost, where it was measured before.
        created: UTC time, ``YYYY-MM-DDTHH:MM:SSZ``; honors ``SOURCE_DATE_EPOCH``.
    """

    schema_version: int = SCHEMA_VERSION
    name: Annotated[str, Field(min_length=1, max_length=200)]
    backend: Annotated[str, Field(min_length=1)]
    engine: FileName
    precision: Precision
    files: dict[FileName, FileEntry]
    requires: dict[str, Any]
    tolerance: Tolerance
    tasks: dict[str, TaskOutputs] = Field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    metrics: dict[str, dict[str, float]] = Field(default_factory=dict)
    host_parity: dict[str, Any]
    export_parity: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str]
    plan_hash: str | None = None
    source: SourceModel | None = None
    predicted: PredictedCost | None = None
    measured: MeasuredCost | None = None
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]

    @model_validator(mode="after")
    def _engine_is_a_file(self) -> Manifest:
        if self.engine not in self.files:
            raise ValueError(f"the engine {self.engine!r} must be one of the files")
        for name in self.files:
            if any(other.startswith(f"{name}/") for other in self.files):
                raise ValueError(f"{name!r} cannot be both a file and a folder")
        return self

    @property
    def threads(self) -> int | None:
        """Threads of the runtime that its latency was measured or predicted for; None where nothing says so."""
        costs = (self.measured, self.predicted)
        return next((cost.threads for cost in costs if cost is not None and cost.threads is not None), None)

    def tolerance_of(self, output: str) -> Tolerance:
        """What parity demands of an output: that of the tasks that read it, the strictest where they are several."""
        own = [one.tolerance or self.tolerance for one in self.tasks.values() if output in one.outputs] or [
            self.tolerance
        ]
        return Tolerance(relative=min(one.relative for one in own), snr_db=max(one.snr_db for one in own))

    def canonical(self) -> bytes:
        """The bytes of ``manifest.json``; what an artifact does not have is left out, as by versions that did not know it."""
        fields = self.model_dump(mode="json")
        for name in ("tasks", "quantization", "metrics", "source", "export_parity"):
            if not fields[name]:
                del fields[name]
        for cost in (fields["predicted"], fields["measured"]):
            if cost is not None and cost["threads"] is None:
                del cost["threads"]
        return canonical_json(fields)

    @property
    def id(self) -> str:
        """sha256 of `canonical`, hexadecimal: the artifact's identity."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @classmethod
    def parse(cls, text: bytes, source: str) -> Manifest:
        """Read the bytes of a ``manifest.json``.

        Args:
            text: The file's bytes.
            source: What errors call it.

        Raises:
            ManifestError: It is no manifest, one of a newer edgeprune, or not canonical.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise ManifestError(f"{source} must be JSON, found {text[:40]!r}.") from error
        if not isinstance(fields, dict) or not isinstance(fields.get("schema_version"), int):
            raise ManifestError(f"{source} must be a manifest with a schema_version, found {text[:40]!r}.")
        if fields["schema_version"] > SCHEMA_VERSION:
            raise ManifestError(
                f"{source} must have schema_version {SCHEMA_VERSION} or older, found {fields['schema_version']}.",
                hint="a newer edgeprune, or compile the artifact again with this one",
            )
        try:
            manifest = cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ManifestError(f"{source} must be a valid manifest, found {where}: {first['msg']}.") from error
        if manifest.canonical() != text:
            raise ManifestError(
                f"{source} must be canonical JSON as edgeprune writes it, found other bytes for the same content."
            )
        return manifest


def canonical_json(value: Any) -> bytes:
    """Equal values give equal bytes: keys sorted, no spaces, UTF-8, one line end; NaN and infinities are refused."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return f"{text}\n".encode()
