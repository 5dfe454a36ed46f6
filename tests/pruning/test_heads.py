"""Attention whose heads share something along their dimensions: heads go as rows, dimensions from all heads at once.

Tables of relative positions, rotations, norms and batches folded into heads, as vision transformers write them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.graph import trace
from compressor.pruning import Structure, find_structure, identity_error, prune
from compressor.pruning.check import random_units
from compressor.records import Group, IntArray

from .conftest import TOLERANCE, images, randomised

DIM, HEADS, SIDE = 32, 4, 4
HEAD_DIM = DIM // HEADS


class Encoder(nn.Module):
    """Patches, one block of the attention under test, and a classifier."""

    def __init__(self, attention: Callable[[], nn.Module], prefix: int = 0) -> None:
        super().__init__()
        self.stem, self.norm, self.attention = nn.Conv2d(3, DIM, 4, 4), nn.LayerNorm(DIM), attention()
        self.registers = nn.Parameter(torch.randn(1, prefix, DIM))
        self.fc1, self.fc2, self.head = nn.Linear(DIM, 48), nn.Linear(48, DIM), nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)  # [N, SIDE * SIDE, DIM]
        tokens = torch.cat([self.registers.expand(x.shape[0], -1, -1), tokens], 1)
        tokens = tokens + self.attention(self.norm(tokens))
        tokens = tokens + self.fc2(F.gelu(self.fc1(tokens)))
        return self.head(tokens.mean(1))  # type: ignore[no-any-return]


class RelativePositions(nn.Module):
    """Queries of all images and heads in one axis, meeting tables of rows and columns; windows where asked for."""

    def __init__(self, window: int = 0, table: int = 0, fused: bool = False) -> None:
        super().__init__()
        self.window, self.side, self.fused = window, window or SIDE, fused
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        length = 2 * (table or self.side) - 1
        self.rows, self.columns = (nn.Parameter(torch.randn(length, HEAD_DIM)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (SIDE, SIDE))
        if not self.window:
            return self.attended(x).flatten(1, 2)
        x, parts = F.pad(x, (0, 0, 0, -SIDE % self.side, 0, -SIDE % self.side)), -(-SIDE // self.side)
        x = x.view(-1, parts, self.side, parts, self.side, DIM).transpose(2, 3)
        x = self.attended(x.reshape(-1, self.side, self.side, DIM))
        x = x.view(-1, parts, parts, self.side, self.side, DIM).transpose(2, 3)
        return x.reshape(-1, parts * self.side, parts * self.side, DIM)[:, :SIDE, :SIDE].flatten(1, 2)

    def attended(self, x: Tensor) -> Tensor:
        n, side, n_tokens = x.shape[0], self.side, self.side**2
        qkv = self.qkv(x).reshape(n, n_tokens, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, n * HEADS, n_tokens, HEAD_DIM).unbind(0)
        places = q.reshape(n * HEADS, side, side, HEAD_DIM)
        beside = torch.einsum("bhwc,hkc->bhwk", places, self.looked_up(self.rows))[:, :, :, :, None]
        above = torch.einsum("bhwc,wkc->bhwk", places, self.looked_up(self.columns))[:, :, :, None, :]
        bias = (beside + above).reshape(n * HEADS, n_tokens, n_tokens)
        if self.fused:
            q, k, v, bias = (t.reshape(n, HEADS, n_tokens, -1) for t in (q, k, v, bias))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
        else:
            y = ((q * HEAD_DIM**-0.5) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
            y = y.view(n, HEADS, n_tokens, HEAD_DIM).permute(0, 2, 1, 3)
        return self.proj(y.reshape(n, side, side, DIM))  # type: ignore[no-any-return]

    def looked_up(self, table: Tensor) -> Tensor:
        length = 2 * self.side - 1
        if len(table) != length:
            table = F.interpolate(table.t()[None], size=length, mode="linear")[0].t()
        places = torch.arange(self.side)
        return table[places[:, None] - places[None] + self.side - 1]


class Rotary(nn.Module):
    """Queries and keys turned by the place of their patch; registers in front are not."""

    def __init__(self, turned: Callable[[Tensor, Tensor], Tensor], **options: bool) -> None:
        super().__init__()
        self.turned, self.options = turned, options
        self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.register_buffer("frequencies", 1 / 10 ** torch.arange(HEAD_DIM // 2))
        self.q_norm, self.k_norm = nn.LayerNorm(HEAD_DIM), nn.LayerNorm(HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        if self.options.get("joint"):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (layer(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.options.get("normed"):
            q, k = self.q_norm(q), self.k_norm(k)
        angles = torch.arange(SIDE * SIDE)[:, None] * self.frequencies
        n_registers = x.shape[1] - len(angles)
        q, k = (torch.cat([t[:, :, :n_registers], self.turned(t[:, :, n_registers:], angles)], 2) for t in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def half_split(x: Tensor, angles: Tensor) -> Tensor:
    angles = torch.cat([angles, angles], -1)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def interleaved(x: Tensor, angles: Tensor) -> Tensor:
    angles = angles.repeat_interleave(2, -1)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return x * angles.cos() + turned * angles.sin()


def in_pairs(x: Tensor, angles: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def as_complex(x: Tensor, angles: Tensor) -> Tensor:
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def partly(x: Tensor, angles: Tensor) -> Tensor:
    return torch.cat([half_split(x[..., : HEAD_DIM // 2], angles[..., ::2]), x[..., HEAD_DIM // 2 :]], -1)


class FixedTable(nn.Module):
    """Queries and keys times numbers that depend on a setting alone, written into the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scale = torch.arange(HEAD_DIM).clamp(1, 3)
        y = F.scaled_dot_product_attention(q * scale, k * scale, v)
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class HeadsInPositions(nn.Module):
    """Cosine attention whose bias a layer makes of relative places, one number for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.bias = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Linear(2, HEADS)
        self.scale = nn.Parameter(torch.ones(HEADS, 1, 1))
        places = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"), -1).flatten(0, 1)
        self.register_buffer("places", (places[:, None] - places).float())  # [tokens, tokens, 2]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale.exp()
        y = (logits + self.bias(self.places).permute(2, 0, 1).sigmoid()).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Weighed(nn.Module):
    """PyTorch's own attention that also gives out its weights: images and heads in one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]  # type: ignore[no-any-return]


class Talking(nn.Module):
    """Weights mixed over heads: a head of the queries and keys is none of the values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.mix = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        mixed = self.mix((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((mixed.softmax(-1) @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SharedLayer(nn.Module):
    """One layer that all heads of the values go through."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.shared = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Linear(HEAD_DIM, HEAD_DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ self.shared(v)
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


ATTENTIONS = {
    "relative": partial(Encoder, RelativePositions),
    "relative, fused": partial(Encoder, partial(RelativePositions, fused=True)),
    "relative, in windows": partial(Encoder, partial(RelativePositions, 2)),
    "relative, in padded windows": partial(Encoder, partial(RelativePositions, 3, fused=True)),
    "relative, of another size": partial(Encoder, partial(RelativePositions, table=7)),
    "rotary, half": partial(Encoder, partial(Rotary, half_split), 2),
    "rotary, half, joint": partial(Encoder, partial(Rotary, half_split, joint=True), 2),
    "rotary, no registers": partial(Encoder, partial(Rotary, half_split), 0),
    "rotary, interleaved": partial(Encoder, partial(Rotary, interleaved, joint=True), 1),
    "rotary, pairs": partial(Encoder, partial(Rotary, in_pairs), 1),
    "rotary, complex": partial(Encoder, partial(Rotary, as_complex), 1),
    "rotary, normed": partial(Encoder, partial(Rotary, half_split, normed=True), 1),
    "rotary, of a part": partial(Encoder, partial(Rotary, partly), 1),
    "fixed": partial(Encoder, FixedTable),
    "cosine": partial(Encoder, HeadsInPositions),
    "weighed": partial(Encoder, Weighed),
}


@cache
def analysed(name: str) -> tuple[torch.fx.GraphModule, Structure, Tensor]:
    torch.manual_seed(0)
    pixels = images((3, 4 * SIDE, 4 * SIDE)).float()
    graph = trace(randomised(ATTENTIONS[name]()), pixels)
    return graph, find_structure(graph, pixels), pixels


def dimensions_of(structure: Structure, layer: str) -> list[Group]:
    groups = [group for group in structure.groups.groups if group.kind == "head_dim"]
    return [group for group in groups if any(site.layer == layer for site in group.sites)]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ATTENTIONS)
def test_heads_are_a_group_and_half_of_them_go_exactly(name: str) -> None:
    graph, structure, pixels = analysed(name)
    heads = [group for group in structure.groups.groups if group.kind == "head"]
    assert [group.size for group in heads] == [HEADS], structure.groups
    assert [layer.layer for layer in structure.groups.left_alone] == ["head"]  # the classifier
    kept: dict[str, IntArray] = {group.name: np.arange(group.size) for group in structure.groups.groups}
    kept[heads[0].name] = np.array([0, 3])
    small, slices = prune(graph, structure, kept)
    assert identity_error(graph, small, structure, kept, pixels) < TOLERANCE
    channels = [head * HEAD_DIM + dimension for head in (0, 3) for dimension in range(HEAD_DIM)]
    cut = [stays for kept_of in slices.kept.values() for stays in kept_of if len(stays) == len(channels)]
    assert cut
    assert all(np.array_equal(stays, channels) for stays in cut)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_any_units_go_exactly(name: str) -> None:
    graph, structure, pixels = analysed(name)
    for seed in range(3):
        kept = random_units(structure, seed, share=(seed + 1) / 4)
        small, _ = prune(graph, structure, kept)
        assert identity_error(graph, small, structure, kept, pixels) < TOLERANCE
        for count in (1, 5):  # heads of all images in one axis are as many as the batch says
            assert small(images((3, 4 * SIDE, 4 * SIDE), count).float()).shape == (count, 5)


@pytest.mark.parametrize(
    ("name", "pairs"), [("rotary, half", [0, 1, 2, 3] * 2), ("rotary, pairs", [0, 0, 1, 1, 2, 2, 3, 3])]
)
def test_a_rotation_ties_the_dimensions_it_turns_in_all_heads(name: str, pairs: list[int]) -> None:
    _, structure, _ = analysed(name)
    (turned,) = dimensions_of(structure, "attention.q")
    assert {site.layer for site in turned.sites} == {"attention.q", "attention.k"}
    for site in turned.sites:
        assert site.units.tolist() == pairs * HEADS
    (free,) = dimensions_of(structure, "attention.v")
    assert free.size == DIM
    assert free.balanced


def test_a_table_of_positions_loses_the_dimensions_its_queries_lose() -> None:
    graph, structure, _ = analysed("relative")
    kept: dict[str, IntArray] = {group.name: np.arange(group.size) for group in structure.groups.groups}
    for group in dimensions_of(structure, "attention.qkv"):
        rows = HEADS if group.balanced else 1
        kept[group.name] = np.flatnonzero(np.arange(group.size) % (group.size // rows) % 2)
    small, slices = prune(graph, structure, kept)
    assert slices.kept["attention.rows"][1].tolist() == [1, 3, 5, 7]
    assert dict(small.named_parameters())["attention.qkv.weight"].shape == (3 * DIM // 2, DIM)


def test_of_talking_heads_dimensions_go_from_all_of_them() -> None:
    torch.manual_seed(0)
    pixels = images((3, 4 * SIDE, 4 * SIDE)).float()
    graph = trace(randomised(Encoder(Talking)), pixels)
    structure = find_structure(graph, pixels)
    (dimensions,) = [group for group in structure.groups.groups if group.sites[0].layer == "attention.qkv"]
    assert dimensions.size == HEAD_DIM
    kept = random_units(structure, 0)
    small, _ = prune(graph, structure, kept)
    assert identity_error(graph, small, structure, kept, pixels) < TOLERANCE


def test_a_layer_that_all_heads_share_loses_outputs() -> None:
    torch.manual_seed(0)
    pixels = images((3, 4 * SIDE, 4 * SIDE)).float()
    graph = trace(randomised(Encoder(SharedLayer)), pixels)
    structure = find_structure(graph, pixels)
    assert structure.groups["attention.shared"].size == HEAD_DIM
    kept = random_units(structure, 0)
    small, _ = prune(graph, structure, kept)
    assert identity_error(graph, small, structure, kept, pixels) < TOLERANCE


def test_fixed_dimensions_stay_and_those_of_the_values_go() -> None:
    _, structure, _ = analysed("fixed")
    assert [group.size for group in dimensions_of(structure, "attention.v")] == [DIM]
    assert not dimensions_of(structure, "attention.q")
