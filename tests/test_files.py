from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from compressor import files
from compressor.errors import FolderError, GateError
from compressor.records import Accuracy, Cost, Group, Groups, LeftAlone, Plan, Scores, Site, Slices


@contextmanager
def full_disk(free_bytes: int) -> Iterator[None]:
    """The kernel refuses files longer than that: the same system call fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _site(node: str, units: list[int]) -> Site:
    return Site(node, f"layer.{node}", (1,), np.array(units))


RECORDS = [
    Groups(
        (
            Group("a", "channel", 3, (_site("conv", [0, 1, 2]), _site("relu", [2, -1, 0, 1])), np.zeros(3, np.int64)),
            Group("b", "head_dim", 2, (), np.array([0, 1]), balanced=True, parent="a", inexact=("layer_norm",)),
        ),
        (LeftAlone("head", "linear", "the model's output"),),
    ),
    Scores("lrp", {"a": np.array([[0.1, np.nan, 1e-300]]), "b": np.zeros((0, 2))}, 32, unscored=("c",)),
    Plan({"a": np.array([0, 2]), "b.c": np.array([], np.int64)}, 1 << 40, 7, budget="macs<=0.5"),
    Slices({"conv.weight": (np.array([0, 2]), np.arange(3)), "scale": ()}),
    Cost(10, 20, 30, {"conv2d": 10}, ("aten.foo",)),
    Accuracy(97, 100, 99),
    Accuracy(1, 2),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_a_record_comes_back_as_it_went(tmp_path: Path, record: object) -> None:
    files.write_record(tmp_path / "record.json", record)
    back = files.read_record(tmp_path / "record.json", type(record))
    assert type(back) is type(record)
    assert files.content_hash(back) == files.content_hash(record)
    assert repr(back) == repr(record)


def test_arrays_keep_type_and_shape(tmp_path: Path) -> None:
    files.write_record(tmp_path / "s.json", RECORDS[1])
    back = files.read_record(tmp_path / "s.json", Scores)
    assert back.values["a"].dtype == np.float64
    assert back.values["b"].shape == (0, 2)


def test_a_rewritten_record_leaves_only_its_own_arrays(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    for kept in ([0], [1]):
        files.write_record(target, Plan({"a": np.array(kept)}, 2, 1))
    assert files.read_record(target, Plan).kept["a"].tolist() == [1]
    assert len(list(tmp_path.iterdir())) == 2


def test_arrays_of_another_record_are_refused(tmp_path: Path) -> None:
    for name, kept in (("a", 0), ("b", 1)):
        files.write_record(tmp_path / f"{name}.json", Plan({"g": np.array([kept])}, 2, 1))
    mine, other = next(tmp_path.glob("a-*.safetensors")), next(tmp_path.glob("b-*.safetensors"))
    mine.write_bytes(other.read_bytes())
    with pytest.raises(FolderError, match="not those it was written with"):
        files.read_record(tmp_path / "a.json", Plan)


def test_a_record_of_another_kind_is_refused(tmp_path: Path) -> None:
    files.write_record(tmp_path / "x.json", Accuracy(1, 2))
    with pytest.raises(FolderError, match="schema 'accuracy/1', expected 'plan/1'"):
        files.read_record(tmp_path / "x.json", Plan)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "has schema None"),
        (None, "doesn't exist"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
        (json.dumps({"schema": "s" * 5000}), "has schema 's"),
    ],
    ids=["cut", "list", "gone", "nested", "long number", "long schema"],
)
def test_a_broken_json_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(FolderError, match=message):
        files.read_json(tmp_path / "x.json", "x/1")


def test_json_without_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no 'schema'"):
        files.write_json(tmp_path / "x.json", {"a": 1})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    files.write_arrays(target, {"w": np.ones(4)})
    before = target.read_bytes()
    with full_disk(4096), pytest.raises(FolderError, match=r"can't be written .*Free space"):
        files.write_arrays(target, {"w": np.zeros(100_000)})
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_full_disk_half_way_through_a_record_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    files.write_record(target, Plan({"a": np.array([5])}, 2, 1))
    with full_disk(4096), pytest.raises(FolderError):
        files.write_record(target, Plan({"a": np.arange(100_000)}, 2, 1))
    assert files.read_record(target, Plan).kept["a"].tolist() == [5]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(FolderError, match=r"runs/x\.json' can't be written"):
        files.write_json(tmp_path / "runs" / "x.json", {"schema": "x/1"})


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")
    program = (
        "import os, sys\nfrom compressor.files import replacing\n"
        "with replacing(sys.argv[1]) as path:\n    path.write_text('new, half')\n    os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert ended.returncode == -9
    assert target.read_text() == "old"
    files.write_text(target, "new")
    assert target.read_text() == "new"
    assert len([p for p in tmp_path.iterdir() if p.name.startswith(".part-")]) == 1  # `Stages.begun` takes it away


def test_two_writers_of_one_file_never_share_a_temporary_one(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "x.json") as first, files.replacing(tmp_path / "x.json") as second:
        assert first != second
        assert first.suffix == second.suffix == ".json"
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "x.json").read_text() == "first"  # whoever ends last
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_written_is_recorded_and_what_an_inner_block_writes_is_its_own(tmp_path: Path) -> None:
    with files.recorded() as outer:
        files.write_record(tmp_path / "plan.json", Plan({"a": np.array([1])}, 2, 1))
        with files.recorded() as inner:
            files.write_text(tmp_path / "scratch", "")
        files.note(tmp_path / "engine")
    files.write_text(tmp_path / "later", "")
    arrays = next(tmp_path.glob("plan-*.safetensors"))
    assert outer == {tmp_path / "plan.json", arrays, tmp_path / "engine"}
    assert inner == {tmp_path / "scratch"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf"), np.array([1.0, np.nan])])
def test_a_number_that_json_does_not_know_is_named_with_its_place(tmp_path: Path, value: object) -> None:
    with pytest.raises(GateError, match=r"would hold .* at 'ms/1/b.*', which is no finite number"):
        files.write_json(tmp_path / "x.json", {"schema": "x/1", "ms": [1.0, {"b": value}]})
    assert not list(tmp_path.iterdir())


def test_a_changed_digit_of_signed_json_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, files.signed({"schema": "x/1", "top1": 0.993, "of": [1, None, {"a": True}]}))
    assert files.read_signed(path, "x/1")["top1"] == 0.993
    path.write_text(path.read_text().replace("0.993", "0.854"))
    with pytest.raises(FolderError, match="was changed since it was written"):
        files.read_signed(path, "x/1")


def test_a_record_names_records_alone(tmp_path: Path) -> None:
    """`records` has other names too, such as what it imports."""
    for name in ("np", "dataclass", "Mapping", "Nothing", 7):
        body = {"schema": "plan/1", "value": {"record": name, "fields": {}}}
        (tmp_path / "x.json").write_text(json.dumps(body))
        with pytest.raises(FolderError, match="holds no Plan"):
            files.read_record(tmp_path / "x.json", Plan)


def test_who_is_reading_reads_the_old_file_to_its_end(tmp_path: Path) -> None:
    files.write_text(tmp_path / "x", "old")
    with (tmp_path / "x").open() as reader:
        files.write_text(tmp_path / "x", "new")
        assert reader.read() == "old"
    assert (tmp_path / "x").read_text() == "new"


def test_a_failure_that_is_not_the_disks_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "x"):
        (tmp_path / "no such input").read_bytes()
    assert not list(tmp_path.iterdir())


def test_written_files_have_the_usual_rights(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        files.write_text(tmp_path / "x", "y")
    finally:
        os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_every_part_of_a_hash_counts() -> None:
    parts: list[tuple[object, ...]] = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (("ab", "c"),),
        (1,),
        (1.0,),
        (True,),
        ("1",),
        (b"1",),
        (b"x", b"y"),
        (b"xbytes;y",),
        (b"xbytes 1;y",),
        (None,),
        (np.array([1, 2]),),
        (np.array([[1, 2]]),),
        (np.array([1, 2], np.int32),),
        ({"a": 1},),
        ({"a": 2},),
        (Accuracy(1, 2),),
        (Accuracy(1, 3),),
    ]
    assert len({files.content_hash(*p) for p in parts}) == len(parts)


def test_a_hash_ignores_the_order_of_keys_and_memory() -> None:
    array = np.arange(6).reshape(2, 3)
    assert files.content_hash({"a": 1, "b": 2}) == files.content_hash({"b": 2, "a": 1})
    assert files.content_hash(array) == files.content_hash(np.asfortranarray(array))
    assert files.content_hash(np.float64(0.5)) == files.content_hash(0.5)


def test_what_has_no_content_is_refused() -> None:
    with pytest.raises(TypeError, match="object has no content"):
        files.content_hash(object())


def test_a_hash_is_the_same_in_every_process() -> None:
    program = "from compressor.files import content_hash; print(content_hash({'a': (1, 'x')}, 2.5))"
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()
    assert said == files.content_hash({"a": (1, "x")}, 2.5)


def test_file_sha256_is_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    # the worked example of FIPS 180-2, appendix B.1
    assert files.file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
