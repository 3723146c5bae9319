"""What trtexec is told: every option must be in the stand-in's list of that very release, which is not ours."""

import json
from pathlib import Path

import pytest

from edgeprune.backends.tensorrt import flags
from edgeprune.backends.tensorrt.flags import BuildOptions
from edgeprune.backends.tensorrt.versions import Version
from edgeprune.errors import CompileError, ConfigError
from edgeprune.testing import trtexec

OPTIONS = json.loads(Path(trtexec.__file__).with_name("trtexec_options.json").read_text(encoding="utf-8"))
RELEASES = [Version(8, 6, 1), Version(10, 3, 0), Version(11, 1, 0)]
WAYS = [
    BuildOptions(),
    BuildOptions("fp16"),
    BuildOptions("fp16", dla_core=1),
    BuildOptions("fp32", workspace_mib=512),
    BuildOptions("int8"),
]
# What the words meant before TensorRT 11, and do nothing since (v11.1, InferenceOptions::parse).
DEPRECATED = {"--useCudaGraph", "--noDataTransfers", "--useSpinWait", "--separateProfileRun"}


def words(version, options):
    return [
        *flags.build(version, options, onnx="a.onnx", engine="a.plan", layers="l.json", cache="t.cache"),
        *flags.time(version, options, engine="a.plan", profile="p.json", times="t.json"),
    ]


@pytest.mark.parametrize("version", RELEASES, ids=str)
@pytest.mark.parametrize("options", WAYS, ids=["fp32", "fp16", "dla", "workspace", "int8"])
def test_every_option_is_one_of_that_release_in_its_form(version, options):
    kinds = {name: kind for kind, names in OPTIONS[str(version)]["options"].items() for name in names}
    for word in words(version, options):
        name, equals, value = word.partition("=")
        assert name in kinds, f"{name} is no option of TensorRT {version}"
        assert bool(equals and value) == (kinds[name] != "flag"), word


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_precision_is_asked_for_until_types_come_from_the_graph(precision):
    for version in RELEASES:
        asked = {"--fp16", "--int8"} & set(words(version, BuildOptions(precision)))
        assert asked == ({f"--{precision}"} if version.major < 11 else set())
        assert not {"--fp16", "--int8"} & set(words(version, BuildOptions("fp32")))


def test_what_is_fp32_does_without_tf32():
    for version in RELEASES:
        assert "--noTF32" in words(version, BuildOptions("fp32"))
        assert "--noTF32" in words(version, BuildOptions("int8"))
        assert "--noTF32" not in words(version, BuildOptions("fp16"))


def test_every_release_times_the_same_thing():
    for version in RELEASES:
        found = set(flags.time(version, BuildOptions(), engine="e", profile="p", times="t"))
        assert found & DEPRECATED == (DEPRECATED if version.major < 11 else set())
        assert not found & {"--includeDataTransfers", "--noSpinWait", "--noCudaGraph"}


def test_a_dla_has_no_cuda_graph_and_falls_back_to_the_gpu():
    for version in RELEASES:
        found = words(version, BuildOptions("fp16", dla_core=1))
        assert found.count("--useDLACore=1") == found.count("--allowGPUFallback") == 2
        assert "--useCudaGraph" not in found
        assert ("--noCudaGraph" in found) == (version.major == 11)


def test_a_dla_in_int8_gets_a_table_of_scales_and_layers_that_stay_in_fp16():
    for version in RELEASES[:2]:
        kinds = {name: kind for kind, names in OPTIONS[str(version)]["options"].items() for name in names}
        found = flags.build(
            version,
            BuildOptions("int8", dla_core=0),
            onnx="a.onnx",
            engine="a.plan",
            layers="l.json",
            cache="t.cache",
            scales="s.table",
            exact=["node_conv2d", "node_linear_1"],
        )
        assert {word.partition("=")[0] for word in found} <= set(kinds)
        assert {"--int8", "--fp16", "--calib=s.table", "--precisionConstraints=prefer"} <= set(found)
        assert "--layerPrecisions=node_conv2d:fp16,node_linear_1:fp16" in found
    with pytest.raises(CompileError, match="found 'a,b'"):
        flags.build(
            RELEASES[0],
            BuildOptions("int8", dla_core=0),
            onnx="a.onnx",
            engine="a.plan",
            layers="l.json",
            cache="t.cache",
            scales="s.table",
            exact=["a,b"],
        )


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"precision": "int4"}, "int4"),
        ({"precision": "fp32", "dla_core": 0}, "fp32"),
        ({"precision": "fp16", "dla_core": -1}, "-1"),
        ({"workspace_mib": 0}, "0"),
    ],
)
def test_contradictions_are_one_sentence(given, named):
    with pytest.raises(ConfigError) as caught:
        BuildOptions(**given)
    assert named in caught.value.message
