"""Which point a trial tries and when it is given up: optuna's sampler and pruner, as a study takes them.

Seeds follow a trial's number, so workers differ and a resumed study goes on as it would have. Every other one of the
first trials varies the best so far, as a slow network sees few. Tree-structured Parzen estimator: Bergstra et al. 2011;
constant liar: Ginsbourger et al. 2010.
"""

from __future__ import annotations

import math
import random
import statistics
import warnings

from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
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
        self._inner: BaseSampler = self._sampler_of(0)

    def _sampler_of(self, number: int) -> BaseSampler:
        with warnings.catch_warnings():
            # `group`: its interface may change. From Python 3.12 on optuna's warning names this line as its place
            warnings.simplefilter("ignore", ExperimentalWarning)
            return TPESampler(
                n_startup_trials=STARTUP_TRIALS,
                multivariate=True,
                group=True,
                constant_liar=True,
                seed=int(content_hash(self._seed, number)[:8], 16),
            )

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner = self._sampler_of(trial.number)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, object]:
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> object:
        """A drawn value, or, while the estimator knows too little, the best trial's in every other trial.

        The draw comes first in any case: later draws of the trial must not depend on which values were taken over.
        """
        drawn = self._inner.sample_independent(study, trial, param_name, param_distribution)
        finished = study.get_trials(deepcopy=False, states=FINISHED)
        if trial.number % 2 or len(finished) >= STARTUP_TRIALS:
            return drawn

        complete = (earlier for earlier in finished if earlier.state == TrialState.COMPLETE)
        best = max(complete, key=lambda earlier: earlier.value or 0.0, default=None)
        if best is None or best.distributions.get(param_name) != param_distribution:
            return drawn
        chance = random.Random(content_hash(self._seed, trial.number, param_name))
        stays = chance.random() < STAYS
        return best.params[param_name] if stays else drawn


class Hopeless(BasePruner):
    """Stops a trial that lies below the others' median at this budget by more than chance on `images` explains."""

    def __init__(self, images: int) -> None:
        self._images = images

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether to stop `trial` after the step it reported last; presets are never stopped."""
        step = trial.last_step
        if step is None or "preset" in trial.user_attrs:
            return False

        finished = study.get_trials(deepcopy=False, states=FINISHED)
        reported = [earlier.intermediate_values for earlier in finished]
        accuracies = [values[step] for values in reported if step in values]
        if len(accuracies) < JUDGES:
            return False

        # a binomial's standard error; the value is a mean over the budgets so far, each of as many images
        median = statistics.median(accuracies)
        error = math.sqrt(max(median * (1 - median), 0.0) / (self._images * (step + 1)))
        return trial.intermediate_values[step] < median - error
