"""Does the job hold for every network? One line per model, no per-model recipe, random weights.

In: names (`--models resnet18,timm:cait_xxs24_224`, or the lists torchvision, timm, all, tasks). Every model gets a
process and a time limit for the whole default job (relevance, measured loss, repair, accuracy, fp32 and int8 files,
parity, an engine, the bundle) on few small images, and a fresh one in which the bundle verifies. With `--parts` it is
pruned by random scores, stage by stage: one process prunes and checks, a fresh one rebuilds from the saved plan,
exports and runs. What they see is noise, or the first of the images in `--images`. Out: a table, DIR/zoo.csv and, as
the last line, one JSON object; DIR/points.jsonl holds what is done, so a run continues.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo_tasks
from safetensors.torch import save_model
from torch import Tensor, fx, nn

from compressor.budgets import Budget
from compressor.device.runtimes import open_model
from compressor.errors import BudgetError, CompressorError
from compressor.export.engines import build_engine, image_profile
from compressor.export.onnx import export_onnx
from compressor.files import read_record
from compressor.graph import fetch, trace
from compressor.inputs.images import Preprocessing, normalised, overridden
from compressor.inputs.models import Model, load_model
from compressor.inputs.sources import load_images
from compressor.pipeline import Run, compress
from compressor.planning import RankingOptions, make_plan
from compressor.planning.budget import least_share
from compressor.pruning import Structure, analyse, find_structure, identity_error, prune
from compressor.records import Compensation, InputSpec, Plan
from compressor.relevance import ScoreOptions, score
from compressor.run.saved import Network, example_of, load_graph, read_network, save
from compressor.tensors import Inputs, as_tuple

JOB = ("build", "job", "repair", "planted", "verify")
STAGES = (
    *("build", "trace", "groups", "plan", "prune", "identity", "forward", "retraced at a second size", "save"),
    *("replay", "export", "parity", "engine"),
)
TIMM = (
    "resnet26d vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 "
    "cait_xxs24_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 convnext_atto convnextv2_atto "
    "mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium efficientnet_lite0 efficientformer_l1 "
    "efficientformerv2_s0 efficientvit_b0 fastvit_t8 ghostnet_100 hrnet_w18_small mixer_s16_224 resmlp_12_224 "
    "gmlp_s16_224 mobileone_s0 mobilevit_xxs mobilevitv2_050 nf_resnet50 nfnet_l0 pvt_v2_b0 poolformer_s12 repvgg_a0 "
    "resnest14d res2net50_14w_8s rexnet_100 sebotnet33ts_256 botnet26t_256 lambda_resnet26t halonet26t "
    "tiny_vit_5m_224 levit_128s xcit_nano_12_p16_224 edgenext_xx_small davit_tiny maxvit_rmlp_pico_rw_256 "
    "coatnet_pico_rw_224 eva02_tiny_patch14_224 seresnext26d_32x4d ecaresnet26t skresnet18 dla34 densenet121 "
    "cspresnet50 vovnet39a regnety_002 tf_efficientnet_b0 tf_efficientnetv2_b0 lcnet_050 tinynet_e semnasnet_075 "
    "hardcorenas_a mnasnet_small dpn68 inception_v4 xception41 convmixer_768_32 twins_svt_small visformer_tiny "
    "pit_ti_224 crossvit_tiny_240 coat_lite_tiny"
).split()
ASKED = 0.5  # share of the MACs that stays
MOST = 0.75  # a structure whose honest limit is above this did not really get smaller
# float64 rounding through ~200 layers of random weights; a wrong index shows as 1e-2 or more
IDENTITY = 1e-7
# Of batch norms, as trained networks have them. At 1, smooth activations of random weights multiply differences: one of
# 1 % in the images is one of 40 % in tf_efficientnet_b0's answers (of 8 % so), and int8's rounding drowns them.
NORM_SCALE = 0.3
# float32 against float32 with other summation orders, through the same layers
PARITY = 1e-3
USUAL = Preprocessing((224, 224), (256,), "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL_PX = (64, 96, 128)  # of the job's images, the smallest that the network takes
JOB_IMAGES = 40
RECIPE: dict[str, Any] = {  # the default but for what only costs time here: tuning, timing, and gates on random weights
    "calibration": 24,
    "evaluation": 0.3,
    "batch_size": 8,
    "finetune_epochs": 0,
    "targets": ("SM86",),
    "precisions": ("fp32", "int8"),
    "runtimes": ("onnxruntime",),
    "latency_batches": (1,),
    "latency_seconds": 0.05,
    "max_accuracy_loss": 100.0,
    "max_int8_loss": 100.0,
}
PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = [Path(__file__).stem, "timm", "torch._dynamo", "onnxscript", "onnxslim"]  # seconds, in every process
PRELOADED += ["matplotlib.pyplot", "onnxruntime", "jinja2"]
PRELOADED += ["transformers", "segmentation_models_pytorch"]  # where they are installed


@dataclass
class Log:
    """What one model's processes have found so far, on disk after every stage."""

    path: Path
    found: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.found["stage"] = name
        self.write()
        start = time.perf_counter()
        yield
        self.found.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 2)
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps(self.found))


def main() -> None:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    PROCESSES.set_forkserver_preload(PRELOADED)
    done = _done(options.out)
    names = names_of(options.models)
    print(f"torch {torch.__version__}, {options.threads} threads, {platform.processor() or platform.machine()}")
    print(f"{'model':44} {'result':8} {'MACs kept':>9} {'groups+plan s':>13} {'total s':>8}  notes", flush=True)
    for name in names:
        if name not in done or (options.again and not done[name]["passed"]):
            done[name] = _measure(name, options)
            with (options.out / "points.jsonl").open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
        print(_line(done[name]), flush=True)
    rows = [done[name] for name in names]
    _write_csv(options.out / "zoo.csv", rows)
    print(json.dumps(_summary(rows)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="torchvision", help="names, or: torchvision, timm, all, tasks")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--limit-seconds", type=float, default=900, help="for each of a model's two processes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--parts", action="store_true", help="stage by stage with random scores, without repair")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run, with --parts")
    parser.add_argument("--size", type=int, default=0, help="pixels; 0: the model's own")
    parser.add_argument("--images", default="", help="real images, as --data of the command line; without: noise")
    parser.add_argument("--again", action="store_true", help="repeat what failed before")
    return parser.parse_args()


def names_of(text: str) -> list[str]:
    """The lists' names, cheapest first where the library says what a model costs."""
    import torchvision.models as library

    if text == "tasks":
        return zoo_tasks.names()
    known = library.list_models(module=library)
    if text in ("torchvision", "all"):
        known.sort(key=lambda n: library.get_model_weights(n).DEFAULT.meta["_ops"])
    both = {"torchvision": [f"torchvision:{n}" for n in known], "timm": [f"timm:{n}" for n in TIMM]}
    if text == "all":
        return [*both["torchvision"], *both["timm"]]
    if text in both:
        return both[text]
    return [n if ":" in n else f"{'torchvision' if n in known else 'timm'}:{n}" for n in text.split(",")]


def _done(out: Path) -> dict[str, dict[str, Any]]:
    path = out / "points.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {row["model"]: row for row in rows}


def _measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    folder = options.out / name.replace(":", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start, failure = time.perf_counter(), ""
    replayed = STAGES.index(options.until) >= STAGES.index("replay")
    for work in (("prune", "replay") if replayed else ("prune",)) if options.parts else ("job",):
        if not failure:
            failure = _run_worker(work, name, folder, options)
    state = json.loads((folder / "state.json").read_text()) if (folder / "state.json").is_file() else {"stage": "build"}
    shutil.rmtree(folder)
    result = {"model": name, "passed": not failure, "reason": failure, "until": options.until, **state}
    return {**result, "total_s": round(time.perf_counter() - start, 1)}


def _run_worker(work: str, name: str, folder: Path, options: argparse.Namespace) -> str:
    """Empty when it ended well, else why not. A process of its own, forked from one that has imported and no more."""
    process = PROCESSES.Process(target=_work, args=(work, name, folder, options))
    process.start()
    assert process.pid  # killpg(0) would be this process's own group
    try:
        process.join(options.limit_seconds)
    finally:
        late = process.exitcode is None
        if late:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    if late:
        return f"not done in {options.limit_seconds:g} s"
    code = process.exitcode or 0
    lines = (folder / "output.txt").read_text().strip().splitlines()
    return "" if code == 0 else (lines[-1][:300] if code > 0 and lines else f"ended with code {code}")


def _line(row: dict[str, Any]) -> str:
    seconds = row.get("seconds", {})
    spent = sum(seconds.get(s, 0) for s in ("groups", "plan"))
    notes = f"{row.get('at', row['stage'])}: {row['reason']}" if not row["passed"] else "; ".join(row.get("notes", []))
    if "error_repaired" in row:
        gain = row["error_removed"] / max(row["error_repaired"], 1e-30)
        notes = f"{row['px']} px, error {gain:.1f} times smaller, {row.get('peak_bytes', 0) / 1e9:.1f} GB. {notes}"
    result = "passed" if row["passed"] else "FAILED"
    return f"{row['model']:44} {result:8} {row.get('macs_kept', 1):9.3f} {spent:13.1f} {row['total_s']:8.1f}  {notes}"


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        columns = ("model", "passed", "stage", "reason", "macs_kept", "identity", "parity", "groups", "left_alone")
        columns += ("library", "task", "identity_catches", "parity_catches", "place")
        columns += ("px", "error_removed", "error_repaired", "layers_repaired", "peak_bytes", "total_s")
        timed = tuple(dict.fromkeys((*JOB, *STAGES)))
        out.writerow([*columns, *(f"{s}_s" for s in timed)])
        for row in rows:
            out.writerow([*(row.get(c, "") for c in columns), *(row.get("seconds", {}).get(s, "") for s in timed)])


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "passed": sum(r["passed"] for r in rows),
        "total": len(rows),
        "failed": {r["model"]: f"{r['stage']}: {r['reason']}" for r in rows if not r["passed"]},
        "macs_kept": {r["model"]: r["macs_kept"] for r in rows if r["passed"] and "macs_kept" in r},
    }


def _work(work: str, name: str, folder: Path, options: argparse.Namespace) -> None:
    os.setsid()  # with the processes it starts, a group that can be ended
    with (folder / "output.txt").open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(options.threads)
    state = folder / "state.json"
    log = Log(state, json.loads(state.read_text()) if state.is_file() else {})
    try:
        for _ in _works_on(name)[work](name, folder, log, options):
            if log.found["stage"] == options.until:
                break
    except CompressorError as error:
        log.found["place"] = _place_of(error)
        log.write()
        sys.exit(f"{type(error).__name__}: {error}")
    except Exception as error:
        log.found["place"] = _place_of(error)
        log.write()
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        where = f"{Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}" if last else ""
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.exit(f"{type(error).__name__} at {where}: {text}")


def _place_of(error: Exception) -> str:
    """The product's innermost function that the error came through, as `pruning/groups.py:_visit`."""
    places = [
        f"{frame.filename.partition('/compressor/')[2]}:{frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
        if "/compressor/" in frame.filename
    ]
    return places[-1] if places else ""


def _works_on(name: str) -> dict[str, Callable[..., Iterator[None]]]:
    """What a process may do with a network of that name."""
    if name.startswith(zoo_tasks.PREFIX):
        return {"job": zoo_tasks.job}
    return {"prune": _prune, "replay": _replay, "job": _job}


def _prune(name: str, folder: Path, log: Log, options: argparse.Namespace) -> Iterator[None]:
    """Every stage up to the saved plan; yields after each."""
    with log.stage("build"):
        model = load_model(name, "none")
        how = overridden(model.preprocessing or USUAL, size=options.size or None)
        shape = how.shape
        images = images_for(how, options.images)
        disturb(model.module, images[:2])
    yield
    with log.stage("trace"):
        graph = trace(model.module, images[:2])
    yield
    with log.stage("groups"):
        structure = find_structure(graph, images[:2])
        groups = structure.groups
        log.found |= {"groups": len(groups.groups), "left_alone": len(groups.left_alone)}
        log.found["blocked_by"] = sorted({f"{x.layer}: {x.operation}, {x.reason}" for x in groups.left_alone})[:20]
    yield
    with log.stage("plan"):
        plan, asked = _plan(graph, structure)
        log.found |= {"macs_kept": round(plan.macs_kept / plan.macs_dense, 4), "asked": asked}
        if log.found["macs_kept"] > MOST:
            raise BudgetError(f"{log.found['macs_kept']:.3f} of the MACs remain, more than {MOST}")
    yield
    with log.stage("prune"):
        small, _ = prune(graph, structure, plan)
    yield
    with log.stage("identity"):
        log.found["identity"] = error = identity_error(graph, small, structure, plan.kept, images[:2])
        _require(error <= IDENTITY, f"pruned and masked differ by {error:.2e}")
    yield
    with log.stage("forward"), torch.no_grad():
        outputs = [_first(small(images[:n])) for n in (1, 3)]
        _require(all(bool(o.isfinite().all()) for o in outputs), "the output is not finite")
        _require(torch.allclose(outputs[0], outputs[1][:1], rtol=1e-3, atol=1e-3), "the batch size changes the output")
        np.savez(folder / "expected.npz", images=images.numpy(), one=outputs[0].numpy(), three=outputs[1].numpy())
    yield
    with log.stage("retraced at a second size"):
        _second_size(model.module, structure, plan, small, shape, log)
    yield
    with log.stage("save"):
        inputs = (InputSpec(shape),)
        save(folder, Network(name, inputs, structure.tied, structure.frozen, dict(plan.kept)), small)
    yield


def _job(name: str, folder: Path, log: Log, options: argparse.Namespace) -> Iterator[None]:
    """The default command on few images, what repair gained, and the bundle's own check in a fresh process."""
    with log.stage("build"):
        name, model, how = _small(name, options.size)
        data = _pictures(folder / "images.npz", how, options.images)
        # statistics of all the very images: where one lies far outside of them, random weights multiply its numbers and
        # their rounding by a thousand, until float32 says nothing
        disturb(model.module, normalised(torch.from_numpy(np.load(data)["images"]).permute(0, 3, 1, 2), how))
        weights = folder / "weights.safetensors"
        save_model(model.module, weights)
    yield
    log.found["px"] = how.size[0]
    with log.stage("job"):
        run = _compressed(name, folder, how, weights, data, log)
        log.found["macs_kept"] = round(run.summary["macs_shipped"] / run.summary["macs_dense"], 4)
    yield
    with log.stage("repair"):
        log.found |= _gained(run.folder, model.module, how)
    yield
    log.found["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with log.stage("verify"):
        command = [sys.executable, "-P", "-m", "compressor.device", "verify", str(run.folder / "bundle")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        _require(done.returncode == 0, f"verify ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    yield


def _small(name: str, pixels: int) -> tuple[str, Model, Preprocessing]:
    """The network on the smallest images it takes, and its name as one would type it: some are built for a size."""
    model = load_model(name, "none")
    how = overridden(model.preprocessing or USUAL, size=pixels or None)
    if pixels:
        return name, model, how
    for small_px in SMALL_PX:
        small = overridden(how, size=small_px)
        if _takes(model.module, small_px):
            return name, model, small
        for argument in ("img_size", "image_size"):
            spelled = f"{name}({argument}={small_px})"
            with suppress(CompressorError, RuntimeError, AssertionError):
                built = load_model(spelled, "none")
                if _takes(built.module, small_px):
                    return spelled, built, small
    return name, model, how


@torch.no_grad()
def _takes(module: nn.Module, pixels: int) -> bool:
    """Whether the network answers images of that size with numbers."""
    try:
        return bool(_first(module.eval()(torch.randn(2, 3, pixels, pixels))).isfinite().all())
    except Exception:
        return False


def _pictures(path: Path, how: Preprocessing, source: str) -> Path:
    """JOB_IMAGES of the source, or smooth noise with labels of two classes."""
    if source:
        images = load_images(source).prepared(how)
        pixels = torch.stack([images.pixels(index) for index in range(JOB_IMAGES)])
        labels = images.labels[:JOB_IMAGES]
    else:
        pixels, labels = _smooth_noise(JOB_IMAGES, how, seed=4), np.arange(JOB_IMAGES) % 2
    np.savez(path, images=pixels.permute(0, 2, 3, 1).numpy(), labels=labels)
    return path


def _smooth_noise(count: int, how: Preprocessing, *, seed: int) -> Tensor:
    """uint8 [N, 3, H, W]."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (255 * nn.functional.interpolate(coarse, how.size, mode="bicubic")).clamp(0, 255).to(torch.uint8)


def _compressed(name: str, folder: Path, how: Preprocessing, weights: Path, data: Path, log: Log) -> Run:
    """At half the MACs, or at what the network's structure lets go."""
    fields = {"size": how.size, "resize": how.size, "mean": how.mean, "std": how.std}
    given = {**RECIPE, **fields, "model": name, "weights": str(weights), "data": str(data), "out": str(folder / "run")}
    begun = time.perf_counter()

    def notify(stage: str, share: float) -> None:
        if log.found.get("at") != stage:
            log.found["at"] = stage
            log.write()

    try:
        run = compress(**given, budget=f"macs {ASKED}", notify=notify)
    except BudgetError as refusal:
        reachable = re.findall(r"macs (0\.\d+)", str(refusal))
        if not reachable or float(reachable[-1]) > MOST:
            raise
        run = compress(**given, budget=f"macs {reachable[-1]}", notify=notify)
    log.found["job_s"] = round(time.perf_counter() - begun, 1)
    log.found["stages"] = run.summary.get("stages", {})
    return run


@torch.no_grad()
def _gained(folder: Path, module: nn.Module, how: Preprocessing) -> dict[str, Any]:
    """Squared error of the outputs after bare removal over that after repair, on images no stage has seen."""
    graph = trace(module, example_of(how.shape))
    network = read_network(folder)
    structure = analyse(graph, network.tied, network.frozen)
    bare, _ = prune(graph, structure, network.kept)
    repaired = load_graph(folder, module)
    images = normalised(_smooth_noise(8, how, seed=5), how)
    dense, cut, mended = (_first(net(images)).double() for net in (graph, bare, repaired))
    errors = [float((out - dense).square().sum() / dense.square().sum()) for out in (cut, mended)]
    layers = len(read_record(folder / "repair-1.json", Compensation).repaired)
    return {"error_removed": errors[0], "error_repaired": errors[1], "layers_repaired": layers}


def images_for(how: Preprocessing, source: str) -> Tensor:
    """[3, C, H, W], as the model takes them."""
    if source:
        return torch.stack([load_images(source).prepared(how)[index] for index in range(3)])
    return torch.randn(3, *how.shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def disturb(module: nn.Module, images: Inputs) -> None:
    """Weights whose every index matters: statistics of real activations, no parameter constant over its channels."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        if (
            parameter.numel() > 1
            and parameter.is_floating_point()
            and bool((parameter == parameter.flatten()[0]).all())
        ):
            noise = torch.rand(parameter.shape, generator=generator)
            start = 0.0 if bool((parameter == 0).all()) else 0.75
            parameter.copy_(start + noise / 2 - (0.25 if start == 0 else 0))

    layers = module.eval().modules()
    norms = [layer for layer in layers if isinstance(getattr(layer, "running_var", None), Tensor)]  # frozen ones too
    for scaled in (getattr(norm, name) for norm in norms for name in ("weight", "bias")):
        if scaled is not None:
            scaled.mul_(NORM_SCALE)

    def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """On what the disturbed layers before it give, so that a deep network's values stay in range."""
        (x,) = inputs
        others = [axis for axis in range(x.dim()) if axis != 1]
        spread = x.std(others).clamp(min=1e-3)
        norm.running_mean = x.mean(others) + 0.2 * spread * torch.randn(spread.shape, generator=generator)
        norm.running_var = spread.square() * (0.5 + torch.rand(spread.shape, generator=generator))

    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    module(*as_tuple(images))
    for hook in hooks:
        hook.remove()


def _plan(graph: fx.GraphModule, structure: Structure) -> tuple[Plan, float]:
    """Half the MACs, or the structure's honest limit; counts rounded to 8 where that can meet it, else to fewer."""
    scores = score(graph, structure.groups, (), criterion="random", options=ScoreOptions())
    refused = BudgetError("nothing can go")
    for multiple in (8, 4, 2, 1):
        options = RankingOptions(multiple=multiple)
        limit = least_share(graph, structure, scores, "macs", options)
        share = max(ASKED, math.ceil(limit * 1000) / 1000)
        try:
            return make_plan(graph, structure, scores, Budget("macs", share), options), share
        except BudgetError as why:
            refused = why
    raise refused


def _second_size(
    module: nn.Module, structure: Structure, plan: Plan, small: fx.GraphModule, shape: tuple[int, ...], log: Log
) -> None:
    """A traced graph is fixed in image size: the dense model is traced again, the same units go, the weights match."""
    pixels = max(32, shape[1] * 3 // 4 // 32 * 32)
    images = torch.randn(2, shape[0], pixels, pixels, generator=torch.Generator().manual_seed(3))
    notes = log.found.setdefault("notes", [])
    try:
        with torch.no_grad():
            module(images)
    except Exception as refusal:
        notes.append(f"no second size: {(str(refusal).strip() or 'refused').splitlines()[0][:60]}")
        return
    graph = trace(module, images)
    again = analyse(graph, structure.tied, structure.frozen)
    other, _ = prune(graph, again, plan)
    for name, parameter in small.named_parameters():
        _require(torch.equal(fetch(other, name), parameter), f"at {pixels} px the plan cuts {name} differently")
    error = identity_error(graph, other, again, plan.kept, images)
    _require(error <= IDENTITY, f"at {pixels} px pruned and masked differ by {error:.2e}")


def _replay(name: str, folder: Path, log: Log, _: argparse.Namespace) -> Iterator[None]:
    """A fresh process: rebuilds from the folder, exports, runs, builds; yields after each stage."""
    held = np.load(folder / "expected.npz")
    images = torch.from_numpy(held["images"])
    with log.stage("replay"), torch.no_grad():
        small = load_graph(folder)
        for n, key in ((1, "one"), (3, "three")):
            got = _first(small(images[:n])).numpy()
            _require(np.allclose(got, held[key], rtol=1e-5, atol=1e-5), "the rebuilt network computes something else")
    yield
    path = folder / "pruned.onnx"
    with log.stage("export"):
        export_onnx(small, images[:2], path)
    yield
    with log.stage("parity"):
        session = open_model(path, threads=torch.get_num_threads())
        for n, key in ((1, "one"), (3, "three")):
            difference = np.abs(session.run(held["images"][:n]) - held[key]).max() / np.abs(held[key]).max()
            log.found["parity"] = max(float(difference), log.found.get("parity", 0.0))
        _require(log.found["parity"] <= PARITY, f"onnxruntime differs by {log.found['parity']:.2e}")
    yield
    with log.stage("engine"):
        profile = image_profile(images.shape[1:], batches=(1, 1, 4))
        build_engine(path, folder / "pruned.engine", target="rtx", profiles=profile)
    yield


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _require(fact: bool, otherwise: str) -> None:
    if not fact:
        raise CompressorError(otherwise)


if __name__ == "__main__":
    main()
