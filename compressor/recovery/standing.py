"""Where a recovery's training stands, as it is put aside and gone on with."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, replace

import torch
from torch import Tensor

from .options import Setting
from .record import Moment, Trial

LOWERED = 3  # a rate that leads away is divided by it
_NUMBERS, _MOMENTS, _TRIALS = "standing.numbers", "standing.moments", "standing.trials"


@dataclass
class Standing:
    """`steps` there will be in all, which become fewer where time runs short; `way` of the cosine is behind it.

    `seconds` are those spent, `begun_s` of them before the first step; `before` of the moments are from before this
    rate. `best` is the place of the nearest moment. `hurried`: nothing got nearer, and the rest was shortened.
    """

    setting: Setting
    steps: int
    seconds: float
    moments: list[Moment]
    trials: tuple[Trial, ...] = ()
    best: int = 0
    shown: int = 0
    step: int = 0
    way: float = 0.0
    begun_s: float = field(default=-1.0)
    first_steps: int = field(default=0)
    before: int = 0
    hurried: bool = False

    def __post_init__(self) -> None:
        if self.begun_s < 0:
            self.begun_s, self.first_steps, self.before = self.seconds, self.steps, len(self.moments)

    def advance(self, images: int, seconds: float) -> None:
        """A step was made; the rest of the cosine is spread over the steps that are left."""
        self.way += (1 - self.way) / max(1, self.steps - self.step)
        self.step += 1
        self.shown += images
        self.seconds = seconds

    def lower(self, least: float) -> None:
        """A third of the rate, `least` at the least, and a whole cosine over the steps that are left."""
        self.setting = replace(self.setting, rate=max(least, self.setting.rate / LOWERED))
        self.way, self.before = 0.0, len(self.moments)

    def shorten(self, left: int) -> None:
        """At most so many steps more."""
        self.steps = min(self.steps, self.step + left)

    def hurry(self, least: int) -> None:
        """The rest of the cosine in a quarter of its steps: what gets no nearer may do so at lower rates."""
        self.shorten(max(least, (self.steps - self.step) // 4))
        self.hurried = True

    def tensors(self) -> dict[str, Tensor]:
        """All of it as float64 tensors by name, none of them empty."""
        counts = [self.steps, self.best, self.shown, self.step, self.first_steps, self.before, int(self.hurried)]
        numbers = [*counts, self.seconds, self.way, self.begun_s]
        rows = [*_row(self.setting), *map(float, numbers)]
        trials = [[*_row(trial.setting), trial.distance] for trial in self.trials] or [[0.0, 0.0, -1.0]]
        return {
            _NUMBERS: torch.tensor(rows, dtype=torch.float64),
            _MOMENTS: torch.tensor([astuple(moment) for moment in self.moments], dtype=torch.float64),
            _TRIALS: torch.tensor(trials, dtype=torch.float64),
        }

    @classmethod
    def read(cls, state: dict[str, Tensor]) -> Standing:
        """Back from those tensors."""
        rate, batch, *numbers = state[_NUMBERS].tolist()
        steps, best, shown, step, first_steps, before, hurried = map(int, numbers[:7])
        seconds, way, begun_s = numbers[7:]
        moments = [Moment(row[0], int(row[1]), *row[2:]) for row in state[_MOMENTS].tolist()]
        trials = tuple(Trial(_setting(*row[:2]), row[2]) for row in state[_TRIALS].tolist() if row[2] >= 0)
        return cls(
            _setting(rate, batch),
            steps,
            seconds,
            moments,
            trials,
            best=best,
            shown=shown,
            step=step,
            way=way,
            begun_s=begun_s,
            first_steps=first_steps,
            before=before,
            hurried=bool(hurried),
        )


def _row(setting: Setting) -> list[float]:
    return [setting.rate, float(setting.norms == "batch")]


def _setting(rate: float, batch: float) -> Setting:
    return Setting(rate, "batch" if batch else "frozen")
