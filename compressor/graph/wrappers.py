"""A module as its owner has it in, the plain float32 module that computes the same out, and what was done to it.

Takes off what training wraps around a network (`torch.compile`, `DataParallel`, moving averages), folds weights
that are computed from others (weight and spectral norm, pruning masks) and converts other floats to float32. What
can't be read as a plain network (TorchScript, fake quantisation, a whole detector) is refused with the remedy. The
module that came in is not changed.
"""

from __future__ import annotations

import copy
import inspect
import keyword
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from ..errors import ModelError

_INNER = {  # a wrapper's class and the attribute its network lies in
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "ModelEma": "module",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
}


@dataclass(frozen=True, slots=True)
class Plain:
    """`notes` say what was taken off, folded or converted, for the report."""

    module: nn.Module
    notes: tuple[str, ...] = ()


def plain(module: nn.Module, *, convert: bool = True) -> Plain:
    """The network without what training wraps around it, itself where there is nothing to take off or to fold.

    Other floats stay as they are unless `convert`. Raises ModelError for what has no plain form: TorchScript,
    quantised and uninitialised modules, whole detectors, with `convert` also a module without values.
    """
    inner, notes = _unwrapped(module)
    _refuse_detector(inner)
    _require_readable(inner, with_values=convert)
    floats = _other_floats(inner) if convert else []
    computed = list(_computed_weights(inner))
    if floats or computed:
        inner = copied(inner)
    if floats:
        inner = inner.float()
        notes.append(f"its {' and '.join(floats)} weights were converted to float32")
    if computed:
        for name in computed:
            _fold(inner.get_submodule(name))
        layers = ", ".join(map(repr, computed))
        notes.append(f"weights computed from others (norms or masks of weights) were folded at {layers}")
    return Plain(inner, tuple(notes))


def _unwrapped(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """The innermost network, and a note for each wrapper around it."""
    notes = []
    inner = _inner(module)
    while inner is not None:
        notes.append(f"{type(module).__name__} was taken off")
        module = inner
        inner = _inner(module)
    return module, notes


def _inner(module: nn.Module) -> nn.Module | None:
    """What a wrapper holds; None for a network, also one whose class is called as a wrapper is."""
    attribute = _INNER.get(type(module).__name__)
    if attribute is None:
        return None
    inner = getattr(module, attribute, None)
    return inner if isinstance(inner, nn.Module) else None


def _other_floats(module: nn.Module) -> list[str]:
    """Types of its parameters beside float32, such as `bfloat16`."""
    names = {str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}
    return sorted(names - {"float32"})


def _require_readable(module: nn.Module, *, with_values: bool) -> None:
    for path, layer in module.named_modules():
        name = path or "the model"
        if isinstance(layer, torch.jit.ScriptModule):
            raise ModelError(
                f"{name!r} is TorchScript, whose code can't be followed; give the Python module it was made from, with "
                "its weights"
            )
        if isinstance(layer, fx.GraphModule) and "eval" in vars(layer):  # export forbids its modes
            raise ModelError(f"{name!r} was exported by torch.export; give the Python module it was made from")
        _refuse_quantised(name, layer)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if isinstance(tensor, UninitializedTensorMixin):
            raise ModelError(f"{name!r} has no shape yet (a lazy layer); run the model once before it is given")
        if tensor.is_meta and with_values:
            raise ModelError(f"{name!r} lies on the meta device and has no values; load the weights first")
    _require_names(module)


def _require_names(module: nn.Module) -> None:
    """Raises ModelError for a part that no Python code can name as an attribute: `torch.fx` writes such code."""
    parts = (*module.named_modules(), *module.named_parameters(), *module.named_buffers())
    for path, _ in parts:
        words = path.split(".")
        if '"' in path or any(map(keyword.iskeyword, words)):
            raise ModelError(
                f"{path!r} can't be traced under that name: it holds a quotation mark or one of Python's own words; "
                "rename it in the model and in its weights (a key of ModuleDict is a name, too)"
            )


def is_detector(module: nn.Module) -> bool:
    """Whether backbone and heads lie in it with what chooses boxes behind them, as in torchvision's detectors.

    By its parts and by the targets its forward takes beside the images: a module of one's own that holds the same parts
    and answers before boxes are chosen is none.
    """
    parts = {name for name, _ in module.named_children()}
    has_one_stage = parts >= {"backbone", "head", "anchor_generator"} and hasattr(module, "postprocess_detections")
    has_two_stages = parts >= {"backbone", "rpn", "roi_heads"}
    if not has_one_stage and not has_two_stages:
        return False
    return list(inspect.signature(module.forward).parameters)[1:2] == ["targets"]


def _refuse_detector(module: nn.Module) -> None:
    if is_detector(module):
        raise ModelError(
            f"the model is a whole detector ({type(module).__name__}): which boxes it answers with depends on values, "
            "and no graph can hold that; give its network, and keep its decode: "
            "network, decode = compressor.detector_network(model)"
        )


_FAKE_QUANTISED = re.compile(r"\.nn\.qat|intrinsic\.qat")
_QUANTISED = re.compile(r"\.nn\.(intrinsic\.)?quantized")


def _refuse_quantised(name: str, layer: nn.Module) -> None:
    """By the names of classes and of their modules: they move between PyTorch's versions, their names stay."""
    kind, place = type(layer).__name__, type(layer).__module__
    if "FakeQuant" in kind or _FAKE_QUANTISED.search(place):
        raise ModelError(
            f"{name!r} is fake quantisation ({kind}), of a quantisation-aware training; give the float network as it "
            "was before it was prepared: int8 files are made here (--precisions int8)"
        )
    if _QUANTISED.search(place):
        raise ModelError(
            f"{name!r} is quantised already ({kind}); give the float network: int8 files are made here "
            "(--precisions int8)"
        )


def copied(module: nn.Module) -> nn.Module:
    """A copy; weights that a hook left behind with their history can't be copied as they are.

    Raises ModelError, with the attribute's name, for a module that holds what can't be copied (a lock, an open file).
    """
    memo: dict[int, Any] = {}
    for layer in module.modules():
        for value in vars(layer).values():
            # weight norm leaves `weight` computed on the layer; deepcopy takes leaves alone
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ModelError(
            f"the model can't be copied{_uncopied(module)}: {error}; take that off the model before it is given, or "
            "define __deepcopy__ for it"
        ) from error


def _uncopied(module: nn.Module) -> str:
    """` for its attribute 'encoder.lock'`, the first that can't be copied by itself; "" where none is."""
    for path, layer in module.named_modules():
        for name, value in vars(layer).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                return f" for its attribute {f'{path}.{name}'.lstrip('.')!r}"
    return ""


def _computed_weights(module: nn.Module) -> Iterator[str]:
    """Names of layers whose weight a hook or a parametrisation computes at every call."""
    for name, layer in module.named_modules():
        hooks = layer._forward_pre_hooks.values()
        if parametrize.is_parametrized(layer) or any(isinstance(hook, _HOOKS) for hook in hooks):
            yield name


_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)


def _fold(layer: nn.Module) -> None:
    """Puts the weight as it is computed now in the place of what it is computed from."""
    training = layer.training
    layer.eval()  # spectral norm goes on iterating in training
    if parametrize.is_parametrized(layer):
        _fold_parametrisations(layer)
    for hook in list(layer._forward_pre_hooks.values()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old forms are on their way out of PyTorch
            match hook:
                case WeightNorm():
                    remove_weight_norm(layer, hook.name)
                case SpectralNorm():
                    remove_spectral_norm(layer, hook.name)
                case prune.BasePruningMethod():
                    prune.remove(layer, hook._tensor_name)  # type: ignore[no-untyped-call]
    layer.train(training)


def _fold_parametrisations(layer: nn.Module) -> None:
    """By hand: PyTorch's own removal takes the property from the class, which a copy shares with its original."""
    names = list(layer.get_submodule("parametrizations")._modules)
    values = {name: getattr(layer, name).detach().clone() for name in names}
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer._modules["parametrizations"]
    for name, value in values.items():
        layer.register_parameter(name, nn.Parameter(value))
