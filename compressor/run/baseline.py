"""For budgets in time: the dense network in, steps and tables of its layers, timed once on this machine, out.

All of it is kept in the run's folder, entry by entry. Real networks are timed here too, against the dense one. Knows
no plan.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import fx

from ..budgets import Budget, require_removal
from ..choices import ranking_of
from ..device.feeds import Arrays
from ..device.runtimes import REFERENCE, row_of
from ..files import content_hash, file_sha256, read_json, recorded, write_json, write_text
from ..latency.clocks import Remember, file_clock, time_file, time_network, torch_clock
from ..latency.correction import Ratio, unreachable
from ..latency.model import (
    LatencyModel,
    Measuring,
    group_steps,
    make_latency_meter,
    measure_model,
    measure_steps,
    model_to_json,
)
from ..latency.places import place_of
from ..latency.tables import Kept, shared_place
from ..latency.trial import export_for, time_ratio, time_ratio_eager
from ..latency.uses import uses_of
from ..placement import code_of, release
from ..planning import RankingOptions
from ..planning.budget import everything_gone, least_share
from ..pruning import Structure, prune
from ..pruning.surgery import removed_classes
from ..recipe import Recipe
from ..records import InputSpec, Scores
from ..relevance import ScoreOptions, score
from ..tensors import Inputs, noise_like
from .fingerprints import Known
from .stages import Keeper, Notify, Progress
from .work import Work

STEPS, TIMED = "steps/1", "timed/2"


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """The dense network whose time others are a share of, and what times are taken with.

    `weights` is the hash of what it was read from, `images` [N, ...] of each input are drawn from, `inputs` say what
    these are; `folder` is the run's.
    """

    dense: fx.GraphModule
    structure: Structure
    weights: str
    images: Arrays
    inputs: tuple[InputSpec, ...]
    ranking: RankingOptions
    recipe: Recipe
    folder: Path

    @property
    def example(self) -> Inputs:
        """What the network was traced with."""
        return noise_like(self.inputs)


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """What predicts a network's time, and what is timed where it must be known.

    `dense_ms` is the dense network's time for a batch, with as many threads as were asked for.
    """

    baseline: Baseline
    model: LatencyModel
    dense_ms: float

    @property
    def ranking(self) -> RankingOptions:
        """The recipe's, with each group's widths on the steps that were measured."""
        return _ranking_on(self.baseline, self.model)


def baseline_of(work: Work, structure: Structure, budget: Budget) -> Baseline:
    """What a run times its networks against."""
    return Baseline(
        dense=work.dense,
        structure=structure,
        weights=work.model.sha256,
        images=work.sample(max(16, budget.batch)),
        inputs=work.inputs,
        ranking=ranking_of(work.recipe),
        recipe=work.recipe,
        folder=work.stages.folder,
    )


def any_scores(graph: fx.GraphModule, structure: Structure, recipe: Recipe) -> Scores:
    """Random scores by the recipe's seed, for what does not depend on them: how far a budget can be reached."""
    return score(graph, structure.groups, [], criterion="random", options=ScoreOptions(seed=recipe.seed))


def find_steps(work: Work, structure: Structure) -> dict[str, int]:
    """Of each group, the widths that pay on this machine; measured once."""
    groups = work.stages.keys["groups"]
    return work.stages.make(
        "steps",
        _measured_steps,
        Keeper(_write_steps, _read_steps),
        place=_place(_probing()),
        graph=Known(work.dense, groups),
        structure=Known(structure, groups),
    )


def _measured_steps(graph: fx.GraphModule, structure: Structure, progress: Progress) -> dict[str, int]:
    return steps_here(graph, structure)


def steps_here(graph: fx.GraphModule, structure: Structure) -> dict[str, int]:
    """The same, measured now."""
    with _measuring(_probing(), Kept(None, shared_place())) as measuring:
        return group_steps(graph, structure, measure_steps(uses_of(graph), measuring))


def _write_steps(folder: Path, steps: Mapping[str, int]) -> None:
    write_json(folder / "steps.json", {"schema": STEPS, "steps": steps})


def _read_steps(folder: Path) -> dict[str, int]:
    return dict(read_json(folder / "steps.json", STEPS)["steps"])


def find_tables(work: Work, structure: Structure, budget: Budget, also: Sequence[Budget] = ()) -> Tables:
    """The layers' times on the budget's runtime, measured once.

    Raises BudgetError where no network is fast enough, or where the dense one is and meets the budgets `also` too.
    """
    baseline = baseline_of(work, structure, budget)
    threads, dense_ms = work.stages.make(
        "latency-model",
        _tabled,
        Keeper(_write_tabled, _read_tabled),
        place=_place(budget),
        # no time depends on what is in the images
        baseline=Known(baseline, [work.stages.keys["groups"], asdict(baseline.ranking)]),
        budget=budget,
        also=list(also),
    )
    model = _measure_model(baseline, replace(budget, threads=threads), _kept_of(baseline))  # all of it is kept by now
    return Tables(baseline, model, dense_ms)


def _tabled(baseline: Baseline, budget: Budget, also: Sequence[Budget], progress: Progress) -> tuple[int, float]:
    """How many threads the layers' tables were timed with, and the dense network's milliseconds.

    The tables lie in the run's folder, entry by entry. Raises BudgetError where no network is fast enough, or where the
    dense one is.
    """

    def say(phase: str, share: float) -> None:
        progress(share, phase)

    kept = _kept_of(baseline)
    if budget.amount:  # told before anything else is timed
        release()
        require_removal([budget.of(_dense_us(baseline, budget, kept) / 1e3), *also])

    tabled = budget
    shares_cores = row_of(budget.runtime).on_processor and budget.threads != 1
    if shares_cores and place_of(budget).is_busy():
        tabled = replace(budget, threads=1)
    model = _measure_model(baseline, tabled, kept, say)
    dense_us = _dense_us(baseline, budget, kept) if budget.amount else model.dense_us
    dense_ms = dense_us / 1e3
    kept.write(budget=str(budget), tables_on=str(tabled), model=model_to_json(model))
    _refuse_early(baseline, budget.of(dense_ms), model)
    return tabled.threads, dense_ms


def _kept_of(baseline: Baseline) -> Kept:
    return Kept(baseline.folder / "latency-model.json", shared_place())


def _ranking_on(baseline: Baseline, model: LatencyModel) -> RankingOptions:
    """The recipe's, with each group's widths on the steps that were measured."""
    return replace(baseline.ranking, steps=group_steps(baseline.dense, baseline.structure, model.steps))


def _write_tabled(folder: Path, tabled: tuple[int, float]) -> None:
    threads, dense_ms = tabled
    write_json(_scratch(folder) / "timed.json", {"schema": TIMED, "threads": threads, "dense_ms": dense_ms})


def _read_tabled(folder: Path) -> tuple[int, float]:
    content = read_json(_scratch(folder) / "timed.json", TIMED)
    return int(content["threads"]), float(content["dense_ms"])


def _scratch(folder: Path) -> Path:
    return folder / "stages" / "latency-model"


def _probing() -> Budget:
    """What a counted budget's widths are measured by where they keep to a runtime's steps."""
    return Budget("latency", 0.5, runtime=REFERENCE, threads=1)


def _place(budget: Budget) -> tuple[object, ...]:
    """What a time stands for."""
    return *place_of(budget).stands_for(budget.runtime), budget.batch, budget.threads


def _takes_networks(budget: Budget) -> bool:
    """Whether what is timed is the network itself, in this process, and no file of it."""
    return row_of(budget.runtime).takes == "network"


@contextlib.contextmanager
def _measuring(budget: Budget, kept: Kept, notify: Notify = lambda stage, share: None) -> Iterator[Measuring]:
    if _takes_networks(budget):
        yield Measuring(torch_clock(batch=budget.batch, threads=budget.threads), kept, _place(budget), notify)
        return
    remember = _remember(budget, kept)
    place, batch, threads = place_of(budget), budget.batch, budget.threads
    with file_clock(budget.runtime, batch=batch, threads=threads, remember=remember, place=place) as clock:
        yield Measuring(clock, kept, _place(budget), notify)


def _remember(budget: Budget, kept: Kept) -> Remember:
    measuring = Measuring(lambda points: [], kept, _place(budget))
    return lambda name, measure: float(measuring.entry(content_hash(name, measuring.place), measure))


def _measure_model(
    baseline: Baseline, budget: Budget, kept: Kept, notify: Notify = lambda stage, share: None
) -> LatencyModel:
    """Times what is not kept yet, so nothing the second time."""
    release()
    dense, structure = baseline.dense, baseline.structure
    with _measuring(budget, kept, notify) as measuring:
        steps = measure_steps(uses_of(dense), measuring)
        options = replace(baseline.ranking, steps=group_steps(dense, structure, steps))
        scores = any_scores(dense, structure, baseline.recipe)
        least = removed_classes(structure, everything_gone(structure, scores, options))
        dense_us = _dense_us(baseline, budget, kept)
        return measure_model(dense, structure, least=least, dense_us=dense_us, measuring=measuring)


def _dense_us(baseline: Baseline, budget: Budget, kept: Kept) -> float:
    """The dense network's time for a batch, timed once."""
    measuring = Measuring(lambda points: [], kept, _place(budget))
    key = content_hash("dense", measuring.place, baseline.weights, code_of(baseline.dense), list(baseline.inputs))
    return float(measuring.entry(key, lambda: _time_dense(baseline, budget, kept)))


def _time_dense(baseline: Baseline, budget: Budget, kept: Kept) -> float:
    if _takes_networks(budget):
        return time_network(baseline.dense, noise_like(baseline.inputs, budget.batch), threads=budget.threads)
    path, remember = _dense_file(baseline), _remember(budget, kept)
    shape = (budget.batch, *baseline.inputs[0].shape)
    place, threads = place_of(budget), budget.threads
    return time_file(path, shape, runtime=budget.runtime, threads=threads, remember=remember, place=place)


def _dense_file(baseline: Baseline) -> Path:
    """The dense network as it is timed; there while plans are tried."""
    path = _dense_path(baseline.folder)
    mark = path.with_suffix(".sha256")
    is_there = path.is_file() and mark.is_file()
    if is_there and mark.read_text(errors="replace") == file_sha256(path):
        return path
    with recorded():  # scratch: no stage's result
        export_for(baseline.dense, baseline.example, path)
        write_text(mark, file_sha256(path))
    return path


def _dense_path(folder: Path) -> Path:
    return _scratch(folder) / "dense.onnx"


def drop_dense_file(folder: Path) -> None:
    """Deletes the dense network's exported file, once no more networks are timed against it."""
    for scratch in (_dense_path(folder), _dense_path(folder).with_suffix(".sha256")):
        scratch.unlink(missing_ok=True)


def _refuse_early(baseline: Baseline, budget: Budget, model: LatencyModel) -> None:
    """Before anything is scored: the smallest network there is, timed, where the tables say that it is too slow."""
    dense, structure, options = baseline.dense, baseline.structure, _ranking_on(baseline, model)
    scores = any_scores(dense, structure, baseline.recipe)
    cost = make_latency_meter(dense, structure, model)
    least = least_share(dense, structure, scores, "latency", options, cost=cost)
    if least <= budget.share:
        return
    kept = everything_gone(structure, scores, options)
    ratio = measure_ratio(baseline, budget, prune(dense, structure, kept)[0])
    if ratio.low > (1 + budget.slack) * budget.share:
        raise unreachable(budget, ratio)


def measure_ratio(baseline: Baseline, budget: Budget, small: fx.GraphModule) -> Ratio:
    """The share of the dense network's time that the small one takes on the budget's runtime, both timed now."""
    release()
    if _takes_networks(budget):
        return time_ratio_eager((baseline.dense, small), baseline.images, budget)
    with tempfile.TemporaryDirectory(prefix="compressor-") as folder:
        path = export_for(small, baseline.example, Path(folder) / "pruned.onnx")
        return time_ratio((_dense_file(baseline), path), baseline.images, budget)
