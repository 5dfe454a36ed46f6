"""LRP rules of one convolution or linear layer: relevance at its output in, relevance at its input out.

`plain` is zennit's rule hooked to a module of the layer, the reference. `fast` gives the same numbers with
as few convolutions as the rule allows; zennit's own serves the rest. Knows nothing of graphs.
Formulas: Bach et al. 2015 (epsilon, alpha-beta), Montavon et al. 2017 (z+), Andeol et al. 2021 (generalised gamma).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RecipeError
from .composite import Rule

if TYPE_CHECKING:
    import zennit.core

_CONVOLUTIONS: dict[int, tuple[Callable[..., Tensor], type[nn.Module]]] = {
    1: (F.conv1d, nn.Conv1d),
    2: (F.conv2d, nn.Conv2d),
    3: (F.conv3d, nn.Conv3d),
}


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A convolution (weight [out, in / groups, *kernel]) or a linear layer (weight [out, in], `dims` 0)."""

    weight: Tensor
    bias: Tensor | None
    dims: int = 0
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


def forward(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's output for x, with other weights and another bias of the same shapes where a rule wants them.

    x is [N, in, *space] for a convolution, [..., in] for a linear layer; the output has `out` in the place of `in`.
    """
    if layer.dims == 0:
        return F.linear(x, weight, bias)
    convolve = _CONVOLUTIONS[layer.dims][0]
    return convolve(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def transposed(layer: Layer, x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    """The layer's input gradient with that weight, shaped as x, of `grad` at its output; x gives the shape only."""
    if layer.dims == 0:
        return torch.matmul(grad, weight)
    if isinstance(layer.padding, str):  # the gradient kernel takes numbers only, and "same" may pad unevenly
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(forward(layer, leaf, weight, None), leaf, grad)[0]
    zero = [0] * layer.dims
    geometry = (layer.stride, layer.padding, layer.dilation, False, zero, layer.groups, [True, False, False])
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry)[0]  # type: ignore[no-any-return]


def module_of(layer: Layer) -> nn.Module:
    """The layer as a torch module, for zennit's hooks; shares the tensors."""
    weight, out = layer.weight, layer.weight.shape[0]
    # built without memory of its own, then given the layer's tensors
    if layer.dims == 0:
        module: nn.Module = nn.Linear(weight.shape[1], out, layer.bias is not None, device="meta")
    else:
        sizes = (weight.shape[1] * layer.groups, out, tuple(weight.shape[2:]), layer.stride, layer.padding)
        kind = _CONVOLUTIONS[layer.dims][1]
        module = kind(*sizes, layer.dilation, layer.groups, layer.bias is not None, device="meta")
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    if layer.bias is not None:
        module.register_parameter("bias", nn.Parameter(layer.bias, requires_grad=False))
    return module


def zennit_rule(rule: Rule, x: Tensor) -> zennit.core.Hook:
    """Zennit's hook for a rule; x is the layer's input, whose extremes z-box takes where no box is given."""
    import zennit.rules  # brings torchvision; most rules have a fast form and never come here

    zero = None if rule.bias else ["bias"]  # the parameters that zennit sets to zero
    eps = rule.epsilon
    makers: dict[str, Callable[[], zennit.core.Hook]] = {
        "epsilon": lambda: zennit.rules.Epsilon(eps, zero_params=zero),
        "zplus": lambda: zennit.rules.ZPlus(eps, zero_params=zero),
        "alphabeta": lambda: zennit.rules.AlphaBeta(rule.alpha, rule.alpha - 1.0, eps, zero_params=zero),
        "gamma": lambda: zennit.rules.Gamma(rule.gamma, eps, zero_params=zero),
        "zbox": lambda: zennit.rules.ZBox(*_box(rule, x), eps, zero_params=zero),
        "wsquare": lambda: zennit.rules.WSquare(eps, zero_params=zero),
        "flat": lambda: zennit.rules.Flat(eps, zero_params=zero),
        "pass": zennit.rules.Pass,
        "norm": lambda: zennit.rules.Norm(eps),
    }
    return makers[rule.name]()


def _box(rule: Rule, x: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value that each element of x may take, both shaped as x."""
    if rule.box is None:  # of each image and channel; of [N, F] of each image
        axes = tuple(range(2, x.dim())) or (1,)
        return x.amin(axes, keepdim=True).expand_as(x), x.amax(axes, keepdim=True).expand_as(x)
    shape = (1, -1) + (1,) * (x.dim() - 2)  # [C] -> [1, C, 1, 1]
    low, high = (torch.tensor(bound, dtype=x.dtype, device=x.device).reshape(shape) for bound in rule.box)
    return low.expand_as(x), high.expand_as(x)


def plain(layer: Layer, rule: Rule, x: Tensor, relevance: Tensor) -> Tensor:
    """Relevance at the layer's input, shaped as x, by zennit's own rule, hooked for this call only.

    `relevance` is shaped as the layer's output. Raises RecipeError where rule `pass` meets a layer that changes shape.
    """
    if rule.name == "pass" and x.shape != relevance.shape:
        raise RecipeError(
            f"rule 'pass' needs a layer with equal input and output shapes, found {list(x.shape)} and "
            f"{list(relevance.shape)}; choose another rule for its depth group"
        )
    module = module_of(layer)
    handles = zennit_rule(rule, x).register(module)
    try:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(module(leaf), leaf, relevance)[0].detach()
    finally:
        handles.remove()


def stabilised_(z: Tensor, epsilon: float, sign: int = 0) -> Tensor:
    """z + epsilon * sign(z), the sign of 0 being +1, written into z; `sign` names the only sign z has, if one."""
    if sign > 0:
        return z.add_(epsilon)
    return z.add_(torch.copysign(torch.full((), epsilon, dtype=z.dtype, device=z.device), z))


def fast(layer: Layer, rule: Rule, x: Tensor, relevance: Tensor, *, output: Tensor | None, nonnegative: bool) -> Tensor:
    """As `plain`. `output` is the layer's output where it was kept; `nonnegative` promises x >= 0."""
    match rule.name:
        case "epsilon" | "norm":
            return _epsilon(layer, rule, x, relevance, output)
        case "zplus":
            return _signed(layer, rule, x, relevance, nonnegative, (1.0, 0.0))
        case "alphabeta":
            return _signed(layer, rule, x, relevance, nonnegative, (rule.alpha, rule.alpha - 1.0))
        case "gamma":
            return _gamma(layer, rule, x, relevance, output, nonnegative)
        case "flat" if not isinstance(layer.padding, str):
            return _flat(layer, rule, x, relevance)
        case _:
            return plain(layer, rule, x, relevance)


def _epsilon(layer: Layer, rule: Rule, x: Tensor, relevance: Tensor, output: Tensor | None) -> Tensor:
    bias = _bias(layer, rule)
    is_output = bias is layer.bias  # what the rule divides by is then what the layer computed
    z = output.clone() if output is not None and is_output else forward(layer, x, layer.weight, bias)
    share = torch.div(relevance, stabilised_(z, rule.epsilon), out=z)
    return transposed(layer, x, layer.weight, share).mul_(x)


def _bias(layer: Layer, rule: Rule) -> Tensor | None:
    """The bias that takes part in the denominators; zennit's norm rule leaves it in always."""
    return layer.bias if rule.bias or rule.name == "norm" else None


def _signed(
    layer: Layer, rule: Rule, x: Tensor, relevance: Tensor, nonnegative: bool, factors: tuple[float, float]
) -> Tensor:
    """alpha * (share of the positive products) - beta * (share of the negative products)."""
    alpha, beta = factors
    total = _one_sign(layer, rule, x, relevance, nonnegative, positive=True)
    if alpha != 1.0:
        total.mul_(alpha)
    if beta != 0.0:
        total.sub_(_one_sign(layer, rule, x, relevance, nonnegative, positive=False).mul_(beta))
    return total


def _one_sign(layer: Layer, rule: Rule, x: Tensor, relevance: Tensor, nonnegative: bool, *, positive: bool) -> Tensor:
    """The relevance shared over the products of one sign; the bias counts where it has that sign."""
    bias = _bias(layer, rule)
    bias_of_sign = None if bias is None else _of_sign(bias, positive)
    weight = _of_sign(layer.weight, positive)
    sign = 1 if positive else -1
    if nonnegative:
        return _share(layer, rule, [(x, weight)], bias_of_sign, relevance, sign=sign)
    # a positive product has two positive factors or two negative ones, a negative product one of each
    pieces = [(x.clamp(min=0), weight), (x.clamp(max=0), _of_sign(layer.weight, not positive))]
    return _share(layer, rule, pieces, bias_of_sign, relevance, sign=sign)


def _of_sign(values: Tensor, positive: bool) -> Tensor:
    return values.clamp(min=0) if positive else values.clamp(max=0)


def _share(
    layer: Layer, rule: Rule, pieces: list[tuple[Tensor, Tensor]], bias: Tensor | None, relevance: Tensor, *, sign: int
) -> Tensor:
    """sum over pieces (x, w) of x * w^T(relevance / stabilised(sum of w x + bias))."""
    first_x, first_weight = pieces[0]
    z = forward(layer, first_x, first_weight, bias)
    for x, weight in pieces[1:]:
        z += forward(layer, x, weight, None)
    share = torch.div(relevance, stabilised_(z, rule.epsilon, sign), out=z)

    total = transposed(layer, first_x, first_weight, share).mul_(first_x)
    for x, weight in pieces[1:]:
        total += transposed(layer, x, weight, share).mul_(x)
    return total


def _gamma(layer: Layer, rule: Rule, x: Tensor, relevance: Tensor, output: Tensor | None, nonnegative: bool) -> Tensor:
    """Outputs > 0 share over w + gamma w+ (on x+) and w + gamma w- (on x-); outputs < 0 the other way round."""
    # zennit decides the side by the true output, its bias included
    z = forward(layer, x, layer.weight, layer.bias) if output is None else output
    raised = layer.weight + rule.gamma * _of_sign(layer.weight, True)
    lowered = layer.weight + rule.gamma * _of_sign(layer.weight, False)

    def side(mask: Tensor, for_positive_x: Tensor, for_negative_x: Tensor, positive: bool) -> Tensor:
        pieces = [(x, for_positive_x)]
        if not nonnegative:
            pieces = [(x.clamp(min=0), for_positive_x), (x.clamp(max=0), for_negative_x)]
        bias = _bias(layer, rule)
        if bias is not None:
            bias = bias + rule.gamma * _of_sign(bias, positive)
        return _share(layer, rule, pieces, bias, relevance * mask, sign=0)

    total = side(z > 0, raised, lowered, True)
    return total.add_(side(z < 0, lowered, raised, False))


def _flat(layer: Layer, rule: Rule, x: Tensor, relevance: Tensor) -> Tensor:
    """All weights one: every output of a group shares with every input of it alike, so one channel per group does."""
    groups = layer.groups
    if layer.dims == 0:
        inputs = torch.full((), float(x.shape[-1]), dtype=x.dtype, device=x.device)
        return torch.div(relevance.sum(-1, keepdim=True), stabilised_(inputs, rule.epsilon)).expand_as(x)

    ones = torch.ones(groups, 1, *layer.weight.shape[2:], dtype=x.dtype, device=x.device)
    thin = replace(layer, weight=ones, bias=None)
    single = x.new_ones(1, groups, *x.shape[2:])
    # how many inputs an output reads: fewer at a padded border
    inputs = forward(thin, single, ones, None).mul_(layer.weight.shape[1])

    by_group = relevance.reshape(relevance.shape[0], groups, -1, *relevance.shape[2:])  # [N, groups, out of it, H, W]
    share = torch.div(by_group.sum(2), stabilised_(inputs, rule.epsilon))
    to_group = transposed(thin, single.expand(x.shape[0], *single.shape[1:]), ones, share)  # [N, groups, H, W]
    return to_group.repeat_interleave(x.shape[1] // groups, 1)
