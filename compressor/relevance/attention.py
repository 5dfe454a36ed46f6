"""LRP through attention: products of two signals, softmax, and both together in one fused operation.

AttnLRP (Achtibat et al. 2024): softmax by its Taylor expansion (proposition 3.1), a product of two signals
split in half (3.3). CP-LRP (Ali et al. 2022): the attention matrix is a constant. Knows no graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from .composite import SoftmaxRule
from .rules import stabilised_


class AttentionOptions(TypedDict, total=False):
    """The keywords of scaled_dot_product_attention; one that is not there has torch's default."""

    attn_mask: Tensor
    is_causal: bool
    scale: float
    enable_gqa: bool


# The softmax rule makes a score's relevance proportional to the score, so its division only has to survive 0 / 0.
SCORE_EPSILON = 1e-15


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, and 0 where factor is 0 even at x = -inf (a masked score)."""
    return torch.where(factor == 0, torch.zeros_like(factor), x * factor)


def softmax(x: Tensor, probabilities: Tensor, relevance: Tensor, dim: int, rule: SoftmaxRule) -> Tensor | None:
    """Relevance of the scores x, shaped as they are; None where the rule sends none.

    `probabilities` are softmax(x) along `dim`, `relevance` is theirs. AttnLRP: x_i (R_i - p_i sum_j R_j)
    (Achtibat et al. 2024, proposition 3.1).
    """
    if rule == "cp":
        return None
    if rule == "attnlrp":
        return scaled(x, relevance - probabilities * relevance.sum(dim, keepdim=True))
    return _softmax_zplus(x, probabilities, relevance, dim, biased=rule == "zplus-bias")


def _softmax_zplus(x: Tensor, p: Tensor, relevance: Tensor, dim: int, *, biased: bool) -> Tensor:
    """z+ on the expansion p_i = sum_j p_i (d_ij - p_j) x_j + bias_i; p_i cancels, so a row costs no matrix.

    Positive products: (1 - p_i) x_i where x_i > 0, and -p_j x_j, j != i, where x_j < 0.
    """
    diagonal = scaled(x.clamp(min=0), 1 - p)  # j = i
    off_diagonal = scaled(-x.clamp(max=0), p)  # at j, what j gives to every other i

    # the positive products of output i: the diagonal's, and the off-diagonal ones of every j but i
    total = diagonal + off_diagonal.sum(dim, keepdim=True) - off_diagonal
    if biased:
        # a masked score is -inf with p = 0: it has no part in the bias, and -inf * 0 must not become NaN
        bias = 1 - x.masked_fill(p == 0, 0) + scaled(x, p).sum(dim, keepdim=True)
        total = total + bias.clamp(min=0)
    share = torch.div(relevance, stabilised_(total.clone(), 1e-6))
    return diagonal * share + off_diagonal * (share.sum(dim, keepdim=True) - share)


def product(
    function: Callable[..., Tensor], a: Tensor, b: Tensor, relevance: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """A bilinear function of two signals: half of the relevance to each, in proportion to the products.

    Returned are the relevances of a and b, shaped as they are (Achtibat et al. 2024, proposition 3.3).
    """
    with torch.enable_grad():
        leaf_a, leaf_b = a.detach().requires_grad_(), b.detach().requires_grad_()
        out = function(leaf_a, leaf_b)
    share = torch.div(relevance, stabilised_(out.detach().mul(2), epsilon))
    gradient_a, gradient_b = torch.autograd.grad(out, (leaf_a, leaf_b), share)
    return gradient_a.mul_(a), gradient_b.mul_(b)


def matrix_product(a: Tensor, b: Tensor, relevance: Tensor, epsilon: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """`product` for torch.matmul with both operands of the same rank, without a tape.

    a [..., n, m], b [..., m, d], relevance and out [..., n, d].
    """
    share = torch.div(relevance, stabilised_(out.mul(2), epsilon))
    return torch.matmul(share, b.mT).mul_(a), torch.matmul(a.mT, share).mul_(b)


def attend(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Attention written out: scores (scaled, masked), probabilities, output.

    q [..., heads, n, d], k and v [..., heads, m, d], repeated where several heads of q share one; scores and
    probabilities are [..., heads, n, m].
    """
    scores = torch.matmul(q, k.mT) * _scale(q, options)  # [..., heads, n, m]
    if options.get("is_causal"):
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))

    mask = options.get("attn_mask")
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    probabilities = torch.softmax(scores, -1)
    return scores, probabilities, torch.matmul(probabilities, v)


def _scale(q: Tensor, options: AttentionOptions) -> float:
    """What the scores are multiplied by: 1 / sqrt(d) where nothing else is asked for."""
    return options.get("scale") or float(q.shape[-1] ** -0.5)


def attention_fused(
    signals: tuple[Tensor, Tensor, Tensor], relevance: Tensor, out: Tensor, options: AttentionOptions, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """AttnLRP through scaled_dot_product_attention by its own gradient kernel; signals are query, key, value.

    With s = R / 2 out, value x gradient is the rule of the second product. The softmax rule returns
    score x gradient, which the first product divides by twice the score again: half of query x gradient.
    """
    share = torch.div(relevance, stabilised_(out.mul(2), epsilon))
    with torch.enable_grad():
        query, key, value = (t.detach().requires_grad_() for t in signals)
        recomputed = F.scaled_dot_product_attention(query, key, value, **options)
    to_q, to_k, to_v = torch.autograd.grad(recomputed, (query, key, value), share)
    return to_q.mul_(signals[0]).mul_(0.5), to_k.mul_(signals[1]).mul_(0.5), to_v.mul_(signals[2])


def attention_written_out(
    signals: tuple[Tensor, Tensor, Tensor],
    relevance: Tensor,
    options: AttentionOptions,
    rule: SoftmaxRule,
    epsilon: float,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Any softmax rule through scaled_dot_product_attention, step by step; queries and keys get None under CP-LRP.

    An additive mask takes part as a bias of the scores.
    """
    q, k, v = signals
    shared_by = 1  # query heads that read one key head
    if options.get("enable_gqa"):
        shared_by = q.shape[-3] // k.shape[-3]
        k = k.repeat_interleave(shared_by, -3)
        v = v.repeat_interleave(shared_by, -3)
    scores, p, out = attend(q, k, v, options)

    if rule == "cp":
        share = torch.div(relevance, stabilised_(out.clone(), epsilon))
        return None, None, _add_shared(torch.matmul(p.mT, share).mul_(v), shared_by)

    # second product, softmax, then the first product
    to_p, to_v = matrix_product(p, v, relevance, epsilon, out)  # [..., heads, n, m], [..., heads, m, d]
    to_scores = softmax(scores, p, to_p, -1, rule)
    assert to_scores is not None
    scale = _scale(q, options)
    # relevance of the scaled product is its part of the masked score's
    share = torch.div(to_scores, stabilised_(scores.clone(), SCORE_EPSILON)).mul_(0.5 * scale)
    to_q = torch.matmul(share, k).mul_(q)
    to_k = torch.matmul(share.mT, q).mul_(k)
    return to_q, _add_shared(to_k, shared_by), _add_shared(to_v, shared_by)


def _add_shared(relevance: Tensor, shared_by: int) -> Tensor:
    """[..., heads, tokens, d] -> [..., heads / shared_by, tokens, d]: copies of one key or value head add up."""
    if shared_by == 1:
        return relevance
    # 4 query heads on 2 key heads: copies 0 and 1 are of key head 0
    by_head = relevance.reshape(*relevance.shape[:-3], -1, shared_by, *relevance.shape[-2:])
    return by_head.sum(-3)
