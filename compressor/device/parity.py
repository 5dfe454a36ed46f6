"""What a model answers twice, one array or several, in; the numeric distance out. Knows no runtime and no file.

SQNR in dB = 10 log10(sum ref^2 / sum (ref - out)^2); the reference is always the fp32 original. Of several outputs the
worst counts. Whole numbers and booleans have no distance, only a share of entries that differ.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import GateError
from .channels import LEAST_SPREAD, channel_distance
from .feeds import Array, Arrays, as_tuple

_MOST_DB = 300.0  # stands for no difference at all; beyond what float64 can tell apart
_WORST = sys.float_info.max
_TINY = float(np.finfo(np.float32).tiny)  # a reference of zeros has no magnitude to take a share of
_SQUARE_ROOT_OF_WORST = 1e150  # larger differences have no square, and no cosine
MOST_RELATIVE = 10.0  # a limit beyond it would hold nothing: ten times the largest output
MOST_CHANNEL = MOST_RELATIVE / LEAST_SPREAD  # the same difference, as a share of the least spread that counts
# of a channel's spread: devices compute in other formats than the reference, such as TF32
LEAST_CHANNEL_ELSEWHERE = 5e-2


@dataclass(frozen=True, slots=True)
class Parity:
    """`cosine` is the least over the rows, `top1_agreement` a share of the rows, 1 where no output is of classes.

    Of several outputs, `max_abs`, `mean_abs` and `reference_max_abs` are those of the one whose largest difference is
    the worst share of its largest magnitude; every other figure is the least of all. Outputs that are not finite have
    the worst value of each figure; all figures are finite, so that JSON holds them.

    `channel_relative` is the largest difference as a share of its channel's spread, and `channel` which one it is, of
    outputs whose channels are of different units (`device.channels`); None and empty where there are none.
    """

    n: int
    max_abs: float
    mean_abs: float
    cosine: float
    sqnr_db: float
    top1_agreement: float
    reference_max_abs: float
    channel_relative: float | None = None
    channel: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a parity may be at worst. `relative` bounds max_abs by a share of the reference's largest magnitude.

    `channel` bounds `channel_relative`; None leaves the channels to the other limits.
    """

    relative: float = 1e-3
    cosine: float = 0.9999
    top1_agreement: float = 0.0
    channel: float | None = None


# fp32 re-ordering moves logits by some 1e-6 of their scale; fp16 by 1e-4 to 2e-2 (trained MobileNetV2: 2e-2, least
# cosine 0.9990). For int8 these are no judgement but a net for broken files: accuracy judges (12 to 35 dB are usual).
LIMITS = {
    "fp32": Limits(relative=1e-3, cosine=0.99999, channel=1e-2),
    "fp16": Limits(relative=5e-2, cosine=0.998),
    "int8": Limits(relative=1.0, cosine=0.7),
}


def compare(reference: Arrays, output: Arrays, names: Sequence[str] = ()) -> Parity:
    """Distance of `output` from `reference`, one array [N, ...] each or as many; the worst of them.

    Raises GateError when numbers or shapes differ or nothing is compared; `names` are the outputs' for its message.
    """
    references, outputs = as_tuple(reference), as_tuple(output)
    if len(references) != len(outputs):
        raise GateError(
            f"there are {len(outputs)} outputs, the reference has {len(references)}; the file holds another model"
        )
    if not references:
        raise GateError("there are no outputs, so nothing was compared")
    prefixes = [""]
    if len(references) > 1:
        prefixes = [_prefix(index, names) for index in range(len(references))]
    return worst_of(list(map(_compare_one, references, outputs, prefixes)))


def worst_of(parities: Sequence[Parity]) -> Parity:
    """The largest difference of all, and for every other figure the worst."""
    worst = max(parities, key=relative_difference)
    worst_channel = max(parities, key=_channel_difference)
    return replace(
        worst,
        cosine=min(parity.cosine for parity in parities),
        sqnr_db=min(parity.sqnr_db for parity in parities),
        top1_agreement=min(parity.top1_agreement for parity in parities),
        channel_relative=worst_channel.channel_relative,
        channel=worst_channel.channel,
    )


def relative_difference(parity: Parity) -> float:
    """The largest difference as a share of the reference's largest magnitude."""
    return parity.max_abs / max(parity.reference_max_abs, _TINY)


def _channel_difference(parity: Parity) -> float:
    """Below all others where no units are mixed."""
    return -1.0 if parity.channel_relative is None else parity.channel_relative


def _prefix(index: int, names: Sequence[str]) -> str:
    if index < len(names):
        return f"output {index} ({names[index]}): "
    return f"output {index}: "


def _compare_one(reference: Array, output: Array, prefix: str) -> Parity:
    """Of one output; `prefix` is how messages begin."""
    if reference.shape != output.shape:
        raise GateError(
            f"{prefix}the outputs have shape {list(output.shape)}, the reference {list(reference.shape)}; "
            "the file holds another model or a fixed batch"
        )
    if reference.ndim == 0 or reference.size == 0:
        shape = list(reference.shape)
        raise GateError(f"{prefix}outputs of shape {shape} hold no number, so nothing was compared; give images")
    if reference.dtype.kind in "biu":
        return _equality(reference, output)
    return _distance(reference, output, prefix)


def _equality(reference: Array, output: Array) -> Parity:
    """Of whole numbers or booleans: each entry that differs is a difference of 1 to a magnitude of 1, spread over all.

    One number for each sample is taken for its class.
    """
    differing = float((reference != output).mean())
    return Parity(
        n=len(reference),
        max_abs=differing,
        mean_abs=differing,
        cosine=1.0,
        sqnr_db=min(_MOST_DB, -10 * math.log10(differing)) if differing else _MOST_DB,
        top1_agreement=1 - differing if reference.ndim == 1 else 1.0,
        reference_max_abs=1.0,
    )


def _distance(reference: Array, output: Array, prefix: str) -> Parity:
    """Of floats. A row of numbers, [N, C] or [N, C, 1, 1], is taken for its classes."""
    wanted = reference.reshape(len(reference), -1).astype(np.float64)  # [N, everything else]
    actual = output.reshape(len(output), -1).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        difference = np.abs(wanted - actual)
    top1_agreement = 1.0
    if reference.shape[1:2] == wanted.shape[1:]:
        top1_agreement = float((wanted.argmax(1) == actual.argmax(1)).mean())
    worst = Parity(
        n=len(wanted),
        max_abs=_WORST,
        mean_abs=_WORST,
        cosine=-1.0,
        sqnr_db=-_MOST_DB,
        top1_agreement=top1_agreement,
        reference_max_abs=float(np.nan_to_num(np.abs(wanted)).max()),
    )
    if not difference.max() < _SQUARE_ROOT_OF_WORST:  # nor is NaN
        return worst

    parity = replace(
        worst,
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        cosine=_least_cosine(wanted, actual),
        sqnr_db=_sqnr_db(wanted, difference),
    )
    shape = reference.shape
    worst_channel = channel_distance(wanted.reshape(shape), difference.reshape(shape))
    if worst_channel is None:
        return parity
    return replace(parity, channel_relative=worst_channel.relative, channel=f"{prefix}{worst_channel.place}")


def _least_cosine(wanted: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    """Of the rows [N, values]; a row of zeros has no direction: 1 beside another, 0 beside anything else."""
    lengths = np.linalg.norm(wanted, axis=1) * np.linalg.norm(actual, axis=1)  # [N]
    has_angle = lengths > 0
    is_same = (wanted == actual).all(axis=1)
    cosine = (wanted * actual).sum(1) / np.where(has_angle, lengths, 1)
    return float(np.where(has_angle, cosine, is_same.astype(np.float64)).min())


def _sqnr_db(reference: NDArray[np.float64], difference: NDArray[np.float64]) -> float:
    signal, noise = float((reference**2).sum()), float((difference**2).sum())
    if noise == 0:
        return _MOST_DB
    if not signal > 0:
        return -_MOST_DB
    ratio_db = 10 * math.log10(signal / noise)
    return min(_MOST_DB, max(-_MOST_DB, ratio_db))


def failures(parity: Parity, limits: Limits) -> tuple[str, ...]:
    """One line per limit that does not hold; empty when all do. NaN keeps to no limit."""
    allowed = limits.relative * max(parity.reference_max_abs, _TINY)
    lines = []
    if not parity.max_abs <= allowed:
        lines.append(f"max |difference| {parity.max_abs:.3g}, at most {allowed:.3g}")
    if not parity.cosine >= limits.cosine:
        lines.append(f"least cosine {parity.cosine:.6f}, at least {limits.cosine}")
    if not parity.top1_agreement >= limits.top1_agreement:
        lines.append(f"top-1 agreement {parity.top1_agreement:.4f}, at least {limits.top1_agreement}")
    if limits.channel is not None and _channel_difference(parity) > limits.channel:
        share = f"max |difference| {parity.channel_relative:.3g} of its spread"
        lines.append(f"{parity.channel}: {share}, at most {limits.channel:.3g}")
    return tuple(lines)


def limits_around(parity: Parity, *, slack: float = 2.0) -> Limits:
    """What another device must keep to, given what was measured here: `slack` times the distance, fp32's at least."""
    floor = LIMITS["fp32"]
    channel = parity.channel_relative
    return Limits(
        relative=min(max(slack * relative_difference(parity), floor.relative), MOST_RELATIVE),
        cosine=max(min(1 - slack * (1 - parity.cosine), floor.cosine), -1.0),
        channel=None if channel is None else min(max(slack * channel, LEAST_CHANNEL_ELSEWHERE), MOST_CHANNEL),
    )
