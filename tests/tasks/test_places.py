"""A detector's distance: scores by their probabilities, boxes by how sure the scores are at their place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.tasks import Reference, reference_of, relative_error, task_named
from compressor.tasks.distances import leaf_distance
from compressor.tasks.places import score_leaves, weights

LAYOUTS = {"maps": (2, 3), "rows": (1,)}  # where the places lie, behind the samples


def answers(layout: str, *, samples: int = 12, as_probabilities: bool = False) -> dict[str, Tensor]:
    """Scores of 3 classes and boxes of 16 places, one of which has an object in each sample."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.full((samples, 3, 16), -6.0)
    places = torch.randint(16, (samples,), generator=generator)
    scores[torch.arange(samples), torch.randint(3, (samples,), generator=generator), places] = 5.0
    boxes = torch.randn(samples, 4, 16, generator=generator)
    if as_probabilities:
        scores = scores.sigmoid()
    leaves = {"cls_logits": scores, "boxes": boxes}
    if layout == "rows":
        return {name: leaf.transpose(1, 2).contiguous() for name, leaf in leaves.items()}  # [N, places, C]
    return {name: leaf.reshape(samples, -1, 4, 4) for name, leaf in leaves.items()}


def reference(leaves: dict[str, Tensor]) -> Reference:
    return reference_of(lambda inputs: leaves, [(torch.zeros(len(leaves["boxes"]), 1), None)], by_place=True)


@pytest.mark.parametrize("as_probabilities", [False, True])
@pytest.mark.parametrize("layout", ["maps", "rows"])
def test_a_box_counts_where_the_scores_are_sure(layout: str, as_probabilities: bool) -> None:
    dense = answers(layout, as_probabilities=as_probabilities)
    distance = task_named("detection", reference=reference(dense)).distance
    channels = 1 if layout == "maps" else 2
    probability = dense["cls_logits"] if as_probabilities else dense["cls_logits"].sigmoid()
    sure = probability.amax(channels, keepdim=True) > 0.5
    off = {where: {**dense, "boxes": dense["boxes"] + 0.3 * mask} for where, mask in (("on", sure), ("beside", ~sure))}
    on, beside = (distance(off[where], dense) for where in ("on", "beside"))
    assert (on > 3 * beside).all()  # although 15 places of 16 are beside
    assert (beside > 0).all()


@pytest.mark.parametrize("layout", ["maps", "rows"])
def test_the_mean_answer_is_one_off(layout: str) -> None:
    dense = answers(layout)
    about = reference(dense)
    task = task_named("detection", reference=about)
    mean_probability = dense["cls_logits"].double().sigmoid().mean(0).logit()
    mean = {"cls_logits": mean_probability.float(), "boxes": about.leaves["boxes"].mean}
    ordinary = {name: leaf[None].expand_as(dense[name]) for name, leaf in mean.items()}
    assert relative_error(task, [(ordinary, dense)]) == pytest.approx(1, rel=1e-4)
    assert relative_error(task, [(dense, dense)]) < 1e-6


def test_far_below_even_one_score_is_as_good_as_another() -> None:
    """A squared distance of logits counts 47 scores of -12 for -6 far above the one that was missed."""
    dense = answers("maps")
    distance = task_named("detection", reference=reference(dense)).distance
    rarer = {**dense, "cls_logits": torch.where(dense["cls_logits"] < 0, -12.0, dense["cls_logits"])}
    missed = {**dense, "cls_logits": torch.where(dense["cls_logits"] > 0, -1.0, dense["cls_logits"])}
    assert (distance(missed, dense) > 2 * distance(rarer, dense)).all()
    squared = leaf_distance(reference(dense))
    assert (squared(rarer, dense) > 20 * squared(missed, dense)).all()


def test_leaves_of_other_names_and_forms_are_compared_as_they_are() -> None:
    dense = {"a": torch.randn(6, 5, 8), "b": torch.randn(6, 4, 8)}
    about = reference_of(lambda inputs: dense, [(torch.zeros(6, 1), None)])
    other = {name: leaf + 0.1 for name, leaf in dense.items()}
    assert not score_leaves(dense)
    assert torch.equal(
        task_named("detection", reference=about).distance(other, dense), leaf_distance(about)(other, dense)
    )
    assert not weights({"scores": torch.randn(2, 3, 8), "embedding": torch.randn(2, 64)}, {"scores": (-3.0, 3.0)})


def test_what_is_said_comes_from_where_the_scores_are_sure() -> None:
    dense = answers("maps")
    said = task_named("detection", reference=reference(dense)).says
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in dense.items()}
    said(leaves, None).sum().backward()
    sure = (dense["cls_logits"] > 0).any(1, keepdim=True)
    gradient = leaves["boxes"].grad
    assert gradient is not None
    assert gradient.abs()[sure.expand_as(gradient)].mean() > 10 * gradient.abs()[~sure.expand_as(gradient)].mean()


@pytest.mark.parametrize("boxes", [(2, 5, 3, 4), (2, 5, 4, 3)])
def test_boxes_of_more_axes_than_their_scores_have_no_weights(boxes: tuple[int, ...]) -> None:
    """Without its last axis [N, K, C, 4] is [N, K, C], which is no place of it."""
    leaves = {"scores": torch.rand(2, 5, 3), "boxes": torch.rand(boxes)}
    assert weights(leaves, {"scores": (0.0, 1.0)}) == {}
