"""Which release a board has: from trtexec's first line, as its releases print it."""

import pytest

from edgeprune.backends.tensorrt import versions
from edgeprune.backends.tensorrt.versions import Version
from edgeprune.errors import IncompatibleTargetError


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8601] # trtexec --help", Version(8, 6, 1)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec", Version(8, 5, 2)),
        (
            "&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # /usr/src/tensorrt/bin/trtexec --onnx=a",
            Version(10, 3, 0),
        ),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v101303] # trtexec", Version(10, 13, 3)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v110100] [b106] # trtexec --help", Version(11, 1, 0)),
        ("&&&& RUNNING TensorRT.trtexec # /workspace/tensorrt/bin/trtexec", None),
        ("", None),
    ],
)
def test_the_first_line_tells_the_release(line, version):
    assert versions.of_log(f"{line}\n[I] === Model Options ===\n") == version


def test_text_and_version_agree():
    assert versions.parse(str(Version(10, 3, 0))) == Version(10, 3, 0)
    assert versions.parse("10.3.0.26-1+cuda12.5") == Version(10, 3, 0)
    assert versions.parse("8") == Version(8, 0, 0)
    assert versions.parse("unknown") == Version(0, 0, 0)


@pytest.mark.parametrize(
    ("version", "opset", "ir_version"),
    [(Version(8, 6, 1), 17, 8), (Version(10, 3, 0), 20, 9), (Version(10, 16), 20, 9), (Version(11, 1), 25, 9)],
)
def test_opset_and_ir_version_follow_the_release(version, opset, ir_version):
    family = versions.dialect(version)
    assert (family.opset, family.ir_version) == (opset, ir_version)


def test_releases_without_a_dla_are_told_apart():
    for version in (Version(8, 6, 1), Version(10, 3, 0), Version(10, 7, 2), Version(11, 4, 1), Version(11, 5)):
        versions.require_dla(version)
    for version in (Version(10, 8), Version(10, 16, 2), Version(11, 1, 0), Version(11, 4, 0)):
        with pytest.raises(IncompatibleTargetError, match=r"up to 10\.7 or from 11\.4\.1") as caught:
            versions.require_dla(version)
        assert caught.value.found == str(version)


@pytest.mark.parametrize("version", [Version(7, 1, 3), Version(8, 5, 2), Version(9, 2), Version(12, 0)])
def test_a_release_whose_options_are_not_known_is_refused(version):
    with pytest.raises(IncompatibleTargetError) as caught:
        versions.dialect(version)
    assert caught.value.found == str(version)
    assert caught.value.hint
