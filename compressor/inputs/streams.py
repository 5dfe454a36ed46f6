"""Batches that can only be gone through in, all their samples in memory out, in an order of their own.

The order is that of the samples' hashes, so that a loader that shuffles gives the same samples in the same places.
Knows neither images nor models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..errors import CompressorError, DataError
from .blame import raised
from .entries import Batch, Signature, read_batch, read_entry
from .examples import hashes_of, require_alike
from .samples import Sample

MOST_BYTES = 2 << 30
"""Of samples that are kept in memory."""
_MOST_SAMPLES = 5_000_000  # a stream without an end, of samples so small that memory does not fill
_HASH_DIGITS = 16  # of a name


@dataclass(frozen=True, slots=True)
class Streamed:
    """Samples by name; `input_names` and `left_out` as in a `Batch`."""

    samples: tuple[Sample, ...]
    names: tuple[str, ...]
    input_names: tuple[str, ...]
    left_out: tuple[str, ...]


def streamed(
    source: str, passes: Callable[[], Iterable[object]], signature: Signature, *, by_sample: bool = False
) -> Streamed:
    """All samples of one pass; `by_sample`: it gives them one by one, without the batch's axis.

    Raises DataError for a pass that gives nothing, too much or no batches, and, with its file and line, for code that
    raises.
    """
    samples: list[Sample] = []
    batch: Batch | None = None
    size = 0
    kind, read = ("sample", read_entry) if by_sample else ("batch", read_batch)
    for number, value in enumerate(_guarded(source, passes)):
        where = f"{kind} {number} of {source}"
        batch = _consistent(read(value, signature, where), batch, where)
        for sample in batch.samples():
            samples.append(sample)
            require_alike(sample, samples[0], where)
            size += sample.nbytes
        _require_room(source, size, len(samples))
    if batch is None or not samples:
        raise DataError(f"{source} yields nothing; give a loader, or a function that returns one, with batches in it")
    names, ordered = _by_content(samples)
    return Streamed(ordered, names, batch.names, batch.left_out)


def _guarded(source: str, passes: Callable[[], Iterable[object]]) -> Iterator[object]:
    """What one pass gives; whatever the user's code raises is told with its line."""
    try:
        yield from passes()
    except CompressorError:
        raise
    except Exception as error:
        raise DataError(f"reading {source} raised {raised(error)}; correct it there") from error


def _consistent(batch: Batch, earlier: Batch | None, where: str) -> Batch:
    if earlier is None:
        return batch
    if earlier.names != batch.names:
        raise DataError(
            f"{where} has the inputs {_named(batch)}, those before it {_named(earlier)}; give the same in all"
        )
    if (earlier.targets is None) != (batch.targets is None):
        has, had = ("no targets", "some") if batch.targets is None else ("targets", "none")
        raise DataError(f"{where} has {has}, those before it have {had}; give targets in all batches or in none")
    return batch


def _named(batch: Batch) -> str:
    return ", ".join(batch.names) or "without names"


def _require_room(source: str, size: int, count: int) -> None:
    if size > MOST_BYTES or count > _MOST_SAMPLES:
        raise DataError(
            f"{source} gives more than {MOST_BYTES >> 30} GB or {_MOST_SAMPLES:,} samples, and what can't be read by "
            "index is kept in memory; give fewer, or a Dataset with __len__ and __getitem__"
        )


def _by_content(samples: list[Sample]) -> tuple[tuple[str, ...], tuple[Sample, ...]]:
    """Names made of the inputs' hashes, and the samples in that order; of equal ones each has a number."""
    hashed = sorted(((hashes_of(sample), sample) for sample in samples), key=lambda entry: entry[0])
    counts = Counter[str]()
    names = []
    for (inputs, _), _ in hashed:
        name = inputs[:_HASH_DIGITS]
        counts[name] += 1
        repeat = "" if counts[name] == 1 else f"-{counts[name]}"
        names.append(name + repeat)
    return tuple(names), tuple(sample for _, sample in hashed)
