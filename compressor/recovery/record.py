"""What a recovery came to, in plain values: how near the network was at each moment, what was tried, why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .options import Setting

Ending = Literal["time", "passes", "no better"]
_WORDS = {
    "time": "the time was over",
    "passes": "all passes over the images were made",
    "no better": "fidelity on held-out images had stopped rising",
}


@dataclass(frozen=True, slots=True)
class Moment:
    """A judgement on held-out images after so many seconds of training, and so many images shown.

    `distance` is the task's, the mean over images: 0 for the dense network's answers. `fidelity` is of all leaves,
    `quality` the share of a classifier's decisions that are the dense one's; of other tasks it is the fidelity.
    """

    seconds: float
    shown: int
    distance: float
    fidelity: float
    quality: float


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting, and the distance that a short training with it came to."""

    setting: Setting
    distance: float


@dataclass(frozen=True, slots=True)
class Recovery:
    """The repaired network's own judgement is the first moment; `best` is the place of the one that was kept.

    `images` trained, `held` told when to end; `metric` names the moments' quality, `precision` what layers computed in.
    """

    moments: tuple[Moment, ...]
    best: int
    setting: Setting
    trials: tuple[Trial, ...]
    ended: Ending
    images: int
    held: int
    metric: str
    precision: str = "float32"

    @property
    def gained(self) -> bool:
        """Whether any moment was nearer to the dense network than the beginning."""
        return self.best > 0


def text_of(recovery: Recovery) -> str:
    """What happened in two or three sentences."""
    start, best = recovery.moments[0], recovery.moments[recovery.best]
    shown = recovery.moments[-1].shown
    if recovery.gained:
        gain = f"Fidelity on those rose from {start.fidelity:.4f} to {best.fidelity:.4f}"
        if recovery.metric != "fidelity":
            gain += f", {recovery.metric} with the dense network from {start.quality:.4f} to {best.quality:.4f}"
        gain += "."
    else:
        gain = "Nothing came nearer to the dense network than the repaired one."
    sentences = [
        f"Recovery: {recovery.images:,} images taught ({shown:,} were shown in all, no label needed), "
        f"{recovery.held:,} others told when to end: after {_minutes(recovery.moments[-1].seconds)}, as "
        f"{_WORDS[recovery.ended]}. Its layers computed in {recovery.precision}.",
        gain,
    ]
    if len(recovery.trials) > 1:
        sentences.append(f"Of {_settings(recovery.trials)} the first was taken.")
    return " ".join(sentences)


def _settings(trials: Sequence[Trial]) -> str:
    ranked = sorted(trials, key=lambda trial: trial.distance)
    return "; ".join(f"{trial.setting} (distance {trial.distance:.4g})" for trial in ranked)


def _minutes(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min"
