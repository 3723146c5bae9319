"""Memory by widths: against hand counting, against cut models, and against what ONNX Runtime really takes."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import edgeprune
from edgeprune.allocation.choices import choices
from edgeprune.allocation.exact import Exact
from edgeprune.allocation.memory import Memory
from edgeprune.allocation.terms import Limit
from edgeprune.criteria.damage import damage_curves
from edgeprune.errors import BudgetInfeasibleError
from edgeprune.surgery.magnitude import l2_norms
from edgeprune.surgery.plan import make_plan
from edgeprune.testing.additive import LayeredCost


class Net(nn.Module):
    """A wide early layer and heavy late weights, so that which operator is the largest changes with the widths."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.norm = nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 24, 3, stride=4)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.second(self.norm(self.first(x)).relu())).relu()
        return self.head(self.down(x).relu().mean((2, 3)))


EXAMPLE = torch.zeros(1, 3, 12, 12)


@pytest.fixture(scope="module")
def graph():
    return edgeprune.trace(Net().eval(), EXAMPLE)


@pytest.fixture(scope="module")
def kernels(graph, tmp_path_factory):
    return edgeprune.lower(graph, workdir=tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def memory(kernels):
    return Memory(kernels)


def test_weights_and_the_largest_live_set_are_counted(memory, graph):
    weights = sum(parameter.numel() for parameter in graph.model.parameters())
    pixels = 12 * 12
    # While the second layer of the block runs: the image, the block's input, the inner activation, and its own output.
    assert memory.value({}) == 4 * (weights + pixels * (3 + 16 + 12 + 16))


def test_half_precision_takes_half_of_it(kernels, memory):
    assert Memory(kernels, "fp16").value({}) == memory.value({}) / 2
    assert Memory(kernels, "int8").value({}) == memory.value({}) / 4


def test_it_is_that_of_the_cut_model(graph, memory, tmp_path):
    plan = edgeprune.uniform_plan(graph, ratio=0.5)
    cut = edgeprune.apply(graph.model, plan)
    own = Memory(edgeprune.lower(edgeprune.trace(cut, EXAMPLE), workdir=tmp_path))
    assert memory.value(plan.widths()) == own.value({}) < 0.6 * memory.value({})


def test_a_removed_block_holds_nothing_inside(graph, memory, tmp_path):
    plan = make_plan(graph, {"first": ()})
    cut = edgeprune.apply(graph.model, plan)
    own = Memory(edgeprune.lower(edgeprune.trace(cut, EXAMPLE), workdir=tmp_path)).value({})
    # The sum of a removed block is counted as a tensor of its own: never less than it is, at most that much more.
    assert own <= memory.value(plan.widths()) <= own + 4 * 16 * 12 * 12


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_sums_that_are_kept_have_the_largest_among_them(memory, data):
    widths = {name: data.draw(st.integers(1, size), label=name) for name, size in memory.sizes.items()}
    if data.draw(st.booleans()):
        widths["first"] = 0
    assert len(memory.sums) < len(memory.every)
    assert max(place.value(widths) for place in memory.sums) == pytest.approx(memory.value(widths), rel=1e-12)
    for place in memory.sums:
        terms = sum(
            float(term.at(*(np.array(form.at({**memory.sizes, **widths})) for form in term.forms)))
            for term in place.terms()
        )
        assert terms == pytest.approx(place.value(widths), rel=1e-12)


@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
def test_the_exact_allocation_is_the_best_of_all_that_fit(graph, memory, share):
    sizes = graph.widths()
    steps = {name: (size, size // 2, size // 4) for name, size in sizes.items()}
    cost = LayeredCost(sizes, steps, (), 1.0)
    damage = damage_curves(l2_norms(graph), "log_share")
    most = share * memory.value({})
    limit = Limit("memory", memory, most, "bytes")
    found = Exact(gap=0.0).allocate(graph.groups, damage, cost, 2.0, limits=[limit])
    assert memory.value(found.widths) <= most
    every = [dict(zip(sizes, widths, strict=True)) for widths in itertools.product(*_candidates(graph, cost).values())]
    best = min(
        sum(damage[name][width] for name, width in widths.items()) for widths in every if memory.value(widths) <= most
    )
    assert found.certificate.damage == pytest.approx(best, rel=1e-6)
    assert found.certificate.gap == pytest.approx(0, abs=1e-6)


def test_out_of_reach_says_the_smallest_and_what_holds_it_up(graph, memory):
    sizes = graph.widths()
    cost = LayeredCost(sizes, {name: (size, size // 2, size // 4) for name, size in sizes.items()}, (), 1.0)
    limit = Limit("memory", memory, 500.0, "bytes", "--memory {}B")
    with pytest.raises(BudgetInfeasibleError) as caught:
        Exact().allocate(graph.groups, damage_curves(l2_norms(graph), "log_share"), cost, 2.0, limits=[limit])
    smallest = caught.value.widths
    assert smallest == {name: min(widths) for name, widths in _candidates(graph, cost).items()}
    least = memory.value(smallest)
    said = f"memory must be <= 500 bytes, the smallest plan found has {least:,.0f} bytes (weights hold"
    assert said in str(caught.value)
    assert f"--memory {least:.0f}B" in str(caught.value)


def _candidates(graph, cost):
    return {choice.groups[0]: choice.candidates(cost) for choice in choices(graph.groups, None)}


_REAL = """
import sys
import numpy, onnxruntime

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.enable_cpu_mem_arena, options.enable_mem_pattern = 1, False, False
onnxruntime.InferenceSession(sys.argv[2], options)
before = status("VmRSS")
session = onnxruntime.InferenceSession(sys.argv[1], options)
feed = {one.name: numpy.zeros(one.shape, numpy.float32) for one in session.get_inputs()}
loaded = status("VmRSS")
with open("/proc/self/clear_refs", "w") as stream:
    stream.write("5")
session.run(None, feed)
print(loaded - before, status("VmHWM") - loaded)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_it_is_near_what_onnx_runtime_takes(kernels, tmp_path):
    """Loaded and run in a process of its own, every buffer of which goes back to the system when it is freed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 96, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(96, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 3000),
    ).eval()  # fmt: skip
    lowered = edgeprune.lower(edgeprune.trace(model, torch.zeros(1, 3, 192, 192)), workdir=tmp_path)
    memory = Memory(lowered)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    # The engine's file is its weights and a little text.
    assert lowered.dense_engine.stat().st_size == pytest.approx(weights, rel=0.02)
    environment = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "4096", "MALLOC_ARENA_MAX": "1"}
    told = subprocess.run(
        [sys.executable, "-c", _REAL, str(lowered.dense_engine), str(kernels.dense_engine)],
        env=environment, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    loaded, ran = (int(word) for word in told.stdout.split())
    assert 0.9 * weights < loaded < 1.6 * weights + 4e6
    activations = memory.value({}) - weights
    assert 0.5 * activations < ran < 1.5 * activations
