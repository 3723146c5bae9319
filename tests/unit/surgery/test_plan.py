"""Plans: made, refused, saved, loaded; constraints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from edgeprune.errors import ConfigError, ConstraintError, EmptyPlanError, PlanError
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.graph.tracing import trace
from edgeprune.spec import Constraints
from edgeprune.surgery.checking import check
from edgeprune.surgery.constraints import resolve
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import PruningPlan, make_plan, uniform_plan
from edgeprune.surgery.plan_format import content_sha256, to_json

X = torch.randn(1, 3, 16, 16)


@pytest.fixture(scope="module")
def graph(nets: ModuleType) -> ChannelGraph:
    return trace(nets.Grouped(), X)


@pytest.fixture(scope="module")
def resnet(nets: ModuleType) -> ChannelGraph:
    return trace(nets.ResNet(), X)


def test_a_plan_says_what_stays(graph: ChannelGraph) -> None:
    plan = make_plan(graph, {"grouped.0": [0, 2], "stem.0 (+1 layer)": range(1, 8)}, predicted={"latency_ms": 1.5})
    assert plan.widths() == {"stem.0 (+1 layer)": 7, "reduce.0": 4, "grouped.0": 2}
    assert plan.kept["grouped.0.weight"] == {0: (0, 2, 4, 6, 8, 10, 12, 14)}
    assert plan.kept["stem.0.weight"] == {0: (1, 2, 3, 4, 5, 6, 7)}
    assert "reduce.0.bias" not in plan.kept
    assert plan.attributes["grouped.0"] == {"out_channels": 8, "in_channels": 16, "groups": 4}
    assert plan.attributes["grouped.1"] == {"num_features": 8}
    assert plan.frozen[0]["name"] == "x"
    assert plan.predicted == {"latency_ms": 1.5}
    assert plan.with_prediction(low_ms=1.0).predicted == {"latency_ms": 1.5, "low_ms": 1.0}


def test_the_hash_covers_the_model_and_the_indices_only(nets: ModuleType, graph: ChannelGraph) -> None:
    plan = make_plan(graph, {"grouped.0": [0, 2]})
    assert plan.hash == make_plan(trace(nets.Grouped(), torch.randn(4, 3, 8, 8)), {"grouped.0": [2, 0]}).hash
    assert plan.hash == plan.with_prediction(latency_ms=3).hash
    assert plan.hash != make_plan(graph, {"grouped.0": [0, 1]}).hash


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"grouped.0": []}, "group 'grouped.0' must keep at least one unit, found none (rule: emptied group)."),
        ({"grouped.0": [0, 4]}, "units of group 'grouped.0' must lie in [0, 4), found 4 (rule: out of range)."),
        ({"grouped.0": [0.5, 1]}, "units of group 'grouped.0' must be whole numbers, found 0.5 (rule: whole numbers)."),
        ({"grouped.0": [True, False]}, "units of group 'grouped.0' must be whole numbers, found True (rule: whole"),
        (
            {"grouped.0": None},
            "units of group 'grouped.0' must be a list of whole numbers, found NoneType (rule: whole",
        ),
        ({"grouped.0": "01"}, "units of group 'grouped.0' must be a list of whole numbers, found str (rule: whole"),
        ({"grouped.0": [-1]}, "units of group 'grouped.0' must lie in [0, 4), found -1 (rule: out of range)."),
        ({"grouped.0": [1, 2, 1]}, "units of group 'grouped.0' must be named once, found 1 again (rule: duplicate)."),
        ({"grouped": [1]}, "a group must be one of the model's 3 groups, found 'grouped'. Try: one of 'grouped.0'"),
        ({"fc": [1]}, "a plan must not name a frozen group, found 'fc': an output of the model keeps its size."),
    ],
)
def test_units_that_cannot_be(graph: ChannelGraph, kept: dict[str, list[int]], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(graph, kept)
    assert str(caught.value).startswith(message)


def test_an_empty_plan_is_refused_unless_it_is_wanted(graph: ChannelGraph) -> None:
    for kept in ({}, {"grouped.0": range(4)}):
        with pytest.raises(EmptyPlanError, match="a plan must remove at least one unit, but every group keeps all"):
            make_plan(graph, kept)
    assert make_plan(graph, {}, allow_empty=True).kept == {}


def test_save_and_load_round_trip(graph: ChannelGraph, tmp_path: Path) -> None:
    plan = uniform_plan(graph, 0.5).with_prediction(latency_ms=2.0)
    plan.save(tmp_path / "sub" / "plan.json")
    loaded = PruningPlan.load(tmp_path / "sub" / "plan.json")
    assert loaded == plan
    assert loaded.hash == plan.hash
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["plan.json"]


def test_a_plan_of_the_schema_before_tiles_is_loaded(graph: ChannelGraph, tmp_path: Path) -> None:
    plan = uniform_plan(graph, 0.5)
    values = to_json(plan) | {"schema": 4}
    del values["kept_tiles"]
    values["content_sha256"] = content_sha256(values)
    (tmp_path / "plan.json").write_text(json.dumps(values))
    assert PruningPlan.load(tmp_path / "plan.json") == plan


def _duplicate(values: dict[str, Any]) -> None:
    values["kept"]["reduce.0.weight"]["0"][1] = values["kept"]["reduce.0.weight"]["0"][0]


def _out_of_range(values: dict[str, Any]) -> None:
    values["kept"]["reduce.0.weight"]["0"][-1] = 99


def _unequal(values: dict[str, Any]) -> None:
    values["kept"]["reduce.1.bias"]["0"].pop()


def _emptied(values: dict[str, Any]) -> None:
    values["groups"]["reduce.0"]["kept"] = []


def _swapped(values: dict[str, Any]) -> None:
    indices = values["kept"]["reduce.1.bias"]["0"]
    indices[-1] = next(i for i in range(16) if i not in indices and i > indices[-2])


def _newer(values: dict[str, Any]) -> None:
    values["schema"] = 6


def _older(values: dict[str, Any]) -> None:
    values["schema"] = 3
    del values["parts"]


def _tiles_outside(values: dict[str, Any]) -> None:
    values["kept_tiles"]["fc.weight"] = {"row_edges": [0, 2], "column_edges": [0, 2, 4], "kept": [[0, 2]]}


def _tiles_of_text(values: dict[str, Any]) -> None:
    values["kept_tiles"]["fc.weight"] = {"row_edges": [0, 2], "column_edges": [0, "2", 4], "kept": [[0]]}


def _tiles_beside(values: dict[str, Any]) -> None:
    values["kept_tiles"]["reduce.0.weight"] = {"row_edges": [0, 2], "column_edges": [0, 2, 4], "kept": [[0]]}


def _unknown_field(values: dict[str, Any]) -> None:
    values["extra"] = 1


def _bad_attribute(values: dict[str, Any]) -> None:
    values["attributes"]["reduce.0"]["out_channels"] = "8"


def _other_attribute(values: dict[str, Any]) -> None:
    values["attributes"]["reduce.0"]["training"] = 1


def _edited_attribute(values: dict[str, Any]) -> None:
    values["attributes"]["reduce.0"]["groups"] = 8


def _edited_program(values: dict[str, Any]) -> None:
    values["program"]["nodes"][0]["args"]["stride"] = [2, 2]


def _edited_input(values: dict[str, Any]) -> None:
    values["inputs"][0]["shape"] = "1"


def _edited_rewrite(values: dict[str, Any]) -> None:
    values["rewrites"].append({})


BROKEN: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_duplicate, "indices of axis 0 of 'reduce.0.weight' (group 'reduce.0') must be ascending and named once"),
    (_out_of_range, "indices of axis 0 of 'reduce.0.weight' (group 'reduce.0') must lie in [0, 16), found 99"),
    (_unequal, "axis 0 of 'reduce.1.bias' must keep 8 indices, as its group 'reduce.0' says, found 7"),
    (_emptied, "group 'reduce.0' must keep at least one unit, found none"),
    (_swapped, "a plan's hash must match its contents"),
    (_newer, "a plan must have schema 5, found 6. Try: pip install --upgrade edgeprune"),
    (_tiles_outside, "kept tiles of 'fc.weight' must lie in its 1 x 2 grid, found (0, 2) (rule: tile out of range)"),
    (_tiles_of_text, "kept tiles of 'fc.weight' must be lists of whole numbers, found"),
    (_tiles_beside, "the grid of 'reduce.0.weight' must cover its shape (16, "),
    (_older, "a plan must have schema 5, found 3. Try: make the plan again"),
    (_unknown_field, "a plan must have exactly the fields of schema 5, found missing=[] unknown=['extra']"),
    (_bad_attribute, "attributes of module 'reduce.0' must be whole numbers"),
    (_other_attribute, "attributes of module 'reduce.0' must be among in_features"),
    (_edited_attribute, "a plan must be as it was saved, found one that was edited (rule: content_sha256)."),
    (_edited_program, "a plan must be as it was saved, found one that was edited (rule: content_sha256)."),
    (_edited_input, "inputs of a plan must have whole numbers as shape, found '1'"),
    (_edited_rewrite, "rewrites of a plan must have 'op', 'module' and 'source', found {}"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[damage.__name__ for damage, _ in BROKEN])
def test_a_damaged_plan_is_refused_by_the_broken_rule(
    graph: ChannelGraph, tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "plan.json"
    make_plan(graph, {"reduce.0": [0, 1]}).save(path)
    values = json.loads(path.read_text())
    damage(values)
    path.write_text(json.dumps(values))
    with pytest.raises(PlanError) as caught:
        PruningPlan.load(path)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": true}'])
def test_a_file_that_is_no_plan(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match="a plan must"):
        PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="a plan must be a readable JSON file"):
        PruningPlan.load(tmp_path / "missing.json")


def test_a_plan_for_another_model_is_refused(nets: ModuleType, graph: ChannelGraph) -> None:
    plan = uniform_plan(graph, 0.5)
    with pytest.raises(PlanError, match=r"found other parameter names or shapes \(it has no '.*weight'\)"):
        check(nets.VGG(), plan, X)
    with pytest.raises(PlanError, match=r"found other parameter names or shapes \(it has no '.*weight'\)"):
        apply(nets.VGG(), plan)
    other = nets.Grouped()
    other.stem[0] = torch.nn.Conv2d(3, 9, 3, padding=1, bias=False)
    with pytest.raises(PlanError, match=r"'stem.0.weight' has shape \(9, 3, 3, 3\), the plan expects \(8, 3, 3, 3\)"):
        apply(other, plan)


def test_uniform_keeps_the_largest_norms(nets: ModuleType) -> None:
    model = nets.VGG()
    with torch.no_grad():
        model.features[0].weight[[1, 4, 6]] *= 10
    plan = uniform_plan(trace(model, X), 0.6)
    assert plan.groups["features.0"]["kept"] == [1, 4, 6]
    assert plan.widths() == {"features.0": 3, "features.3": 5, "classifier.1": 8}


def test_uniform_takes_scores_multiples_and_constraints(nets: ModuleType) -> None:
    graph = trace(nets.VGG(), X)
    scores = {name: np.arange(size) for name, size in graph.widths().items()}
    plan = uniform_plan(graph, 0.5, scores=scores)
    assert plan.groups["features.3"]["kept"] == [6, 7, 8, 9, 10, 11]
    assert uniform_plan(graph, 0.5, multiple_of=4).widths() == {"features.0": 4, "features.3": 8, "classifier.1": 12}
    rules = Constraints(keep=["features.0"], min_width={"features.*": 9}, multiple_of={"classifier.*": 7})
    with pytest.raises(ConstraintError, match=r"min_width of 'features\.0' must be at most its 8 units, found 9"):
        uniform_plan(graph, 0.5, rules)
    rules = Constraints(keep=["features.0"], min_width={"features.3": 9}, multiple_of={"classifier.*": 7})
    assert uniform_plan(graph, 0.5, rules).widths() == {"features.0": 8, "features.3": 9, "classifier.1": 7}
    with pytest.raises(ConfigError, match=r"the ratio must lie in \[0, 1\), found 1"):
        uniform_plan(graph, 1)
    with pytest.raises(PlanError, match=r"scores of 'features.0' must have shape \(8,\), found \(3,\)"):
        uniform_plan(graph, 0.5, scores=dict.fromkeys(graph.widths(), np.zeros(3)))
    with pytest.raises(PlanError, match=r"scores of 'features.0' must have shape \(8,\), found \(0,\)"):
        uniform_plan(graph, 0.5, scores={})
    with pytest.raises(PlanError, match=r"scores of 'features.0' must be numbers, found NaN"):
        uniform_plan(graph, 0.5, scores={name: np.full(size, np.nan) for name, size in graph.widths().items()})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"multiple_of": 4},
            r"multiple_of must map patterns of modules to values, found 4. Try: multiple_of={'\*': 8}",
        ),
        ({"same_as": ["stem"]}, r"same_as must map patterns of modules to values, found \['stem'\]"),
        ({"min_width": {"a": 1.5}}, "min_width of 'a' must be a whole number of at least 1, found 1.5"),
        ({"min_width": {"a": "16"}}, "min_width of 'a' must be a whole number of at least 1, found '16'"),
        ({"multiple_of": {"a": 0}}, "multiple_of of 'a' must be a whole number of at least 1, found 0"),
        ({"keep": "features.0"}, r"keep must be a list of patterns, found 'features.0'. Try: keep=\['features.0'\]"),
    ],
)
def test_constraints_of_another_kind_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Constraints(**fields)


def test_patterns_match_any_layer_of_a_group(resnet: ChannelGraph) -> None:
    rules = resolve(Constraints(keep=["layer1.1.conv2"], multiple_of={"layer2.*.conv1": 4}), resnet)
    assert [name for name, rule in rules.items() if rule.frozen] == ["stem.0 (+2 layers)"]
    assert [name for name, rule in rules.items() if rule.multiple_of == 4] == ["layer2.0.conv1", "layer2.1.conv1"]
    assert rules["layer2.0.conv1"].widths(16) == [4, 8, 12, 16]
    assert rules["layer2.0.conv1"].width(6, 16) == 8


def test_tied_groups_share_width_and_rules(resnet: ChannelGraph) -> None:
    wanted = Constraints(same_as={"layer1.*.conv1": "layer1.0.conv1"}, min_width={"layer1.1.conv1": 7})
    rules = resolve(wanted, resnet)
    assert rules["layer1.1.conv1"].tied_to == "layer1.0.conv1"
    assert rules["layer1.0.conv1"].min_width == 7
    widths = uniform_plan(resnet, 0.5, wanted).widths()
    assert widths["layer1.1.conv1"] == widths["layer1.0.conv1"] == 7
    with pytest.raises(ConstraintError, match="groups with the same width must have the same size"):
        resolve(Constraints(same_as={"layer2.0.conv1": "layer1.0.conv1"}), resnet)
    with pytest.raises(ConstraintError, match="same_as must not go in a circle"):
        resolve(Constraints(same_as={"layer1.0.conv1": "layer1.1.conv1", "layer1.1.conv1": "layer1.0.conv1"}), resnet)


def test_a_pattern_that_matches_nothing_lists_near_names(resnet: ChannelGraph) -> None:
    for constraints in (
        Constraints(keep=["layer1.0.conv7"]),
        Constraints(min_width={"layer1.0.conv7": 2}),
        Constraints(multiple_of={"layer1.0.conv7": 2}),
        Constraints(same_as={"layer1.0.conv7": "layer1.0.conv1"}),
        Constraints(same_as={"layer1.0.conv1": "layer1.0.conv7"}),
    ):
        with pytest.raises(ConstraintError, match=r"'layer1.0.conv7' matches none\. Try: one of 'layer1\.[01]\.conv"):
            resolve(constraints, resnet)
    assert not any(rule.frozen for rule in resolve(Constraints(keep=["fc"]), resnet).values())
