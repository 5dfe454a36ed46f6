"""LRP through whole networks: conservation, equality with zennit end to end, and nothing left changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import zennit.attribution
import zennit.composites
import zennit.torchvision
from torch import Tensor, fx, nn
from torch.nn import functional

from compressor.errors import InputError, ModelError
from compressor.graph import Watcher, aten, trace
from compressor.inputs.models import load_model
from compressor.relevance import lrp
from compressor.relevance.canonical import affine
from compressor.relevance.composite import PRESETS, Composite, Rule, at, preset
from compressor.relevance.rules import forward

SAME_AS_ZENNIT = 1e-5  # the issue's bound for a fast path; both run in float64 here
CONSERVED = 1e-4  # the issue's bound, of the relevance at the start
TINY = 1e-12  # in float64 a stabiliser that absorbs nothing measurable
CONSERVING = Composite(
    low=Rule("zplus", TINY),
    mid=Rule("zplus", TINY),
    high=Rule("zplus", TINY),
    fc=Rule("epsilon", TINY),
    linear=Rule("epsilon", TINY),
    first=Rule("flat", TINY),
    epsilon=TINY,
)


def _randomised(model: nn.Module, seed: int, *, biases: bool) -> nn.Module:
    """Weights of usual size, BatchNorm statistics as after training; without biases shifts are zero too."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.data = torch.rand(module.num_features, generator=generator) + 0.5
            module.weight.data = torch.rand(module.num_features, generator=generator) + 0.5
            module.running_mean.data = torch.randn(module.num_features, generator=generator) * 0.1 * biases
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.data = torch.randn(bias.shape, generator=generator) * 0.1 * biases
    return model.eval()


def _built(name: str, seed: int, *, biases: bool) -> nn.Module:
    model = getattr(torchvision.models, name)(weights=None, num_classes=5, **_SMALL.get(name, {}))
    if name.startswith("vgg"):  # its own head has 10^8 weights and nothing else to test
        model.classifier = nn.Sequential(nn.Linear(512 * 49, 16), nn.ReLU(), nn.Linear(16, 5))
    return _randomised(model, seed, biases=biases)


_SMALL: dict[str, dict[str, Any]] = {"mobilenet_v2": {"width_mult": 0.5}}


def _images(n: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _graph(model: nn.Module, size: int) -> fx.GraphModule:
    return trace(model.double(), _images(2, size))


def _input(graph: fx.GraphModule) -> str:
    return next(n.name for n in graph.graph.nodes if n.op == "placeholder")


def _values(graph: fx.GraphModule, images: Tensor) -> dict[fx.Node, Any]:
    found: dict[fx.Node, Any] = {}

    def watch(node: fx.Node, value: Any) -> Any:
        found[node] = value
        return value

    with torch.no_grad():
        Watcher(graph, watch).run(images)
    return found


def _absorbed(prepared: lrp.Prepared, node: fx.Node, relevance: Tensor, values: Mapping[fx.Node, Any]) -> float:
    """What biases, shifts, constants and the softmax's expansion keep for themselves, from their formulas."""
    known = prepared.canon
    if node in known.weighted:
        weighted = known.weighted[node]
        layer, x = weighted.layer, values[weighted.source]
        if weighted.rule.name == "flat":
            return 0.0
        bias = torch.zeros(()) if layer.bias is None else layer.bias.reshape(-1, *[1] * layer.dims)
        z = forward(layer, x, layer.weight, layer.bias)
        kept = bias + TINY * z.sign()
        if weighted.rule.name == "zplus":  # an output without a positive product keeps all it is given
            positive = forward(layer, x.clamp(min=0), layer.weight.clamp(min=0), None)
            negative = forward(layer, x.clamp(max=0), layer.weight.clamp(max=0), None)
            kept = bias.clamp(min=0) + TINY
            z = positive + negative + bias.clamp(min=0)
        return float((relevance * kept / _apart_from_zero(z)).sum())
    if node in known.merged:
        return 0.0
    if node.target is aten.batch_norm.default:
        shift = affine(node, known.constants)[1].reshape(1, -1, 1, 1)
        return float((relevance * shift / _apart_from_zero(values[node])).sum())
    if node.target is aten.layer_norm.default:
        return float((relevance * known.constants[node.args[3]] / _apart_from_zero(values[node])).sum())
    if node.target is aten.add.Tensor:
        return sum(
            float((relevance * known.constants[n] / _apart_from_zero(values[node])).sum())
            for n in node.args
            if n in known.constants
        )
    if node.target is aten.cat.default:
        return _constant_part(known, node, relevance, values)
    if node.target is aten.scaled_dot_product_attention.default:
        return _absorbed_by_attention(node, relevance, values)
    return 0.0


def _apart_from_zero(z: Tensor) -> Tensor:
    return z + torch.where(z < 0, -TINY, TINY)


def _constant_part(known: Any, node: fx.Node, relevance: Tensor, values: Mapping[fx.Node, Any]) -> float:
    """A class token's relevance ends at the token."""
    parts: Any = node.args[0]
    pieces = torch.split(relevance, [values[n].shape[node.args[1]] for n in parts], node.args[1])  # type: ignore[arg-type]
    return sum(float(piece.sum()) for n, piece in zip(parts, pieces, strict=True) if n not in known.data)


def _absorbed_by_attention(node: fx.Node, relevance: Tensor, values: Mapping[fx.Node, Any]) -> float:
    """Half goes to the values; of the other half the expansion's constant p_j (1 - x_j + sum p x) keeps its part."""
    q, k, v = (values[n] for n in node.args[:3])
    x = q @ k.mT * q.shape[-1] ** -0.5
    p = torch.softmax(x, -1)
    to_p = p * ((relevance / (2 * (p @ v))) @ v.mT)
    return float((to_p * (1 - x + (p * x).sum(-1, keepdim=True))).sum())


def _check_conservation(graph: fx.GraphModule, composite: Composite, images: Tensor) -> float:
    """After every step back, what is under way plus what was absorbed is the start; returns the share absorbed."""
    prepared = lrp.prepare(graph, lrp.LrpOptions(composite))
    values = _values(graph, images)
    start = float(len(images))
    state = {"under way": start, "absorbed": 0.0, "steps": 0}

    def observe(node: fx.Node, relevance: Any, given: Mapping[fx.Node, Any]) -> None:
        parts = relevance if isinstance(relevance, list) else [relevance]
        came = sum(float(r.sum()) for r in parts if r is not None)
        went = [r for part in given.values() for r in (part if isinstance(part, list) else [part]) if r is not None]
        state["under way"] += sum(float(r.sum()) for r in went) - came
        if isinstance(relevance, Tensor):
            state["absorbed"] += _absorbed(prepared, node, relevance, values)
        state["steps"] += 1
        assert abs(state["under way"] + state["absorbed"] - start) < CONSERVED * start, node.name

    got = prepared(images, torch.zeros(len(images), dtype=torch.long), [_input(graph)], observe=observe)
    assert float(got[_input(graph)].sum()) == pytest.approx(state["under way"], abs=CONSERVED * start)
    assert state["steps"] > 20
    return state["absorbed"] / start


NETWORKS = ("resnet18", "vgg11_bn", "densenet121", "mobilenet_v2")


@pytest.mark.parametrize(
    "name",
    [name if name == "resnet18" else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS],
)
@pytest.mark.parametrize("biases", [False, True])
def test_relevance_is_conserved(name: str, biases: bool) -> None:
    graph = _graph(_built(name, 1, biases=biases), 32)
    absorbed = _check_conservation(graph, CONSERVING, _images(2, 32, 3))
    dead_outputs = name == "mobilenet_v2"  # a linear bottleneck without a positive product, see _absorbed
    assert biases or dead_outputs or abs(absorbed) < CONSERVED


TRAINED = {
    "torchvision:squeezenet1_1": "imagenet_squeezenet1_1",
    "tf_mobilenet.py:MobileNetV2": "imagenet_mobilenet_v2_1.0_224_slim_fp32",
    "cifar_resnet.py:cifar_resnet(depth=20)": "cifar10_resnet20",
    "cifar_resnet.py:cifar_resnet(depth=56)": "cifar10_resnet56",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_relevance_is_conserved_with_trained_weights(name: str, shared_data: Path) -> None:
    weights = shared_data / "weights"
    place = "" if name.startswith("torchvision") else f"{weights}/architectures/"
    model = load_model(place + name, f"{weights}/{TRAINED[name]}.safetensors")
    graph = _graph(model.module, 64)
    assert abs(_check_conservation(graph, CONSERVING, _images(2, 64, 3))) > CONSERVED


class _TinyTransformer(nn.Module):
    """Two pre-norm blocks over patches, attention written as the caller wishes."""

    def __init__(self, how: str, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.how, self.heads = how, heads
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(4)])
        self.qkv = nn.ModuleList([nn.Linear(width, 3 * width) for _ in range(2)])
        self.out = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.up = nn.ModuleList([nn.Linear(width, 4 * width) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(4 * width, width) for _ in range(2)])
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for i in range(2):
            x = x + self.out[i](self._attend(self.qkv[i](self.norms[2 * i](x))))
            x = x + self.down[i](torch.nn.functional.gelu(self.up[i](self.norms[2 * i + 1](x))))
        scores: Tensor = self.head(x[:, 0])
        return scores

    def _attend(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.how == "fused":
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            mixed = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return mixed.transpose(1, 2).flatten(2)


def _transformer(how: str) -> nn.Module:
    torch.manual_seed(3)
    return _TinyTransformer(how).eval()


@cache
def _transformer_graph(how: str) -> fx.GraphModule:
    return _graph(_transformer(how), 32)


def test_transformer_loses_what_biases_and_softmax_expansion_absorb() -> None:
    graph = _transformer_graph("fused")
    assert abs(_check_conservation(graph, CONSERVING, _images(2, 32, 3))) > CONSERVED


@pytest.mark.parametrize("softmax", ["attnlrp", "cp", "zplus", "zplus-bias"])
def test_fused_and_written_out_attention_agree(softmax: Any) -> None:
    images, target = _images(2, 32, 4), torch.tensor([1, 3])
    found = []
    for how in ("fused", "written"):
        graph = _transformer_graph(how)
        composite = replace(PRESETS["epsilon-plus-flat"], softmax=softmax, epsilon=TINY)
        nodes = [n.name for n in graph.graph.nodes if n.target is aten.linear.default]
        found.append(lrp.node_relevance(graph, images, target, nodes, lrp.LrpOptions(composite)))
    for a, b in zip(found[0].values(), found[1].values(), strict=True):
        assert float((a - b).abs().max()) <= SAME_AS_ZENNIT * float(b.abs().max())


class _Told(nn.Module):
    """Attention whose queries see what lies before them alone: by its own switch, or by a mask."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal, self.patches, self.qkv, self.head = (
            causal,
            nn.Conv2d(3, 16, 8, 8),
            nn.Linear(16, 48),
            nn.Linear(16, 5),
        )
        self.register_buffer("seen", torch.ones(16, 16).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.patches(x).flatten(2).transpose(1, 2)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        options: Any = {"is_causal": True} if self.causal else {"attn_mask": self.seen}
        mixed = functional.scaled_dot_product_attention(q, k, v, **options)
        scores: Tensor = self.head(mixed.transpose(1, 2).flatten(2).mean(1))
        return scores


def _normed(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class _RootMeanSquare(nn.Module):
    """What RMSNorm computes, in plain operations."""

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.square().mean((1, 2, 3), keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()
        return x * scale.detach()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: _Told(causal=True), lambda: _Told(causal=False)),
        (lambda: _normed(nn.GroupNorm(1, 6)), lambda: _normed(nn.LayerNorm([6, 30, 30], elementwise_affine=False))),
        (lambda: _normed(nn.GroupNorm(6, 6)), lambda: _normed(nn.InstanceNorm2d(6))),
        (lambda: _normed(nn.RMSNorm([6, 30, 30])), lambda: _normed(_RootMeanSquare())),
        (
            lambda: _normed(nn.RMSNorm([6, 30, 30], elementwise_affine=False)),
            lambda: _normed(nn.RMSNorm([6, 30, 30])),
        ),
    ],
    ids=["causal attention", "one group", "a group for each channel", "root mean square", "without weights"],
)
def test_two_spellings_of_one_function_pass_the_same_relevance(
    one: Callable[[], nn.Module], other: Callable[[], nn.Module]
) -> None:
    found = []
    for build in (one, other):
        torch.manual_seed(3)
        graph = _graph(build().eval(), 32)
        nodes = [node.name for node in graph.graph.nodes if node.target in (aten.linear.default, aten.conv2d.default)]
        options = lrp.LrpOptions(replace(PRESETS["epsilon-plus-flat"], epsilon=TINY))
        found.append(lrp.node_relevance(graph, _images(2, 32, 4), torch.tensor([1, 3]), nodes, options))
    for a, b in zip(found[0].values(), found[1].values(), strict=True):
        assert float(b.abs().max()) > 0
        assert float((a - b).abs().max()) <= SAME_AS_ZENNIT * float(b.abs().max())


def test_attention_rule_decides_whether_queries_and_keys_get_relevance() -> None:
    graph = _transformer_graph("fused")
    qkv = next(n.name for n in graph.graph.nodes if n.meta.get("layer") == "qkv.0")
    for softmax, reached in (("attnlrp", True), ("cp", False)):
        options = lrp.LrpOptions(replace(PRESETS["epsilon-plus-flat"], softmax=softmax))  # type: ignore[arg-type]
        found = lrp.node_relevance(graph, _images(2, 32), torch.tensor([0, 1]), [qkv], options)[qkv]
        assert bool(found[..., :32].abs().sum() > 0) is reached
        assert float(found[..., 32:].abs().sum()) > 0


def _by_zennit(model: nn.Module, images: Tensor, target: Tensor, canonizer: Any) -> Tensor:
    composite = zennit.composites.EpsilonPlusFlat(canonizers=[canonizer])
    with zennit.attribution.Gradient(model, composite) as attributor:
        _, relevance = attributor(images, torch.eye(5, dtype=images.dtype)[target])
    found: Tensor = relevance.detach()
    return found


@pytest.mark.parametrize(
    ("name", "canonizer"),
    [
        ("resnet18", zennit.torchvision.ResNetCanonizer),
        pytest.param("vgg11_bn", zennit.torchvision.VGGCanonizer, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("quick", [True, False])
def test_network_equals_zennit_end_to_end(name: str, canonizer: Any, quick: bool) -> None:
    model = _built(name, 2, biases=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0  # zennit's merged norm still divides by sqrt(1 + eps)
    graph = _graph(model, 32)
    images, target = _images(2, 32, 5), torch.tensor([1, 4])
    ours = lrp.node_relevance(graph, images, target, [_input(graph)], lrp.LrpOptions(fast=quick))[_input(graph)]
    theirs = _by_zennit(model, images, target, canonizer())
    assert float((ours - theirs).abs().max()) <= SAME_AS_ZENNIT * float(theirs.abs().max())


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_fast_equals_plain_in_a_whole_network(name: str) -> None:
    torch.manual_seed(0)
    graph = _graph(timm.create_model("test_efficientnet", num_classes=5).eval(), 64)
    images, target = _images(2, 64, 6), torch.tensor([2, 0])
    nodes = [n.name for n in graph.graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], Tensor)]
    nodes = [n for n in nodes if graph_value(graph, n).is_floating_point()]
    quick, plain = (
        lrp.node_relevance(graph, images, target, nodes, lrp.LrpOptions(preset(name), fast=fast))
        for fast in (True, False)
    )
    assert set(quick) == set(nodes)
    for node in nodes:
        assert quick[node].shape == plain[node].shape
        assert float((quick[node] - plain[node]).abs().max()) <= SAME_AS_ZENNIT * float(plain[node].abs().max())


def graph_value(graph: fx.GraphModule, name: str) -> Tensor:
    value: Tensor = next(n.meta["val"] for n in graph.graph.nodes if n.name == name)
    return value


def test_gradients_before_and_after_are_bit_equal() -> None:
    model = _transformer("fused").double()
    images = _images(2, 32, 7)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(images).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    graph = trace(model, images)
    state = {name: t.clone() for name, t in graph.state_dict().items()}
    out = graph(images)
    for quick in (True, False):
        lrp.node_relevance(graph, images, torch.tensor([0, 1]), [_input(graph)], lrp.LrpOptions(fast=quick))
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
    assert all(torch.equal(t, state[name]) for name, t in graph.state_dict().items())
    assert torch.equal(out, graph(images))
    assert all(p.grad is None for p in graph.parameters())


def test_batch_size_does_not_change_relevance() -> None:
    graph = _transformer_graph("written")
    node = next(n.name for n in graph.graph.nodes if n.meta.get("layer") == "up.1")
    images, target = _images(4, 32, 8), torch.tensor([0, 1, 2, 3])
    prepared = lrp.prepare(graph)
    whole = prepared(images, target, [node])[node]
    single = torch.cat([prepared(images[i : i + 1], target[i : i + 1], [node])[node] for i in range(4)])
    assert torch.allclose(whole, single, rtol=1e-9, atol=1e-15)


def test_start_and_target_options() -> None:
    graph = _transformer_graph("fused")
    images = _images(3, 32, 9)
    logits = graph(images).detach()
    output = next(n.name for n in graph.graph.nodes if n.meta.get("layer") == "head")
    labels = torch.tensor([4, -1, 0])
    got = lrp.node_relevance(graph, images, labels, [output], lrp.LrpOptions(start="logit"))[output]
    chosen = torch.tensor([4, int(logits[1].argmax()), 0])
    expected = torch.zeros_like(logits).scatter_(1, chosen[:, None], logits.gather(1, chosen[:, None]))
    assert torch.allclose(got, expected)
    predicted = lrp.node_relevance(graph, images, labels, [output], lrp.LrpOptions(target="predicted"))[output]
    assert torch.equal(predicted.argmax(1), logits.argmax(1))
    assert float(predicted.sum()) == 3.0


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).cumprod(1).mean((2, 3))
        scores: Tensor = self.head(x)
        return scores


@pytest.mark.parametrize("options", [lrp.LrpOptions(), lrp.LrpOptions(strict=True, accept=("aten.cumprod",))])
def test_an_uncovered_operation_is_named_and_passed(options: lrp.LrpOptions) -> None:
    graph = _graph(_Odd().eval(), 8)
    assert lrp.uncovered(graph) == ("aten.cumprod at layer ''",)
    conv = next(n.name for n in graph.graph.nodes if n.target is aten.conv2d.default)
    found = lrp.node_relevance(graph, _images(2, 8), torch.tensor([0, 1]), [conv], options)[conv]
    assert bool(found.isfinite().all())
    assert float(found.abs().sum()) > 0


def test_an_uncovered_operation_is_refused_when_strict() -> None:
    with pytest.raises(InputError, match=r"aten.cumprod at layer ''; leave --strict out"):
        lrp.prepare(_graph(_Odd().eval(), 8), lrp.LrpOptions(strict=True))


class _Between(nn.Module):
    """A convolution, an operation without a rule of its own, a classifier."""

    def __init__(self, between: nn.Module | Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.conv, self.between, self.head = nn.Conv2d(3, 6, 3, padding=1), between, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


class _Columns(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(6, 6, batch_first=True)

    def forward(self, y: Tensor) -> Tensor:
        return self.cell(y.mean(2).transpose(1, 2))[0].transpose(1, 2).unsqueeze(2)  # type: ignore[no-any-return]


def _filtered(y: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(y)
    return torch.fft.irfft2(spectrum * torch.linspace(1, 0, spectrum.shape[-1]), s=y.shape[-2:])


def _resampled(y: Tensor) -> Tensor:
    turn = torch.eye(2, 3).to(y).expand(y.shape[0], 2, 3) * 0.9
    grid = functional.affine_grid(turn, list(y.shape), align_corners=False)
    return functional.grid_sample(y, grid, align_corners=False)


@pytest.mark.parametrize(
    "between",
    [
        _Columns(nn.GRU),
        _Columns(nn.LSTM),
        _filtered,
        _resampled,
        lambda y: functional.interpolate(y, scale_factor=1.5, mode="nearest-exact"),
        nn.BatchNorm2d(6, track_running_stats=False),
    ],
    ids=["gru", "lstm", "fft", "grid_sample", "nearest-exact", "batch statistics"],
)
def test_relevance_passes_what_has_no_rule(between: nn.Module) -> None:
    torch.manual_seed(0)
    graph = _graph(_Between(between).eval(), 8)
    conv = next(n.name for n in graph.graph.nodes if n.target is aten.conv2d.default)
    found = lrp.node_relevance(graph, _images(2, 8), torch.tensor([0, 1]), [conv])[conv]
    assert found.is_floating_point()
    assert bool(found.isfinite().all())
    assert float(found.abs().sum()) > 0


def test_relevance_is_conserved_through_a_fourier_filter() -> None:
    """irfft2 of rfft2 is the identity: so much relevance comes out as would without them."""
    torch.manual_seed(0)
    plain = _Between(nn.Identity()).eval()
    turned = _Between(lambda y: torch.fft.irfft2(torch.fft.rfft2(y), s=y.shape[-2:])).eval()
    turned.load_state_dict(plain.state_dict())
    sums = []
    for net in (plain, turned):
        graph = _graph(net, 8)
        conv = next(n.name for n in graph.graph.nodes if n.target is aten.conv2d.default)
        sums.append(lrp.node_relevance(graph, _images(2, 8), torch.tensor([0, 1]), [conv])[conv].sum((1, 2, 3)))
    assert torch.allclose(sums[0], sums[1], rtol=1e-3)


def test_unknown_node_is_refused() -> None:
    graph = _transformer_graph("fused")
    with pytest.raises(ModelError, match="no node 'nowhere'"):
        lrp.node_relevance(graph, _images(2, 32), torch.tensor([0, 1]), ["nowhere"])


def test_norms_are_merged_before_and_behind_a_layer() -> None:
    torch.manual_seed(0)
    layers = [
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 6, 2, groups=3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1),
    ]
    model = nn.Sequential(*layers, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 5), nn.BatchNorm1d(5))
    graph = _graph(_randomised(model, 4, biases=True), 8)
    known = lrp.prepare(graph).canon
    norms = [n for n in graph.graph.nodes if n.target is aten.batch_norm.default]
    assert set(norms) == set(known.merged)
    values = _values(graph, _images(2, 8))
    for norm in norms:
        weighted = known.weighted.get(norm.args[0])
        if weighted is None:  # the first: it went into the convolution behind it
            continue
        x = values[weighted.source.args[0] if weighted.source in norms else weighted.source]
        out = forward(weighted.layer, x, weighted.layer.weight, weighted.layer.bias)
        assert torch.allclose(out, values[norm], atol=1e-12)


def test_depth_groups_follow_the_networks_own_depth() -> None:
    graph = _graph(torchvision.models.resnet18(weights=None, num_classes=5).eval(), 64)
    groups = {n.meta["layer"]: w.group for n, w in lrp.prepare(graph).canon.weighted.items()}
    assert {groups[name] for name in groups if name.startswith(("conv1", "layer1"))} == {"low"}
    assert {groups[name] for name in groups if name.startswith(("layer2", "layer3"))} == {"mid"}
    assert {groups[name] for name in groups if name.startswith("layer4.")} == {"high"}
    assert groups["fc"] == "fc"


def test_a_point_of_the_space_is_a_composite() -> None:
    point = {"low.rule": "gamma", "low.gamma": 0.5, "fc.epsilon": 1e-3, "softmax": "cp"}
    composite = at(point, PRESETS["hatefi2024"])
    assert composite.low == Rule("gamma", gamma=0.5)
    assert composite.softmax == "cp"
    assert composite.fc.epsilon == 1e-3
    graph = _transformer_graph("fused")
    rules = {w.group: w.rule.name for w in lrp.prepare(graph, lrp.LrpOptions(composite)).canon.weighted.values()}
    assert rules["mid"] == "epsilon"
    assert "gamma" in {w.rule.name for w in lrp.prepare(graph, lrp.LrpOptions(composite)).canon.weighted.values()}
    for bad in ({"depth": 1.0}, {"low.rule": "epsilonn"}, {"softmax": "half"}, {"low.gamma": 1e9}):
        with pytest.raises(InputError):
            at(bad)


class _ByHand(nn.Module):
    """Norms written out, nn.MultiheadAttention, a choice by `where`, a gate, probabilities at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.mix, self.gate, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt(x.var(-1, keepdim=True) + 1e-5)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        x = x + self.attention(x, x, x)[0]
        x = torch.where(x > 0, x, 0.1 * x)
        x = self.mix(x) * torch.sigmoid(self.gate(x.mean(1, keepdim=True)))
        return torch.softmax(self.head(x.mean(1)), -1)


def test_operations_written_by_hand_are_covered() -> None:
    torch.manual_seed(0)
    graph = _graph(_ByHand().eval(), 16)
    assert lrp.uncovered(graph) == ()
    layers = {n.meta["layer"]: n.name for n in graph.graph.nodes if n.target is aten.linear.default}
    norms = [n.name for n in graph.graph.nodes if n.target in (aten.var.dim, aten.rsqrt.default)]
    nodes = [*layers.values(), *norms, _input(graph)]
    found = lrp.node_relevance(graph, _images(2, 16), torch.tensor([0, 1]), nodes)
    assert all(bool(r.isfinite().all()) for r in found.values())
    assert float(found[layers["head"]].sum()) == pytest.approx(2.0)  # the start is at the scores, not the softmax
    assert all(float(found[name].abs().sum()) == 0 for name in norms)
    product = next(
        n.name for n in graph.graph.nodes if n.target is aten.mul.Tensor and layers["mix"] in map(str, n.args)
    )
    whole = lrp.node_relevance(graph, _images(2, 16), torch.tensor([0, 1]), [product])[product].sum((1, 2))
    assert torch.allclose(2 * found[layers["mix"]].sum((1, 2)), whole, rtol=1e-9)
    half = found[layers["mix"]].sum(1, keepdim=True)
    assert torch.allclose(half, found[layers["gate"]], rtol=1e-9, atol=1e-12)


def test_detached_gate_takes_nothing() -> None:
    torch.manual_seed(0)
    graph = _graph(_ByHand().eval(), 16)
    layers = {n.meta["layer"]: n.name for n in graph.graph.nodes if n.target is aten.linear.default}
    options = lrp.LrpOptions(replace(PRESETS["epsilon-plus-flat"], gate="signal"))
    found = lrp.node_relevance(graph, _images(2, 16), torch.tensor([0, 1]), list(layers.values()), options)
    assert float(found[layers["gate"]].abs().sum()) == 0
    assert float(found[layers["mix"]].abs().sum()) > 0


class _Peaks(nn.Module):
    """Scores where they are largest among their neighbours, by a mask made a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (functional.max_pool2d(x, 3, 1, 1) == x).float()


def test_nothing_goes_back_through_a_mask_that_became_a_number() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), _Peaks(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    graph, images, target = _graph(nn.Sequential(*layers).eval(), 8), _images(2, 8), torch.tensor([1, 3])
    first = next(node.name for node in graph.graph.nodes if node.target is aten.conv2d.default)
    found = lrp.node_relevance(graph, images, target, [first], lrp.LrpOptions())[first]
    peaks = functional.max_pool2d(layers[0](images), 3, 1, 1) == layers[0](images)
    assert bool((found != 0).any())
    assert not bool(found[~peaks].any())
