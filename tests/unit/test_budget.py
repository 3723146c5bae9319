"""Budgets: what can be asked for, in numbers and in words."""

import pytest

from edgeprune.budget import Budget
from edgeprune.cli.hints import next_step
from edgeprune.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "expected", "said"),
    [
        ({"latency": "12ms"}, Budget(latency_ms=12), "12 ms"),
        ({"latency": " 800us "}, Budget(latency_ms=0.8), "0.8 ms"),
        ({"latency": "0.012s"}, Budget(latency_ms=12), "12 ms"),
        ({"latency": "50%"}, Budget(latency_ratio=0.5), "50% of dense"),
        ({"params": "40%"}, Budget(parameters_ratio=0.4), "40% of the parameters"),
        ({"params": "1.2M"}, Budget(parameters=1.2e6), "1,200,000 parameters"),
        ({"macs": "300k"}, Budget(macs=3e5), "300,000 multiply-accumulates"),
        ({"energy": "30mJ"}, Budget(energy_mj=30), "30 mJ"),
        ({"energy": "900uJ"}, Budget(energy_mj=0.9), "0.9 mJ"),
        ({"energy": "60%"}, Budget(energy_ratio=0.6), "60% of the energy"),
        ({"memory": "8MB"}, Budget(memory_bytes=8e6), "8,000,000 bytes"),
        ({"memory": "512KiB"}, Budget(memory_bytes=524288), "524,288 bytes"),
        ({"memory": "50%"}, Budget(memory_ratio=0.5), "50% of the memory"),
        (
            {"latency": "50%", "params": "250000", "macs": "4G"},
            Budget(latency_ratio=0.5, parameters=250000, macs=4e9),
            "50% of dense, 250,000 parameters, 4,000,000,000 multiply-accumulates",
        ),
    ],
)
def test_texts(given, expected, said):
    assert Budget.of(**given) == expected
    assert str(expected) == said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "must bound something"),
        ({"latency": "12"}, "a latency budget must be a number with a unit, found '12'"),
        ({"latency": "0%"}, r"must lie in \(0 %, 100 %\], found 0.000%"),
        ({"params": "12ms"}, "the budget of params must be a number or a share, found '12ms'"),
        ({"params": "0"}, "a parameter budget must be greater than 0, found 0"),
        ({"macs": "120%"}, r"a relative multiply-accumulate budget must lie in \(0 %, 100 %\], found 120"),
        ({"macs": "-3M"}, "the budget of macs must be a number or a share"),
        ({"energy": "30"}, "the budget of energy must be a number with a unit or a share, found '30'"),
        ({"energy": "0mJ"}, "an energy budget must be greater than 0 mJ, found 0"),
        ({"memory": "8M"}, "the budget of memory must be a number with a unit or a share, found '8M'"),
        ({"memory": "101%"}, r"a relative memory budget must lie in \(0 %, 100 %\], found 101"),
    ],
)
def test_what_is_none_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        Budget.of(**given)


def test_a_number_and_a_share_of_one_cost_are_too_much():
    with pytest.raises(ConfigError, match="exactly one of latency_ms and latency_ratio, found both"):
        Budget(latency_ms=1, latency_ratio=0.5)
    with pytest.raises(ConfigError, match="exactly one of macs and macs_ratio, found both"):
        Budget(macs=1, macs_ratio=0.5)


def test_latency_resolves_against_the_dense_one_which_it_is_where_nothing_bounds_it():
    assert Budget(latency_ms=3).resolve_ms(10) == 3
    assert Budget(latency_ratio=0.25).resolve_ms(10) == 2.5
    assert Budget(parameters=5).resolve_ms(10) == 10


@pytest.mark.parametrize(
    ("given", "hint", "said"),
    [
        ({"latency": "12"}, 'Budget.of(latency="12ms") or Budget.of(latency="50%")', "--latency 12ms or --latency 50%"),
        ({"params": "12ms"}, 'Budget.of(params="40%") or Budget.of(params="1.2M")', "--params 40% or --params 1.2M"),
        ({"memory": "0B"}, 'Budget.of(memory="50%"), or a number', "--memory 50%, or a number"),
    ],
)
def test_hints_are_of_the_library_and_told_as_options_by_the_command_line(given, hint, said):
    with pytest.raises(ConfigError) as caught:
        Budget.of(**given)
    assert caught.value.hint.startswith(hint)
    assert next_step(caught.value, ["prune"]).startswith(said)
