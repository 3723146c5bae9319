"""Tables against the costs that they are made of: every state of small problems."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.allocation.nodes import Joint, Nodes, Sum, ranges
from edgeprune.allocation.problem import Problem
from edgeprune.allocation.sampling import color, orthogonal, prime_at_least
from edgeprune.allocation.tables import from_terms
from edgeprune.allocation.terms import CostTerm
from edgeprune.errors import ConfigError
from edgeprune.graph.forms import SizeForm
from edgeprune.testing.additive import LayeredParameters, attention, chain, densenet, product_of, sum_of, width_of


def tabulated(made, most_buckets=48):
    problem = Problem(made.groups, made.damage, made.cost, None)
    nodes = Nodes(problem.candidates)
    counted = LayeredParameters(made.cost)
    tables = from_terms(problem, nodes, [made.cost.terms(), counted.terms()], most_buckets)
    every = np.array(list(itertools.product(*(range(len(widths)) for widths in problem.candidates))))
    if len(every) > 500:
        every = every[np.random.default_rng(0).choice(len(every), 500, replace=False)]
    plans = [problem.widths(tuple(problem.candidates[i][o] for i, o in enumerate(state))) for state in every]
    true = np.array([[made.cost.ms(plan), counted.value(plan)] for plan in plans]).T
    return nodes, tables, every, true


@pytest.mark.parametrize("kind", [chain, densenet, attention])
@pytest.mark.parametrize("seed", range(3))
def test_tables_are_the_cost_at_every_state(kind, seed):
    _, tables, every, true = tabulated(kind(seed))
    for table, values in zip(tables, true, strict=True):
        assert table.lossless
        np.testing.assert_allclose(table.total(every), values, rtol=1e-9)


def test_concats_make_sums_and_attention_makes_joint_nodes():
    assert any(isinstance(node, Sum) for node in tabulated(densenet(0))[0].all)
    assert any(isinstance(node, Joint) for node in tabulated(attention(0))[0].all)
    assert not any(isinstance(node, (Sum, Joint)) for node in tabulated(chain(0))[0].all)


@pytest.mark.parametrize("seed", range(3))
def test_with_few_buckets_tables_are_never_above_the_cost(seed):
    _, tables, every, true = tabulated(densenet(seed), most_buckets=3)
    assert not tables[0].lossless
    assert (tables[0].total(every) <= true[0] * (1 + 1e-12)).all()
    assert (tables[0].total(every) < true[0] * 0.999).any()
    # Numbers of weights are linear in every sum, so ranges lose nothing.
    np.testing.assert_allclose(tables[1].total(every), true[1], rtol=1e-9)


def test_a_sum_of_a_width_and_a_product_is_one_size():
    made = attention(1)
    problem = Problem(made.groups, made.damage, made.cost, None)
    nodes = Nodes(problem.candidates)
    form = SizeForm(5, (((("embedding",)), 2), (product_of("layer0.heads", "layer0.head_size").terms[0][0], 1)))
    (table,) = from_terms(problem, nodes, [[CostTerm((form,), lambda size: np.sqrt(size))]], most_buckets=10_000)
    states = np.stack([np.random.default_rng(0).integers(0, len(widths), 50) for widths in problem.candidates], axis=1)
    for state, found in zip(states, table.total(states), strict=True):
        widths = problem.widths(tuple(problem.candidates[i][o] for i, o in enumerate(state)))
        assert found == pytest.approx(np.sqrt(form.at(widths)))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 8))
def test_ranges_cover_everything_and_end_where_costs_change(costs, most):
    last, lossless = ranges(np.array(costs, dtype=float)[:, None], most)
    assert last[-1] == len(costs) - 1
    assert len(last) <= max(most, 1)
    assert (np.diff(last) > 0).all()
    pieces = np.split(np.array(costs), last[:-1] + 1)
    assert lossless == all(len(set(piece.tolist())) == 1 for piece in pieces)


@pytest.mark.parametrize("q", [2, 3, 5, 7])
def test_two_columns_of_an_orthogonal_array_hold_every_pair_once(q):
    array = orthogonal(q)
    assert array.shape == (q * q, q + 1)
    for first, second in itertools.combinations(range(q + 1), 2):
        assert len({(int(row[first]), int(row[second])) for row in array}) == q * q


@given(st.integers(1, 12), st.data())
def test_neighbors_get_different_colors(count, data):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))))
    pairs = [pair for pair in pairs if pair[0] != pair[1]]
    colors = color(count, pairs)
    assert all(colors[first] != colors[second] for first, second in pairs)


def test_primes():
    assert [prime_at_least(number) for number in (0, 2, 4, 8, 14, 16, 24)] == [2, 2, 5, 11, 17, 17, 29]


def test_terms_are_checked():
    with pytest.raises(ConfigError, match="must depend on at most two sizes, found 3"):
        CostTerm((width_of("a"), width_of("b"), width_of("c")), lambda *sizes: sizes[0])
    with pytest.raises(ConfigError, match="must multiply at most two widths"):
        CostTerm((SizeForm(0, ((("a", "b", "c"), 1),)),), lambda size: size)
    made = chain(0)
    problem = Problem(made.groups, made.damage, made.cost, None)
    with pytest.raises(ConfigError, match="must name groups of the model, found nowhere"):
        from_terms(problem, Nodes(problem.candidates), [[CostTerm((sum_of(["nowhere"]),), lambda size: size)]])
