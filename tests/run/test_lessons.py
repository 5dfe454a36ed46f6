"""Images that learned criteria learn from: how many are read, and that none of them evaluates or judges."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np

from compressor.inputs.images import Batches, Images
from compressor.recipe import make_recipe
from compressor.run.judges import JUDGE_IMAGES, spare_of
from compressor.run.lessons import lessons_of, shown_to_learned
from compressor.run.work import Work


def work_of(images: Images, criterion: str) -> Work:
    parts = {name: images.subset(np.arange(start, start + 8)) for name, start in (("calibration", 0), ("search", 8))}
    splits = SimpleNamespace(**parts, hashes={"calibration": "c", "search": "s"})
    recipe = make_recipe({"model": "net", "criterion": criterion, "batch_size": 4})
    return cast(Work, SimpleNamespace(recipe=recipe, splits=splits, prepared_as=None))


def test_as_many_images_are_set_apart_as_the_longest_training_shows() -> None:
    assert shown_to_learned(make_recipe({"model": "net", "criterion": "lrp"})) == 0
    assert shown_to_learned(make_recipe({"model": "net", "criterion": "gates", "gates_steps": 10})) == 320
    papers = {"criterion": "isp", "gates_schedule": "isp2022", "batch_size": 2, "finetune_epochs": 0}
    papers = make_recipe({"model": "net", **papers})
    assert shown_to_learned(papers) == 8000
    assert spare_of(papers) == JUDGE_IMAGES + 8000
    assert spare_of(make_recipe({"model": "net", "finetune_epochs": 0})) == 0
    assert spare_of(replace(papers, precisions=("int8",), criterion="lrp")) == JUDGE_IMAGES


def test_what_neither_evaluates_nor_judges_teaches(images: Images) -> None:
    lessons = lessons_of(work_of(images, "isp"), judging=5)
    assert lessons is not None
    batches = lessons.value
    assert isinstance(batches, Batches)
    assert batches.images.names == images.names[:8] + images.names[13:16]
    assert [len(inputs) for inputs, _ in batches] == [4, 4, 3]
    few = lessons_of(work_of(images, "gates"), judging=100)
    assert few is not None
    assert cast(Batches, few.value).images.names == images.names[:8]
    assert few.stands_for != lessons.stands_for


def test_other_criteria_have_no_lessons(images: Images) -> None:
    assert lessons_of(work_of(images, "lrp"), judging=5) is None
