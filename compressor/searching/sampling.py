"""Which point a trial tries and when it is given up: optuna's sampler and pruner, as a study takes them.

Seeds follow a trial's number, so workers differ and a resumed study goes on as it would have. Every other one of the
first trials varies the best so far, as a slow network sees few. Tree-structured Parzen estimator: Bergstra et al. 2011;
constant liar: Ginsbourger et al. 2010.
"""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ..files import content_hash

STARTUP_TRIALS = 12  # before the estimator trusts what it has seen; every other one varies the best one so far
STAYS = 0.7  # share of the best one's values that a variation keeps
JUDGES = 6  # trials that must have reached a budget before one may be stopped there
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class Seeded(BaseSampler):
    """A sampler made anew for every trial from the trial's number."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inner: BaseSampler = self._made(0)

    def _made(self, number: int) -> BaseSampler:
        return TPESampler(
            n_startup_trials=STARTUP_TRIALS,
            multivariate=True,
            group=True,
            constant_liar=True,
            seed=int(content_hash(self._seed, number)[:8], 16),
        )

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner = self._made(trial.number)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        drawn = self._inner.sample_independent(study, trial, param_name, param_distribution)
        done = study.get_trials(deepcopy=False, states=FINISHED)
        if trial.number % 2 or len(done) >= STARTUP_TRIALS:
            return drawn
        judged = (t for t in done if t.state == TrialState.COMPLETE)
        best = max(judged, key=lambda t: t.value or 0.0, default=None)
        stays = random.Random(content_hash(self._seed, trial.number, param_name)).random() < STAYS
        if best is None or not stays or best.distributions.get(param_name) != param_distribution:
            return drawn
        return best.params[param_name]


class Hopeless(BasePruner):
    """Stops a trial that lies below the others' median at this budget by more than chance on `images` explains."""

    def __init__(self, images: int) -> None:
        self._images = images

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        step = trial.last_step
        if step is None or "preset" in trial.user_attrs:
            return False
        reached = [t.intermediate_values for t in study.get_trials(deepcopy=False, states=FINISHED)]
        others = [values[step] for values in reached if step in values]
        if len(others) < JUDGES:
            return False
        middle = statistics.median(others)
        error = math.sqrt(max(middle * (1 - middle), 0.0) / (self._images * (step + 1)))
        return trial.intermediate_values[step] < middle - error
