"""The flow from Python: what a run gives, what is done again, and that a run cut off anywhere ends the same."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor import inspecting, pipeline
from compressor.budgets import SLACK
from compressor.device.bundle import read_bundle, verify_bundle
from compressor.errors import BudgetError, GateError, ModelError
from compressor.files import file_sha256
from compressor.graph import trace
from compressor.graph.cost import measure_cost
from compressor.inputs.checkpoints import state_hash
from compressor.inputs.images import Images
from compressor.inputs.models import Model
from compressor.inputs.sources import load_images
from compressor.pipeline import quality, recovery
from compressor.pruning import identity_error
from compressor.recipe import Recipe, make_recipe, read_recipe
from compressor.records import Accuracy
from compressor.recovery import recover as recover_network
from compressor.repair.better_of_two import Choice, Judged
from compressor.run import stages
from compressor.run.judges import judges_of, judging_of, spare_of
from compressor.run.saved import rebuild
from compressor.run.tasking import NetworkTask, make_task
from compressor.run.work import Request, Work, prepare

SUMMARY = (
    "model run_dir accuracy_dense accuracy_removed accuracy_repaired accuracy_tuned accuracy_shipped shipped choice "
    "gates warnings busy macs_dense macs_shipped params_dense "
    "params_shipped onnx_bytes_dense onnx_bytes_shipped latency_ms latency_ratio_b1 latency_ratio_b32 parity_max_abs "
    "engines not_checked seconds stages"
).split()
PARITY = 1e-4  # float32 sums in another order, on outputs of about 1
EXACT = 1e-9  # float64 rounding; a wrong unit shows as O(1)
QUICK: dict[str, Any] = {
    "criterion": "l1",
    "multiple": 1,
    "reduction": "mean",
    "per_cost": 0.0,
    "targets": "",
    "latency_batches": "1,32",
    "latency_seconds": 0.0,
    "max_accuracy_loss": 100,
    "finetune_epochs": 1,
    "batch_size": 8,
}


pytestmark = pytest.mark.usefixtures("short_runs")


class Tiny(nn.Module):
    """Two branches side by side, a residual sum, a gate and a lone scale: nothing a library's model has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.left = nn.Conv2d(24, 24, 3, padding=1, bias=False)
        self.right = nn.Conv2d(24, 24, 5, padding=2, groups=2)
        self.norm = nn.BatchNorm2d(48)
        self.mix = nn.Sequential(nn.Conv2d(48, 64, 1), nn.ReLU(), nn.Conv2d(64, 24, 1))  # fine steps to a budget
        self.gate = nn.Linear(24, 24)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.mix(nn.functional.gelu(self.norm(torch.cat([self.left(x), self.right(x)], 1))))
        x = x + self.scale * y * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(nn.functional.max_pool2d(x, 2).flatten(2).mean(-1))


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny().train()


@pytest.fixture(scope="module")
def many(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Images:
    """400 images, all different: more than are needed for each service."""
    path = tmp_path_factory.mktemp("many") / "images.npz"
    pixels = np.random.default_rng(1).integers(0, 255, (400, 12, 12, 3))
    np.savez(path, images=pixels.astype(np.uint8), labels=np.arange(400) % 4)
    assert images.preprocessing is not None
    return load_images(str(path)).prepared(images.preprocessing)


Compress = Callable[..., compressor.Run]


@pytest.fixture(scope="module")
def compress(tiny: nn.Module, images: Images, short_runs: None) -> Compress:
    return lambda out, **more: compressor.compress(tiny, images, out=out, **{**QUICK, **more})


@pytest.fixture(scope="module")
def notified() -> list[tuple[str, float]]:
    """Stages and the shares of them that are done, as `run` notified them."""
    return []


@pytest.fixture(scope="module")
def run(
    compress: Compress, notified: list[tuple[str, float]], tmp_path_factory: pytest.TempPathFactory
) -> compressor.Run:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return compress(folder, notify=lambda stage, share: notified.append((stage, share)))


Planned = tuple[Work, pipeline.Pruned]


def _facts(folder: Path) -> dict[str, Any]:
    """What must not depend on how often a run was cut off; times and paths do."""
    summary = json.loads((folder / "summary.json").read_text())
    timed = {"run_dir", "latency_ms", "latency_ratio_b1", "latency_ratio_b32", "busy", "warnings", "seconds", "stages"}
    timed |= {"recovery"}  # which says how long it took
    files = ["weights.safetensors", "model.onnx", "network.json", "plan.json", "scores-1.json", "groups.json"]
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    return {**{k: v for k, v in summary.items() if k not in timed}, **hashes}


def _planned(recipe: Recipe, *, model: nn.Module | None = None, images: Images | None = None) -> Planned:
    """A run as far as its repaired network."""
    given = Model(model, "", "given", None, None, state_hash(model)) if model else None
    work = prepare(Request(recipe, given, images), lambda stage, share: None)
    structure, spent = pipeline.find_units(work)
    with work.stages.begun():
        pipeline.keep_units(work, structure, spent)
        return work, pipeline.remove_and_repair(work, structure, _task_of(work))


def _task_of(work: Work) -> NetworkTask:
    return make_task(work.stages, work.chosen, work.dense, work.calibration_images, work.stages.keys["groups"])


# what a run gives


def test_the_summary_holds_what_the_command_promises(run: compressor.Run) -> None:
    assert [key for key in SUMMARY if key not in run.summary] == []
    assert json.loads(json.dumps(run.summary)) == run.summary
    assert json.loads((run.folder / "summary.json").read_text()) == {"schema": "summary/2", **run.summary}
    for batches in run.summary["latency_ms"].values():
        assert set(batches) == {"1", "32"}
        assert all(at[which]["p50"] > 0 for at in batches.values() for which in ("dense", "shipped"))


def test_every_figure_of_a_summary_that_a_page_shows_is_there(run: compressor.Run) -> None:
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *root.glob("docs/*.md"), *root.glob("examples/*.py")]
    shown = {page.name: re.findall(r"summary\[\"(\w+)\"\]", page.read_text()) for page in pages}
    assert {name: keys for name, keys in shown.items() if not set(keys) <= set(run.summary)} == {}
    assert shown["README.md"] == ["accuracy_shipped", "latency_ratio_b1"]  # both of the network that ships


def test_a_stage_that_takes_long_says_how_far_it_is(run: compressor.Run, notified: list[tuple[str, float]]) -> None:
    for stage in ("measured-1", "repair-1", "finetune", "accuracy"):
        shares = [share for name, share in notified if name.partition(": ")[0] == stage]
        assert shares == sorted(shares)
        assert [share for share in shares if 0 < share < 1], stage


def test_the_budget_is_met_from_below_by_smaller_tensors(run: compressor.Run) -> None:
    share = run.summary["macs_shipped"] / run.summary["macs_dense"]
    assert 0.5 * (1 - SLACK) <= share <= 0.5
    network = run.network(Tiny())
    assert measure_cost(network).macs == run.summary["macs_shipped"]
    assert sum(p.numel() for p in network.parameters()) == run.summary["params_shipped"] < run.summary["params_dense"]


def test_the_network_that_comes_back_computes_what_ships(run: compressor.Run, images: Images) -> None:
    x = torch.stack([images[i] for i in range(5)])
    with torch.no_grad():
        expected = run.network(Tiny())(x).numpy()
    session = onnxruntime.InferenceSession(run.folder / "bundle" / "model.onnx", providers=["CPUExecutionProvider"])
    shipped = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.abs(shipped - expected).max() < PARITY
    assert np.abs(expected).max() > 100 * PARITY


def test_the_bundle_says_what_it_is(run: compressor.Run) -> None:
    manifest = read_bundle(run.folder / "bundle")
    assert {"README.md", "index.html", "bom.cdx.json"} < set(manifest.files)
    assert {metric.of for metric in manifest.metrics} == {"dense", *run.summary["precisions"]}
    shipped = next(metric for metric in manifest.metrics if metric.of == "model.onnx")
    assert shipped.value == pytest.approx(run.summary["precisions"]["model.onnx"]["accuracy"], abs=5e-5)  # 4 digits
    assert shipped.low <= shipped.value <= shipped.high
    assert list(manifest.not_checked) == run.summary["not_checked"]
    provenance = manifest.provenance
    assert provenance["recipe_sha256"] == file_sha256(run.folder / "recipe.toml")
    assert provenance["data"] == json.loads((run.folder / "splits.json").read_text())["hashes"]
    assert provenance["shipped"] == run.summary["shipped"]
    assert "not stated where they were read" in manifest.licences[0]  # the model was given as an object


def test_the_bundle_verifies_and_a_changed_byte_does_not(run: compressor.Run, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(run.folder / "bundle", bundle)
    assert verify_bundle(bundle).passed
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    assert not verify_bundle(bundle).passed


def test_the_folder_holds_every_part_and_nothing_temporary(run: compressor.Run) -> None:
    parts = "recipe.toml splits.json scores-1.json plan.json weights.safetensors model.onnx parity.json accuracy.json"
    parts += " latency.json report.md report.html summary.json bundle/manifest.json"
    assert [name for name in parts.split() if not (run.folder / name).is_file()] == []
    assert [p for p in run.folder.rglob("*") if p.name.startswith(".")] == []
    assert read_recipe(run.folder / "recipe.toml") == run.recipe


def test_the_callers_model_is_as_it_was(compress: Compress, tiny: nn.Module, tmp_path: Path) -> None:
    before = copy.deepcopy(tiny.state_dict())
    with pytest.raises(GateError):
        compress(tmp_path / "stopped", max_accuracy_loss=-100)
    assert tiny.training
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())


def test_a_run_of_a_model_object_asks_for_that_object(run: compressor.Run) -> None:
    assert run.network() is not None  # the run that was just made has it in hand
    with pytest.raises(ModelError, match="give that model to load it"):
        compressor.load(run.folder)


# the same folder again


def test_the_same_again_does_nothing_again(run: compressor.Run, compress: Compress) -> None:
    said: list[str] = []
    again = compress(run.folder, notify=lambda stage, share: said.append(stage))
    assert [line for line in said if not line.endswith("(done before)")] == []
    assert all(cost["reused"] for cost in again.summary["stages"].values())
    assert _as_if_done_now(again.summary) == _as_if_done_now(run.summary)


def _as_if_done_now(summary: dict[str, Any]) -> dict[str, Any]:
    costs = {name: {**cost, "reused": False} for name, cost in summary["stages"].items()}
    return {**summary, "stages": costs}


class Killed(BaseException):
    """Stands for kill -9: no handler of ours may run on it."""


@pytest.mark.thorough
def test_a_run_cut_off_at_every_stage_ends_as_if_it_had_not_been(
    run: compressor.Run, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json, cut_off = stages.write_json, set()

    def killed_once(path: Path, value: dict[str, Any]) -> None:
        if path.parent.name == "stages" and path.name not in cut_off:
            cut_off.add(path.name)
            raise Killed
        write_json(path, value)

    monkeypatch.setattr(stages, "write_json", killed_once)
    for _ in range(20):
        try:
            compress(tmp_path / "cut", latency_batches=1)
            break
        except Killed:
            continue
    assert len(cut_off) == len(list((run.folder / "stages").glob("*.json"))) >= 8
    assert _facts(tmp_path / "cut") == _facts(run.folder)


@pytest.mark.slow
def test_another_budget_keeps_groups_scores_and_losses_and_does_the_rest_again(
    run: compressor.Run, compress: Compress, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(run.folder, folder)
    said: list[str] = []
    changed = compress(folder, budget="macs 0.64", notify=lambda stage, share: said.append(stage))
    kept = [stage.removesuffix(" (done before)") for stage in said if stage.endswith("(done before)")]
    assert kept == ["groups", "scores-1", "measured-1"]
    assert changed.summary["macs_shipped"] > run.summary["macs_shipped"]
    assert _facts(folder) == _facts(compress(tmp_path / "fresh", budget="macs 0.64").folder)


def test_a_failed_gate_leaves_a_report_that_says_so_and_nothing_that_ships(
    run: compressor.Run, compress: Compress, tmp_path: Path
) -> None:
    folder = tmp_path / "failed"
    shutil.copytree(run.folder, folder)
    with pytest.raises(GateError, match="accuracy: top-1 lost"):
        compress(folder, max_accuracy_loss=-100)
    assert "accuracy: top-1 lost" in (folder / "report.md").read_text()
    assert not (folder / "bundle").exists()
    assert not (folder / "summary.json").exists()


@pytest.mark.parametrize("budget", ["macs 0.001", "parameters 0.001"])
def test_a_budget_out_of_reach_is_refused_before_anything_is_written(
    compress: Compress, run: compressor.Run, tmp_path: Path, budget: str
) -> None:
    with pytest.raises(BudgetError, match=f"can't be met.*ask for at least --budget '{budget.split()[0]} 0"):
        compress(tmp_path / "new", budget=budget)
    assert list(tmp_path.iterdir()) == []
    before = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")}
    with pytest.raises(BudgetError):
        compress(run.folder, budget=budget)
    assert {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")} == before


@pytest.mark.slow
def test_too_few_images_for_a_batch_come_again_rather_than_stop_a_run(
    compress: Compress, tiny: nn.Module, images: Images, tmp_path: Path
) -> None:
    few = images.subset(range(6))
    few = compressor.compress(
        tiny, few, out=tmp_path / "few", **{**QUICK, "batch_size": 1, "evaluation": 0.5, "latency_batches": 32}
    )
    assert few.summary["evaluation_images"] == 3
    assert few.summary["latency_ms"]["onnxruntime"]["32"]["shipped"]["p50"] > 0


def test_repeated_images_are_left_out_and_do_not_stop_a_run(tmp_path: Path, tiny: nn.Module, images: Images) -> None:
    twice = images.subset([*range(20), *range(10)])
    recipe = make_recipe({**QUICK, "model": "Tiny", "out": tmp_path / "twice"})
    model = Model(tiny, "", "given", None, None, "")
    work = prepare(Request(recipe, model, twice), lambda stage, share: None)
    parts = [work.splits.calibration, work.splits.evaluation]
    digests = [p.digest(name) for p in parts for name in p.names]
    assert len(digests) == len(set(digests)) == 20


# what a recipe can ask for, on the embedded models


def _embedded(out: Path, model: str, **more: Any) -> Recipe:
    base = {"criterion": "l1", "multiple": 4, "calibration": 32, "targets": "", "compensate": False}
    base |= {"normalisation": "mean"}
    return read_recipe(None, model=model, out=str(out), **{**base, **more})


@pytest.mark.thorough
@pytest.mark.parametrize(("criterion", "normalisation"), [("lrp", "measured"), ("gradient_x_input", "mean")])
@pytest.mark.parametrize("model", ["digits-resnet", "digits-vit"])
def test_either_way_of_ranking_leads_to_a_plan_that_meets_the_budget(
    tmp_path: Path, model: str, criterion: str, normalisation: str
) -> None:
    given = {"criterion": criterion, "normalisation": normalisation, "budget": "macs 0.6", "calibration": 8}
    recipe = _embedded(tmp_path / "run", model, **given)
    work, pruned = _planned(recipe)
    assert 0.6 * (1 - SLACK) <= measure_cost(pruned.network).macs / measure_cost(work.dense).macs <= 0.6
    assert [gate.passed for gate in pruned.checks.gates] == [True]


@pytest.mark.thorough
def test_two_rounds_meet_the_budget_and_their_plan_is_in_units_of_the_dense_network(
    tiny: nn.Module, images: Images, tmp_path: Path
) -> None:
    recipe = make_recipe({**QUICK, "model": "Tiny", "rounds": 2, "out": tmp_path / "run"})
    work, pruned = _planned(recipe, model=tiny, images=images)
    plan, small = pruned.plan, pruned.network
    assert set(work.stages.keys) == {
        "groups",
        *(f"{stage}-{r}" for stage in ("scores", "measured", "repair") for r in (1, 2)),
    }
    assert 0.5 * (1 - SLACK) <= measure_cost(small).macs / measure_cost(work.dense).macs <= 0.5
    structure, _ = pipeline.find_units(work)
    replayed = rebuild(work.dense, structure, dict(plan.kept))
    assert identity_error(work.dense, replayed, structure, plan.kept, torch.from_numpy(work.sample(4))) < EXACT
    assert {n: p.shape for n, p in replayed.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}


@pytest.mark.thorough
def test_other_rounds_in_the_same_folder_give_what_they_give_in_a_new_one(
    tiny: nn.Module, images: Images, tmp_path: Path
) -> None:
    def kept(folder: str, rounds: int) -> dict[str, list[int]]:
        recipe = make_recipe(
            {
                **QUICK,
                "model": "Tiny",
                "rounds": rounds,
                "budget": "macs 0.49",
                "criterion": "random",
                "calibration": 16,
                "out": tmp_path / folder,
            }
        )
        plan = _planned(recipe, model=tiny, images=images)[1].plan
        return {name: units.tolist() for name, units in plan.kept.items()}

    once, twice = kept("a", 1), kept("a", 2)
    assert twice == kept("b", 2) != once
    assert kept("a", 1) == once


@pytest.mark.thorough
def test_only_the_allowed_kinds_of_units_go(tmp_path: Path) -> None:
    recipe = _embedded(tmp_path / "run", "digits-vit", units="head_dim,neuron", budget="macs 0.7")
    work, pruned = _planned(recipe)
    plan, small = pruned.plan, pruned.network
    structure, _ = pipeline.find_units(work)
    gone = {structure.groups[name].kind for name, kept in plan.kept.items() if len(kept) < structure.groups[name].size}
    assert gone == {"head_dim", "neuron"}
    assert measure_cost(small).macs <= 0.7 * measure_cost(work.dense).macs


class _Sized(nn.Module):
    """A network whose forward treats the size of its image in one of three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.stem, self.head = way, nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4 * 16 * 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        if self.way == "flattened":
            return self.head(y.flatten(1))
        return nn.functional.interpolate(y, size=x.shape[-2:]) if self.way == "resized" else y


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("flattened", "32 x 32 alone: the model itself refuses 64 x 64"),
        ("resized", "the model takes other sizes too, its files take 32 x 32 alone (--size makes them for another)"),
        ("free", "(--size makes them for another); nothing in the graph depends on it"),
    ],
)
def test_which_sizes_of_image_fit_is_said(way: str, said: str) -> None:
    module, example = _Sized(way).eval(), torch.randn(2, 3, 32, 32)
    assert inspecting._sizes_in_words(module, trace(module, example), example).endswith(said)


def test_inspecting_and_predicting_need_neither_images_nor_weights() -> None:
    recipe = make_recipe({"model": "torchvision:resnet18", "size": 32, "budget": "macs 0.4"})
    inspection = inspecting.inspect(recipe)
    groups = inspection.groups
    assert "takes other sizes too" in inspection.image_size
    assert {g.kind for g in groups.groups} == {"channel", "stream"} or len(groups.groups) >= 8
    assert [x for x in groups.left_alone if x.layer == "fc"] != []
    predicted = inspecting.predict(recipe)
    assert 0.4 * (1 - SLACK) <= predicted["macs_predicted"] / predicted["macs_dense"] <= 0.4


# the promises of the embedded default, as the command gives them


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "share", "lost", "lost_tuned"), [("digits-resnet", 0.5, 3.0, 0.7), ("digits-vit", 0.6, 3.0, 1.0)]
)
def test_the_embedded_default_keeps_its_promises(
    tmp_path: Path, model: str, share: float, lost: float, lost_tuned: float
) -> None:
    summary = compressor.compress(model, out=tmp_path / "run", latency_seconds=0.5).summary
    assert summary["macs_shipped"] <= share * summary["macs_dense"]
    assert 100 * (summary["accuracy_dense"] - summary["accuracy_repaired"]) <= lost
    assert 100 * (summary["accuracy_dense"] - summary["accuracy_shipped"]) <= lost_tuned
    assert summary["engines"] != []
    assert compressor.load(tmp_path / "run")(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


# which network ships, and what it was judged on


def test_the_better_of_repaired_and_tuned_ships_and_it_is_said_which(run: compressor.Run) -> None:
    summary = run.summary
    assert summary["shipped"] in ("repaired", "tuned")
    assert summary["accuracy_shipped"] == summary[f"accuracy_{summary['shipped']}"]
    assert summary["choice"].startswith(f"The {summary['shipped']} network ships: of 8 calibration images kept out")
    assert summary["choice"] in (run.folder / "report.md").read_text()


@pytest.mark.parametrize("better", ["repaired", "tuned"])
def test_what_ships_are_the_weights_of_the_better_one(
    tiny: nn.Module, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: str
) -> None:
    def chosen(repaired: nn.Module, tuned: nn.Module, batches: Any, *, source: str, **others: object) -> Choice:
        seen.extend(image.numpy().tobytes() for batch, _ in batches for image in batch)
        return Choice(better, source, Judged(1, 2, 0.5), Judged(1, 2, 0.5))  # type: ignore[arg-type]

    seen: list[bytes] = []
    monkeypatch.setattr(recovery, "choose", chosen)

    def taught_otherwise(*networks: Any, **options: Any) -> Any:
        network, found = recover_network(*networks, **options)
        with torch.no_grad():
            next(network.parameters()).add_(0.01)  # a recovery of untrained weights may come no nearer
        return network, found

    monkeypatch.setattr(recovery, "recover_network", taught_otherwise)
    recipe = make_recipe({**QUICK, "model": "Tiny", "normalisation": "mean", "out": tmp_path / "run"})
    work, pruned = _planned(recipe, model=tiny, images=images)
    small = pruned.network
    structure, _ = pipeline.find_units(work)
    recovered = pipeline.recover(work, structure, pruned, _task_of(work))
    assert recovered.tuned is not None
    expected = small if better == "repaired" else recovered.tuned
    other = recovered.tuned if better == "repaired" else small
    state = recovered.shipped.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())
    assert any(not torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    right = itertools.count()
    monkeypatch.setattr(quality, "evaluate", lambda network, batches, **others: Accuracy(next(right), 18))
    accuracy = pipeline.measure_accuracy(work, structure, pruned, recovered, _task_of(work))
    assert accuracy["shipped"] == accuracy[better]
    in_order = [accuracy[name] for name in ("dense", "removed", "repaired", "tuned")]
    assert in_order == [Accuracy(correct, 18) for correct in range(4)]
    evaluated = {image.numpy().tobytes() for batch, _ in work.evaluation for image in batch}
    judges = judges_of(work)
    assert judges is not None
    taught = {image.numpy().tobytes() for batch, _ in judges.lessons for image in batch}
    assert (len(seen), len(taught)) == (8, 28)  # of 42 a fifth judges, of the rest a fifth tells when to end
    assert evaluated.isdisjoint(seen)
    assert taught.isdisjoint(seen)


def test_few_images_left_over_judge_and_calibration_images_teach(
    tiny: nn.Module, images: Images, tmp_path: Path
) -> None:
    recipe = make_recipe({**QUICK, "model": "Tiny", "calibration": 20, "out": tmp_path / "run"})
    given = Model(tiny, "", "given", None, None, state_hash(tiny))
    work = prepare(Request(recipe, given, images, spare=spare_of(recipe)), lambda stage, share: None)
    judges = judges_of(work)
    assert judges is not None
    assert [len(part.images) for part in judges.parts] == [16, 4, 22]
    assert set(judges.held.images.names).isdisjoint(judges.lessons.images.names)
    assert judges.source == "22 images that served nothing else"
    assert set(judges.images.images.names).isdisjoint(work.splits.calibration.names)
    assert spare_of(replace(recipe, finetune_epochs=0)) == 0
    assert spare_of(replace(recipe, recovery_minutes=0)) == 0


def test_all_images_that_are_left_over_serve(tiny: nn.Module, images: Images, tmp_path: Path, many: Images) -> None:
    recipe = make_recipe({**QUICK, "model": "Tiny", "calibration": 20, "out": tmp_path / "run"})
    given = Model(tiny, "", "given", None, None, state_hash(tiny))
    work = prepare(Request(recipe, given, many, spare=spare_of(recipe)), lambda stage, share: None)
    judges = judges_of(work)
    assert judges is not None
    parts = [set(part.images.names) for part in judges.parts]
    spare = len(work.splits.search)
    assert [len(part) for part in parts] == [20 + spare - 2 * (spare // 5), spare // 5, spare // 5]
    assert sum(map(len, parts)) == len(set().union(*parts, work.splits.evaluation.names)) - len(work.splits.evaluation)
    assert set(work.splits.calibration.names) < parts[0]
    assert judging_of(recipe, work.splits.search).names == judges.images.images.names  # int8 is judged on the same


def test_a_budget_that_is_beaten_is_a_warning_and_not_an_error(tiny: nn.Module, images: Images, tmp_path: Path) -> None:
    asked = {**QUICK, "multiple": 16, "budget": "macs 0.6", "normalisation": "mean", "finetune_epochs": 0}
    run = compressor.compress(tiny, images, out=str(tmp_path / "run"), **{**asked, "runtimes": "onnxruntime"})
    assert run.summary["macs_kept"] < 0.6 * (1 - SLACK)
    said = [text for text in run.summary["warnings"] if "where 0.6 may stay" in text]
    assert len(said) == 1
    assert said[0] in (run.folder / "report.md").read_text()


# nothing removed


AS_IT_IS: dict[str, Any] = {"budget": "none", "precisions": "fp32,int8", "max_int8_loss": 100, "latency_batches": 1}


@pytest.fixture(scope="module")
def as_it_is(compress: Compress, tmp_path_factory: pytest.TempPathFactory) -> compressor.Run:
    return compress(tmp_path_factory.mktemp("runs") / "dense", **AS_IT_IS)


def test_a_network_ships_as_it_is(as_it_is: compressor.Run, tiny: nn.Module, images: Images) -> None:
    x = torch.stack([images[i] for i in range(5)])
    expected = copy.deepcopy(tiny).eval()(x).detach().numpy()
    with torch.no_grad():
        assert np.abs(as_it_is.network(Tiny())(x).numpy() - expected).max() < PARITY
        assert np.abs(as_it_is.module()(x).numpy() - expected).max() < PARITY
    file = as_it_is.folder / "bundle" / "model.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert np.abs(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0] - expected).max() < PARITY
    assert verify_bundle(as_it_is.folder / "bundle").passed
    assert compressor.load(as_it_is.folder, tiny)(x).shape == (5, 4)


def test_a_run_without_a_budget_has_every_key_and_no_stage_or_gate_of_pruning(as_it_is: compressor.Run) -> None:
    summary = as_it_is.summary
    keys = [key for key in SUMMARY if key != "latency_ratio_b32"]
    assert [key for key in keys if key not in summary] == []
    assert (summary["shipped"], summary["macs_kept"], summary["latency_ratio_b1"]) == ("dense", 1.0, 1.0)
    assert summary["accuracy_shipped"] == summary["accuracy_dense"]
    assert summary["accuracy_removed"] is summary["accuracy_repaired"] is summary["accuracy_tuned"] is None
    assert summary["onnx_bytes_dense"] == summary["onnx_bytes_shipped"]
    assert list(summary["precisions"]) == ["model.onnx", "model.fp16.onnx", "model.int8.onnx"]
    stages = "network accuracy onnx fp16 int8 parity latency layers engines".split()
    assert set(summary["stages"]) == {*stages, "accuracy of the files"}
    assert [name for name in summary["gates"] if "identity" in name or name == "accuracy: top-1 lost"] == []
    assert any(name.startswith("parity: model.int8.onnx") for name in summary["gates"])
    report = (as_it_is.folder / "report.md").read_text()
    assert "Nothing was removed: the network ships as it is." in report
    assert "made smaller" not in report
    assert not (as_it_is.folder / "dense.onnx").exists()


def test_a_run_without_a_budget_is_continued_as_any(as_it_is: compressor.Run, compress: Compress) -> None:
    again = compress(as_it_is.folder, **AS_IT_IS)
    assert all(cost["reused"] for cost in again.summary["stages"].values())


def test_a_run_without_a_budget_predicts_the_dense_network() -> None:
    recipe = make_recipe({"model": "torchvision:squeezenet1_1", "size": 64, "budget": "none"})
    predicted = inspecting.predict(recipe)
    assert predicted["macs_predicted"] == predicted["macs_dense"]
    assert predicted["groups"] == 0


# amounts and several at once


@pytest.mark.thorough
def test_the_summary_and_the_report_say_which_of_several_budgets_decided(
    compress: Compress, run: compressor.Run, tmp_path: Path
) -> None:
    size = 4 * run.summary["params_dense"]
    budget = f"macs 0.9, size {0.6 * size / 1e3:.3f} kB"
    both = compress(tmp_path / "both", budget=budget, normalisation="mean", finetune_epochs=0, latency_batches=1)
    macs, bytes_ = both.summary["budgets"]
    assert (macs["decided"], bytes_["decided"]) == (False, True)
    assert macs["kept"] <= 0.9
    assert 4 * both.summary["params_shipped"] <= 0.6 * size
    assert f"of these '{bytes_['budget']}' decided" in (both.folder / "report.md").read_text()
