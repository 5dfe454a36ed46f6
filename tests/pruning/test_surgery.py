"""Identity: the pruned network is the original with the removed units at zero in every consumer's input, float64.

The masked side knows nothing of labels: it is written by hand for each net, as hooks that zero what each named
module reads (or gives), with the module's own channel positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, fx, nn
from torch.nn import functional
from torchvision.models import VisionTransformer

from compressor.errors import GateError, ModelError
from compressor.graph import fetch, trace
from compressor.pruning import Structure, find_structure, identity_error, prune, surgery
from compressor.pruning.check import random_units
from compressor.pruning.compaction import RaggedError
from compressor.records import Group, IntArray, Plan

from .conftest import TOLERANCE, images, randomised, removed_channels


@dataclass(frozen=True)
class Mask:
    """Channels `at` of what `module` reads ("in") or gives ("out") are channels `of` of what `producer` gives."""

    module: str
    producer: str
    at: Sequence[int] | None = None
    of: Sequence[int] | None = None
    side: str = "in"
    axis: int = 1


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    masks: tuple[Mask, ...]
    pruned: tuple[str, ...]  # layers that must lose units, so that no case passes by freezing
    kinds: tuple[str, ...] = ("channel", "neuron", "stream", "head", "head_dim", "conv_group")


def conv_bn(i: int, o: int, k: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(o), nn.ReLU())


class Head(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 8), conv_bn(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = conv_bn(3, 8), conv_bn(8, 6), Head(8)
        self.b = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(functional.relu(x + self.b(self.a(x))))


class InvertedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.depthwise = conv_bn(3, 6), conv_bn(6, 12, 1), conv_bn(12, 12, 3, groups=12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project, self.head = nn.Conv2d(12, 6, 1), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(self.expand(x))
        gate = self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return self.head(x + self.project(y * gate))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 4), conv_bn(4, 6)
        self.norm, self.c, self.head = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 3), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.c(self.norm(torch.cat([x, self.b(x)], 1)).relu()))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.g = conv_bn(3, 12), conv_bn(12, 16, 3, groups=4)
        self.c, self.head = nn.Conv2d(16, 5, 1), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.g(self.a(x))))


class Tokens(nn.Module):
    """[N, 3, H, W] to [N, HW, C] and, after `inner`, to three classes."""

    def __init__(self, inner: nn.Module, width: int = 12) -> None:
        super().__init__()
        self.embed, self.inner, self.out = nn.Linear(3, width), inner, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2))
        return self.out(x + self.inner(x)).mean(1)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.gelu(self.a(x)))


class Attention(nn.Module):
    """Four heads of six; `how` is the kernel path, and with `table` a bias per head from relative positions."""

    def __init__(self, how: str, *, table: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj, self.how = nn.Linear(12, 72), nn.Linear(24, 12), how
        self.table = nn.Parameter(torch.zeros(7, 4)) if table else None
        self.register_buffer("index", torch.arange(4)[:, None] - torch.arange(4)[None] + 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        if self.how == "fused":
            x = functional.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-2, -1) * 6**-0.5
            if self.table is not None:
                scores = scores + self.table[self.index.reshape(-1)].reshape(4, 4, 4).permute(2, 0, 1)
            x = scores.softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, t, 24))


class Gated(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(12, 32), nn.Linear(16, 12), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "glu":
            return self.b(functional.glu(self.a(x)))
        u, v = self.a(x).chunk(2, -1)
        return self.b(u * functional.silu(v))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 12), nn.Conv2d(12, 5, 1), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        return self.head(self.b(x.reshape(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)))


class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 24), nn.Conv2d(6, 5, 1), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(functional.pixel_shuffle(self.a(x), 2)))


class OptionA(nn.Module):
    """The CIFAR ResNet's shortcut: every second pixel, zeros beside the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv_bn(3, 8), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 1), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.b(self.a(x).relu()) + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


class Transposed(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.a, self.up, self.head = conv_bn(3, 8), nn.ConvTranspose2d(8, 12, 2, 2, groups=groups), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.a(x)).relu())


class PatchMerging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.reduce, self.out = nn.Linear(3, 6), nn.Linear(24, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x.permute(0, 2, 3, 1))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.out(self.reduce(x)).mean((1, 2))


class StandardConv(nn.Conv2d):
    """The kernel is normalised, each output channel's over its inputs, then scaled by a gain."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o, 3)
        self.gain = nn.Parameter(torch.ones(o, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = functional.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True, momentum=0.0)
        return functional.conv2d(x, w.reshape_as(self.weight) * self.gain, self.bias)


class Standardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = StandardConv(3, 8), nn.Conv2d(8, 5, 1), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()))


class BareParameters(nn.Module):
    """A token, positions, a layer scale and a buffer along the stream, none of them a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.out = nn.Linear(3, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 12)), nn.Parameter(torch.zeros(1, 17, 12))
        self.scale = nn.Parameter(torch.ones(12))
        self.register_buffer("colour", torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).transpose(1, 2)) * self.colour
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = x + self.scale * self.a(x)
        return self.out(x[:, 0])


class Tied(nn.Module):
    """One matrix into the hidden space and, transposed, out of it; one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twice, self.out = nn.Linear(3, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.mean((2, 3)))
        x = self.twice(self.twice(x).relu()).relu()
        return self.out(x) + functional.linear(x, self.embed.weight.t())


SHUFFLED = [(i % 3) * 4 + i // 3 for i in range(12)]
ATTENTION = (
    Mask("inner.qkv", "inner.qkv", side="out", axis=2),
    Mask("inner.proj", "inner.qkv", None, range(48, 72), axis=2),
)
ON_TOKENS = (Mask("inner.qkv", "embed", axis=2), Mask("out", "embed", axis=2))
CASES = {
    "chain": Case(Chain, (3, 6, 6), (Mask("b.0", "a.0"), Mask("head.fc", "b.0")), ("a.0", "b.0")),
    "residual": Case(
        Residual,
        (3, 6, 6),
        (Mask("a.0", "stem.0"), Mask("b.0", "a.0"), Mask("head.fc", "b.0")),
        ("stem.0", "a.0", "b.0"),
    ),
    "inverted residual": Case(
        InvertedResidual,
        (3, 6, 6),
        (
            *(Mask("expand.0", "stem.0"), Mask("squeeze", "depthwise.0"), Mask("excite", "squeeze")),
            *(Mask("project", "expand.0"), Mask("head.fc", "project")),
        ),
        ("stem.0", "expand.0", "depthwise.0", "squeeze", "excite", "project"),
    ),
    "dense": Case(
        Dense,
        (3, 6, 6),
        (Mask("b.0", "a.0"), Mask("c", "a.0", range(4)), Mask("c", "b.0", range(4, 10)), Mask("head.fc", "c")),
        ("a.0", "b.0", "c"),
    ),
    "grouped": Case(
        Grouped, (3, 6, 6), (Mask("g.0", "a.0"), Mask("c", "g.0"), Mask("head.fc", "c")), ("a.0", "g.0", "c")
    ),
    "mlp": Case(
        lambda: Tokens(Mlp()),
        (3, 2, 2),
        (Mask("inner.a", "embed", axis=2), Mask("inner.b", "inner.a", axis=2), Mask("out", "embed", axis=2)),
        ("embed", "inner.a", "inner.b"),
    ),
    "attention, fused": Case(
        lambda: Tokens(Attention("fused")), (3, 2, 2), ATTENTION + ON_TOKENS, ("embed", "inner.qkv", "inner.proj")
    ),
    "attention, written out": Case(
        lambda: Tokens(Attention("plain")), (3, 2, 2), ATTENTION + ON_TOKENS, ("embed", "inner.qkv", "inner.proj")
    ),
    "attention, relative positions": Case(
        lambda: Tokens(Attention("plain", table=True)), (3, 2, 2), ATTENTION + ON_TOKENS, ("embed", "inner.qkv")
    ),
    "glu": Case(
        lambda: Tokens(Gated("glu")),
        (3, 2, 2),
        (
            Mask("inner.a", "embed", axis=2),
            Mask("inner.b", "inner.a", None, range(16), axis=2),
            Mask("out", "embed", axis=2),
        ),
        ("embed", "inner.a"),
    ),
    "chunk": Case(
        lambda: Tokens(Gated("chunk")),
        (3, 2, 2),
        (
            Mask("inner.a", "embed", axis=2),
            Mask("inner.b", "inner.a", None, range(16), axis=2),
            Mask("out", "embed", axis=2),
        ),
        ("embed", "inner.a"),
    ),
    "shuffle": Case(Shuffle, (3, 4, 4), (Mask("b", "a.0", None, SHUFFLED), Mask("head.fc", "b")), ("a.0", "b")),
    "pixel shuffle": Case(
        PixelShuffle, (3, 4, 4), (Mask("b", "a.0", None, range(0, 24, 4)), Mask("head.fc", "b")), ("a.0", "b")
    ),
    "option A": Case(
        OptionA,
        (3, 6, 6),
        (Mask("a", "stem.0"), Mask("b", "a"), Mask("head.fc", "b")),
        ("stem.0", "a", "b"),
    ),
    "transposed": Case(Transposed, (3, 4, 4), (Mask("up", "a.0"), Mask("head.fc", "up")), ("a.0", "up")),
    "transposed, grouped": Case(
        lambda: Transposed(4), (3, 4, 4), (Mask("up", "a.0"), Mask("head.fc", "up")), ("a.0", "up")
    ),
    "patch merging": Case(
        PatchMerging,
        (3, 4, 4),
        (*(Mask("reduce", "a", range(6 * i, 6 * i + 6), axis=3) for i in range(4)), Mask("out", "reduce", axis=3)),
        ("a", "reduce"),
    ),
    "weight standardisation": Case(Standardised, (3, 6, 6), (Mask("b", "a"), Mask("head.fc", "b")), ("a", "b")),
    "bare parameters": Case(
        BareParameters, (3, 4, 4), (Mask("a", "embed", axis=2), Mask("out", "embed", axis=1)), ("embed", "a")
    ),
}


@contextmanager
def masked(model: nn.Module, masks: Sequence[Mask], gone: Mapping[str, IntArray]) -> Iterator[None]:
    handles = []
    for mask in masks:
        module, lost = model.get_submodule(mask.module), gone[mask.producer]
        of = np.asarray(mask.of if mask.of is not None else np.arange(10**4))
        at = np.asarray(mask.at if mask.at is not None else np.arange(10**4))
        zero = torch.from_numpy(at[: len(of)][np.isin(of[: len(at)], lost)])

        def blank(x: Tensor, zero: Tensor = zero, axis: int = mask.axis) -> Tensor:
            return x.index_fill(min(axis, x.ndim - 1), zero[zero < x.shape[min(axis, x.ndim - 1)]], 0)

        if mask.side == "in":
            handles.append(module.register_forward_pre_hook(lambda m, args, blank=blank: (blank(args[0]),)))
        else:
            handles.append(module.register_forward_hook(lambda m, args, out, blank=blank: blank(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cut(model: nn.Module, shape: Sequence[int]) -> tuple[fx.GraphModule, Structure, dict[str, IntArray]]:
    graph = trace(model, images(shape))
    structure = find_structure(graph, images(shape))
    kept = random_units(structure, seed=0)
    return prune(graph, structure, Plan(kept, 0, 0))[0], structure, kept


@cache
def analysed(name: str) -> tuple[nn.Module, fx.GraphModule, Structure]:
    case = CASES[name]
    model = randomised(case.build()).double()
    graph = trace(model, images(case.shape))
    return model, graph, find_structure(graph, images(case.shape))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_pruned_is_original_with_removed_units_at_zero(name: str, seed: int) -> None:
    case = CASES[name]
    x = images(case.shape, 3)
    model, graph, structure = analysed(name)
    kept = random_units(structure, seed)
    small, _ = prune(graph, structure, Plan(kept, 0, 0))
    gone = {m.producer: removed_channels(structure.groups.groups, kept, m.producer) for m in case.masks}
    for layer in case.pruned:
        assert len(removed_channels(structure.groups.groups, kept, layer)), f"{layer} loses nothing"
    with torch.no_grad(), masked(model, case.masks, gone):
        expected = model(x)
    dense = model(x)
    assert (dense - expected).abs().max() > 1e-3 * dense.abs().max(), "the mask must matter"
    torch.testing.assert_close(small(x), expected, rtol=TOLERANCE, atol=TOLERANCE)


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_torch_multihead_attention() -> None:
    """The layer hands its matrices to a function, so there is nothing to hook: rows of q, k and v are zeroed."""
    model, x = randomised(Tokens(TorchAttention())).double(), images((3, 2, 2), 3)
    graph = trace(model, images((3, 2, 2)))
    structure = find_structure(graph, images((3, 2, 2)))
    kept = {n: u for n, u in random_units(structure, 0).items() if structure.groups[n].kind in ("head", "head_dim")}
    small, slices = prune(graph, structure, Plan(kept, 0, 0))
    assert {structure.groups[n].kind for n in kept} == {"head", "head_dim"}
    held = slices.kept["inner.attention.in_proj_weight"][0]
    gone = np.setdiff1d(np.arange(36), held)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.get_parameter("inner.attention.in_proj_weight")[gone] = 0
        expected.get_parameter("inner.attention.in_proj_bias")[gone] = 0
    assert len(gone) > 9
    assert (expected(x) - model(x)).abs().max() > 1e-3
    torch.testing.assert_close(small(x), expected(x), rtol=TOLERANCE, atol=TOLERANCE)


def test_tied_weights_stay_tied() -> None:
    model, x = randomised(Tied()).double(), images((3, 4, 4), 3)
    small, structure, kept = cut(model, (3, 4, 4))
    gone = removed_channels(structure.groups.groups, kept, "embed")
    assert len(gone)
    with torch.no_grad():
        for name in ("embed.weight", "embed.bias", "twice.weight", "twice.bias"):
            model.get_parameter(name)[gone] = 0
    torch.testing.assert_close(small(x), model(x), rtol=TOLERANCE, atol=TOLERANCE)
    assert len(list(small.parameters())) == len(list(model.parameters()))


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 12), nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x.mean((2, 3)))))


def test_a_normalised_axis_is_named_inexact_and_normalises_what_remains() -> None:
    model, x = randomised(Normalised()).double(), images((3, 4, 4), 3)
    small, structure, kept = cut(model, (3, 4, 4))
    assert structure.groups["a"].inexact == ("layer_norm",)
    stays = torch.from_numpy(kept["a"])
    a, norm, b = model.a, model.norm, model.b
    y = functional.layer_norm(a(x.mean((2, 3)))[:, stays], (len(stays),), norm.weight[stays], norm.bias[stays])
    torch.testing.assert_close(small(x), y @ b.weight[:, stays].t() + b.bias, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_twelve_heads_to_seven(library: str) -> None:
    """Rows of q, k and v and columns of the projection really go; the attention runs over seven heads."""
    torch.manual_seed(0)
    if library == "torchvision":
        model: nn.Module = VisionTransformer(16, 8, 2, 12, 48, 96, num_classes=5)
        names = (
            "encoder.layers.encoder_layer_1.self_attention.in_proj_weight",
            "encoder.layers.encoder_layer_1.self_attention.out_proj.weight",
        )
    else:
        model = TimmViT(img_size=16, patch_size=8, embed_dim=48, depth=2, num_heads=12, num_classes=5)
        names = ("blocks.1.attn.qkv.weight", "blocks.1.attn.proj.weight")
    model, x = randomised(model), torch.randn(3, 3, 16, 16)
    graph = trace(model, x)
    structure = find_structure(graph, x)
    heads = [g for g in structure.groups.groups if g.kind == "head"]
    assert [g.size for g in heads] == [12, 12]
    plan = Plan({g.name: np.array([0, 2, 3, 5, 6, 9, 11]) for g in heads}, 0, 0)
    small, _ = prune(graph, structure, plan)
    assert [tuple(fetch(small, n).shape) for n in names] == [(3 * 28, 48), (48, 28)]
    attention = [n for n in small.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert [n.meta["val"].shape[1] for n in attention] == [7, 7]
    assert small(x).shape == (3, 5)
    assert identity_error(graph, small, structure, plan.kept, x) < TOLERANCE


def test_softmax_scale_stays_the_trained_one() -> None:
    """Dimensions of a head go, 1 / sqrt(D) does not follow: fused and written-out attention agree after pruning."""
    outputs = []
    for how in ("fused", "plain"):
        model, x = randomised(Tokens(Attention(how))).double(), images((3, 2, 2))
        graph = trace(model, x)
        structure = find_structure(graph, x)
        kept = {g.name: g_kept(g) for g in structure.groups.groups if g.kind == "head_dim"}
        small, _ = prune(graph, structure, Plan(kept, 0, 0))
        assert fetch(small, "inner.qkv.weight").shape == (36, 12)
        outputs.append(small(x))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=TOLERANCE, atol=TOLERANCE)


def g_kept(group: Group) -> IntArray:
    """The first three units of every row."""
    return np.sort(np.concatenate([np.flatnonzero(group.rows == r)[:3] for r in np.unique(group.rows)]))


def test_a_plan_of_another_model_is_refused() -> None:
    graph = trace(randomised(Chain()), images((3, 6, 6)).float())
    structure = find_structure(graph, images((3, 6, 6)).float())
    with pytest.raises(ModelError, match="other_layer"):
        prune(graph, structure, Plan({"other_layer": np.array([0])}, 0, 0))


def test_groups_that_cannot_go_together_are_an_error_with_place_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval(), torch.randn(2, 3, 8, 8))
    structure = find_structure(graph, torch.randn(2, 3, 8, 8))

    def ragged(*arguments: object, **options: object) -> None:
        error = RaggedError("rows would keep 3 to 4 units")
        error.node = "view_7"
        raise error

    monkeypatch.setattr(surgery, "remove", ragged)
    kept = {structure.groups.groups[0].name: np.arange(4)}
    with pytest.raises(ModelError, match=r"can't go together: at 'view_7' rows would keep .* \(--units\)"):
        prune(graph, structure, kept)


def test_the_graph_that_came_in_is_not_touched() -> None:
    graph = trace(randomised(Chain()), images((3, 6, 6)).float())
    before = {n: p.clone() for n, p in graph.state_dict().items()}
    structure = find_structure(graph, images((3, 6, 6)).float())
    prune(graph, structure, Plan(random_units(structure, 0), 0, 0))
    assert all(torch.equal(p, before[n]) for n, p in graph.state_dict().items())


def test_a_trial_shares_what_loses_nothing_and_leaves_the_graph_alone() -> None:
    model = nn.Sequential(conv_bn(3, 8), nn.ReLU(), conv_bn(8, 6), nn.Flatten(), nn.Linear(6 * 64, 4)).eval()
    x = torch.randn(2, 3, 8, 8)
    graph = trace(model, x)
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    structure = find_structure(graph, x)
    (first, *_) = structure.groups.groups
    plan = Plan({first.name: np.arange(5)}, 0, 0)
    (own, _), (shared, _) = (prune(graph, structure, plan, share=share) for share in (False, True))
    with torch.no_grad():
        assert torch.equal(own(x), fx.Interpreter(shared).run(x))
    mine, theirs = ({id(t) for t in network.parameters()} for network in (graph, shared))
    assert mine & theirs
    assert mine - theirs
    assert not mine & {id(t) for t in own.parameters()}
    assert all(torch.equal(before[name], tensor) for name, tensor in graph.state_dict().items())


def test_fewer_images_than_the_traced_batch_compare_nothing() -> None:
    example = torch.randn(2, 3, 8, 8)
    graph = trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()).eval(), example)
    structure = find_structure(graph, example)
    for few in (example[:0], example[:1]):
        with pytest.raises(GateError, match=f"was given {len(few)} images and compares 2 at once"):
            identity_error(graph, graph, structure, {}, few)
