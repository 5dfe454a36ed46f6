"""A batch or an entry of a data set, as people write them, in; inputs and targets by their place out.

A batch is inputs, (inputs, targets) or all of them in one tuple; inputs are a tensor, a tuple by position or a dict by
name. Knows neither where batches come from nor what becomes of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..device.targets import require_boxes
from ..errors import DataError, with_article
from ..tensors import unwrapped
from .samples import BOXES, LABELS, Sample, Target, Targets, distinct_shapes, has_boxes, unknown_class
from .targets import values_of

Array = Tensor | NDArray[np.generic]

_NUMBERS = "fiub"  # numpy's kinds: floats, whole numbers with a sign and without, booleans
_TARGET_KEYS = ("labels", "label", "targets", "target")  # a target even where forward could take it, for a loss
_MAYBE_TARGET_KEYS = ("mask", "masks", "y")  # a target unless forward has such a parameter


@dataclass(frozen=True, slots=True)
class Signature:
    """What forward takes: how many inputs it needs, and its parameters' names where they are known.

    `preprocessed`: a pre-processing is known, so that images can be given as their pixels.
    """

    wanted: int = 1
    parameters: tuple[str, ...] = ()
    preprocessed: bool = True

    def is_target(self, key: str) -> bool:
        """Whether an entry of that name is the target and no input."""
        if key in _TARGET_KEYS:
            return key not in self.parameters[: self.wanted]
        return key in _MAYBE_TARGET_KEYS and key not in self.parameters


ANY_SIGNATURE = Signature()
"""Of one input, its name not known."""


@dataclass(frozen=True, slots=True)
class Batch:
    """`inputs` are [N, ...] each, named where `names` are; None: no targets. `left_out` names entries for nobody."""

    inputs: tuple[Tensor, ...]
    names: tuple[str, ...]
    targets: Targets | None
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs[0])

    def samples(self) -> list[Sample]:
        """One by one, each in memory of its own: what made the batch may use its memory again."""
        return [self._sample(index) for index in range(len(self))]

    def _sample(self, index: int) -> Sample:
        inputs = tuple(tensor[index].clone() for tensor in self.inputs)
        target: Target = unknown_class() if self.targets is None else self.targets[index]
        if isinstance(target, Tensor):
            target = target.clone()
        return Sample(unwrapped(inputs), target)


def notes_on(left_out: Sequence[str]) -> tuple[str, ...]:
    """What a report says of a batch's `left_out`; nothing without any."""
    if not left_out:
        return ()
    return (f"entries that forward has no parameter for are left out: {', '.join(left_out)}",)


def is_array(value: object) -> TypeGuard[Array]:
    """A tensor, or numpy's."""
    return isinstance(value, (Tensor, np.ndarray))


def read_entry(entry: object, signature: Signature, where: str) -> Batch:
    """An entry of a data set, which has no batch axis, as a batch of one. Raises DataError as `read_batch`."""
    return read_batch(_batch_of_one(entry), signature, where)


def _batch_of_one(entry: object, *, is_inner: bool = False) -> object:
    match entry:
        case Mapping() if is_inner and BOXES in entry:  # a target of many parts, which stays one
            return [entry]
        case Mapping():
            return {key: _batch_of_one(value, is_inner=True) for key, value in entry.items()}
        case tuple() | list():
            return tuple(_batch_of_one(value, is_inner=True) for value in entry)
        case Tensor():
            return entry[None]
        case np.ndarray() | np.generic() | int() | float():
            return np.asarray(entry)[None]
        case _:
            return entry


@dataclass(frozen=True, slots=True)
class _Parts:
    """A batch's entries as they came; `names` of inputs that are given by name."""

    inputs: tuple[object, ...]
    targets: object = None
    names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def read_batch(batch: object, signature: Signature, where: str) -> Batch:
    """Inputs and targets of a batch; `where` names it in errors, as `batch 3 of my loader`.

    Raises DataError for entries that are no tensors, of which there are too many or too few, or of different lengths.
    """
    parts = _parts(batch, signature, where)
    places = parts.names or _places(len(parts.inputs))
    inputs = {}
    for place, column in zip(places, parts.inputs, strict=True):
        inputs[place] = _tensor(column, f"{place} of {where}")
    targets = _targets(parts.targets, where)
    lengths = {place: len(tensor) for place, tensor in inputs.items()}
    if targets is not None:
        lengths["targets"] = len(targets)
    if len(set(lengths.values())) > 1:
        counted = ", ".join(f"{count} of {place}" for place, count in lengths.items())
        raise DataError(f"{where} holds {counted}; give as many of each, with the samples on the first axis")
    return Batch(tuple(inputs.values()), parts.names, targets, parts.left_out)


def _places(count: int) -> tuple[str, ...]:
    """What inputs without names are called in errors."""
    if count == 1:
        return ("the input",)
    return tuple(f"input {index}" for index in range(count))


def _parts(batch: object, signature: Signature, where: str) -> _Parts:
    match batch:
        case Mapping():
            return _parts_by_name(batch, signature, where)
        case tuple() | list():
            return _parts_in_turn(tuple(batch), signature, where)
        case _:
            return _Parts((batch,))


def _parts_in_turn(entries: tuple[object, ...], signature: Signature, where: str) -> _Parts:
    """Of a tuple: (inputs, targets) where inputs are several, else inputs and behind them targets, if there are any."""
    match entries:
        case (Mapping() as inputs, targets):
            return replace(_parts_by_name(inputs, signature, where), targets=targets)
        case (tuple() | list() as inputs, targets):
            if signature.wanted == 1 and _are_as_many(inputs, targets):  # samples one by one, which are stacked
                return _Parts((tuple(inputs),), targets)
            _require_count(len(inputs), signature, where)
            return _Parts(tuple(inputs), targets)
        case (*inputs, targets) if len(inputs) == signature.wanted:
            return _Parts(tuple(inputs), targets)
        case _:
            _require_count(len(entries), signature, where)
            return _Parts(entries)


def _are_as_many(inputs: Sequence[object], targets: object) -> bool:
    return isinstance(targets, (tuple, list)) and len(inputs) == len(targets)


def _require_count(count: int, signature: Signature, where: str) -> None:
    if count != signature.wanted:
        plural = "" if signature.wanted == 1 else "s"
        raise DataError(
            f"{where} holds {count} entries, forward takes {signature.wanted} input{plural}; give (inputs, targets), "
            "with inputs a tensor, a tuple or a dict"
        )


def _parts_by_name(batch: Mapping[Any, object], signature: Signature, where: str) -> _Parts:
    """Of a dict: the target by its usual names, inputs by forward's parameters, whatever else is left out."""
    entries = {str(key): value for key, value in batch.items() if value is not None}
    targets, target_keys = _targets_by_name(entries, signature, where)
    others = _without(entries, target_keys)
    arrays = [key for key in others if is_array(entries[key])]
    names = [name for name in signature.parameters or arrays if name in others]
    if names:
        missing = _without(signature.parameters[: signature.wanted], names)
        if missing:
            raise DataError(f"{where} has no entry {missing[0]!r}, which forward takes; it has {', '.join(entries)}")
        return _Parts(tuple(entries[name] for name in names), targets, tuple(names), _without(others, names))

    if len(arrays) == 1 and signature.wanted == 1:  # there is one input to be, whatever it is called
        return _Parts((entries[arrays[0]],), targets, (), _without(others, arrays))
    raise DataError(
        f"{where} is a dict of {', '.join(entries)}, of which none is forward's parameter "
        f"({', '.join(signature.parameters) or 'unknown'}); name its entries as forward does"
    )


def _without(keys: Iterable[str], taken: Collection[str]) -> tuple[str, ...]:
    return tuple(key for key in keys if key not in taken)


def _targets_by_name(entries: Mapping[str, object], signature: Signature, where: str) -> tuple[object, tuple[str, ...]]:
    """The target, None without one, and the keys that it takes."""
    if has_boxes(entries) and BOXES not in signature.parameters:
        return {BOXES: entries[BOXES], LABELS: entries[LABELS]}, (BOXES, LABELS)
    keys = tuple(key for key in entries if signature.is_target(key))
    if len(keys) > 1:
        raise DataError(f"{where} has several targets ({', '.join(keys)}); keep the one that is meant")
    return next((entries[key] for key in keys), None), keys


def _tensor(column: object, where: str) -> Tensor:
    """One input of a batch: floats as float32, everything else as it is, on the CPU."""
    match column:
        case Tensor():
            tensor = column.detach().cpu()
        case np.ndarray() if column.dtype.kind in _NUMBERS:
            tensor = torch.from_numpy(np.require(column, requirements=["C", "W"]))
        case tuple() | list() if _are_arrays(column):
            tensor = _stacked([_tensor(entry, where) for entry in column], where)
        case np.ndarray():
            raise _no_tensor(f"array of {column.dtype}", where)
        case _:
            raise _no_tensor(type(column).__name__, where)
    if not tensor.ndim:
        raise DataError(f"{where} is a single number, expected samples on its first axis")
    if tensor.is_floating_point():
        return tensor.float()
    return tensor


def _no_tensor(kind: str, where: str) -> DataError:
    return DataError(f"{where} is {with_article(kind)}, expected a tensor or a numpy array of numbers")


def _are_arrays(entries: Sequence[object]) -> TypeGuard[Sequence[Array]]:
    """Whether there are entries, and all are arrays."""
    return bool(entries) and all(is_array(entry) for entry in entries)


def _are_dicts(entries: Sequence[object]) -> TypeGuard[Sequence[Mapping[Any, Any]]]:
    """Whether there are entries, and all are dicts."""
    return bool(entries) and all(isinstance(entry, Mapping) for entry in entries)


def _stacked(tensors: Sequence[Tensor], where: str) -> Tensor:
    """Samples that come one by one, with an axis in front."""
    shapes = distinct_shapes(tensors)
    if len(shapes) > 1:
        raise DataError(f"{where} holds samples of the shapes {shapes[0]} and {shapes[1]}; give one shape")
    return torch.stack(list(tensors))


def _targets(targets: object, where: str) -> Targets | None:
    match targets:
        case None:
            return None
        case Mapping():
            return _of_columns(targets, where)
        case tuple() | list() if _are_dicts(targets):
            return [_boxes(target, where) for target in targets]
        case tuple() | list():
            targets = _as_one(targets, where)
    values = values_of(_numbers_in(targets, where))
    if not values.ndim:
        raise DataError(f"the targets of {where} are a single number, expected one a sample")
    is_column = values.shape[1:] == (1,)
    if is_column and not values.is_floating_point():
        return values[:, 0]  # class indices [N, 1] to [N]
    return values


def _as_one(targets: Sequence[object], where: str) -> object:
    """Arrays or numbers that come one a sample as one array; anything else as it is."""
    if _are_arrays(targets):
        return _stacked([values_of(target) for target in targets], f"the targets of {where}")
    if all(isinstance(target, (int, float)) for target in targets):
        return np.asarray(targets)
    return targets


def _numbers_in(targets: object, where: str) -> Array:
    """The same array. Raises DataError for what is none, or none of numbers."""
    match targets:
        case Tensor():
            return targets
        case np.ndarray() if targets.dtype.kind in _NUMBERS:
            return targets
        case tuple() | list() if targets:
            first = targets[0]
        case _:
            first = targets
    raise DataError(
        f"the targets of {where} are of the type {type(first).__name__}, expected a tensor, numbers, or a dict of "
        "'boxes' and 'labels' a sample"
    )


def _of_columns(targets: Mapping[Any, Any], where: str) -> Targets:
    """{"boxes": [N, k, 4], "labels": [N, k]}, as data of equally many boxes are collated, one by one."""
    if not has_boxes(targets):
        raise DataError(
            f"the targets of {where} are a dict of {', '.join(map(str, targets))}, expected 'boxes' and 'labels', or a "
            "tensor"
        )
    boxes, labels = targets[BOXES], targets[LABELS]
    if len(boxes) != len(labels):
        raise DataError(f"the targets of {where} are boxes of {len(boxes)} samples and labels of {len(labels)}")
    return [_boxes({BOXES: one, LABELS: other}, where) for one, other in zip(boxes, labels, strict=True)]


def _boxes(target: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    try:
        boxes, labels = values_of(target[BOXES]).float().reshape(-1, 4), values_of(target[LABELS]).reshape(-1)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"a target of {where} is a dict of {', '.join(map(str, target))}, expected 'boxes' [k, 4] and 'labels' [k]"
        ) from error
    if len(boxes) != len(labels) or labels.is_floating_point():
        raise DataError(f"a target of {where} has {len(boxes)} boxes and {len(labels)} labels, or labels no indices")
    try:
        require_boxes(boxes.numpy())
    except ValueError as error:
        raise DataError(f"a target of {where} is unusable: {error}; correct it") from error
    return {BOXES: boxes, LABELS: labels}
