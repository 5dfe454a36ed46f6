"""What a network is given and what it answers: one tensor or several, each with a batch's samples on its first axis.

Whatever takes images takes several inputs too by going through these functions; a tensor alone stays one. Knows no
network and no device but the one it is told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor

from .records import InputSpec

Inputs: TypeAlias = "Tensor | tuple[Tensor, ...]"
Outputs: TypeAlias = "Tensor | tuple[Tensor, ...]"

INPUT, OUTPUT = "input", "output"  # what the only one is called


def as_tuple(tensors: Inputs) -> tuple[Tensor, ...]:
    """The tensors one by one, in their order."""
    return (tensors,) if isinstance(tensors, Tensor) else tensors


def mapped(function: Callable[[Tensor], Tensor], tensors: Inputs) -> Inputs:
    """The function's result for each."""
    if isinstance(tensors, Tensor):
        return function(tensors)
    return tuple(map(function, tensors))


def unwrapped(tensors: tuple[Tensor, ...]) -> Inputs:
    """The tensor alone where there is but one."""
    return tensors[0] if len(tensors) == 1 else tensors


def from_arrays(arrays: NDArray[Any] | tuple[NDArray[Any], ...]) -> tuple[Tensor, ...]:
    """A tensor for each array, on the CPU and on the array's own memory."""
    if not isinstance(arrays, tuple):
        arrays = (arrays,)
    return tuple(map(torch.from_numpy, arrays))


def count(tensors: Inputs) -> int:
    """How many samples there are."""
    return len(as_tuple(tensors)[0])


def cut(tensors: Inputs, start: int, stop: int) -> Inputs:
    """The samples from `start` to before `stop`."""
    return mapped(lambda tensor: tensor[start:stop], tensors)


def parted(tensors: Inputs, size: int) -> list[Inputs]:
    """At most `size` samples at a time: 5 in threes are 3 and 2."""
    return [cut(tensors, start, start + size) for start in range(0, count(tensors), size)]


def joined(batches: Sequence[Inputs]) -> Inputs:
    """The samples of all batches, one behind the other. Raises ValueError without any batch."""
    if not batches:
        raise ValueError("there is no batch to join")
    columns = zip(*map(as_tuple, batches), strict=True)  # [batches, inputs] to [inputs, batches]
    together = tuple(map(torch.cat, columns))
    return together[0] if isinstance(batches[0], Tensor) else together


def moved(tensors: Inputs, device: torch.device) -> Inputs:
    """The tensors on that device."""
    return mapped(lambda tensor: tensor.to(device), tensors)


def specs_of(tensors: Inputs) -> tuple[InputSpec, ...]:
    """What one sample of each is; the first one's whole numbers and truth values are kept, but for pixels."""
    return tuple(map(_spec_of, as_tuple(tensors)))


_MOST_VALUES = 1 << 16  # kept of a sample; longer ones are no indices of tokens and no masks of them


def _spec_of(tensor: Tensor) -> InputSpec:
    first = tensor[0]
    has_meaning = not first.is_floating_point() and first.dtype != torch.uint8
    values = tuple(map(int, first.flatten().tolist())) if has_meaning and first.numel() <= _MOST_VALUES else ()
    return InputSpec(tuple(first.shape), _type_name(first.dtype), values)


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def noise_like(specs: Sequence[InputSpec], count: int = 2, seed: int = 0) -> Inputs:
    """Samples made of nothing, the same in every process: noise, pixels of 0 to 255, and the specs' own values.

    Where a whole number may be an index and no values are known, it is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = tuple(_noise(spec, count, generator) for spec in specs)
    return unwrapped(tensors)


def _noise(spec: InputSpec, count: int, generator: torch.Generator) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    shape = (count, *spec.shape)
    if spec.values:
        return torch.tensor(spec.values).to(dtype).reshape(spec.shape).expand(shape).clone()
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator).to(dtype)
    if dtype == torch.uint8:
        return torch.randint(256, shape, generator=generator, dtype=dtype)
    return torch.zeros(shape, dtype=dtype)


def named_leaves(answer: object) -> dict[str, Tensor]:
    """The tensors of a network's answer by name, in their order, whatever holds them; what is no tensor has none.

    One alone is `output`. Entries of a mapping, a dataclass or a named tuple have their key's name, those of a list or
    a tuple their number: `{"out": x, "boxes": [y, z]}` is out, boxes.0, boxes.1, and `(x, y)` output.0, output.1.
    """
    leaves = dict(_leaves(answer, ""))
    if list(leaves) == [""]:
        return {OUTPUT: leaves[""]}
    return leaves


def _leaves(answer: object, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(answer, Tensor):
        yield path, answer
        return
    for key, entry in _entries(answer):
        yield from _leaves(entry, _joined_path(path, key))


def _joined_path(path: str, key: object) -> str:
    if path:
        return f"{path}.{key}"
    return f"{OUTPUT}.{key}" if isinstance(key, int) else str(key)


def _entries(answer: Any) -> Iterator[tuple[object, object]]:
    """What a container holds, by key; nothing of anything else."""
    match answer:
        case Mapping():
            yield from answer.items()
        case _ if dataclasses.is_dataclass(type(answer)):
            for field in dataclasses.fields(answer):
                yield field.name, getattr(answer, field.name)
        case tuple() if hasattr(answer, "_fields"):
            yield from zip(answer._fields, answer, strict=True)
        case tuple() | list():
            yield from enumerate(answer)
