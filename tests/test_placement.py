"""On a GPU as on the CPU: every step of the job, with its network on a pretended device that forgives no mix-up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

import compressor
from compressor import choices, explaining
from compressor.accuracy import evaluate
from compressor.budgets import Budget
from compressor.criteria import UNLEARNED
from compressor.delivery import Delivered
from compressor.errors import CompressorError, RecipeError
from compressor.export.gate import check_export
from compressor.export.onnx import export_onnx
from compressor.files import read_record
from compressor.graph import fetch, trace
from compressor.inputs.images import Images
from compressor.inputs.models import Model
from compressor.pipeline import flow
from compressor.placement import (
    CPU,
    code_of,
    computing,
    device_of,
    placed,
    resolve,
    reusing_freed_memory,
    to_device,
    value_bytes,
    within_memory,
)
from compressor.planning import RankingOptions, make_plan, measure_scores
from compressor.pruning import Structure, find_structure, identity_error, prune
from compressor.recipe import make_recipe
from compressor.records import Plan, Scores, Slices
from compressor.relevance import ScoreOptions, score
from compressor.relevance.composite import PRESETS
from compressor.relevance.lrp import LrpOptions
from compressor.repair import compensate
from compressor.repair.batchnorm import reestimate
from compressor.run import work
from compressor.run.checks import Checks
from compressor.run.saved import read_weights, write_weights
from tests.fake_device import FAKE, MixedDevices, fake_device

SAME_LOSS = 1e-2  # squared differences of outputs, of 1e-7 of their square: float32 leaves three digits of the roots
SAME = 1e-5  # the same kernels on the same numbers; copies may lie in another order of axes
IDENTITY = 1e-9  # float64 rounding
CLASSES, PX = 4, 12


class Convolutions(nn.Module):
    """What convolutional networks are made of: a stem, depthwise, a gate, a residual sum, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.Hardswish())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1))
        self.last = nn.Sequential(nn.Conv2d(16, 24, 3, stride=2, padding="valid"), nn.BatchNorm2d(24), nn.ReLU6())
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = x + self.deep(x) * torch.sigmoid(self.gate(x))
        return self.head(self.last(x).mean((2, 3)))


class Attention(nn.Module):
    """A class token made by the graph itself, positions looked up by a range of numbers, attention, a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 16)), nn.Embedding(10, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        first = torch.zeros(x.shape[0], 1, 16, device=x.device) + self.token
        x = torch.cat([first, x], 1) + self.positions(torch.arange(x.shape[1] + 1, device=x.device))
        y = self.norms[0](x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x)[:, 0])


NETWORKS: dict[str, Callable[[], nn.Module]] = {"convolutions": Convolutions, "attention": Attention}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval()


def batches(count: int = 3, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, size, 3, PX, PX, generator=generator)
    labels = torch.randint(0, CLASSES, (count, size), generator=generator)
    labels[0, 0] = -1
    return list(zip(images, labels, strict=True))


@pytest.fixture(scope="module", params=NETWORKS)
def subject(request: pytest.FixtureRequest) -> tuple[fx.GraphModule, Structure]:
    graph = trace(network(request.param), torch.randn(2, 3, PX, PX, generator=torch.Generator().manual_seed(0)))
    return graph, find_structure(graph, batches()[0][0][:2])


Subject = tuple[fx.GraphModule, Structure]


def plan_of(graph: fx.GraphModule, structure: Structure) -> Plan:
    scores = score(graph, structure.groups, [], criterion="random")
    return make_plan(graph, structure, scores, Budget("macs", 0.6, 1.0), RankingOptions(multiple=1))


def on_cpu_and_fake(job: Callable[[fx.GraphModule], Any], graph: fx.GraphModule) -> tuple[Any, Any]:
    """What a job makes of a graph on the CPU, and of the same on the pretended device."""
    expected = job(copy.deepcopy(graph))
    with fake_device():
        return expected, job(placed(graph, FAKE))


def assert_same_tensors(a: fx.GraphModule, b: fx.GraphModule) -> None:
    """`b` is a network on the pretended device."""
    assert device_of(b) == FAKE
    with fake_device():
        theirs = placed(b, CPU).state_dict()
    for name, tensor in a.state_dict().items():
        assert torch.allclose(tensor, theirs[name], rtol=SAME, atol=SAME), name


def assert_same_scores(a: Scores, b: Scores, within: float = SAME) -> None:
    assert list(a.values) == list(b.values)
    assert a.values or a.unscored
    for name, values in a.values.items():
        assert np.allclose(values, b.values[name], rtol=within, atol=within * max(np.abs(values).max(), 1e-30)), name


# -- the pretended device is strict


@pytest.mark.parametrize(
    "mix",
    [
        lambda far: far + torch.ones(3),
        lambda far: torch.where(far > 0, far, torch.zeros(3)),
        lambda far: far.index_select(0, torch.tensor([1])),
        lambda far: far.gather(0, torch.tensor([1])),
        lambda far: torch.zeros(3).index_add_(0, torch.tensor([0]), far[:1]),
        lambda far: torch.zeros(3)[far.long()],
        lambda far: torch.stack([far, torch.ones(3)]),
        lambda far: far.new_zeros(3) @ torch.arange(3.0),
        lambda far: far[torch.tensor([0])] + torch.from_numpy(np.ones(1, np.float32)),
    ],
)
def test_tensors_on_two_devices_are_refused(mix: Callable[[Tensor], Any]) -> None:
    with fake_device(), pytest.raises(MixedDevices):
        mix(torch.ones(3, device=FAKE))


def test_what_a_gpu_allows_is_allowed() -> None:
    with fake_device():
        far = torch.tensor([1.0, 2.0, 3.0], device=FAKE)
        assert device_of(nn.ParameterList([nn.Parameter(far)])) == FAKE
        assert (far * torch.tensor(2.0))[torch.tensor([0, 2])].tolist() == [2.0, 6.0]
        assert far.cpu().device == CPU
        assert far.cpu().numpy().tolist() == [1.0, 2.0, 3.0]
        far[1:] += 1
        assert far.tolist() == [1.0, 3.0, 4.0]
        with pytest.raises(RuntimeError, match="numpy"):
            far.numpy()


# -- a device's name


def test_the_gpu_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve("auto") == resolve("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve("cpu") == CPU
    assert resolve("auto") == resolve("cuda") == resolve("cuda:1") == torch.device("cuda", 1)
    assert resolve("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(RecipeError, match=r"cuda:9.*cuda:0, cuda:1.*--device"):
        resolve("cuda:9")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "CUDA", "", "mps", "cpu:0"])
def test_a_device_nobody_knows_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="auto, cpu, cuda or cuda:n"):
        resolve(name)


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"'cuda:9' needs a GPU, there is none; use --device auto or --device cpu"):
        choices.require_known(make_recipe({"device": "cuda:9"}))


def test_a_full_gpu_is_one_line_with_a_remedy() -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB.\nMore advice"
    with pytest.raises(CompressorError) as raised, computing():
        raise torch.OutOfMemoryError(said)
    assert str(raised.value) == (
        "CUDA out of memory. Tried to allocate 2.00 GiB; use a smaller --batch-size, or --device cpu"
    )


def test_float32_is_whole_inside_and_as_before_outside() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with computing():
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


class Library:
    """What glibc was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int] | str] = []

    def mallopt(self, what: int, size: int) -> None:
        self.told.append((what, size))

    def malloc_trim(self, pad: int) -> None:
        self.told.append("trim")


def test_freed_blocks_stay_until_the_last_that_reuses_them_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    with reusing_freed_memory():
        kept = [(-3, 1 << 30), (-1, (1 << 31) - 1)]
        assert library.told == kept
        with pytest.raises(ValueError, match="in the middle"), reusing_freed_memory():
            raise ValueError("in the middle")
        assert library.told == kept
    assert library.told == [*kept, (-3, 1 << 25), (-1, 1 << 26), "trim"]


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", missing)
    with reusing_freed_memory():
        values = torch.ones(3)
    assert values.sum() == 3


# -- networks and batches on a device


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.ones(6))
        self.register_buffer("again", self.table)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.table + self.again  # type: ignore[no-any-return]


def test_a_network_is_copied_with_its_ties_or_is_there_already() -> None:
    graph = trace(Tied(), torch.randn(2, 6))
    assert placed(graph, CPU) is graph
    graph.get_parameter("first.bias").requires_grad_(False)
    with fake_device():
        far = placed(graph, FAKE)
        assert {t.device for t in (*far.parameters(), *far.buffers())} == {FAKE}
        assert fetch(far, "first.weight") is fetch(far, "second.weight")
        assert [n for n, p in far.named_parameters() if not p.requires_grad] == ["first.bias"]
        assert all(isinstance(p, nn.Parameter) for p in far.parameters())
        assert far(torch.ones(2, 6, device=FAKE)).device == FAKE
    assert {t.device for t in graph.parameters()} == {CPU}


def test_tensors_that_a_graph_makes_are_made_there() -> None:
    graph = trace(network("attention"), torch.randn(2, 3, PX, PX))
    named = [n for n in graph.graph.nodes if "device" in n.kwargs]
    assert named, "the network makes no tensor of its own any more; give it one"
    assert "cpu" in str(graph.code)
    images = torch.randn(5, 3, PX, PX)
    with fake_device():
        far = placed(graph, FAKE)
        assert torch.allclose(far(images.to(FAKE)).cpu(), graph(images), atol=SAME)
        assert code_of(far) == code_of(graph) == str(graph.code)
        back = placed(far, CPU)
        assert torch.equal(back(images), graph(images))


class Bare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(CLASSES, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight).mean((2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Bare, Buffered])
def test_a_network_without_parameters_has_a_device(kind: type[nn.Module]) -> None:
    graph = trace(kind(), torch.randn(2, 3, PX, PX))
    assert device_of(graph) == CPU
    shown = [(images, labels % 3) for images, labels in batches()]
    expected = evaluate(graph, shown)
    reestimate(graph, shown)
    structure = find_structure(graph, shown[0][0][:2])
    assert not structure.groups.groups
    with fake_device():
        far = placed(graph, FAKE)
        assert device_of(far) == (CPU if kind is Bare else FAKE)
        assert evaluate(far, shown) == expected
        reestimate(far, shown)


def test_a_batch_on_its_way_to_a_gpu_is_pinned() -> None:
    with fake_device():
        traced = trace(nn.Flatten(), batches()[0][0])
        traced.weight = nn.Parameter(torch.zeros(1, device=FAKE))
        images, labels = next(within_memory(batches(), traced))
        assert images.device == labels.device == FAKE
        assert to_device(images, FAKE) is images


def test_a_model_elsewhere_is_traced_where_the_example_lies() -> None:
    model = network("convolutions")
    example = batches()[0][0]
    with fake_device():
        far = placed(model, FAKE)
        with _disable_current_modes():
            graph = trace(far, example)
        assert device_of(far) == FAKE
    assert device_of(graph) == CPU
    assert torch.equal(graph(example), model(example))


# -- every criterion


@pytest.mark.parametrize("criterion", UNLEARNED)
def test_scores_do_not_depend_on_the_device(subject: Subject, criterion: str) -> None:
    graph, structure = subject
    options = ScoreOptions(steps=2)

    def job(network: fx.GraphModule) -> Scores:
        return score(network, structure.groups, batches(), criterion=criterion, options=options)

    assert_same_scores(*on_cpu_and_fake(job, graph))


@pytest.mark.parametrize("target", ["true", "predicted"])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_relevance_does_not_depend_on_the_device(subject: Subject, preset: str, fast: bool, target: Any) -> None:
    graph, structure = subject
    options = ScoreOptions(lrp=LrpOptions(composite=PRESETS[preset], fast=fast), target=target)

    def job(network: fx.GraphModule) -> Scores:
        return score(network, structure.groups, batches(2), criterion="lrp", options=options)

    assert_same_scores(*on_cpu_and_fake(job, graph))


# -- groups, removal, checks


def test_groups_are_found_and_checked_on_the_cpu(subject: Subject) -> None:
    graph, structure = subject
    example = batches()[0][0][:2]
    with fake_device():
        far = placed(graph, FAKE)
        found = find_structure(far, example)
        assert [g.name for g in found.groups.groups] == [g.name for g in structure.groups.groups]
        assert (found.tied, found.frozen) == (structure.tied, structure.frozen)
        assert device_of(far) == FAKE


def test_removal_and_identity_do_not_depend_on_the_device(subject: Subject) -> None:
    graph, structure = subject
    plan = plan_of(graph, structure)
    images = batches()[0][0]
    expected, _ = prune(graph, structure, plan)
    with fake_device():
        far = placed(graph, FAKE)
        small, slices = prune(far, structure, plan_of(far, structure))
        assert identity_error(far, small, structure, plan.kept, images) < IDENTITY
        assert slices.kept
    assert_same_tensors(expected, small)


# -- repair and recovery


def pruned(graph: fx.GraphModule, structure: Structure) -> tuple[fx.GraphModule, Slices]:
    return prune(graph, structure, plan_of(graph, structure))


def test_compensation_does_not_depend_on_the_device(subject: Subject, tmp_path: Path) -> None:
    graph, structure = subject

    def job(dense: fx.GraphModule) -> tuple[fx.GraphModule, Any]:
        small, slices = pruned(dense, structure)
        return small, compensate(dense, small, slices, batches())

    (expected, record), (found, theirs) = on_cpu_and_fake(job, graph)
    assert record.repaired
    assert [r.weight for r in record.repaired] == [r.weight for r in theirs.repaired]
    assert_same_tensors(expected, found)


@pytest.mark.parametrize("limit", [0, 2 << 30])
def test_statistics_do_not_depend_on_the_device(limit: int) -> None:
    """With nothing held in memory, every value goes through a file and comes back to its device."""
    graph = trace(network("convolutions"), batches()[0][0])
    structure = find_structure(graph, batches()[0][0])

    def job(dense: fx.GraphModule) -> fx.GraphModule:
        small, slices = pruned(dense, structure)
        assert reestimate(small, batches(), reference=dense, slices=slices, limit_bytes=limit)
        return small

    assert_same_tensors(*on_cpu_and_fake(job, graph))


def test_accuracy_does_not_depend_on_the_device(subject: Subject) -> None:
    assert len(set(on_cpu_and_fake(lambda network: evaluate(network, batches()), subject[0]))) == 1


def test_weights_go_to_disk_and_come_back_to_their_device(subject: Subject, tmp_path: Path) -> None:
    graph, _ = subject
    with fake_device():
        far = placed(graph, FAKE)
        write_weights(tmp_path / "far.safetensors", far)
        with torch.no_grad():
            for parameter in far.parameters():
                parameter.zero_()
        read_weights(tmp_path / "far.safetensors", far)
    assert_same_tensors(graph, far)


@pytest.mark.thorough
def test_measured_scores_do_not_depend_on_the_device(subject: Subject) -> None:
    graph, structure = subject
    scores = score(graph, structure.groups, batches(), criterion="l1")

    def job(network: fx.GraphModule) -> Scores:
        return measure_scores(network, structure, scores, batches(), RankingOptions(multiple=1))

    assert_same_scores(*on_cpu_and_fake(job, graph), within=SAME_LOSS)


def test_files_are_made_from_a_copy_on_the_cpu(tmp_path: Path) -> None:
    graph, images = trace(network("attention"), batches()[0][0][:2]), batches()[0][0]
    with fake_device():
        far = placed(graph, FAKE)
    path = export_onnx(far, images[:2], tmp_path / "far.onnx")
    check_export(path, far, images.numpy(), batches=(3,))
    assert device_of(far) == FAKE


# -- the whole job


@pytest.fixture
def on_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--device cuda` is the pretended device; a model's code is read on the CPU, outside of it."""

    def trace_plainly(*given: Any) -> fx.GraphModule:
        with _disable_current_modes():
            return trace(*given)

    monkeypatch.setattr(choices, "resolve", lambda name: FAKE if name == "cuda" else resolve(name))
    for module in (work, explaining):
        monkeypatch.setattr(module, "resolve", lambda name: FAKE if name == "cuda" else resolve(name))
        monkeypatch.setattr(module, "trace", trace_plainly)


@pytest.fixture
def undelivered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end before files are made, which takes longer than all before and is on the CPU anyway."""
    monkeypatch.setattr(flow, "deliver", lambda *args: Delivered({}, Checks()))


QUICK: dict[str, Any] = {
    "criterion": "lrp",
    "multiple": 1,
    "targets": "",
    "latency_batches": "1",
    "latency_seconds": 0.0,
    "runtimes": "onnxruntime",
    "max_accuracy_loss": 100,
    "finetune_epochs": 1,
    "batch_size": 8,
    "rounds": 2,
    "reestimate": True,
    "seed": 3,
}
ONE_IMAGE = 0.06  # of accuracy: one of 18 may fall on the other side


def lines(notified: list[str], said: str) -> list[str]:
    return [stage for stage in notified if said in stage]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "normalisation"),
    [
        pytest.param("attention", "mean", marks=pytest.mark.slow),
        pytest.param("convolutions", "mean", marks=pytest.mark.slow),  # of the next, less
        ("convolutions", "measured"),
    ],
)
def test_the_whole_job_makes_the_same_plan_and_goes_on_on_another_device(
    name: str, normalisation: str, images: Images, tmp_path: Path, on_fake: None, undelivered: None
) -> None:
    asked = {**QUICK, "normalisation": normalisation}
    near = compressor.compress(network(name), images, out=str(tmp_path / "cpu"), device="cpu", **asked)
    with fake_device():
        far = compressor.compress(network(name), images, out=str(tmp_path / "far"), device="cuda", **asked)
    plans = [read_record(run.folder / "plan.json", Plan) for run in (near, far)]
    assert {n: k.tolist() for n, k in plans[0].kept.items()} == {n: k.tolist() for n, k in plans[1].kept.items()}
    assert (near.summary["device"], far.summary["device"]) == ("cpu", "lazy:0")
    for variant in ("accuracy_dense", "accuracy_removed", "accuracy_repaired", "accuracy_tuned", "accuracy_shipped"):
        assert near.summary[variant] == far.summary[variant], variant
    notified: list[str] = []
    compressor.compress(
        network(name),
        images,
        out=str(far.folder),
        device="cpu",
        notify=lambda stage, share: notified.append(stage),
        **asked,
    )
    assert lines(notified, "repair-2 (done before)")
    done = [stage.removesuffix(" (done before)") for stage in lines(notified, "(done before)")]
    assert set(lines(notified, "scores-") + lines(notified, "finetune") + lines(notified, "accuracy")) == {
        f"{stage} (done before)" for stage in done if stage.startswith(("scores-", "finetune", "accuracy"))
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_a_picture_of_relevance_does_not_depend_on_the_device(
    name: str, tmp_path: Path, on_fake: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 255, (3, PX, PX, 3)).astype(np.uint8)
    np.savez(path, images=pixels, labels=np.arange(3))
    model = Model(network(name), "", "given", None, None, "0" * 64)
    monkeypatch.setattr(explaining, "load_model", lambda *args, **kwargs: model)
    options = {"data": str(path), "size": PX, "mean": "0.5,0.5,0.5", "std": "0.5,0.5,0.5"}
    expected = explaining.explain(make_recipe({**options, "device": "cpu"}), 1)
    with fake_device():
        found = explaining.explain(make_recipe({**options, "device": "cuda"}), 1)
    assert np.allclose(expected.heat, found.heat, rtol=SAME, atol=SAME)
    for ours, theirs in zip(expected.layers, found.layers, strict=True):
        assert np.allclose(ours.units, theirs.units, rtol=SAME, atol=SAME)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_gpu_makes_the_plan_the_cpu_makes(name: str, images: Images, tmp_path: Path) -> None:
    """Sums come in another order there: units of about equal scores may change places, sizes may not."""
    runs = [
        compressor.compress(network(name), images, out=str(tmp_path / device), device=device, **QUICK)
        for device in ("cpu", "cuda")
    ]
    near, far = (read_record(run.folder / "plan.json", Plan).kept for run in runs)
    assert runs[1].summary["device"].startswith("cuda:")
    assert list(near) == list(far)
    assert {n: len(k) for n, k in near.items()} == {n: len(k) for n, k in far.items()}
    agree = sum(len(np.intersect1d(near[n], far[n])) for n in near) / sum(map(len, near.values()))
    assert agree > 0.9
    for variant in ("accuracy_dense", "accuracy_removed", "accuracy_repaired", "accuracy_tuned", "accuracy_shipped"):
        assert runs[0].summary[variant] == pytest.approx(runs[1].summary[variant], abs=2 * ONE_IMAGE), variant


def test_batches_come_in_even_parts_where_a_networks_values_pass_the_limit() -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten()), torch.zeros(2, 3, 8, 8))
    an_image = 2 * 8 * 8 * 8 * 4  # the convolution's and the ReLU's outputs, float32; flattening is a view
    assert value_bytes(graph) == an_image
    images, labels = torch.arange(10.0)[:, None, None, None].expand(10, 3, 8, 8), torch.arange(10)
    parts = list(within_memory([(images, labels)], graph, limit_bytes=4 * an_image))
    assert [len(part) for part, _ in parts] == [4, 4, 2]
    assert torch.equal(torch.cat([part for part, _ in parts]), images)
    assert torch.equal(torch.cat([part for _, part in parts]), labels)
    assert [len(part) for part, _ in within_memory([(images, labels)], graph, limit_bytes=1)] == [1] * 10
