"""What searching and tuning cannot do is refused before anything is scored, cut or measured."""

from __future__ import annotations

import copy

import pytest
import torch

from edgeprune.budget import Budget
from edgeprune.errors import BudgetInfeasibleError, ConfigError, ConstraintError, TaskError
from edgeprune.loop.netadapt import NetAdapt
from edgeprune.loop.pruning import prune
from edgeprune.loop.soft_masking import SoftMasking
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.spec import Constraints
from edgeprune.surgery.constraints import require_possible

EXAMPLE = torch.zeros(1, 1, 8, 8)


def pruned(tabled, budget, told, model=None, **options):
    return prune(
        model or tabled.model,
        EXAMPLE,
        budget,
        predictor=tabled.predictor,
        task=tabled.task,
        kernel_graph=tabled.kernel_graph,
        progress=lambda *step: told.append(step),
        **options,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill": ("logits", "features"), "taps": ("down", "head")}, "those of 'head' do not"),
        ({"distill": "attention", "taps": ("head",), "soft_masking": SoftMasking()}, "those of 'head' do not"),
        ({"netadapt": NetAdapt(most_tunings=5), "blocks": True}, "may take 5 short tunings, found that"),
        (
            {"netadapt": NetAdapt(), "budget": Budget(latency_ratio=0.6, parameters_ratio=0.4)},
            "netadapt keeps a latency only, found a budget of parameters too",
        ),
    ],
    ids=["a tap", "a tap, after a search", "too many tunings", "another budget"],
)
def test_settings_that_do_not_go_together(tabled, options, message):
    told = []
    options = {"budget": Budget(latency_ratio=0.6), **options}
    with pytest.raises(ConfigError, match=message):
        pruned(tabled, options.pop("budget"), told, **options)
    assert told == []


def test_weights_that_do_not_learn_under_masks(tabled):
    told = []
    frozen = copy.deepcopy(tabled.model)
    frozen.block.second.weight.requires_grad_(False)
    with pytest.raises(TaskError, match=r"block\.second\.weight must require them"):
        pruned(tabled, "60%", told, model=frozen, soft_masking=SoftMasking())
    assert told == []


def test_a_model_none_of_whose_weights_learn(tabled):
    told = []
    frozen = copy.deepcopy(tabled.model).requires_grad_(False)
    with pytest.raises(TaskError, match="fine-tuning needs parameters that require gradients, found none"):
        pruned(tabled, "60%", told, model=frozen)
    assert told == []


@pytest.mark.parametrize(("budget", "option"), [(Budget(parameters=3), "--params"), (Budget(macs=5), "--macs")])
def test_a_count_out_of_reach_comes_with_the_option_that_can_be_reached(tabled, budget, option):
    with pytest.raises(BudgetInfeasibleError) as refused:
        pruned(tabled, budget, [], fine_tuning=FineTuning(epochs=0))
    assert refused.value.hint is not None
    asked, number = refused.value.hint.split(" ")
    assert asked == option
    reached = Budget.of(**{option.strip("-"): number})
    pruned(tabled, reached, [], fine_tuning=FineTuning(epochs=0))


def test_a_dense_model_that_suffices_costs_no_measured_losses(tabled):
    told = []
    assert pruned(tabled, Budget(latency_ms=1.001 * tabled.dense_ms), told, blocks=True).unchanged
    assert not any("damage" in step for step, *_ in told)


def test_what_would_not_be_used_is_not_refused(tabled):
    options = {"distill": "features", "taps": ("head",), "netadapt": NetAdapt(most_tunings=1)}
    assert pruned(tabled, Budget(latency_ms=2 * tabled.dense_ms), [], **options).unchanged


def test_a_pattern_that_matches_nothing_is_told_before_the_model_is_lowered(tabled):
    told = []
    constraints = Constraints(keep=("nolayer",))
    with pytest.raises(ConstraintError, match=r"keep must match at least one group, 'nolayer' matches none"):
        prune(tabled.model, EXAMPLE, "60%", predictor=tabled.predictor, constraints=constraints, progress=told.append)
    assert told == []
    # Every name that a trace gives passes.
    names = [*(group.name for group in tabled.graph.groups), *(axis.name for axis in tabled.graph.frozen)]
    require_possible(Constraints(keep=tuple(names)), tabled.model)
