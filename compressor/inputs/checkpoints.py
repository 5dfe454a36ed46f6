"""A weights file and a module in, the module filled with the file's tensors out, or an error that says what differs.

Reads safetensors and PyTorch state dicts (weights_only, so nothing in the file is executed). Knows no
architecture; the guesses in its messages come from names and shapes alone.
"""

from __future__ import annotations

import argparse
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import ModelError, first_line, with_article
from ..files import content_hash

_NESTS = ("state_dict", "model_state_dict", "model_state", "state_dict_ema", "model_ema", "model", "net", "params")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
_UNNEEDED = "num_batches_tracked"  # counts training steps; evaluation never reads it
_EXTRA_STATE = "_extra_state"  # of modules that keep something beside tensors; no output is made of it
_NAMED = 3  # so many names of each kind in a message


@dataclass(frozen=True, slots=True)
class _Misfit:
    """Names of tensors that a module expects and a file lacks, that it does not expect, that have another shape."""

    missing: list[str]
    unexpected: list[str]
    unequal: list[str]

    @property
    def is_none(self) -> bool:
        return not any((self.missing, self.unexpected, self.unequal))


def fill(module: nn.Module, path: str | Path) -> None:
    """Puts a checkpoint's tensors into the module, all of them or, with a ModelError, none."""
    state = _without_prefix(read_state(path), module)
    expected = module.state_dict()
    state = _with_tied(state, expected)
    misfit = _misfit(expected, state)
    if not misfit.is_none:
        raise ModelError(
            f"checkpoint {str(path)!r} doesn't fit the model: {_differences(expected, state, misfit)}. "
            f"{_guess(expected, state, misfit)}"
        )

    trained = _trained(state, expected, f"checkpoint {str(path)!r}")
    try:
        module.load_state_dict(_of_this_version(trained, expected), strict=False)
    except Exception as error:  # of a module's own way of loading
        reason = first_line(error)
        raise ModelError(f"checkpoint {str(path)!r} has the model's names and shapes, but {reason}") from error


def fitting(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    where: str,
    remedy: str,
    optional: Collection[str] = (),
    spare: Collection[str] = (),
) -> dict[str, Tensor]:
    """The tensors of `state` that are expected; `optional` ones may be missing, `spare` ones be there.

    Raises ModelError, with `where` they are from and the remedy, for what is missing, unexpected, of another shape or
    no trained weight.
    """
    whole = _with_tied(dict(state), expected)
    misfit = _misfit(expected, whole, optional, spare)
    if not misfit.is_none:
        raise ModelError(f"{where} doesn't fit the network: {_differences(expected, whole, misfit)}. {remedy}")
    return _trained(whole, expected, where)


def _trained(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors that are expected. Raises ModelError for one that is no trained weight."""
    tensors = {name: tensor for name, tensor in state.items() if name in expected}
    for name, tensor in tensors.items():
        _require_usable(name, tensor, expected[name], where)
    return tensors


def _of_this_version(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the versions of the model's modules beside them, where PyTorch keeps them.

    A file of tensors alone has none, and a module that changed its layout once (MNASNet) refuses what has no version.
    Names and shapes are this version's: that was just compared.
    """
    versioned = OrderedDict(state)
    versioned._metadata = getattr(expected, "_metadata", {})  # type: ignore[attr-defined]
    return versioned


def _with_tied(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that the model has under several names, under all of them: safetensors' own writer keeps one."""
    in_memory = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in expected.items() if _has_memory(tensor)}
    saved = {place: state[name] for name, place in in_memory.items() if name in state}
    tied = dict(state)
    for name, place in in_memory.items():
        if place in saved:
            tied.setdefault(name, saved[place])
    return tied


def _has_memory(tensor: object) -> bool:
    if not isinstance(tensor, Tensor) or is_lazy(tensor):
        return False
    return not tensor.is_meta and tensor.numel() > 0


def _misfit(
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    optional: Collection[str] = (),
    spare: Collection[str] = (),
) -> _Misfit:
    """Each kind in the order of the model or the file; what evaluation never reads may be there or not."""
    return _Misfit(
        missing=_needed_names(expected, {*state, *optional}),
        unexpected=_needed_names(state, {*expected, *spare}),
        unequal=[name for name in expected if name in state and expected[name].shape != state[name].shape],
    )


def _needed_names(names: Iterable[str], without: Collection[str]) -> list[str]:
    return [name for name in names if name not in without and not name.endswith(_UNNEEDED)]


def _require_usable(name: str, tensor: Tensor, expected: Tensor, where: str) -> None:
    """Values that a trained model has: numbers of the model's kind, all finite but where the model's own are not."""
    _require_plain(name, tensor, where)
    if tensor.is_floating_point():
        _require_sound(name, tensor, expected, where)
    elif expected.is_floating_point():
        raise ModelError(
            f"{where} holds {_dtype(tensor)} where the model has {_dtype(expected)} (first in {name!r}); is it of "
            "a quantised model? Give the float one, int8 files are made from that"
        )


def _require_sound(name: str, tensor: Tensor, expected: Tensor, where: str) -> None:
    if tensor.isnan().any():
        raise ModelError(f"{where} holds NaN (first in {name!r}); it is of a failed training")
    if tensor.isinf().any() and not expected.isinf().any():  # an attention's mask is infinite on purpose
        raise ModelError(f"{where} holds infinity (first in {name!r}); it is of a failed training")
    if name.endswith("running_var") and bool((tensor < 0).any()):
        raise ModelError(f"{where} holds a negative variance (first in {name!r}); it is damaged")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _require_plain(name: str, tensor: Tensor, where: str) -> None:
    """A tensor whose values are there, one by one."""
    if tensor.is_meta:
        raise ModelError(f"{where} has no values for {name!r} (it is on the device 'meta'); fill it with its weights")
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise ModelError(f"{where} holds {name!r} as {layout}; store it dense (tensor.to_dense())")
    if tensor.is_quantized:
        raise ModelError(f"{where} holds {name!r} as {_dtype(tensor)}; give the float model, int8 is made from that")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or a PyTorch checkpoint, out of whatever it nests them in, on the CPU.

    Raises ModelError where the file is missing, damaged, or holds code beside its tensors.
    """
    value = load_checkpoint(path)
    state = _nested(value)
    if state is None:
        raise ModelError(
            f"{str(path)!r} holds {type(value).__name__}, no tensors by name; save it with "
            "torch.save(model.state_dict(), ...)"
        )
    return state


def load_checkpoint(path: str | Path) -> object:
    """What the file holds as it lies there. Raises ModelError as `read_state` does."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ModelError(f"weights {str(path)!r} don't exist; give 'none', 'default' or a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol; the error below says what matters
            return _load(file)
    except Exception as error:
        reason = "neither tensors alone nor complete"
        if not isinstance(error, UnpicklingError):  # whose text advises to load the file unsafely
            reason = first_line(error)
        raise ModelError(
            f"{str(path)!r} is not a checkpoint that can be read safely ({reason}); "
            "save it with safetensors, or torch.save(model.state_dict(), ...)"
        ) from error


def state_in(value: object, entry: str = "") -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    """The tensors by name that a checkpoint holds, or those of its `entry`; and names of entries that hold others.

    An entry is a key, or what names begin with (`ema.`). None where there is no such thing.
    """
    if not isinstance(value, Mapping):
        return None
    nests = [nest for nest in _NESTS if _nested(value.get(nest))]
    if not entry:
        state, others = _nested(value), nests[1:]  # the first of them is what was taken
    elif isinstance(value.get(entry), Mapping):
        state, others = _nested(value[entry]), [nest for nest in nests if nest != entry]
    else:
        state, others = _below(entry.rstrip(".") + ".", _nested(value) or {}), []
    if not state:
        return None
    return state, tuple(others)


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _load(file: Path) -> object:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints hold their options, plain values
        return torch.load(file, map_location="cpu", weights_only=True)


def _nested(value: object) -> dict[str, Tensor] | None:
    """The tensors of the first mapping inside, else the value's own; None where it has none."""
    if not isinstance(value, Mapping):
        return None
    tensors = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
    nested = (_nested(value.get(nest)) for nest in _NESTS)
    return next(filter(None, nested), tensors or None)


def _without_prefix(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Wrappers (DataParallel, compile, trainers) put a prefix before every name; the model's own names win."""
    expected = set(module.state_dict())
    for prefix in _PREFIXES:
        has_prefix = all(name.startswith(prefix) for name in state)
        if has_prefix and expected.isdisjoint(state):
            state = _below(prefix, state)
    return state


def _differences(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], misfit: _Misfit) -> str:
    """`1 missing ('fc.bias'), 1 of other shape (...)`."""
    shapes = []
    for name in misfit.unequal:
        theirs, ours = list(state[name].shape), list(expected[name].shape)
        shapes.append(f"{name!r} {theirs} in the file, {ours} in the model")
    differences = (
        _counted("missing", list(map(repr, misfit.missing))),
        _counted("unexpected", list(map(repr, misfit.unexpected))),
        _counted("of other shape", shapes, "; "),
    )
    return ", ".join(filter(None, differences))


def _counted(kind: str, entries: list[str], separator: str = ", ") -> str:
    """`4 missing ('a', 'b', 'c', ...)`; empty where there are none."""
    if not entries:
        return ""
    dots = ", ..." if len(entries) > _NAMED else ""
    return f"{len(entries)} {kind} ({separator.join(entries[:_NAMED])}{dots})"


def _guess(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], misfit: _Misfit) -> str:
    """What the user probably did."""
    if len(misfit.missing) > len(expected) / 2:
        return "Probably the file is of another architecture; give the model it was trained with"
    if _differs_in_classes(expected, state, misfit):
        theirs, ours = (len(tensors[misfit.unequal[0]]) for tensors in (state, expected))
        return (
            f"Probably the number of classes differs: {theirs} in the file, {ours} in the model; "
            f"build the model for {theirs}, for example with (num_classes={theirs})"
        )
    if misfit.unequal:
        return "Probably the model was built with another width or input; give the arguments it was trained with"
    return "Probably the model was built with other options; give the arguments it was trained with"


def _differs_in_classes(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], misfit: _Misfit) -> bool:
    """Whether a single layer differs, in its outputs alone: it is the classifier."""
    layers = {name.rpartition(".")[0] for name in misfit.unequal}
    if misfit.missing or len(layers) != 1:
        return False
    theirs, ours = state[misfit.unequal[0]].shape, expected[misfit.unequal[0]].shape
    return len(theirs) == len(ours) and theirs[1:] == ours[1:]


def state_hash(module: nn.Module) -> str:
    """sha256 over all parameters and buffers, by name.

    Raises ModelError for a model without values of its own kind: quantised, sparse, not yet filled.
    """
    contents: list[object] = []
    for name, tensor in sorted(_tensors_of(module).items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)  # bfloat16 has no numpy type: hash the bytes
        contents += [name, str(tensor.dtype), list(tensor.shape), flat.view(torch.uint8).numpy()]
    return content_hash(*contents)


def require_values(module: nn.Module) -> None:
    """Raises ModelError unless every parameter and buffer is a tensor of plain values."""
    _tensors_of(module)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers, each looked at."""
    tensors = {name: value for name, value in module.state_dict().items() if not name.endswith(_EXTRA_STATE)}
    for name, tensor in tensors.items():
        _require_values(name, tensor)
    return tensors


def _require_values(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ModelError(
            f"the model holds {with_article(type(tensor).__name__)} at {name!r}, expected tensors alone: is it "
            "quantised (torch.ao.quantization)? Give the float model, int8 files are made from that"
        )
    if is_lazy(tensor):
        raise ModelError(f"the model's {name!r} has no size yet (a lazy layer); run the model on one image first")
    _require_plain(name, tensor, "the model")
