"""Data as people have them: every form of tensors ready for the network, and what is none of them, refused in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from compressor.errors import DataError
from compressor.inputs import streams
from compressor.inputs.data import given_data
from compressor.inputs.entries import ANY_SIGNATURE, Signature
from compressor.inputs.examples import Examples
from compressor.inputs.images import Images, Preprocessing, batches, require_decodable
from compressor.inputs.splits import require_disjoint, split

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DEPTH = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
SIGNAL = torch.randn(6, 2, 30, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(6) % 3
MASKS = torch.arange(6 * 64).reshape(6, 8, 8) % 4
VALUES = torch.linspace(0, 1, 12).reshape(6, 2)
TWO = Signature(2, ("image", "depth"))
HOW = Preprocessing((8, 8), (8,), "bilinear", (0.5,) * 3, (0.5,) * 3)


class Pairs(Dataset[Any]):
    """Entries by index, of any columns."""

    def __init__(self, *columns: Any) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> Any:
        return tuple(column[index] for column in self.columns) if len(self.columns) > 1 else self.columns[0][index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from zip(X, LABELS.tolist(), strict=True)


class Loader:
    """What can be gone through again and has nothing else."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def generator() -> Iterator[Any]:
    for start in (0, 4):
        yield X[start : start + 4], LABELS[start : start + 4]


def examples(data: object, signature: Signature = ANY_SIGNATURE) -> Examples:
    made = given_data(data, signature)
    assert isinstance(made, Examples)
    return made


def rows(data: Examples) -> set[tuple[float, int]]:
    """First value and class of every sample, in no order."""
    inputs = data.inputs(range(len(data)))
    assert isinstance(inputs, Tensor)
    return {(round(float(x.flatten()[0]), 5), int(label)) for x, label in zip(inputs, data.labels, strict=True)}


EXPECTED = {(round(float(x.flatten()[0]), 5), int(label)) for x, label in zip(X, LABELS, strict=True)}

LABELLED: dict[str, Callable[[], Any]] = {
    "arrays": lambda: (X.numpy(), LABELS.numpy()),
    "tensors": lambda: (X, LABELS),
    "a column of labels": lambda: (X, LABELS[:, None]),
    "float64": lambda: (X.double().numpy(), LABELS.numpy().astype(np.uint8)),
    "a list of two": lambda: [X, LABELS],
    "a dict": lambda: {"x": X, "labels": LABELS},
    "a data set": lambda: TensorDataset(X, LABELS),
    "a data set of pairs": lambda: Pairs(X, LABELS.tolist()),
    "a list of pairs": lambda: list(zip(X, LABELS.tolist(), strict=True)),
    "a loader": lambda: DataLoader(TensorDataset(X, LABELS), batch_size=4),
    "a loader that shuffles": lambda: DataLoader(TensorDataset(X, LABELS), batch_size=4, shuffle=True),
    "a loader of dicts": lambda: DataLoader(
        Pairs([{"pixels": x, "label": label} for x, label in zip(X, LABELS.tolist(), strict=True)]), batch_size=4
    ),
    "a loader that collates": lambda: DataLoader(
        Pairs(X, LABELS.tolist()),
        batch_size=2,
        collate_fn=lambda pairs: {"x": torch.stack([x for x, _ in pairs]), "y": [label for _, label in pairs]},
    ),
    "a loader of batches": lambda: DataLoader(Batched(), batch_size=None),
    "a loader of a stream": lambda: DataLoader(Stream(), batch_size=4),
    "a stream": Stream,
    "a function": lambda: generator,
    "a function of a loader": lambda: lambda: DataLoader(TensorDataset(X, LABELS), batch_size=4),
    "a list of batches": lambda: [(X[:4], LABELS[:4]), (X[4:], LABELS[4:])],
    "anything that goes again": lambda: Loader((X[:5], LABELS[:5]), (X[5:], LABELS[5:])),
}


class Batched(Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return (X[:4], LABELS[:4]) if index == 0 else (X[4:], LABELS[4:])


@pytest.mark.parametrize("form", LABELLED)
def test_labelled_tensors_of_every_form_are_taken_as_they_are(form: str) -> None:
    made = examples(LABELLED[form]())
    assert rows(made) == EXPECTED
    assert made.target_kind == "class"
    assert made.class_names == ("0", "1", "2")
    assert made.prepared(HOW) is made
    assert any("taken as the network takes them" in note for note in made.notes)
    ((inputs, targets),) = batches(made, 6)
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert {(round(float(x.flatten()[0]), 5), int(y)) for x, y in zip(inputs, targets, strict=True)} == EXPECTED


@pytest.mark.parametrize("form", ["a loader of a stream", "a function", "a list of batches", "a loader that shuffles"])
def test_parts_do_not_depend_on_the_order_of_the_data(form: str) -> None:
    orders = [LABELLED[form](), Loader((X.flip(0), LABELS.flip(0)))]
    first, second = (split(examples(data), 0, calibration=3, search=0, evaluation=0.34) for data in orders)
    if form != "a loader that shuffles":
        assert first.hashes == second.hashes
    again = split(examples(LABELLED[form]()), 0, calibration=3, search=0, evaluation=0.34)
    assert again.hashes == first.hashes
    require_disjoint(first.calibration, first.evaluation)


def test_the_same_tensors_are_found_in_another_source() -> None:
    with pytest.raises(DataError, match=r"1 of 6 images .* also among the evaluation"):
        require_disjoint(examples((X, LABELS)), examples([(X[2:3], LABELS[:1])]))


@pytest.mark.parametrize(
    ("data", "kind", "shape"),
    [
        ((X, MASKS), "mask", (8, 8)),
        ((X, VALUES), "values", (2,)),
        ((X, VALUES[:, 0]), "values", ()),
        ((X, (VALUES > 0.5)), "values", (2,)),
        ((X, X), "values", (3, 8, 8)),
        (TensorDataset(X, MASKS), "mask", (8, 8)),
        ([(X, MASKS)], "mask", (8, 8)),
    ],
)
def test_targets_of_other_kinds(data: Any, kind: str, shape: tuple[int, ...]) -> None:
    made = examples(data)
    assert made.target_kind == kind
    assert set(made.labels.tolist()) == {-1}
    assert tuple(made.targets([0, 1]).shape) == (2, *shape)  # type: ignore[union-attr]


def _detections(count: int) -> list[Any]:
    return [(X[i], {"boxes": torch.ones(i, 4), "labels": torch.ones(i).long(), "area": i}) for i in range(count)]


@pytest.mark.parametrize(
    "data",
    [
        _detections(4),
        DataLoader(Pairs(_detections(4)), batch_size=2, collate_fn=lambda b: tuple(zip(*b, strict=True))),
        [(X[:4], [target for _, target in _detections(4)])],
    ],
)
def test_boxes_are_a_list_of_dicts(data: Any) -> None:
    made = examples(data)
    assert made.target_kind == "boxes"
    targets = made.targets(range(4))
    assert isinstance(targets, list)
    assert sorted(len(target["boxes"]) for target in targets) == [0, 1, 2, 3]


def test_other_ranks_and_types() -> None:
    assert tuple(examples(SIGNAL).inputs([0, 1]).shape) == (2, 2, 30)  # type: ignore[union-attr]
    tokens = examples((torch.arange(12).reshape(6, 2), LABELS))
    assert tokens.inputs([1]).tolist() == [[2, 3]]  # type: ignore[union-attr]
    assert examples(X).labels.tolist() == [-1] * 6


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ((X, DEPTH, LABELS), ()),
        (((X, DEPTH), LABELS), ()),
        ({"depth": DEPTH, "image": X, "label": LABELS}, ("image", "depth")),
        (({"image": X, "depth": DEPTH}, LABELS), ("image", "depth")),
        (TensorDataset(X, DEPTH, LABELS), ()),
        (DataLoader(TensorDataset(X, DEPTH, LABELS), batch_size=4), ()),
        ([(X, DEPTH, LABELS)], ()),
        ([{"image": X, "depth": DEPTH, "y": LABELS}], ("image", "depth")),
    ],
)
def test_several_inputs_by_position_or_by_name(data: Any, names: tuple[str, ...]) -> None:
    made = examples(data, TWO)
    assert made.input_names == names
    first, second = made.inputs(range(6))
    assert {round(float(x.flatten()[0]), 5) for x in first} == {round(float(x.flatten()[0]), 5) for x in X}
    assert tuple(second.shape) == (6, 1, 8, 8)
    assert sorted(made.labels.tolist()) == sorted(LABELS.tolist())
    unlabelled = examples((X, DEPTH), TWO)
    assert unlabelled.labels.tolist() == [-1] * 6


def test_what_forward_needs_is_no_target_and_what_it_does_not_know_is_left_out() -> None:
    masked = examples({"x": X, "mask": MASKS}, Signature(2, ("x", "mask")))
    assert masked.input_names == ("x", "mask")
    model_of_a_hub = Signature(1, ("pixel_values", "labels", "return_dict"))
    made = examples([{"pixel_values": X, "labels": LABELS, "file": ["a"] * 6}], model_of_a_hub)
    assert made.input_names == ("pixel_values",)
    assert sorted(made.labels.tolist()) == sorted(LABELS.tolist())
    assert "left out: file" in made.notes[-1]


def test_pixels_stay_images_where_a_preprocessing_is_known() -> None:
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for data in (
        (pixels, LABELS),
        (pixels.float() / 255, LABELS),
        TensorDataset(pixels, LABELS),
        DataLoader(TensorDataset(pixels, LABELS), batch_size=4),
        [(pixels, LABELS)],
        [(Image.fromarray(x.permute(1, 2, 0).numpy()), int(y)) for x, y in zip(pixels, LABELS, strict=True)],
        Pairs([{"image": Image.fromarray(x.permute(1, 2, 0).numpy()), "label": 1} for x in pixels]),
    ):
        made = given_data(data)
        assert isinstance(made, Images)
        assert len(made) == 6
        assert set(made.labels.tolist()) <= {0, 1, 2}
        assert made.prepared(HOW).inputs([0]).shape == (1, 3, 8, 8)
    assert isinstance(given_data((pixels.float() / 255, LABELS), Signature(preprocessed=False)), Examples)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (Image.fromarray(MASKS[0].numpy().astype(np.uint8)), "mask"),
        (MASKS[0], "mask"),
        (Image.new("RGB", (16, 16)), "image"),
        (VALUES[0], "values"),
        ({"boxes": torch.ones(2, 4), "labels": torch.ones(2)}, "boxes"),
    ],
)
def test_pictures_with_targets_of_other_kinds_are_images(target: Any, kind: str) -> None:
    made = given_data([(Image.new("RGB", (8, 8), (i, 0, 0)), target) for i in range(3)])
    assert isinstance(made, Images)
    assert made.target_kind == kind
    require_decodable(made.prepared(HOW))
    assert (
        made.content_hash() != given_data([(Image.new("RGB", (8, 8), (i, 0, 0)), 1) for i in range(3)]).content_hash()
    )  # type: ignore[union-attr]


def test_a_sampler_chooses_the_samples() -> None:
    made = examples(DataLoader(TensorDataset(X, LABELS), batch_size=2, sampler=SubsetRandomSampler([4, 1])))
    assert made.names == ("1", "4")
    assert torch.equal(made.inputs([0, 1]), X[[1, 4]])  # type: ignore[arg-type]


def test_a_buffer_that_is_used_again_is_copied() -> None:
    def reused() -> Iterator[Tensor]:
        buffer = torch.empty(1, 3)
        for value in range(4):
            yield buffer.fill_(value)

    inputs = examples(reused).inputs(range(4))
    assert sorted(inputs[:, 0].tolist()) == [0, 1, 2, 3]  # type: ignore[call-overload]


# what is refused


class Raises(Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise KeyError("no such file")


class Random(Dataset[Any]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return torch.randn(3, 8, 8), index


def raises() -> Iterator[Any]:
    yield X, LABELS
    raise OSError("the disk\nis gone")


def late(index: int, value: Any) -> list[Any]:
    """Batches of one, the given in place of one of them."""
    entries: list[Any] = [(X[i : i + 1], LABELS[i : i + 1]) for i in range(6)]
    entries[index] = value
    return entries


NAN = X.clone()
NAN[3, 0, 0, 0] = torch.nan

REFUSED: dict[str, tuple[Any, str]] = {
    "a generator": (generator(), "can be gone through once, .*give a function that returns one"),
    "an iterator": (iter([X]), "can be gone through once"),
    "nothing": (Loader(), "Loader yields nothing"),
    "an empty list": ([], "yields nothing"),
    "an empty function": (lambda: iter(()), "yields nothing"),
    "an empty data set": (TensorDataset(X[:0]), "holds no samples"),
    "empty arrays": ((X[:0], LABELS[:0]), "holds no samples"),
    "numbers": ([1, 2], "given as a list is an int, expected a tensor"),
    "words": (["a"], "is a str, expected a tensor"),
    "a number": (3, "given as an int, expected"),
    "a class": (TensorDataset, "are the class TensorDataset, expected one made of it"),
    "None of a function": (lambda: None, "returned None"),
    "a function with arguments": (lambda n: n, "raised TypeError: .*missing 1 required.*needs no arguments"),
    "fewer labels": ((X, LABELS[:4]), "holds 6 of the input, 4 of targets"),
    "fewer labels in a batch": ([(X, LABELS), (X, LABELS[:4])], "batch 1 of .* holds 6 of the input, 4 of targets"),
    "two shapes": (
        late(2, (X[2:3, :, :4], LABELS[2:3])),
        r"batch 2 of .* is float32 \[3, 4, 8\], the first .*\[3, 8, 8\]",
    ),
    "two shapes of targets": ([(X, VALUES[:, :1]), (X, VALUES)], "has targets of the shapes .* one shape"),
    "two types": (late(2, (X[2:3].long(), LABELS[2:3])), "is int64 .* the first float32"),
    "two kinds": (late(2, (X[2:3], MASKS[2:3])), "target of the kind 'mask', the first 'class'"),
    "NaN": ((NAN, LABELS), "sample '3' of tuple of arrays holds NaN"),
    "NaN of a data set": (TensorDataset(NAN, LABELS), "sample '3' of TensorDataset holds NaN"),
    "text as targets": ((X, np.array(list("abcdef"))), "expected a tensor, numbers, or a dict"),
    "names as targets": ([(X, list("abcdef"))], "are of the type str"),
    "an object": ([object()], "is an object, expected a tensor"),
    "three entries": ([(X, LABELS, LABELS)], "holds 3 entries, forward takes 1 input"),
    "a raising data set": (Raises(), r"entry 0 of Raises raised KeyError: .*no such file.*test_examples\.py:\d+"),
    "a raising function": (raises, r"reading raises raised OSError: the disk, at .*test_examples\.py:\d+"),
    "a raising worker": (
        DataLoader(Stream(), 2, collate_fn=lambda pairs: 1 / 0),
        r"ZeroDivisionError.*test_examples\.py",
    ),
    "random tensors": (Random(), "gives other tensors at every reading"),
    "a single number": (torch.tensor(3.0), "is a single number"),
    "two targets": ({"x": X, "labels": LABELS, "mask": MASKS}, r"several targets \(labels, mask\)"),
    "a dict of other names": ({"a": X, "b": DEPTH}, r"a dict of a, b, of which none is forward's parameter \(x\)"),
}


def _read(made: object) -> None:
    assert isinstance(made, Examples)
    require_decodable(made)
    made.targets(range(len(made)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_together_is_said_in_one_line(name: str) -> None:
    data, words = REFUSED[name]
    signature = Signature(1, ("x",)) if name == "a dict of other names" else Signature()
    with pytest.raises(DataError, match=words) as caught:
        _read(given_data(data, signature))
    assert "\n" not in str(caught.value)


def test_inputs_that_forward_takes_and_the_data_lack_are_named() -> None:
    with pytest.raises(DataError, match="has no entry 'depth', which forward takes; it has image, label"):
        given_data({"image": X, "label": LABELS}, TWO)
    with pytest.raises(DataError, match="holds 4 entries, forward takes 2 inputs"):
        given_data((X, DEPTH, LABELS, LABELS), TWO)


def test_a_stream_that_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_BYTES", 2000)

    def endless() -> Iterator[Any]:
        while True:
            yield X[:1]

    with pytest.raises(DataError, match=r"endless gives more than .*give fewer, or a Dataset"):
        given_data(endless)
