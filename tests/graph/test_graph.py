"""Tracing leaves the caller's model as it was, whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.graph import trace
from compressor.pruning import find_structure


class Failing(nn.Module):
    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.error = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2), error

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        if self.error is not None:
            raise self.error
        return self.b(x.mean((2, 3)))


def observed(model: Failing) -> tuple[dict[str, Tensor], list[object]]:
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modes: list[object] = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return state, [
        *modes,
        *(p.requires_grad for p in model.parameters()),
        *(p.grad is None for p in model.parameters()),
    ]


@pytest.mark.parametrize(
    ("error", "expected"),
    [(None, None), (ValueError("no"), ModelError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["inspect", "exception", "interrupt"],
)
def test_the_model_is_as_it_was(error: BaseException | None, expected: type[BaseException] | None) -> None:
    model, x = Failing(error).train(), torch.randn(2, 3, 8, 8)
    model.norm.eval()
    model.a.weight.requires_grad_(False)
    model.a.register_forward_hook(lambda *_: None)
    before, facts = observed(model)
    identities = [id(p) for p in model.parameters()]

    def inspect() -> None:
        find_structure(trace(model, x), x)

    _ends(inspect, expected)
    after, facts_after = observed(model)
    assert facts_after == facts
    assert [id(p) for p in model.parameters()] == identities
    assert all(torch.equal(after[n], before[n]) for n in before)


def _ends(act: Callable[[], None], expected: type[BaseException] | None) -> None:
    if expected is None:
        act()
    else:
        with pytest.raises(expected):
            act()


class Caching(nn.Module):
    """Keeps a table computed from a parameter in a plain attribute, as LeViT's attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cache = nn.Parameter(torch.randn(4)), {}
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if "t" not in self.cache:
            self.cache["t"] = self.table * 2
        return self.b(self.a(x.mean((2, 3))) * self.cache["t"])


def test_a_cached_tensor_is_state() -> None:
    model, x = Caching(), torch.randn(2, 3, 4, 4)
    model(x)
    graph = trace(model, x)
    torch.testing.assert_close(graph(x), model(x))
    attributes = [str(n.target) for n in graph.graph.nodes if n.op == "get_attr"]
    assert set(attributes) <= set(graph.state_dict())


class Attending(nn.Module):
    def __init__(self, call: Callable[[nn.MultiheadAttention, Tensor], Tensor], **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})  # type: ignore[arg-type]
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.attention, x.flatten(2).transpose(1, 2))


MASK = torch.tensor([[False, True, False, True]]).expand(4, 4)
CALLS: dict[str, Callable[[nn.MultiheadAttention, Tensor], Tensor]] = {
    "plain": lambda a, x: a(x, x, x, need_weights=False)[0],
    "by position": lambda a, x: a(x, x, x, None, False)[0],
    "weights": lambda a, x: a(x, x, x)[0] + a(x, x, x)[1].mean(),
    "crossed": lambda a, x: a(x, x.flip(1), x, need_weights=False)[0],
    "masked": lambda a, x: a(x, x, x, need_weights=False, attn_mask=MASK)[0],
    "padded": lambda a, x: a(x, x, x, need_weights=False, key_padding_mask=MASK[: len(x)])[0],
}
OPTIONS = {"tokens first": {"batch_first": False}, "zero": {"add_zero_attn": True}, "extra": {"add_bias_kv": True}}


@pytest.mark.thorough
@pytest.mark.parametrize("name", [*CALLS, *OPTIONS])
def test_attention_is_read_as_it_computes(name: str) -> None:
    torch.manual_seed(0)
    model = Attending(CALLS.get(name, CALLS["plain"]), **OPTIONS.get(name, {})).eval().requires_grad_(False)
    x, theirs = torch.randn(4, 8, 2, 2), nn.MultiheadAttention.forward
    graph = trace(model, x)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-6)
    assert nn.MultiheadAttention.forward is theirs
    moved = [n for n in graph.graph.nodes if n.target in (torch.ops.aten.permute.default, torch.ops.aten.transpose.int)]
    assert (len(moved) == 3) == (name in ("plain", "by position"))  # the images' own, qkv's and the heads'


class Remembering(nn.Module):
    """As detectors do: positions are made again only where the shape is another than that of the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shape, self.places = nn.Conv2d(3, 4, 3, padding=1), None, torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.shape != x.shape:
            self.shape, self.places = x.shape, torch.arange(x.shape[-1], dtype=x.dtype)
        return x + self.places


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("last_batch", [1, 2, 3, 8])
def test_the_batch_a_model_was_last_called_with_does_not_matter(last_batch: int) -> None:
    model, images = Remembering().eval(), torch.randn(8, 3, 6, 6)
    expected = model(images)
    for count in (2, 3, 8):
        model(images[:last_batch])
        assert torch.allclose(trace(model, images[:count])(images), expected, atol=1e-6)


class Late(nn.Module):
    """Makes its table of positions at the first call, and keeps it where `kept_in` says."""

    def __init__(self, kept_in: str) -> None:
        super().__init__()
        self.stem, self.kept_in = nn.Conv2d(3, 4, 3, padding=1), kept_in
        self.table: Tensor | None = None
        self.tables: dict[int, Tensor] = {}
        self.listed: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.places(x.shape[-1])

    def places(self, width: int) -> Tensor:
        match self.kept_in:
            case "attribute":
                if self.table is None:
                    self.table = torch.linspace(0, 1, width)
                return self.table
            case "new attribute":
                if not hasattr(self, "late"):
                    self.late = torch.linspace(0, 1, width)
                return self.late
            case "buffer":
                if not hasattr(self, "late"):
                    self.register_buffer("late", torch.linspace(0, 1, width))
                return self.late
            case "dictionary":
                return self.tables.setdefault(width, torch.linspace(0, 1, width))
        if not self.listed:
            self.listed.append(torch.linspace(0, 1, width))
        return self.listed[0]


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize("kept_in", ["attribute", "new attribute", "buffer", "dictionary", "list"])
def test_a_model_is_read_alike_before_and_after_its_first_call(kept_in: str) -> None:
    model, images = Late(kept_in).eval(), torch.randn(3, 3, 6, 6)
    attributes, keys = dict(vars(model)), list(model.state_dict())
    before = trace(model, images)
    assert vars(model) == attributes
    assert list(model.state_dict()) == keys
    assert (model.tables, model.listed) == ({}, [])

    expected = model(images)
    after = trace(model, images)
    assert type(model.places(6)) is Tensor
    assert after.code == before.code
    assert list(after.state_dict()) == list(before.state_dict())
    for graph in (before, after):
        assert torch.allclose(graph(images), expected, atol=1e-6)


def test_a_model_that_can_not_be_copied_is_read_and_left_as_it_was() -> None:
    model = Late("new attribute").eval()
    model.lock = threading.Lock()  # type: ignore[assignment]
    images = torch.randn(3, 3, 6, 6)
    graph = trace(model, images)
    assert not hasattr(model, "late")
    assert torch.allclose(graph(images), model(images), atol=1e-6)


def test_autocast_around_the_call_changes_nothing() -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(3, 3, 6, 6)
    plainly = trace(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        cast = trace(model, images)
    assert cast.code == plainly.code


class Casting(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.stem, self.way = nn.Conv2d(3, 4, 3), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "double":
            return self.stem(x.double())  # type: ignore[no-any-return]
        if self.way == "cast":
            return self.stem(x).bfloat16().relu().float()  # type: ignore[no-any-return]
        with torch.autocast("cpu", torch.bfloat16):
            return self.stem(x).float()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("double", r"test_graph\.py:\d+.*leave casts to other types out of forward"),
        ("cast", r"bfloat16 from test_graph\.py:\d+ on.*leave autocast and casts"),
        ("autocast", r"bfloat16 from forward on.*leave autocast and casts"),
    ],
)
def test_other_types_inside_forward_are_refused_with_their_line(way: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        trace(Casting(way).eval(), torch.randn(2, 3, 6, 6))


def test_what_training_draws_is_its_middle_in_evaluation() -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.RReLU(0.1, 0.4)).eval(), torch.randn(2, 3, 6, 6)
    graph = trace(model, images)
    assert torch.allclose(graph(images), model(images), atol=1e-6)
    assert [node.target for node in graph.graph.nodes][-2] is torch.ops.aten.leaky_relu.default


class Complex(nn.Module):
    """Channels in pairs, as complex numbers: the pair must lie side by side in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.stem(x).unflatten(1, (2, 2)).movedim(2, -1).contiguous()  # [N, 2, H, W, 2]
        return torch.view_as_complex(pairs).abs()


def test_a_copy_that_orders_memory_is_kept() -> None:
    model, images = Complex().eval(), torch.randn(3, 3, 6, 6)
    assert torch.allclose(trace(model, images)(images), model(images), atol=1e-6)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return torch.cond(y.sum() > 0, torch.relu, torch.neg, (y,))  # type: ignore[no-any-return]


def test_a_graph_within_the_graph_is_refused() -> None:
    with pytest.raises(ModelError, match=r"branches by torch\.cond or the like.*torch\.where"):
        trace(Branching().eval(), torch.randn(2, 3, 6, 6))


class Helped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.doubled(x)

    def doubled(self, x: Tensor) -> Tensor:
        return x * 2


def test_an_operation_in_a_method_is_placed_at_its_own_line() -> None:
    graph = trace(Helped(), torch.randn(2, 3))
    (product,) = (node for node in graph.graph.nodes if node.op == "call_function")
    code = Helped.doubled.__code__
    assert product.meta["place"] == f"test_graph.py:{code.co_firstlineno + 1}"


class Counted(nn.Module):
    """Asks how many images there are, which one of the two readings alone follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, 2)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])
        self.shape: object = None

    def forward(self, x: Tensor) -> Tensor:
        self.shape = x.shape
        tokens = self.conv(x).flatten(2).mT.reshape(len(x), -1, 8)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.mean(1)  # type: ignore[no-any-return]


def test_an_encoder_layer_is_read_as_what_it_is_made_of_and_layers_by_their_names() -> None:
    model, x = Counted().eval().requires_grad_(False), torch.randn(2, 3, 8, 8)
    was_fused = torch.backends.mha.get_fastpath_enabled()
    graph = trace(model, x)
    assert torch.backends.mha.get_fastpath_enabled() is was_fused
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-6)
    layers = {node.meta["layer"] for node in graph.graph.nodes if node.op == "call_function"}
    assert "blocks.0.linear1" in layers
    assert layers <= {"", *(name for name, _ in model.named_modules())}
