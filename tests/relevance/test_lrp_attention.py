"""Attention's LRP rules against AttnLRP's propositions written out, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.relevance import attention
from compressor.relevance.rules import stabilised_

EXACT = 1e-9  # float64 rounding of sums of at most some hundred terms
FUSED = 1e-5  # float32, other order of summation
EPSILON = 1e-12  # far below every denominator of these tests, so that both sides mean the limit


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _product_by_definition(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Proposition 3.3: R_ji = sum_p a_ji b_ip R_jp / (2 o_jp), likewise for b."""
    o = a @ b
    to_a, to_b = torch.zeros_like(a), torch.zeros_like(b)
    for j in range(a.shape[-2]):
        for i in range(a.shape[-1]):
            for p in range(b.shape[-1]):
                part = a[..., j, i] * b[..., i, p] * relevance[..., j, p] / (2 * o[..., j, p])
                to_a[..., j, i] += part
                to_b[..., i, p] += part
    return to_a, to_b


def _softmax_by_definition(x: Tensor, relevance: Tensor) -> Tensor:
    """Proposition 3.1: R_i = sum_j J_ji x_i R_j / s_j, the Jacobian from automatic differentiation."""
    rows = []
    for xs, r in zip(x.flatten(0, -2), relevance.flatten(0, -2), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: torch.softmax(v, -1), xs)
        assert isinstance(jacobian, Tensor)
        rows.append((jacobian * xs / torch.softmax(xs, -1)[:, None] * r[:, None]).sum(0))
    return torch.stack(rows).reshape(x.shape)


def _softmax_zplus_by_definition(x: Tensor, relevance: Tensor, biased: bool) -> Tensor:
    rows = []
    for xs, r in zip(x.flatten(0, -2), relevance.flatten(0, -2), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: torch.softmax(v, -1), xs)
        assert isinstance(jacobian, Tensor)
        p = torch.softmax(xs, -1)
        z = (jacobian * xs / p[:, None]).clamp(min=0)
        bias = ((p - jacobian @ xs) / p).clamp(min=0) if biased else torch.zeros_like(p)
        rows.append((z / (z.sum(1) + bias + 1e-6)[:, None] * r[:, None]).sum(0))
    return torch.stack(rows).reshape(x.shape)


def test_product_equals_proposition() -> None:
    a, b, relevance = _random(2, 3, 4), _random(2, 4, 5, seed=1), _random(2, 3, 5, seed=2)
    expected = _product_by_definition(a, b, relevance)
    taped = attention.product(torch.matmul, a, b, relevance, EPSILON)
    direct = attention.matrix_product(a, b, relevance, EPSILON, a @ b)
    for given in (taped, direct):
        assert max(_distance(g, e) for g, e in zip(given, expected, strict=True)) < EXACT
    assert float(taped[0].sum() + taped[1].sum()) == pytest.approx(float(relevance.sum()), rel=EXACT)


def test_softmax_equals_proposition() -> None:
    x, relevance = _random(2, 3, 5), _random(2, 3, 5, seed=1)
    p = torch.softmax(x, -1)
    given = attention.softmax(x, p, relevance, -1, "attnlrp")
    assert given is not None
    assert _distance(given, _softmax_by_definition(x, relevance)) < EXACT
    assert attention.softmax(x, p, relevance, -1, "cp") is None


@pytest.mark.parametrize("biased", [False, True])
def test_softmax_zplus_equals_explicit_matrix(biased: bool) -> None:
    x, relevance = _random(2, 3, 5), _random(2, 3, 5, seed=1)
    given = attention.softmax(x, torch.softmax(x, -1), relevance, -1, "zplus-bias" if biased else "zplus")
    assert given is not None
    assert _distance(given, _softmax_zplus_by_definition(x, relevance, biased)) < EXACT


def _masks() -> dict[str, dict[str, Any]]:
    allowed = torch.ones(4, 6, dtype=torch.bool)
    allowed[:, 2] = False
    return {
        "plain": {},
        "scale": {"scale": 0.7},
        "boolean mask": {"attn_mask": allowed},
        "additive mask": {"attn_mask": _random(4, 6, seed=9)},
        "infinite mask": {"attn_mask": torch.zeros(4, 6, dtype=torch.float64).masked_fill(~allowed, float("-inf"))},
    }


def _attention_by_definition(
    q: Tensor, k: Tensor, v: Tensor, relevance: Tensor, options: dict[str, Any]
) -> list[Tensor]:
    """Both products and the softmax by their propositions; an additive mask is a bias of the scores."""
    scale = options.get("scale", q.shape[-1] ** -0.5)
    mask = options.get("attn_mask", torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype))
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask
    open_ = torch.isfinite(bias)
    scores = q @ k.mT * scale + bias
    p = torch.softmax(scores, -1)
    to_p, to_v = _product_by_definition(p, v, relevance)
    to_scores = torch.where(open_, scores.nan_to_num(neginf=0) * (to_p - p * to_p.sum(-1, keepdim=True)), 0.0)
    products = q @ k.mT * scale
    to_products = torch.where(open_, to_scores * products / torch.where(open_, scores, 1.0), 0.0)
    to_q, to_k = _product_by_definition(q, k.mT, to_products)
    return [to_q, to_k.mT, to_v]


@pytest.mark.parametrize("case", ["plain", "scale", "boolean mask", "additive mask", "infinite mask"])
def test_attention_equals_propositions(case: str) -> None:
    options = _masks()[case]
    q, k, v = _random(2, 4, 3), _random(2, 6, 3, seed=1), _random(2, 6, 5, seed=2)
    out = F.scaled_dot_product_attention(q, k, v, **options)
    relevance = _random(2, 4, 5, seed=3)
    expected = _attention_by_definition(q, k, v, relevance, options)
    fused = attention.attention_fused((q, k, v), relevance, out, options, EPSILON)
    written = attention.attention_written_out((q, k, v), relevance, options, "attnlrp", EPSILON)
    for given in (fused, written):
        for one, other in zip(given, expected, strict=True):
            assert one is not None
            assert _distance(one, other) < EXACT


def test_attention_forms_agree_at_the_usual_stabiliser() -> None:
    q, k, v, relevance = (_random(2, 8, 8, seed=s).float() for s in range(4))
    out = F.scaled_dot_product_attention(q, k, v)
    relevance = relevance * out  # as it arrives behind a linear layer: in proportion to the output
    fused = attention.attention_fused((q, k, v), relevance, out, {}, 1e-6)
    written = attention.attention_written_out((q, k, v), relevance, {}, "attnlrp", 1e-6)
    assert all(w is not None and _distance(f, w) < FUSED for f, w in zip(fused, written, strict=True))


def test_constant_attention_gives_values_everything() -> None:
    q, k, v, relevance = (_random(2, 5, 4, seed=s) for s in range(4))
    to_q, to_k, to_v = attention.attention_written_out((q, k, v), relevance, {}, "cp", EPSILON)
    p = torch.softmax(q @ k.mT * 0.5, -1)
    expected = torch.einsum("bij,bjd,bid->bjd", p, v, relevance / (p @ v))
    assert to_q is None
    assert to_k is None
    assert _distance(to_v, expected) < EXACT


def test_grouped_queries_sum_into_shared_keys() -> None:
    q, k, v, relevance = (
        _random(1, 4, 3, 2),
        _random(1, 2, 3, 2, seed=1),
        _random(1, 2, 3, 2, seed=2),
        _random(1, 4, 3, 2, seed=3),
    )
    shared = attention.attention_written_out((q, k, v), relevance, {"enable_gqa": True}, "attnlrp", EPSILON)
    full = [t.repeat_interleave(2, 1) for t in (k, v)]
    single = attention.attention_written_out((q, full[0], full[1]), relevance, {}, "attnlrp", EPSILON)
    assert single[1] is not None
    assert shared[1] is not None
    assert _distance(shared[1], single[1].unflatten(1, (2, 2)).sum(2)) < EXACT
    assert _distance(shared[2], single[2].unflatten(1, (2, 2)).sum(2)) < EXACT


def test_stabiliser_moves_away_from_zero() -> None:
    given = stabilised_(torch.tensor([2.0, -2.0, 0.0]), 0.5)
    assert given.tolist() == [2.5, -2.5, 0.5]
