"""How good a network's answers are for labelled data: predict and data in, one `Quality` out.

A metric keeps one row of figures a sample, over all ranks, and makes its value and its interval of those rows. Where a
sample's row says it all the formulas are here; average precision, which needs a sorted list, is torchmetrics'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..device import scoring
from ..device.intervals import bootstrap, jackknife, mean_interval
from ..distributed import joined_over_ranks, sum_over_ranks
from ..errors import DataError, MissingPackageError
from ..placement import reusing_freed_memory
from ..records import FloatArray, IntArray, Quality, wilson
from ..tensors import Inputs
from .objectives import labels_or_answers, masks_of, multi_hot, pixel_logits, sized_like
from .record import Data, Predict, Targets, class_leaf, finite, leaf_like, per_sample

MOST_DECIBELS = 100.0  # of PSNR, for images that are equal; float32 rounds at about 140
Rows = dict[str, FloatArray]


@torch.no_grad()
@reusing_freed_memory()
def rows_of(data: Data, measure: Callable[[Inputs, Targets], Mapping[str, Tensor]]) -> Rows:
    """What `measure` says of each batch, each [N, ...], for all samples of all ranks. Raises DataError without any."""
    batches: dict[str, list[FloatArray]] = {}
    for inputs, targets in data:
        for name, values in measure(inputs, targets).items():
            batches.setdefault(name, []).append(values.detach().cpu().double().numpy())
    if not batches:
        raise DataError("there are no images to judge the answers of; expected at least one batch")
    return joined_over_ranks({name: np.concatenate(parts) for name, parts in batches.items()})


def share(metric: str, right: FloatArray, chance: float) -> Quality:
    """The quality of [N] answers that are right (1) or not (0), with Wilson's interval."""
    value = float(right.mean())
    low, high = wilson(value, len(right))
    return Quality(metric, value, len(right), low, high, chance)


def chance_of(answers: FloatArray, truths: FloatArray) -> float:
    """The share of `truths` [N] that the same answers in a random order would meet: Cohen's kappa starts from it."""
    return float(sum((answers == label).mean() * (truths == label).mean() for label in np.unique(truths)))


def top1(predict: Predict, data: Data) -> Quality:
    """The share of labelled samples whose largest logit is the label's."""

    def measure(inputs: Inputs, targets: Targets) -> Mapping[str, Tensor]:
        logits = finite(class_leaf(predict(inputs))[1])
        labels_or_answers(logits, targets)  # refuses labels that don't fit
        assert isinstance(targets, Tensor)
        return {"answer": logits.argmax(1), "truth": targets}

    rows = rows_of(data, measure)
    labelled = rows["truth"] >= 0
    answers, truths = rows["answer"][labelled], rows["truth"][labelled]
    return share("top-1", (answers == truths).astype(np.float64), chance_of(answers, truths))


def mean_average_precision(predict: Predict, data: Data) -> Quality:
    """Average precision of each label, the mean over labels that some sample has; the interval is the jackknife's.

    By chance it is the share of samples that have the label.
    """

    def measure(inputs: Inputs, targets: Targets) -> Mapping[str, Tensor]:
        scores = finite(class_leaf(predict(inputs))[1])
        labels = multi_hot(scores, targets)
        return {"scores": scores, "labels": torch.full_like(scores, -1) if labels is None else labels}

    rows = rows_of(data, measure)
    scores, labels = rows["scores"], rows["labels"].astype(np.int64)  # [N, C] both
    if not (labels == 1).any():
        raise DataError("no sample has any of the labels; mean average precision needs samples that do")

    def figure(indices: IntArray) -> float:
        return float(np.mean(_average_precisions(scores[indices], labels[indices])))

    value = figure(np.arange(len(scores)))
    low, high = jackknife(figure, len(scores), value)
    present = (labels == 1).any(0)
    prevalence = (labels[:, present] == 1).sum(0) / (labels[:, present] >= 0).sum(0)
    return Quality("mean AP", value, len(scores), low, high, float(prevalence.mean()))


def _average_precisions(scores: FloatArray, labels: IntArray) -> list[float]:
    """One for each label that some sample has; samples where it is not known (-1) are left out."""
    average_precision = _binary_average_precision()
    precisions = []
    for column in np.flatnonzero((labels == 1).any(0)):
        known = labels[:, column] >= 0
        ranks = np.unique(scores[known, column], return_inverse=True)[1]  # as torchmetrics wants shares of one
        shares = torch.from_numpy(ranks / max(1, int(ranks.max())))
        precisions.append(float(average_precision(shares, torch.from_numpy(labels[known, column]))))
    return precisions


def _binary_average_precision() -> Callable[[Tensor, Tensor], Tensor]:
    """torchmetrics takes a second to import, and only this stage needs it."""
    try:
        from torchmetrics.functional.classification import binary_average_precision
    except ImportError as error:
        raise MissingPackageError("mean average precision needs torchmetrics; pip install torchmetrics") from error
    function: Callable[[Tensor, Tensor], Tensor] = binary_average_precision
    return function


def mean_iou(predict: Predict, data: Data) -> Quality:
    """Intersection over union of each class over all pixels, the mean over classes that are there or answered.

    Pixels of no class don't count; the interval is the bootstrap's over images.
    """

    def measure(inputs: Inputs, targets: Targets) -> Mapping[str, Tensor]:
        small = pixel_logits(predict(inputs))
        masks = masks_of(small, targets)
        if masks is None:
            masks = torch.full((len(small), *small.shape[2:]), -1)
        return _class_areas(sized_like(small, masks).argmax(1), masks, small.shape[1])

    rows = rows_of(data, measure)
    return scoring.mean_iou(rows["both"], rows["answered"], rows["true"])  # [N, C] pixels


def _class_areas(answers: Tensor, masks: Tensor, classes: int) -> Mapping[str, Tensor]:
    """Pixels [N, classes] where answer and mask are a class, where the answer is, where the mask is."""
    counted = masks >= 0
    image = torch.arange(len(masks)).view(-1, *[1] * (masks.dim() - 1)).expand_as(masks)

    # one bin for each class of each image: class 5 of 21 in image 2 is bin 2 * 21 + 5 = 47
    def areas(labels: Tensor, where: Tensor) -> Tensor:
        return torch.bincount((image * classes + labels)[where], minlength=len(masks) * classes).view(-1, classes)

    return {
        "both": areas(masks, counted & (answers == masks)),
        "answered": areas(answers, counted),
        "true": areas(masks, counted),
    }


def retrieval_top1(predict: Predict, data: Data) -> Quality:
    """The share of samples whose nearest other one, by cosine, has the same identity.

    Samples without an identity (-1), or alone with theirs, ask nothing; the former are not answered either.
    """

    def measure(inputs: Inputs, targets: Targets) -> Mapping[str, Tensor]:
        rows = functional.normalize(finite(class_leaf(predict(inputs))[1]).double(), dim=1)
        assert isinstance(targets, Tensor)
        return {"row": rows, "identity": targets}

    rows = rows_of(data, measure)
    embeddings = rows["row"][rows["identity"] >= 0]  # [N, D]
    identities = rows["identity"][rows["identity"] >= 0]
    alike = (identities[:, None] == identities[None]).sum(1) - 1
    asking: list[int] = np.flatnonzero(alike > 0).tolist()
    if not asking:
        raise DataError("no identity has two samples; retrieval needs another one to find")
    right = np.array([_nearest_other(embeddings, index, identities) for index in asking], np.float64)
    return share("retrieval top-1", right, float((alike[asking] / (len(identities) - 1)).mean()))


def _nearest_other(embeddings: FloatArray, index: int, identities: FloatArray) -> bool:
    cosines = embeddings @ embeddings[index]
    cosines[index] = -np.inf  # the sample itself is nobody's answer
    return bool(identities[cosines.argmax()] == identities[index])


def psnr(predict: Predict, data: Data) -> Quality:
    """Peak signal-to-noise ratio to the target images, the mean over images, in dB, at most 100.

    10 log10(peak^2 / mean squared error); the peak is what the targets' range tells: 1, 255, or 2 for -1 to 1.
    """

    def measure(inputs: Inputs, targets: Targets) -> Mapping[str, Tensor]:
        assert isinstance(targets, Tensor)
        leaves = predict(inputs)
        leaf = finite(leaf_like(leaves, targets)[1]).double()
        return image_errors(leaf, targets.to(leaf).reshape(leaf.shape))

    return decibels("PSNR", rows_of(data, measure))


def image_errors(images: Tensor, wanted: Tensor) -> Mapping[str, Tensor]:
    """Mean squared error, smallest and largest wanted value of each [N, C, h, w]."""
    flat = wanted.flatten(1)
    errors = (images - wanted).square().flatten(1).mean(1)
    return {"error": errors, "low": flat.amin(1), "high": flat.amax(1)}


def decibels(metric: str, rows: Rows) -> Quality:
    """PSNR of the rows of `image_errors`."""
    peak = _peak(float(rows["low"].min()), float(rows["high"].max()))
    least = peak**2 * 10 ** (-MOST_DECIBELS / 10)
    values = 10 * np.log10(peak**2 / np.maximum(rows["error"], least))
    low, high = mean_interval(values)
    return Quality(metric, float(values.mean()), len(values), low, high, is_share=False)


def _peak(low: float, high: float) -> float:
    rounding = 1.05  # networks overshoot a little
    if low < -0.05:
        return 2.0 if max(-low, high) <= rounding else high - low
    if high <= rounding:
        return 1.0
    return 255.0 if high <= 255 * rounding else high


def r_squared(predict: Predict, data: Data) -> Quality:
    """1 - squared errors over the targets' squared distances from their mean over samples, sums over all entries.

    Entries that are not finite don't count. Where targets don't differ from sample to sample, 1 - root of squared
    errors over squared targets. The interval is the bootstrap's over errors, the targets' spread is held.
    """
    sums: dict[str, FloatArray] = {}

    def measure(inputs: Inputs, targets: Targets) -> Mapping[str, Tensor]:
        assert isinstance(targets, Tensor)
        leaf = finite(leaf_like(predict(inputs), targets)[1]).double()
        wanted = targets.to(leaf).reshape(leaf.shape)
        known = wanted.isfinite()
        wanted = torch.where(known, wanted, 0.0)
        for part, values in {"n": known.double(), "sum": wanted, "square": wanted.square()}.items():
            sums[part] = sums.get(part, 0.0) + values.sum(0).cpu().numpy()
        return {"error": per_sample((leaf - wanted).square() * known)}

    errors = rows_of(data, measure)["error"]
    totals = sum_over_ranks(sums)
    square = float(totals["square"].sum())
    spread = square - float((totals["sum"] ** 2 / np.maximum(totals["n"], 1)).sum())
    if spread > 1e-10 * square:
        terms = 1 - errors * len(errors) / spread
        return Quality("R^2", float(terms.mean()), len(errors), *mean_interval(terms), chance=0.0)

    def figure(counts: FloatArray) -> float:
        return float(1 - np.sqrt(counts @ errors / square)) if square else float("nan")

    if square == 0:
        raise DataError("every target is 0 or not finite; expected targets that differ")
    value = figure(np.ones(len(errors)))
    return Quality("1 - relative RMSE", value, len(errors), *bootstrap(figure, len(errors), value), chance=0.0)
