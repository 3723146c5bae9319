import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.deployment.golden import make_golden, positional
from edgeprune.errors import InputError
from edgeprune.graph.tracing import trace
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import make_plan
from edgeprune.surgery.program_module import ProgramModule


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(x), (x > 0)


def test_samples_are_cut_into_deployment_batches_and_edge_cases_follow():
    data = torch.randn(64, 3)
    golden = make_golden(Scale(), (torch.zeros(4, 3),), data)
    assert golden.kinds == ("sample",) * 8 + ("zeros", "extremes", "denormals")
    np.testing.assert_array_equal(golden.inputs[0][:8].reshape(32, 3), data[:32].numpy())
    assert not golden.inputs[0][8].any()
    np.testing.assert_array_equal(np.abs(golden.inputs[0][9]), np.full((4, 3), data[:32].abs().max()))
    denormals = np.abs(golden.inputs[0][10])
    assert ((denormals > 0) & (denormals < np.finfo(np.float32).tiny)).all()


def test_outputs_are_those_of_the_module_in_eval_form_and_the_module_is_left_alone():
    module = Scale().train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    golden = make_golden(module, (torch.randn(2, 3),))
    assert module.training
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    expected = module.eval()(torch.from_numpy(golden.inputs[0][0]))
    np.testing.assert_array_equal(golden.outputs[0][0], expected[0].detach().numpy())
    assert golden.outputs[1].dtype == np.bool_


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 70), st.integers(0, 3))
def test_there_are_always_enough_samples_of_the_deployment_shape(batch, given_samples, seed):
    samples = torch.randn(given_samples, 3) if given_samples else None
    golden = make_golden(torch.nn.Identity(), (torch.randn(batch, 3),), samples, seed=seed)
    cases = golden.kinds.count("sample")
    assert cases * batch >= 32
    assert golden.inputs[0].shape == (cases + 3, batch, 3)
    assert golden.inputs[0].dtype == np.float32
    assert np.isfinite(golden.inputs[0]).all()


def test_random_integers_stay_in_the_range_of_the_examples():
    module = torch.nn.Embedding(7, 4)
    golden = make_golden(module, (torch.tensor([[0, 3, 6]]),))
    assert set(np.unique(golden.inputs[0])) <= {0, 3, 6}
    assert "denormals" not in golden.kinds


def test_same_seed_gives_the_same_file(tmp_path):
    for name in ("a", "b"):
        make_golden(torch.nn.Identity(), (torch.randn(1, 5, generator=torch.Generator().manual_seed(0)),), seed=3).save(
            tmp_path / name
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert all(info.filename.endswith(".npy") for info in zipfile.ZipFile(tmp_path / "a").infolist())
    with np.load(tmp_path / "a", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["input_0", "kinds", "output_0"]


def test_samples_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"must have shape \(samples, 3\) for input 0, found \(8, 4\)"):
        make_golden(torch.nn.Identity(), (torch.zeros(1, 3),), torch.zeros(8, 4))


def test_module_that_gives_nan_on_samples_is_refused():
    class Log(torch.nn.Module):
        def forward(self, x):
            return torch.log(x)

    with pytest.raises(InputError, match="output 0 must be finite on the golden samples"):
        make_golden(Log(), (torch.randn(1, 8),))


def test_example_inputs_may_be_a_dict_in_any_order():
    class Two(torch.nn.Module):
        def forward(self, left, right):
            return left - right

    one, two = torch.ones(1), torch.zeros(1)
    assert [float(value) for value in positional(Two(), {"right": two, "left": one})] == [1.0, 0.0]
    with pytest.raises(InputError, match="forward must take the example inputs"):
        positional(Two(), {"left": one, "middle": two})


def test_they_may_be_a_dict_where_the_cut_model_is_its_program():
    class Fixed(torch.nn.Module):
        """Its forward cannot follow a cut: the size is written into it."""

        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 16), torch.nn.Linear(16, 2)

        def forward(self, left, right):
            return self.second(self.first(left - right).view(-1, 16))

    model = Fixed().eval()
    graph = trace(model, {"right": torch.zeros(1, 4), "left": torch.ones(1, 4)})
    cut = apply(model, make_plan(graph, {"first": tuple(range(8))}))
    assert isinstance(cut, ProgramModule)
    values = positional(cut, {"right": torch.zeros(1), "left": torch.ones(1)})
    assert [float(value) for value in values] == [1.0, 0.0]
    with pytest.raises(InputError, match="forward must be given left, right, found left, middle"):
        positional(cut, {"left": torch.zeros(1), "middle": torch.zeros(1)})
