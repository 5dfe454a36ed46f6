"""The search: what counts on a network, points as recipes and back, studies that stop, go on and are shared."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import compressor
from compressor.__main__ import main
from compressor.choices import scoring_of
from compressor.errors import BudgetError, DataError, MissingPackageError, ModelError, RecipeError
from compressor.graph import trace
from compressor.pruning import analyse
from compressor.recipe import Recipe, make_recipe, read_recipe, to_toml
from compressor.records import Scores
from compressor.relevance import score
from compressor.relevance.composite import PRESETS, SPACE, Axis, Choice, Rule, at, point_of
from compressor.relevance.spelling import composite_of, to_text
from compressor.report import searched as searched_pages
from compressor.report.searched import Curve, SearchReport, Tried, write_search_report
from compressor.searching import load_flow
from compressor.searching.bench import Kept, area
from compressor.searching.finalists import Finalist, finalists_of, winner_of
from compressor.searching.options import SearchOptions, make_options
from compressor.searching.sampling import JUDGES, STARTUP_TRIALS
from compressor.searching.space import Space, find_space, point_at, presets, recipe_at, require_holdable
from compressor.searching.storage import open_study
from compressor.searching.study import Progress, TrialRow, enqueue_presets, rows, run_trials

EXACT = 1e-12
LIVE = 1e-3  # what an axis that counts moves a score by, relative to the mean; the probe asks for ten times as much

MODELS = """
import torch
from torch import nn
import torch.nn.functional as F

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(1, 16, 3, 2), nn.Conv2d(16, 32, 3, 2)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(32 * 9, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.b(self.a(x).relu()) + x
        return self.head(self.down(x.relu()).relu().flatten(1))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm2, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        q, k, v = (t.reshape(len(x), -1, 2, 8).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(1, 16, 4, 4), nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))

def small():
    torch.manual_seed(0)
    return Small()

def tokens():
    torch.manual_seed(0)
    return Tokens()
"""


def _module(name: str) -> nn.Module:
    scope: dict[str, Any] = {}
    exec(compile(MODELS, "models.py", "exec"), scope)
    return scope[name]().eval()


def _with_fitted_head(network: nn.Module) -> nn.Module:
    """Random features and a least-squares head: right on about nine digits in ten, without training."""
    from compressor.inputs.images import batches, overridden
    from compressor.inputs.sources import load_images

    images = load_images("digits:training").prepared(overridden(None, size=16, mean=(0.5,), std=(0.5,)))
    x, labels = next(iter(batches(images, len(images))))
    found: list[torch.Tensor] = []
    handle = network.head.register_forward_pre_hook(lambda module, given: found.append(given[0].double()))
    with torch.no_grad():
        network(x)
    handle.remove()
    rows = torch.cat([found[0], torch.ones(len(x), 1)], 1)
    targets = torch.nn.functional.one_hot(labels, 10).double()
    fitted = torch.linalg.solve(rows.T @ rows + 0.1 * torch.eye(rows.shape[1]), rows.T @ targets)
    with torch.no_grad():
        network.head.weight.copy_(fitted[:-1].T)
        network.head.bias.copy_(fitted[-1])
    return network


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    (folder / "models.py").write_text(MODELS)
    save_file(_with_fitted_head(_module("small")).state_dict(), folder / "small.safetensors")
    return folder


OWN = {
    "data": "digits:training",
    "size": "16",
    "mean": "0.5",
    "std": "0.5",
    "calibration": 60,
    "multiple": 2,
    "normalisation": "mean",
}
SHORT = {"budgets": (0.5,), "search_images": 100, "trial_images": 60, "score_images": 16, "finalists": 1}


def _search(place: Path, out: Path, trials: int, **more: Any) -> Any:
    model, weights = f"{place / 'models.py'}:small", place / "small.safetensors"
    return compressor.search(model, weights=weights, out=str(out), trials=trials, **{**OWN, **SHORT, **more})


# composites as text


def _drawn(seed: int) -> dict[str, str | float]:
    """A random point of LRP's space, as a sampler would walk it."""
    generator = random.Random(seed)
    point: dict[str, str | float] = {}
    for axis in SPACE:
        if axis.when is None or point.get(axis.when[0]) in axis.when[1]:
            if isinstance(axis, Choice):
                point[axis.field] = generator.choice(axis.values)
            else:
                point[axis.field] = generator.uniform(axis.lowest, axis.highest)
    return point


@pytest.mark.parametrize("seed", range(20))
def test_a_point_of_the_space_is_a_composite_a_recipe_and_the_point_again(tmp_path: Path, seed: int) -> None:
    point = _drawn(seed)
    composite = at(point)
    assert point_of(composite) == point
    recipe = make_recipe({"composite": to_text(composite)})
    (tmp_path / "best.toml").write_text(to_toml(recipe))
    assert composite_of(read_recipe(tmp_path / "best.toml").composite) == composite
    assert composite_of(read_recipe(composite=tmp_path / "best.toml").composite) == composite


def test_presets_are_spelled_by_name_and_stand_in_the_space() -> None:
    for name, composite in PRESETS.items():
        assert (to_text(composite), composite_of(name)) == (name, composite)
        assert at(point_of(composite)) == composite


def test_a_composite_is_a_table_in_a_recipe_or_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text('low = {name = "gamma", gamma = 0.3}\nfc = "epsilon"\nsoftmax = "cp"\n')
    (tmp_path / "rules.json").write_text('{"low": {"name": "gamma", "gamma": 0.3}, "fc": "epsilon", "softmax": "cp"}')
    (tmp_path / "recipe.toml").write_text(
        '[composite]\nlow = {name = "gamma", gamma = 0.3}\nfc = "epsilon"\nsoftmax = "cp"\n'
    )
    recipes = [read_recipe(composite=tmp_path / f"rules.{kind}") for kind in ("toml", "json")]
    for recipe in (*recipes, read_recipe(tmp_path / "recipe.toml")):
        composite = composite_of(recipe.composite)
        assert (composite.low, composite.softmax) == (Rule("gamma", gamma=0.3), "cp")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"lwo": "zplus"}', "no field 'lwo'. Did you mean 'low'?"),
        ('{"low": "zpuls"}', "Did you mean 'zplus'"),
        ('{"low": {"gamma": 1}}', "no LRP rule"),
        ('{"low": {"name": "gamma", "gama": 1}}', "no parameter 'gama'. Did you mean 'gamma'"),
        ('{"low": {"name": "gamma", "gamma": "much"}}', "low.gamma = 'much' is not a number"),
        ('{"softmax": "half"}', "softmax = 'half' is not one of attnlrp"),
        ('{"boundaries": [0.8, 0.2]}', "boundaries"),
        ('{"epsilon": true}', "epsilon = True is not a number"),
        ('{"low": ', "not valid JSON"),
        ("hatefi", "Did you mean 'hatefi2024'"),
    ],
)
def test_a_composite_that_is_none_is_refused_by_field(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        composite_of(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# what counts on a network


@pytest.fixture(scope="module", params=["small", "tokens"])
def network(request: pytest.FixtureRequest) -> tuple[str, Space, Callable[[Recipe], Scores]]:
    """A network's space, and scores of it on images the space was not found with."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(4, 1, 16, 16, generator=generator) for _ in range(2)]
    graph = trace(_module(request.param), torch.randn(2, 1, 16, 16, generator=generator))
    groups = analyse(graph).groups
    labels = torch.tensor([3, 1, 4, 1])

    def scores(recipe: Recipe, which: int = 1) -> Scores:
        batch = [(images[which], labels)]
        return score(graph, groups, batch, criterion=recipe.criterion, options=scoring_of(recipe).options)

    space = find_space(Recipe(), ("lrp", "activation"), groups.groups, lambda recipe: scores(recipe, 0))
    return request.param, space, scores


def test_dimensions_are_those_the_network_has(network: Any) -> None:
    name, space, _ = network
    fields = {axis.field for axis in space.axes}
    assert {"criterion", "lrp.mid.rule", "lrp.mid.gamma", "lrp.fc.rule", "lrp.sign", "scope", "per_cost"} <= fields
    transformer_only = {"lrp.softmax", "lrp.normalisation", "lrp.activation"}
    assert transformer_only <= fields if name == "tokens" else not transformer_only & fields
    assert not {"lrp.first.rule", "lrp.linear.rule", "activation.start", "activation.start_class"} & fields
    assert space.by_depth is (name == "tokens")


def test_what_is_held_stays_as_the_recipe_has_it() -> None:
    graph = trace(_module("small"), torch.randn(2, 1, 16, 16))
    groups = analyse(graph).groups
    batch = [(torch.randn(4, 1, 16, 16), torch.tensor([3, 1, 4, 1]))]

    def probe(recipe: Recipe) -> Scores:
        return score(graph, groups, batch, criterion=recipe.criterion, options=scoring_of(recipe).options)

    base = Recipe(normalisation="mean", scope="uniform", sign="signed")
    held = ("normalisation", "scope", "sign")
    space = find_space(base, ("lrp",), groups.groups, probe, held)
    fields = {axis.field for axis in space.axes}
    assert "lrp.mid.rule" in fields
    assert not {"normalisation", "scope", "lrp.sign", "per_cost"} & fields  # a uniform share asks for no costs
    for name, point in presets(space, ("lrp",)).items():
        found = recipe_at(space, point)
        assert (found.normalisation, found.scope, found.sign) == ("mean", "uniform", "signed"), name
    free = find_space(Recipe(scope="global"), ("lrp",), groups.groups, probe, ("scope",))
    assert next(axis for axis in free.axes if axis.field == "per_cost").when is None
    with pytest.raises(RecipeError, match=r"held = 'normalization'.*Did you mean 'normalisation'"):
        require_holdable(("normalization",))


def test_no_dimension_is_dead(network: Any) -> None:
    """Each choice, and both ends of each range where it counts, give other scores on other images too."""
    _, space, scores = network
    for axis in space.axes:
        if axis.field in ("scope", "per_cost", "reduction", "normalisation"):  # of the ranking, not of the scores
            continue
        ends = axis.values if isinstance(axis, Choice) else (axis.lowest, axis.highest)
        forced = {axis.field: ends[0], **_conditions(space, axis)}
        found = [scores(recipe_at(space, _walk(space, {**forced, axis.field: end}))) for end in ends]
        for other in found[1:]:
            assert _moved(found[0], other) > LIVE, f"{axis.field} does not count"


def _conditions(space: Space, axis: Axis) -> dict[str, str | float]:
    """What the axes above it must say for it to count."""
    axes = {a.field: a for a in space.axes}
    found: dict[str, str | float] = {}
    while axis.when is not None:
        found[axis.when[0]] = axis.when[1][0]
        axis = axes[axis.when[0]]
    return found


def _walk(space: Space, forced: dict[str, str | float]) -> dict[str, str | float]:
    def value(axis: Axis) -> str | float:
        first = axis.values[0] if isinstance(axis, Choice) else axis.lowest
        return forced.get(axis.field, first)

    return space.walk(value)


def _moved(a: Scores, b: Scores) -> float:
    def relative(scores: Scores, group: str) -> Any:
        return scores.values[group] / (np.abs(scores.values[group]).mean() or 1.0)

    return max(float(np.abs(relative(a, g) - relative(b, g)).max()) for g in a.values)


def test_the_recipe_and_the_presets_stand_in_the_space_and_score_as_themselves(network: Any) -> None:
    _, space, scores = network
    named = presets(space, ("lrp", "activation"))
    assert sum(name.startswith("recipe") for name in named) == 1
    assert sum(name.count(preset) for preset in PRESETS for name in named) == len(PRESETS)
    for name, point in named.items():
        original = Recipe(criterion="activation") if name == "activation" else Recipe(composite=name.split()[-1])
        assert _moved(scores(recipe_at(space, point)), scores(original)) < EXACT + 1e-5, name
        assert point_at(space, recipe_at(space, point)) == point


def test_a_recipe_the_space_cannot_say_is_refused() -> None:
    space = Space(Recipe(), tuple(replace(a, field=f"lrp.{a.field}") for a in SPACE if a.field == "low.rule"))
    with pytest.raises(RecipeError, match=r"has no lrp\.low\.rule = 'pass'"):
        point_at(space, Recipe(composite='{"low": "pass"}'))


# area, finalists, options


def test_area_is_the_mean_height_under_straight_lines() -> None:
    points = [Kept(0.8, 0.79, 0.9, 100), Kept(0.4, 0.4, 0.6, 100), Kept(0.5, 0.5, 0.8, 100)]
    assert area(points) == pytest.approx(((0.6 + 0.8) / 2 * 0.1 + (0.8 + 0.9) / 2 * 0.3) / 0.4, abs=EXACT)
    assert area(points[:1]) == 0.9


def _row(number: int, value: float, preset: str = "", state: str = "complete") -> TrialRow:
    return TrialRow(number, state, value, {}, (Kept(0.5, 0.5, value, 100),), 1.0, preset)


def test_finalists_are_the_best_and_every_preset_and_a_preset_wins_a_draw() -> None:
    tried = [_row(0, 0.5, "a"), _row(1, 0.9), _row(2, 0.7), _row(3, 0.9), _row(4, 0.95, state="stopped")]
    assert [row.number for row in finalists_of(tried, 2)] == [1, 3, 0]
    made = [Finalist(row, Recipe(), {"search": (Kept(0.5, 0.5, 0.9, 100),)}) for row in finalists_of(tried, 2)]
    assert winner_of(made).row.preset == "a"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"budgets": "0.5,1.2"}, "shares of the MACs between 0 and 1"),
        ({"budgets": "half"}, "budgets = 'half' is not understood"),
        ({"trials": 0}, "trials = 0 must be at least 1"),
        ({"minutes": -1}, "minutes = -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_options(given)
    assert said in str(caught.value)


def test_options_are_read_from_the_command_line_as_from_python() -> None:
    assert make_options({"budgets": "0.5,0.8", "trials": "7", "storage": None}) == SearchOptions(
        budgets=(0.5, 0.8), trials=7
    )


# studies

PLAIN = Space(Recipe(), (Choice("scope", ("global", "uniform")), *(a for a in SPACE if a.field == "epsilon")))


def _height(point: dict[str, str | float]) -> float:
    """An easy objective: uniform is worse, a larger epsilon better."""
    return 0.5 * (point["scope"] == "global") + 0.05 * (9 + math.log10(float(point["epsilon"])))


def _accuracies(point: dict[str, str | float]) -> Iterator[Kept]:
    for budget in (0.3, 0.6):
        yield Kept(budget, budget, round(_height(point), 3), 1000)


def _run(url: str, total: int, accuracies: Any = _accuracies, named: Any = None, **more: Any) -> list[TrialRow]:
    with open_study(url, "test", seed=0, images=1000) as study:
        enqueue_presets(study, named or {})
        run_trials(study, PLAIN, accuracies, total=total, steps=2, **more)
        return rows(study)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


def test_a_study_goes_on_as_if_it_had_not_been_stopped(url: str, tmp_path: Path) -> None:
    first = _run(url, 4)
    assert len(first) == 4
    again = _run(url, 7)
    whole = _run(f"sqlite:///{tmp_path / 'other.db'}", 7)
    assert [r.point for r in again] == [r.point for r in whole]
    assert again[:4] == first
    assert len({json.dumps(r.point, sort_keys=True) for r in again}) == 7


def test_presets_come_first_are_never_stopped_and_are_not_tried_twice(url: str) -> None:
    bad = {"scope": "uniform", "epsilon": 1e-9}
    named = {"worst": bad, "recipe": {"scope": "global", "epsilon": 1e-3}}
    _run(url, JUDGES + 2, named=named)
    found = _run(url, JUDGES + 4, named={**named, "late": {"scope": "uniform", "epsilon": 1e-8}})
    assert [r.preset for r in found[:2]] == ["worst", "recipe"]
    by_name = {r.preset: r for r in found if r.preset}
    assert set(by_name) == {"worst", "recipe", "late"}
    assert by_name["late"].state == "complete", "a preset was stopped"
    assert len(by_name["late"].points) == 2


WIDE = Space(Recipe(), tuple(Choice(f"axis{i}", ("a", "b", "c", "d")) for i in range(8)))


def test_every_other_of_the_first_trials_varies_the_best_one(url: str) -> None:
    """Of eight axes a variation keeps six on average, a random point two."""
    preset = {f"axis{i}": "a" for i in range(8)}

    def accuracies(point: dict[str, str | float]) -> Iterator[Kept]:
        yield Kept(0.5, 0.5, sum(value == "a" for value in point.values()) / 8, 8)

    with open_study(url, "test", seed=0, images=1000) as study:
        enqueue_presets(study, {"recipe": preset})
        run_trials(study, WIDE, accuracies, total=STARTUP_TRIALS + 1, steps=1)
        found = rows(study)
    varied, drawn = ([8 * r.points[0].quality for r in found[1:STARTUP_TRIALS] if r.number % 2 == i] for i in (0, 1))
    assert found[0].point == preset
    assert sum(drawn) / len(drawn) < 4.0 < sum(varied) / len(varied) < 8.0
    assert len({json.dumps(row.point, sort_keys=True) for row in found}) == len(found)


def test_hopeless_trials_are_stopped_before_their_last_budget(url: str) -> None:
    found = _run(url, 2 * JUDGES + 2)
    stopped = [r for r in found if r.state == "stopped"]
    assert stopped
    assert all(len(r.points) == 1 for r in stopped)
    assert max(r.points[0].quality for r in stopped) < max(r.points[0].quality for r in found if r.state == "complete")


def test_what_ctrl_c_interrupted_is_tried_again(url: str) -> None:
    seen: list[Any] = []

    def interrupted(point: dict[str, str | float]) -> Iterator[Kept]:
        seen.append(point)
        yield next(_accuracies(point))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(url, 3, interrupted, {"recipe": {"scope": "global", "epsilon": 1e-3}})
    found = _run(url, 3)
    assert (found[0].point, found[0].preset, found[0].state) == (seen[0], "recipe", "complete")
    assert len(found) == 3


def test_a_point_that_cannot_be_scored_is_a_bad_trial_not_the_end(url: str) -> None:
    def failing(point: dict[str, str | float]) -> Iterator[Kept]:
        raise RecipeError("non-finite scores")
        yield

    found = _run(url, 2, failing)
    assert [(r.state, r.why, r.value) for r in found] == [("failed", "non-finite scores", None)] * 2


def test_no_trial_is_begun_after_the_time_is_over(url: str) -> None:
    assert _run(url, 5, until=time.monotonic()) == []


def test_every_trial_is_reported(url: str) -> None:
    said: list[Progress] = []
    _run(url, 3, report=said.append)
    assert [(p.done, p.total) for p in said] == [(1, 3), (2, 3), (3, 3)]
    assert said[-1].best is not None
    assert said[-1].best.value == max(p.row.value or 0 for p in said)


def test_a_storage_that_is_not_there_is_one_line_without_its_password() -> None:
    with pytest.raises(RecipeError) as caught, open_study("nonsense://me:secret@nowhere/x", "test", seed=0, images=1):
        pass
    assert "secret" not in str(caught.value)
    assert "--storage" in str(caught.value)
    assert "\n" not in str(caught.value)


WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_search as t

def slow(point):
    for kept in t._accuracies(point):
        print(point, flush=True)
        time.sleep(float(sys.argv[3]))
        yield kept

t._run(sys.argv[2], int(sys.argv[4]), slow, {"recipe": {"scope": "global", "epsilon": 1e-3}})
"""


def _worker(url: str, pause_s: float, total: int) -> subprocess.Popen[str]:
    here = str(Path(__file__).parent)
    words = [sys.executable, "-c", WORKER, here, url, str(pause_s), str(total)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


@pytest.mark.thorough
def test_a_killed_processs_trial_is_taken_up_by_the_next(url: str) -> None:
    process = _worker(url, 600, 2)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "global" in line
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = _run(url, 2)
    assert (found[0].preset, found[0].state) == ("recipe", "complete")
    assert len(found) == 2


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The address of a server of its own, on a socket in a folder of its own."""
    programs = [shutil.which("initdb"), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    initdb = next((p for p in programs if p), None)
    if initdb is None:
        pytest.skip("no PostgreSQL server here (Debian's package postgresql)")
    pytest.importorskip("psycopg")
    user = "postgres" if os.geteuid() == 0 else None  # the server refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # pytest's own folders are closed to other users
    try:
        if user is not None:
            shutil.chown(folder, user)
        binaries = Path(initdb).resolve().parent
        quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder, "user": user}
        subprocess.run([binaries / "initdb", "-D", folder / "data", "-U", "me", "-A", "trust", "-N"], **quiet)
        server = [binaries / "pg_ctl", "-D", folder / "data", "-w"]
        options = f"-c listen_addresses='' -c fsync=off -k {folder}"
        subprocess.run([*server, "-o", options, "-l", folder / "log", "start"], **quiet)
        try:
            yield f"postgresql://me@/postgres?host={folder}"
        finally:
            subprocess.run([*server, "-m", "immediate", "stop"], **quiet)
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_two_processes_share_a_postgresql_study_and_repeat_nothing(postgres: str) -> None:
    _require_shared(postgres)


@pytest.mark.thorough
def test_two_processes_share_a_file_and_repeat_nothing(url: str) -> None:
    _require_shared(url)


def _require_shared(url: str) -> None:
    """Two processes at one study: each does its part, no point is begun by both."""
    total = 10
    workers = [_worker(url, 0.1, total) for _ in range(2)]
    printed = [worker.communicate(timeout=120)[0].splitlines() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    with open_study(url, "test", seed=0, images=1000) as study:
        found = rows(study)
    assert len(found) == total
    assert len({json.dumps(r.point, sort_keys=True) for r in found}) == total
    assert [r.preset for r in found if r.preset] == ["recipe"]
    begun = [set(lines) for lines in printed]
    assert all(len(points) >= 2 for points in begun), "one process did nearly everything"
    assert not begun[0] & begun[1], "a trial was repeated"


def test_without_optuna_the_search_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("compressor.searching.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingPackageError, match="optuna not installed"):
        compressor.search("digits-resnet")


# what a Python caller holds


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, Any]]:
    """Recipe and data that each search would begin with; none goes further."""
    beginnings: list[tuple[Recipe, Any]] = []

    def begin(recipe: Recipe, options: SearchOptions, *, data: Any, **others: object) -> None:
        beginnings.append((recipe, data))

    monkeypatch.setattr(load_flow(), "run_search", begin)
    return beginnings


def test_a_search_begins_with_what_it_was_given(begun: list[tuple[Recipe, Any]]) -> None:
    pixels, labels = np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 3
    compressor.search("digits-resnet", (pixels, labels))
    compressor.search(nn.Flatten(), Path("train.npz"))
    (_, arrays), (recipe, nothing) = begun
    assert arrays[0] is pixels
    assert arrays[1] is labels
    assert (recipe.data, nothing) == ("train.npz", None)


def test_what_is_no_data_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="given as a list"):
        compressor.search("digits-resnet", [1, 2], out=str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_begins_no_search(begun: list[tuple[Recipe, Any]]) -> None:
    with pytest.raises(ModelError, match="the class Flatten, expected a module made of it"):
        compressor.search(nn.Flatten)  # type: ignore[arg-type]
    assert begun == []


# a whole search


@pytest.fixture(scope="module")
def searched(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _search(place, tmp_path_factory.mktemp("searched") / "run", 4)


def test_a_search_leaves_a_recipe_that_keeps_at_least_what_the_presets_keep(searched: Any) -> None:
    summary, folder = searched.summary, searched.folder
    assert summary["lost_workers"] == []
    assert summary["area"]["search"] >= max(areas["search"] for areas in summary["area_presets"].values())
    recipe = read_recipe(folder / "best.toml")
    assert recipe == searched.recipe
    assert (recipe.data, recipe.out) == ("digits:training", "")
    for name in ("search.md", "search.html", "plots/search-curve.png", "plots/search-history.png", "study.db"):
        assert (folder / name).stat().st_size > 0
    record = json.loads((folder / "search.json").read_text())
    assert record["schema"] == "search/2"
    assert set(record["splits"]["hashes"]) == {"calibration", "search", "evaluation"}
    assert len(set(record["splits"]["hashes"].values())) == 3
    assert [t["number"] for t in record["history"]] == list(range(4))
    assert record["history"][0]["preset"].startswith("recipe")


def test_the_recipe_found_compresses(searched: Any) -> None:
    words = ["compress", "--recipe", str(searched.folder / "best.toml"), "--budget", "macs 0.45", "--dry-run"]
    assert main(words) == 0


@pytest.mark.thorough
def test_a_search_with_more_trials_goes_on(searched: Any, place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(searched.folder, folder)
    before = json.loads((folder / "search.json").read_text())["history"]
    after = _search(place, folder, 5)
    history = json.loads((folder / "search.json").read_text())["history"]
    assert history[:4] == before
    assert (after.summary["trials"], len(history)) == (5, 5)


@pytest.mark.slow
def test_two_workers_of_one_command_do_as_many_trials_as_one_and_no_point_twice(place: Path, tmp_path: Path) -> None:
    found = _search(place, tmp_path / "run", 30, workers=2, evaluate=False)
    record = json.loads((found.folder / "search.json").read_text())
    points = {json.dumps(row["point"], sort_keys=True) for row in record["history"]}
    assert (len(record["history"]), len(points)) == (30, 30)
    assert record["options"]["workers"] == 2
    assert found.summary["lost_workers"] == []
    assert len(_workers_of(found.folder)) == 2, "the helper did nothing"


def _workers_of(folder: Path) -> set[str]:
    """Who did the trials of the one study in the folder's file."""
    url = f"sqlite:///{folder / 'study.db'}"
    (name,) = optuna.get_all_study_names(url)
    with open_study(url, name, seed=0, images=60) as study:
        return {row.worker for row in rows(study)}


@pytest.mark.thorough
def test_without_budgets_the_usual_ones_within_reach_are_tried(place: Path, tmp_path: Path) -> None:
    """Seven tenths of every group stay, so the hardest of the usual budgets can't be met."""
    found = _search(place, tmp_path / "run", 1, budgets=(), least=0.7, evaluate=False)
    summary = json.loads((found.folder / "search.json").read_text())
    assert 0 < len(summary["budgets"]) < 4
    assert set(summary["budgets"]) < {0.35, 0.5, 0.65, 0.8}


@pytest.mark.thorough
def test_a_search_that_repairs_nothing_says_so(place: Path, tmp_path: Path) -> None:
    found = _search(place, tmp_path / "run", 1, compensate=False, evaluate=False)
    assert not found.recipe.compensate
    said = (found.folder / "search.md").read_text()
    assert "neither repaired nor fine-tuned" in said
    assert "scored and repaired" not in said


def test_what_no_search_can_do_is_refused_before_anything_is_written(place: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="can't be met"):
        _search(place, tmp_path / "run", 3, budgets=(0.001,))
    with pytest.raises(DataError, match="left to search on"):
        _search(place, tmp_path / "run", 3, calibration=740)
    with pytest.raises(RecipeError, match="rounds = 2: a search judges recipes in one round"):
        _search(place, tmp_path / "run", 3, rounds=2)
    with pytest.raises(RecipeError, match="criterion gates is learned"):
        _search(place, tmp_path / "run", 3, criterion="gates")
    assert not (tmp_path / "run").exists()


def _report(areas: list[float], tmp_path: Path) -> tuple[Any, Path]:
    tried = tuple(Tried(i, "complete", area, "", ((0.5, area),), 1.0) for i, area in enumerate(areas))
    curve = Curve("trial 0", "search", ((0.5, areas[0], 0.5, 200),), areas[0], True, "")
    settings = {"settings": (("criterion", "lrp"),), "composite": (), "importance": (), "hashes": {}, "images": {}}
    counts: dict[str, Any] = {"trial_images": 200, "score_images": 64, "repaired": True}
    report = SearchReport(
        "m", "trial 0", "", {"search": 1.0}, "top-1", True, curves=(curve,), tried=tried, **settings, **counts
    )
    return report, write_search_report(report, tmp_path, {"schema": "search/2"}).markdown


def test_trials_that_cannot_be_told_apart_are_said_to_be_so(tmp_path: Path) -> None:
    alike, apart = _report([1.0, 1.0, 0.999], tmp_path / "a")[1], _report([0.9, 0.5, 0.7], tmp_path / "b")[1]
    assert "All complete trials lie within what the images can tell apart" in alike.read_text()
    assert "All complete trials" not in apart.read_text()


def test_trials_are_numbered_alike_in_table_and_picture(tmp_path: Path) -> None:
    report, page = _report([0.9, 0.5, 0.7, 0.8], tmp_path)
    assert "| trial | state | preset | area, % |" in page.read_text()
    axes = searched_pages._history(report).axes[0]
    ticks = [tick for tick in axes.get_xticks() if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    assert [tick for tick in ticks if tick != round(tick)] == []
    assert {float(x) for c in axes.collections for x, _ in c.get_offsets()} == {0.0, 1.0, 2.0, 3.0}
