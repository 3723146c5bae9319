import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgeprune.errors import ConfigError, TaskError
from edgeprune.tasks.limits import Tolerance, parse_limit, parse_limits
from edgeprune.tasks.task import Objective, Task


def objective(name="seg", **changes):
    return Objective(name, [1], [1], nn.MSELoss(), lambda outputs, targets: 0.0, **changes)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("2%", Tolerance(0.02)),
        (" 2.5 % ", Tolerance(0.025)),
        ("2pp", Tolerance(0.02, relative=False)),
        (".5pp", Tolerance(0.005, relative=False)),
        ("0%", Tolerance(0.0)),
        ("0.85", 0.85),
        ("-3", -3.0),
        ("1e-3", 1e-3),
    ],
)
def test_a_limit_is_read(text, limit):
    assert parse_limit(text) == limit
    if isinstance(limit, Tolerance):
        assert parse_limit(str(limit)) == limit


@pytest.mark.parametrize("text", ["", "two", "-2%", "-1pp", "2 percent", "2%%", "pp", "nan", "inf%"])
def test_what_is_no_limit_is_refused(text):
    with pytest.raises(ConfigError, match=r"a limit must be 2% \(of the dense model's metric\), 2pp .* found '"):
        parse_limit(text)


def test_limits_name_their_objective():
    assert parse_limits(("seg=2%", "depth = 0.5pp", "a=b=1")) == {
        "seg": Tolerance(0.02),
        "depth": Tolerance(0.005, relative=False),
        "a=b": 1.0,
    }
    with pytest.raises(ConfigError, match="must be written NAME=LIMIT, found '2%'"):
        parse_limits(("2%",))
    with pytest.raises(ConfigError, match="found two for 'seg'"):
        parse_limits(("seg=2%", "seg=3%"))


def test_percent_is_of_the_dense_metric_and_points_are_absolute():
    assert objective(limit="2%").worst(0.5) == pytest.approx(0.49)
    assert objective(limit="2pp").worst(0.5) == pytest.approx(0.48)
    assert objective(limit="2%", higher_is_better=False).worst(0.5) == pytest.approx(0.51)
    assert objective(limit="2%").worst(-0.5) == pytest.approx(-0.51)
    assert objective(limit=0.4).worst() == 0.4
    assert objective().worst(0.5) is None
    assert objective(limit="2%").meets_limit(0.49001, 0.5)
    assert not objective(limit="2%").meets_limit(0.4899, 0.5)


@given(
    dense=st.floats(-100, 100).filter(lambda value: abs(value) > 1e-3),
    amount=st.floats(0, 3),
    higher=st.booleans(),
)
def test_the_dense_model_keeps_every_limit_that_refers_to_it(dense, amount, higher):
    one = objective(limit=Tolerance(amount), higher_is_better=higher)
    assert one.meets_limit(dense, dense)
    Task((one,)).require_kept_by({"seg": dense})
    better = dense + 1 if higher else dense - 1
    assert one.meets_limit(better, dense)


def test_what_a_limit_cannot_refer_to():
    with pytest.raises(TaskError, match="metric of the dense model that is not 0, found 0 for objective 'seg'"):
        objective(limit="2%").worst(0.0)
    with pytest.raises(
        TaskError, match=r"a metric that is a share in \[0, 1\], found 73.4 for objective 'seg'"
    ) as caught:
        objective(limit="2pp").worst(73.4)
    assert caught.value.hint == "--limit seg=2%"
    with pytest.raises(TaskError, match="needs the metric of the dense model, found none"):
        objective(limit="2%").meets_limit(0.5)
    with pytest.raises(ConfigError, match="at least 0, found -1"):
        Tolerance(-1)


def test_a_limit_that_the_dense_model_does_not_keep_is_refused():
    task = Task((objective(), objective("depth", limit=0.3, higher_is_better=False)))
    task.require_kept_by({"seg": 0.1, "depth": 0.3})
    with pytest.raises(
        TaskError, match=r"'depth' must be one that the dense model keeps, found a metric of 0.31, .* 0.3\."
    ):
        task.require_kept_by({"seg": 0.1, "depth": 0.31})


def test_a_task_takes_other_limits():
    task = Task((objective(limit=0.5), objective("depth")))
    found = task.with_limits({"depth": "3%"})
    assert [one.limit for one in found.objectives] == [0.5, Tolerance(0.03)]
    assert task.with_limits({}) == task
    assert task.with_limits({"seg": None}).objective("seg").limit is None
    with pytest.raises(TaskError, match="found no 'normals' among seg, depth"):
        task.with_limits({"normals": "1%"})
    with pytest.raises(ConfigError, match="a limit must be"):
        task.with_limits({"seg": "a lot"})


def test_a_limit_that_cannot_be_read_is_told_with_its_objective() -> None:
    with pytest.raises(ConfigError, match="found 'a lot'") as caught:
        parse_limits(("seg=2%", "left depth=a lot"))
    assert caught.value.hint == "--limit 'left depth'=2%"
