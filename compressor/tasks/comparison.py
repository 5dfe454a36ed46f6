"""How much a network's answers are those of another, the dense one: what needs no labels and serves every task."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor
from torch.nn import functional

from ..device.intervals import mean_interval
from ..distributed import sum_over_ranks
from ..errors import ModelError
from ..records import FloatArray, Quality
from ..tensors import Inputs, count
from .distances import both
from .places import even_score
from .qualities import chance_of, decibels, image_errors, rows_of, share
from .record import (
    Data,
    Leaves,
    Predict,
    Targets,
    class_leaf,
    finite,
    in_words,
    map_leaf,
    per_sample,
    sample_leaves,
)
from .reference import scale_of

WORST = 1e6  # a sample whose answer is not finite is so many times as far off as the mean answer


def fidelity(predict: Predict, dense_predict: Predict, data: Data) -> Quality:
    """1 - squared error of each leaf over its spread over the images, the mean over leaves; 0 is the mean answer's.

    A leaf that never changes has its square for its spread. The interval is the bootstrap's over samples' errors, the
    spreads are held.
    """
    sums: dict[str, FloatArray] = {}

    def measure(inputs: Inputs, targets: Targets) -> Mapping[str, Tensor]:
        leaves, dense = predict(inputs), dense_predict(inputs)
        errors: dict[str, Tensor] = {}
        for name in sample_leaves(dense, count(inputs)):
            ours, theirs = both(leaves, dense, name)
            errors[name] = per_sample((ours.double() - theirs.double()).square())
            for part, values in {"sum": theirs.double(), "square": theirs.double().square()}.items():
                sums[f"{name}|{part}"] = sums.get(f"{name}|{part}", 0.0) + values.sum(0).cpu().numpy()
        if not errors:
            raise ModelError(f"no leaf of real numbers is there to compare: {in_words(dense)}")
        return errors

    rows = rows_of(data, measure)
    totals = sum_over_ranks(sums)
    relative = [errors / _spread(totals, name, len(errors)) for name, errors in rows.items()]
    errors = np.nan_to_num(np.mean(relative, axis=0), nan=WORST, posinf=WORST).clip(max=WORST)
    return Quality("fidelity", float(1 - errors.mean()), len(errors), *mean_interval(1 - errors), chance=0.0)


def _spread(totals: Mapping[str, FloatArray], name: str, samples: int) -> float:
    """A leaf's squared distance from its mean, the mean over samples."""
    square = float(totals[f"{name}|square"].sum()) / samples
    spread = square - float(np.square(totals[f"{name}|sum"] / samples).sum())  # mean of |y|^2 less |mean y|^2
    return scale_of(spread, square)


Decisions = Callable[[Leaves], Tensor]  # whole numbers [N, ...]


def classes_of(leaves: Leaves) -> Tensor:
    """int64 [N]: the class."""
    return finite(class_leaf(leaves)[1]).argmax(1)


def labels_of(leaves: Leaves) -> Tensor:
    """int64 [N, C]: which labels; scores within 0 and 1 are taken for probabilities."""
    scores = finite(class_leaf(leaves)[1])
    return (scores > even_score(float(scores.min()), float(scores.max()))).long()


def pixels_of(leaves: Leaves) -> Tensor:
    """int64 [N, h, w]: the class of each pixel; of one channel alone, whether it is above 0."""
    logits = finite(map_leaf(leaves)[1])
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).long()
    return logits.argmax(1)


def agreement(
    predict: Predict,
    dense_predict: Predict,
    data: Data,
    *,
    decisions: Decisions = classes_of,
    metric: str = "agreement",
) -> Quality:
    """The share of a sample's decisions that are the dense network's, the mean over samples.

    One decision a sample is a counted share with Wilson's interval and what chance would get; several have the
    bootstrap's over samples.
    """

    def measure(inputs: Inputs, targets: Targets) -> Mapping[str, Tensor]:
        ours, theirs = decisions(predict(inputs)), decisions(dense_predict(inputs))
        _require_one_form(ours, theirs)
        alike = (ours == theirs).double()
        if alike.dim() > 1:
            return {"alike": alike.flatten(1).mean(1)}
        return {"alike": alike, "ours": ours, "theirs": theirs}

    rows = rows_of(data, measure)
    if "ours" in rows:
        return share(metric, rows["alike"], chance_of(rows["ours"], rows["theirs"]))
    shares = rows["alike"]
    return Quality(metric, float(shares.mean()), len(shares), *mean_interval(shares))


def _require_one_form(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise ModelError(f"answers differ in form: {list(ours.shape)} decisions, expected {list(theirs.shape)}")


def label_agreement(predict: Predict, dense_predict: Predict, data: Data) -> Quality:
    """The share of labels that are given or not as by the dense network.

    Whether scores are probabilities is told by all the dense network's together, whatever the batches.
    """

    def measure(inputs: Inputs, targets: Targets) -> Mapping[str, Tensor]:
        ours, theirs = (finite(class_leaf(network(inputs))[1]) for network in (predict, dense_predict))
        _require_one_form(ours, theirs)
        return {"ours": ours, "theirs": theirs}

    rows = rows_of(data, measure)  # [N, C] both
    even = even_score(float(rows["theirs"].min()), float(rows["theirs"].max()))
    shares = ((rows["ours"] > even) == (rows["theirs"] > even)).mean(1)
    return Quality("label agreement", float(shares.mean()), len(shares), *mean_interval(shares))


def pixel_agreement(predict: Predict, dense_predict: Predict, data: Data) -> Quality:
    """The share of pixels with the dense network's class."""
    return agreement(predict, dense_predict, data, decisions=pixels_of, metric="pixel agreement")


def mean_cosine(predict: Predict, dense_predict: Predict, data: Data) -> Quality:
    """The mean cosine of a sample's row to the dense network's."""

    def measure(inputs: Inputs, targets: Targets) -> Mapping[str, Tensor]:
        ours, theirs = (finite(class_leaf(network(inputs))[1]).double() for network in (predict, dense_predict))
        return {"cosine": functional.cosine_similarity(ours, theirs, dim=1)}

    cosines = rows_of(data, measure)["cosine"]
    return Quality("mean cosine", float(cosines.mean()), len(cosines), *mean_interval(cosines))


def psnr_to_dense(predict: Predict, dense_predict: Predict, data: Data) -> Quality:
    """PSNR with the dense network's images for targets."""

    def measure(inputs: Inputs, targets: Targets) -> Mapping[str, Tensor]:
        dense = dense_predict(inputs)
        name, _ = map_leaf(dense)
        ours, theirs = both(predict(inputs), dense, name)
        return image_errors(finite(ours).double(), theirs.double())

    return decibels("PSNR to dense", rows_of(data, measure))
