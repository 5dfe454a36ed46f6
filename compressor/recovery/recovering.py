"""A repaired network, taught by the dense one over all images there are, within a stated time; the best state stays.

Short trials choose the setting on held-out images; then Muon with a warm-up and half a cosine, judged at even
distances, ended by the time or the passes, or soon after nothing gets nearer. A rate that leads away is lowered. What
is killed goes on where it was put aside. Knows no recipe, and no labels but those that only add.
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import fx

from ..accuracy import batch_norms
from ..distributed import from_first, rank
from ..inputs.checkpoints import state_hash
from ..inputs.images import Batches
from ..placement import reusing_freed_memory
from ..records import Slices
from ..steering.checkpoints import Checkpoint, optimiser_state, restore_optimiser
from ..tasks import Task
from ..tensors import count
from .judging import Judge
from .lessons import batches_from, images_in
from .options import RecoveryOptions, Setting
from .pupil import Pupil, State, rate_factor
from .record import Ending, Moment, Recovery
from .standing import Standing
from .teaching import Teaching
from .trials import Clock, choose_setting, seconds_per_step

JUDGEMENTS = 12  # of a recovery, alike apart
PATIENCE = 4  # judgements that come no nearer than those before begin the end
LEAST_GAIN = 1e-3  # of the distance; less is no gain
FAR = 2.0  # times the nearest distance, twice: the rate is too high
LEAST_RATE = 0.01  # of the highest one is not made lower
CHECKPOINT_S = 15.0  # as much is lost at most where a run is killed
_USUAL = RecoveryOptions()
FILE = "recovery-training.safetensors"


class Progress(Protocol):
    """A share of one, and what is happening."""

    def __call__(self, share: float, phase: str = "") -> None: ...


def _silent(share: float, phase: str = "") -> None:
    """Says nothing."""


@reusing_freed_memory()
def recover(
    dense: fx.GraphModule,
    repaired: fx.GraphModule,
    lessons: Batches,
    held_out: Batches,
    *,
    slices: Slices | None = None,
    task: Task | None = None,
    options: RecoveryOptions = _USUAL,
    folder: Path | None = None,
    progress: Progress = _silent,
    clock: Clock = time.monotonic,
) -> tuple[fx.GraphModule, Recovery]:
    """A copy of the repaired network as near to the dense one on `held_out` or nearer, and how it came to that.

    `slices` say which of the dense network's channels are left (features are compared by them), `task` how answers are
    compared; without one the network is a classifier. What is put aside lies in `folder`. Raises DataError where there
    is no image to learn from or to judge on.
    """
    network = copy.deepcopy(repaired)
    learned = {parameter: parameter.requires_grad for parameter in network.parameters()}
    for parameter in learned:
        parameter.requires_grad_(parameter.is_floating_point())
    judge = Judge(dense, held_out, task)
    teaching = Teaching(dense, network, judge.task, lessons, slices=slices, options=options)
    belongs = [asdict(options), state_hash(repaired), state_hash(dense), lessons.batch_size, list(lessons.images.names)]
    file = None if folder is None or rank() > 0 else folder / FILE
    checkpoint = Checkpoint(file, belongs, CHECKPOINT_S)
    pupil = Pupil(network, teaching, lessons, options.seed)
    devices = [teaching.device] if teaching.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # the caller's draws stay its own
        torch.manual_seed(options.seed)
        # every rank goes by the first one's clock, so that all make the same steps
        recovery = _Recovering(pupil, judge, options, checkpoint, progress, lambda: from_first(clock())).run()
    for parameter, was in learned.items():
        parameter.requires_grad_(was)
        parameter.grad = None
    return network, recovery


@dataclass
class _Recovering:
    """One recovery, from its beginning or from where it was put aside to its end; the pupil changes."""

    pupil: Pupil
    judge: Judge
    options: RecoveryOptions
    checkpoint: Checkpoint
    progress: Progress
    clock: Clock

    @property
    def limit_s(self) -> float:
        return max(60 * self.options.minutes, 1e-3)

    @property
    def least_rate(self) -> float:
        return LEAST_RATE * self.options.rate

    @property
    def all_steps(self) -> int:
        """What the passes come to."""
        return self.options.passes * len(self.pupil.lessons)

    def run(self) -> Recovery:
        """Trials and training; the best state is in the pupil afterwards."""
        earlier = from_first(self.checkpoint.read())
        if earlier is None:
            standing, best = self._begun()
            optimiser = self.pupil.begin(standing.setting)
        else:
            _, state = earlier
            standing, best = Standing.read(state), _prefixed(state, "best.")
            self.pupil.restore(_prefixed(state, "now."))
            optimiser = self.pupil.begin(standing.setting)
            restore_optimiser(optimiser, state)
        self._train(standing, best, optimiser)
        self.pupil.restore(best)
        self.checkpoint.close()
        images = self.pupil.lessons.images
        return Recovery(
            tuple(standing.moments),
            standing.best,
            standing.setting,
            standing.trials,
            self._ending(standing),
            len(images),
            self.judge.images,
            self.judge.metric,
            str(self.pupil.teaching.pace),
        )

    def _begun(self) -> tuple[Standing, State]:
        """The start is judged and a setting chosen; the training begins with what its trial came to, if that is
        nearer. Gives the best state so far, too."""
        begin = self.clock()
        start = self.judge.judge(self.pupil.network)
        moments = [Moment(0.0, 0, start.distance, start.fidelity, start.quality)]
        settings = self._settings()
        step_s = seconds_per_step(self.pupil, settings[0], self.clock)

        def say(phase: str) -> None:
            self.progress(min((self.clock() - begin) / self.limit_s, 1.0), phase)

        tried = choose_setting(self.pupil, self.judge, settings, self._within(self.limit_s, step_s), say)
        if tried.distance < start.distance:
            self.pupil.restore(tried.state)
            reached = self.judge.judge(self.pupil.network)
            shown = images_in(self.pupil.lessons, tried.steps)
            moments.append(Moment(self.clock() - begin, shown, reached.distance, reached.fidelity, reached.quality))
        spent = self.clock() - begin
        steps = self._within(self.limit_s - spent, step_s)
        standing = Standing(
            tried.setting, steps, spent, moments, tried.trials, best=len(moments) - 1, shown=moments[-1].shown
        )
        return standing, self.pupil.state()

    def _settings(self) -> tuple[Setting, ...]:
        """Without batch normalisation it makes no difference whose statistics are meant."""
        settings = self.options.settings
        if batch_norms(self.pupil.network):
            return settings
        return tuple(setting for setting in settings if setting.norms == "frozen")

    def _within(self, seconds: float, step_s: float) -> int:
        """How many steps fit in, of those that the passes come to; at least one."""
        return max(1, min(self.all_steps, int(seconds / step_s)))

    def _train(self, standing: Standing, best: State, optimiser: torch.optim.Optimizer) -> None:
        """To the end; `best` holds the nearest state."""
        begin = self.clock() - standing.seconds
        before_s = standing.begun_s
        every = max(1, standing.first_steps // JUDGEMENTS)
        batches = batches_from(self.pupil.lessons, self.options.seed + 1, standing.step)
        while standing.step < standing.steps:
            rate = standing.setting.rate * rate_factor(standing.way)
            batch = next(batches)
            self.pupil.learn(batch, standing.first_steps + standing.step, optimiser, rate)
            standing.advance(count(batch[0]), self.clock() - begin)
            if standing.seconds >= self.limit_s:
                standing.steps = standing.step
            if standing.step % every == 0 or standing.step == standing.steps:
                self._note(standing, best)
                step_s = (self.clock() - begin - before_s) / standing.step
                left = max(0, int((self.limit_s - standing.seconds) / max(step_s, 1e-9)))
                standing.shorten(left)
                if standing.setting.rate > self.least_rate and _leads_away(standing):
                    standing.lower(self.least_rate)
                    self.pupil.restore(best)
                    optimiser = self.pupil.begin(standing.setting)
                elif not standing.hurried and _is_stuck(standing):
                    standing.hurry(every)
            self._put_aside(standing, best, optimiser)
            self._say(standing)

    def _note(self, standing: Standing, best: State) -> None:
        """Judges the pupil; a nearer one is kept."""
        now = self.judge.judge(self.pupil.network)
        nearest = standing.moments[standing.best].distance
        standing.moments.append(Moment(standing.seconds, standing.shown, now.distance, now.fidelity, now.quality))
        if now.distance < (1 - LEAST_GAIN) * nearest:
            standing.best = len(standing.moments) - 1
            best.update(self.pupil.state())

    def _ending(self, standing: Standing) -> Ending:
        """What ended the training."""
        if standing.hurried:
            return "no better"
        if standing.steps >= self.all_steps:
            return "passes"
        return "time"

    def _put_aside(self, standing: Standing, best: State, optimiser: torch.optim.Optimizer) -> None:
        if not self.checkpoint.is_due:
            return
        state = {f"now.{name}": tensor for name, tensor in self.pupil.tensors.items()}
        state |= {f"best.{name}": tensor for name, tensor in best.items()}
        self.checkpoint.write(standing.step, {**state, **standing.tensors(), **optimiser_state(optimiser)})

    def _say(self, standing: Standing) -> None:
        share = max(standing.step / standing.steps, standing.seconds / self.limit_s)
        start, best = standing.moments[0].fidelity, standing.moments[standing.best].fidelity
        self.progress(min(share, 1.0), f"fidelity {start:.3f} to {best:.3f}")


def _leads_away(standing: Standing) -> bool:
    """Whether the first two judgements at this rate go farther and farther from the nearest before, or very far."""
    distances = [moment.distance for moment in standing.moments[standing.before :]]
    if len(distances) != 2 or standing.best >= standing.before:
        return False
    nearest, (first, second) = standing.moments[standing.best].distance, distances
    return nearest < first < second or min(first, second) > FAR * nearest


def _is_stuck(standing: Standing) -> bool:
    """By the moments of the training alone: its first steps may lead away from a start that is very near."""
    distances = [moment.distance for moment in standing.moments[standing.before :]]
    if len(distances) <= PATIENCE:
        return False
    return min(distances[-PATIENCE:]) >= (1 - LEAST_GAIN) * min(distances[:-PATIENCE])


def _prefixed(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
