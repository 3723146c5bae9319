"""Parsers of trtexec's exports: on recorded ones (see tests/data), and on damaged ones."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.backends.tensorrt import exports
from edgeprune.backends.tensorrt.exports import Layer, LayerTime, Profile
from edgeprune.backends.tensorrt.kernels import timed_kernels
from edgeprune.errors import BackendError

READERS = [exports.read_layers, exports.read_profile, exports.read_times]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["Name", "LayerType", "Inputs", "Outputs", "Metadata", "Dimensions", "Weights", "Kernel", "Groups", "HasBias", "Activation",
     "ParameterType", "TacticName", "Format/Datatype", "name", "averageMs", "medianMs", "count", "latencyMs", "computeMs"]
)  # fmt: skip
SHAPED = st.dictionaries(KEYS, JSON | st.lists(st.dictionaries(KEYS, JSON, max_size=3), max_size=2), max_size=6)


def test_layers_of_a_resnet18(recorded):
    layers = exports.read_layers(recorded("resnet18.layers.json"))
    assert len(layers) == 26
    first = layers[1]
    assert (first.name, first.kind) == ("/conv1/Conv + /relu/Relu", "CaskConvolution")
    assert first.nodes == ("/conv1/Conv", "/relu/Relu")
    assert first.inputs[0].shape == (1, 3, 224, 224)
    assert first.outputs[0].shape == (1, 64, 112, 112)
    assert layers[0].nodes == ()


def test_nodes_of_generated_code_have_another_separator(recorded):
    layers = {layer.name: layer for layer in exports.read_layers(recorded("alexnet.layers.json"))}
    gemm = layers["/classifier/classifier_1/Gemm_myl9_2"]
    assert gemm.nodes == ("/classifier/classifier.1/Gemm", "/classifier/classifier.2/Relu")


def test_a_profile_of_a_resnet18(recorded):
    profile = exports.read_profile(recorded("resnet18.profile.json"))
    assert profile.passes > 1000
    assert len(profile.rows) == 26
    assert all(row.median_ms is not None for row in profile.rows)
    # A NoOp takes no time.
    assert next(row.name for row in profile.rows if row.average_ms == 0).startswith("Reformatting CopyNode")


def test_times_of_a_resnet18(recorded):
    times = exports.read_times(recorded("resnet18.times.json"))
    assert len(times.latency_ms) == 200
    assert min(times.latency_ms) <= times.percentile_ms(50) <= times.percentile_ms(99) <= max(times.latency_ms)
    assert times.percentile_ms(100) == max(times.latency_ms)
    # Recorded without data transfers.
    assert times.latency_ms == times.compute_ms


@pytest.mark.parametrize("model", ["resnet18", "alexnet"])
def test_every_layer_has_its_time_and_every_computing_layer_its_nodes(recorded, model):
    layers = exports.read_layers(recorded(f"{model}.layers.json"))
    profile = exports.read_profile(recorded(f"{model}.profile.json"))
    found = timed_kernels(layers, profile)
    assert [kernel.average_ms for kernel in found] == [row.average_ms for row in profile.rows]
    for kernel in found:
        # What TensorRT put in between computes nothing of the model.
        between = kernel.kernel.op in ("Reformat", "NoOp", "shape_call")
        assert bool(kernel.nodes) != between, kernel.layer


def test_kernels_of_a_resnet18(recorded):
    layers = exports.read_layers(recorded("resnet18.layers.json"))
    found = timed_kernels(layers, operations={"/fc/Gemm": "Gemm"}, origins={"/fc/Gemm": "fc"})
    families = [kernel.kernel.family for kernel in found]
    assert families.count("conv") == 20
    assert families.count("pool") == 2
    # The last layer is generated code: only the operation of its node says what it is.
    assert families[-1] == "gemm"
    assert found[-1].kernel.origin == ("fc",)
    second = found[4].kernel
    assert second.attribute("residual") is True
    assert second.attribute("kernel") == (3, 3)
    assert second.attribute("stride") == (1, 1)
    assert second.attribute("pads") == (1, 1, 1, 1)
    assert second.attribute("activation") == "RELU"
    assert {kernel.kernel.precision for kernel in found if kernel.nodes} == {"fp16"}


def test_layers_of_one_name_are_told_apart_by_their_order():
    layers = [Layer("a", "CaskConvolution"), Layer("b"), Layer("a", "CaskPooling")]
    profile = Profile(9, (LayerTime("a", 1.0, None), LayerTime("a", 2.0, 2.0), LayerTime("c", 3.0, None)))
    found = timed_kernels(layers, profile)
    assert [(kernel.layer, kernel.average_ms) for kernel in found] == [("a", 1.0), ("b", None), ("a", 2.0), ("c", 3.0)]


def test_names_alone_are_layers_too():
    found = exports.read_layers('{"Layers": ["conv1 + relu1", "fc"], "Bindings": ["x", "y"]}')
    assert [layer.name for layer in found] == ["conv1 + relu1", "fc"]
    assert [kernel.kernel.family for kernel in timed_kernels(found)] == ["other", "other"]


def test_a_profile_without_medians_is_that_of_an_old_release():
    found = exports.read_profile(
        '[ { "count" : 7 }, { "name" : "a", "timeMs" : 7, "averageMs" : 1, "percentage" : 100 } ]'
    )
    assert found == Profile(7, (LayerTime("a", 1.0, None),))


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (exports.read_layers, ""),
        (exports.read_layers, "[]"),
        (exports.read_layers, '{"Layers": [1]}'),
        (exports.read_layers, '{"Layers": [{"Name": "a", "Inputs": [1]}]}'),
        (exports.read_profile, "[]"),
        (exports.read_profile, '[{"count": -1}]'),
        (exports.read_profile, '[{"count": 1}, {"averageMs": 1}]'),
        (exports.read_profile, '[{"count": 1}, {"name": "a", "averageMs": NaN}]'),
        (exports.read_profile, '[{"count": 1}, {"name": "a", "averageMs": 1' + "0" * 400 + "}]"),
        # A layer's name is written as it is: a quote in it breaks the file.
        (exports.read_profile, '[{"count": 1}, {"name": "a"b", "averageMs": 1}]'),
        (exports.read_times, "[]"),
        (exports.read_times, '[{"latencyMs": 1}]'),
        (exports.read_times, '[{"latencyMs": -1, "computeMs": 1}]'),
        (exports.read_times, "[" * 100_000),
    ],
)
def test_damage_is_one_typed_sentence(reader, text):
    with pytest.raises(BackendError) as caught:
        reader(text)
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["resnet18.profile.json", "resnet18.times.json", "alexnet.layers.json"])
def test_an_export_that_was_cut_short_is_refused(recorded, name):
    text = recorded(name).rstrip()
    reader = {"profile": exports.read_profile, "times": exports.read_times}.get(name.split(".")[1], exports.read_layers)
    reader(text)
    for end in range(0, len(text) - 1, max(1, len(text) // 60)):
        with pytest.raises(BackendError):
            reader(text[:end])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(READERS),
    JSON | st.lists(SHAPED, max_size=4) | st.lists(SHAPED, max_size=4).map(lambda x: {"Layers": x}),
)
def test_whatever_json_it_is_the_answer_is_data_or_a_typed_error(reader, value):
    found = None
    with contextlib.suppress(BackendError):
        found = reader(json.dumps(value))
    if found is not None and reader is exports.read_layers:
        for kernel in timed_kernels(found):
            assert kernel.kernel.key


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_character_is_data_or_a_typed_error(data):
    text = json.dumps({"Layers": [{"Name": "a", "LayerType": "kgen", "Metadata": "[ONNX Layer: n]", "Kernel": [3, 3]}]})
    place = data.draw(st.integers(0, len(text) - 1))
    damaged = text[:place] + data.draw(st.characters()) + text[place + 1 :]
    with contextlib.suppress(BackendError):
        timed_kernels(exports.read_layers(damaged))
