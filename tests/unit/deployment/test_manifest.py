import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.deployment.manifest import TOLERANCES, FileEntry, Manifest, MeasuredCost, PredictedCost, canonical_json
from edgeprune.errors import ManifestError


def manifest(**changes):
    fields = {
        "name": "net",
        "backend": "onnxruntime",
        "engine": "engine.onnx",
        "precision": "fp32",
        "files": {"engine.onnx": FileEntry(sha256="a" * 64, size_bytes=3)},
        "requires": {"runtime": "onnxruntime", "opset": 18},
        "tolerance": TOLERANCES["fp32"],
        "host_parity": {},
        "versions": {"edgeprune": "0.1.0"},
        "created": "2026-01-02T03:04:05Z",
    }
    return Manifest(**{**fields, **changes})


def test_canonical_bytes_survive_a_round_trip_and_the_id_is_their_hash():
    one = manifest(
        name="größe",
        predicted=PredictedCost(latency_ms=1.5, low_ms=1.25, high_ms=2.0, table="t"),
        measured=MeasuredCost(latency_ms=1.6, dense_ms=3.0, conditions="measured on local"),
        plan_hash="p",
    )
    text = one.canonical()
    assert text.endswith(b"\n")
    assert text.count(b"\n") == 1
    assert b": " not in text
    again = Manifest.parse(text, "manifest.json")
    assert again == one
    assert again.id == one.id


def test_id_does_not_depend_on_the_order_of_fields():
    assert manifest(requires={"a": 1, "b": 2}).id == manifest(requires={"b": 2, "a": 1}).id
    assert manifest(requires={"a": 1}).id != manifest(requires={"a": 2}).id


@given(
    st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.integers())
)
def test_canonical_json_is_a_function_of_the_value(value):
    shuffled = dict(sorted(value.items(), reverse=True))
    assert canonical_json(value) == canonical_json(shuffled)
    assert json.loads(canonical_json(value)) == value


def test_json_that_is_not_canonical_is_refused():
    text = json.dumps(json.loads(manifest().canonical()), indent=1).encode()
    with pytest.raises(ManifestError, match=r"x/manifest\.json must be canonical JSON"):
        Manifest.parse(text, "x/manifest.json")


def test_newer_schema_is_named():
    fields = json.loads(manifest().canonical())
    fields["schema_version"] = 99
    with pytest.raises(ManifestError, match="must have schema_version 1 or older, found 99") as caught:
        Manifest.parse(canonical_json(fields), "manifest.json")
    assert "newer edgeprune" in caught.value.hint


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"schema_version":"1"}', b"\xff\xfe", b"null"])
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(ManifestError, match=r"^manifest\.json must be"):
        Manifest.parse(text, "manifest.json")


def test_unknown_field_is_named():
    fields = json.loads(manifest().canonical())
    fields["surprise"] = 1
    with pytest.raises(ManifestError, match="found surprise"):
        Manifest.parse(canonical_json(fields), "manifest.json")


@pytest.mark.parametrize(
    "name",
    ["../engine", "/engine", "a/../b", "a//b", "", ".", "..", "a\\b", "a b", "a\nb", "$(id)", "-rf", "manifest.json"],
)
def test_file_name_that_could_leave_the_folder_is_refused(name):
    with pytest.raises(ValueError, match="file name"):
        manifest(files={name: FileEntry(sha256="a" * 64, size_bytes=1)}, engine="engine.onnx")


def test_engine_must_be_among_the_files():
    with pytest.raises(ValueError, match=r"the engine 'other\.onnx' must be one of the files"):
        manifest(engine="other.onnx")


def test_measured_cost_must_say_where_it_was_measured():
    with pytest.raises(ValueError, match="conditions"):
        MeasuredCost(latency_ms=1.0, conditions="fast")
