"""A recipe and what it means: every field that decides something reaches its family, and none reaches another's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from compressor.choices import (
    Choices,
    choices_of,
    given_preprocessing,
    measuring_of,
    ranking_of,
    recovering_of,
    repairing_of,
    require_known,
    scoring_of,
)
from compressor.errors import EngineError, MissingPackageError, RecipeError
from compressor.latency import places
from compressor.planning import RankingOptions
from compressor.planning.ranking import step_of
from compressor.recipe import BY_WIDTH, Recipe
from compressor.relevance import ScoreOptions
from compressor.steering.options import selector_options

PLAIN = Recipe(normalisation="mean")
OTHER: dict[str, dict[str, Any]] = {
    "scoring": {
        "criterion": "l1",
        "composite": "yeom2021",
        "start": "logit",
        "start_class": "predicted",
        "sign": "signed",
        "per": "sample",
        "place": "settled",
        "strict": True,
        "accept": ("aten.erf",),
        "seed": 7,
        "normalisation": "measured",
    },
    "ranking": {
        "reduction": "max",
        "normalisation": "sum",
        "scope": "uniform",
        "per_cost": 0.25,
        "units": ("head",),
        "least": 0.3,
        "multiple": 4,
    },
    "repairing": {"compensate": False, "reestimate": True, "seed": 7},
    "recovering": {"recovery_minutes": 1.0, "finetune_epochs": 3, "learning_rate": 0.1, "distillation": 0.5, "seed": 7},
}
READ = {"scoring": scoring_of, "ranking": ranking_of, "repairing": repairing_of, "recovering": recovering_of}
FIELDS = [(family, name) for family, values in OTHER.items() for name in values]


@pytest.mark.parametrize(("family", "name"), FIELDS)
def test_a_field_that_means_something_to_a_family_reaches_it(family: str, name: str) -> None:
    changed = replace(PLAIN, **{name: OTHER[family][name]})
    assert READ[family](changed) != READ[family](PLAIN)


@pytest.mark.parametrize(("family", "name"), FIELDS)
def test_a_field_reaches_no_family_that_it_means_nothing_to(family: str, name: str) -> None:
    changed = replace(PLAIN, **{name: OTHER[family][name]})
    for other, read in READ.items():
        if name not in OTHER[other]:
            assert read(changed) == read(PLAIN), other


def test_a_field_left_empty_is_the_criterions_own_choice() -> None:
    usual, signed = scoring_of(PLAIN).options, scoring_of(replace(PLAIN, sign="signed")).options
    assert (usual.sign, signed.sign) == (ScoreOptions().sign, "signed")
    assert replace(signed, sign=usual.sign) == usual


LEARNED = replace(PLAIN, criterion="isp")
LEARNING = {
    "gates_start": "lrp",
    "gates_steps": 5,
    "selector_steps": 6,
    "gates_schedule": "isp2022",
    "explanation": 0.9,
    "units": ("head",),
    "seed": 7,
}


@pytest.mark.parametrize("name", list(LEARNING))
def test_how_gates_learn_reaches_learned_criteria_alone(name: str) -> None:
    changed = {name: LEARNING[name]}
    assert scoring_of(replace(LEARNED, **changed)).steering != scoring_of(LEARNED).steering
    assert scoring_of(replace(PLAIN, **changed)).steering == scoring_of(PLAIN).steering


def test_a_schedule_brings_its_steps_unless_others_are_asked_for_and_gates_keep_no_explanation() -> None:
    papers = scoring_of(replace(LEARNED, gates_schedule="isp2022")).steering
    assert (papers.gates.steps, papers.gates.falls, papers.gates.least) == (4000, False, 0.5)
    assert papers.gates.travel / papers.gates.steps == pytest.approx(1e-3)  # AdamW's rate
    assert (papers.selector.area, papers.selector.power, papers.selector.roughness) == (0.2, 0.3, 1e-3)
    large = selector_options(papers, 224)
    assert (large.area, large.power, large.roughness) == (1.0, 0.5, 1e-4)
    assert scoring_of(replace(LEARNED, gates_schedule="isp2022", gates_steps=9)).steering.gates.steps == 9
    assert scoring_of(replace(LEARNED, criterion="gates", explanation=0.9)).steering.explanation == 0


def test_a_selectors_steps_are_as_many_as_asked_for_and_its_predictor_takes_half() -> None:
    for schedule in ("", "isp2022"):
        selector = scoring_of(replace(LEARNED, gates_schedule=schedule, selector_steps=900)).steering.selector
        assert (selector.steps, selector.predictor_steps) == (900, 450)
    assert scoring_of(replace(LEARNED, selector_steps=1)).steering.selector.predictor_steps == 1


def test_measured_scores_rank_as_they_are_and_per_mac() -> None:
    measured = replace(PLAIN, normalisation="measured", per_cost=0.25)
    assert scoring_of(measured).measured
    assert (ranking_of(measured).normalisation, ranking_of(measured).per_cost) == ("none", 1.0)
    assert (ranking_of(PLAIN).normalisation, ranking_of(PLAIN).per_cost) == ("mean", 0.5)
    assert not scoring_of(PLAIN).measured


def test_a_multiple_of_nothing_leaves_the_usual_until_steps_are_measured() -> None:
    assert ranking_of(replace(PLAIN, multiple=0)).multiple == RankingOptions().multiple
    assert ranking_of(replace(PLAIN, multiple=1)).multiple == 1


def test_a_multiple_that_is_asked_for_is_kept_to_and_otherwise_steps_follow_the_width() -> None:
    asked, usual = ranking_of(replace(PLAIN, multiple=8)), ranking_of(replace(PLAIN, multiple=BY_WIDTH))
    assert [step_of(width, asked) for width in (4, 16, 64)] == [8, 8, 8]
    assert [step_of(width, usual) for width in (4, 8, 16, 24, 32, 64, 512)] == [1, 1, 2, 2, 4, 8, 8]
    assert ranking_of(Recipe()).largest_step == usual.largest_step == Choices().ranking.largest_step


@pytest.mark.parametrize("name", ["units", "least", "reduction"])
def test_what_decides_how_far_a_group_is_cut_decides_what_is_measured(name: str) -> None:
    changed = replace(PLAIN, **{name: OTHER["ranking"][name]})
    assert measuring_of(changed) != measuring_of(PLAIN)


@pytest.mark.parametrize("name", ["scope", "per_cost", "multiple", "normalisation"])
def test_what_only_orders_units_leaves_what_was_measured_as_it_is(name: str) -> None:
    """So that another budget or order in the same folder measures nothing again."""
    assert measuring_of(replace(PLAIN, **{name: OTHER["ranking"][name]})) == measuring_of(PLAIN)


def test_a_round_goes_by_all_three_and_without_repair_by_none_of_it() -> None:
    chosen = choices_of(PLAIN)
    assert (chosen.scoring, chosen.ranking) == (scoring_of(PLAIN), ranking_of(PLAIN))
    assert chosen.repairing == repairing_of(PLAIN)
    assert repairing_of(replace(PLAIN, compensate=False)).compensation is None


def test_pre_processing_that_is_not_given_is_none_and_one_number_is_a_square() -> None:
    assert set(given_preprocessing(PLAIN).values()) == {None}
    stated = replace(PLAIN, size=(32,), resize=(36,), interpolation="bicubic", mean=(0.5,), std=(0.2,))
    assert given_preprocessing(stated) == {
        "size": 32,
        "resize": (36,),
        "interpolation": "bicubic",
        "mean": (0.5,),
        "std": (0.2,),
    }
    assert given_preprocessing(replace(PLAIN, size=(32, 48)))["size"] == (32, 48)


@pytest.mark.parametrize(
    ("reason", "error"),
    [("not installed: pip install openvino", MissingPackageError), ("no GPU", EngineError)],
)
def test_a_latency_on_a_runtime_that_is_not_here_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, reason: str, error: type[Exception]
) -> None:
    monkeypatch.setattr(places, "available", lambda: {"openvino": reason, "onnxruntime": ""})
    with pytest.raises(error, match=f"can't be measured here: openvino {reason}"):
        require_known(replace(PLAIN, budget="latency 0.5 on openvino", device="cpu"))


def test_a_composite_that_a_later_stage_would_refuse_is_refused_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "available", lambda: {"onnxruntime": ""})
    require_known(replace(PLAIN, budget="latency 0.5 on onnxruntime", device="cpu"))
    with pytest.raises(RecipeError, match="Did you mean 'yeom2021'"):
        require_known(replace(PLAIN, composite="yeom", device="cpu"))


@pytest.mark.parametrize(
    ("budget", "counted"),
    [("macs 0.5", "macs"), ("parameters 0.5", "parameters"), ("size 1 MB, macs 0.5", "parameters"), ("none", "macs")],
)
def test_gates_are_pressed_by_what_the_budget_counts(budget: str, counted: str) -> None:
    recipe = Recipe(criterion="gates", budget=budget)
    assert scoring_of(recipe).steering.gates.counted == counted
