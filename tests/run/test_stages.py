from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from compressor.device.usage import Usage
from compressor.errors import FolderError
from compressor.files import read_json, read_signed, signed, write_json, write_text
from compressor.run.fingerprints import Known
from compressor.run.stages import SHIPPED, Keeper, Stages, changed_files, open_run, recorded_files

IDENTITY = {"model": "m", "weights": "w", "data": "d"}


class Killed(BaseException):
    """Stands for the signal that no handler sees."""


def _open(folder: Path) -> Stages:
    return open_run(folder, IDENTITY, lambda stage, share: None)


def _stage(stages: Stages, inputs: object, *, name: str = "scores", text: str = "written") -> str:
    path = stages.folder / name
    return stages.do(name, inputs, lambda: write_text(path, text), path.read_text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with _open(tmp_path / "run").begun():
        pass
    return tmp_path / "run"


def test_a_stage_is_read_back_for_the_same_inputs_and_done_again_for_others(folder: Path) -> None:
    assert _stage(_open(folder), [1, "a"], text="first") == "first"
    again = _open(folder)
    assert _stage(again, [1, "a"], text="second") == "first"
    assert again.reused == ["scores"]
    changed = _open(folder)
    assert _stage(changed, [2, "a"], text="third") == "third"
    assert changed.reused == []


def test_a_stage_cut_off_after_its_files_and_before_its_mark_is_done_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stage(_open(folder), [1], text="old")

    def killed(*given: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("compressor.run.stages.write_json", killed)
        with pytest.raises(Killed):
            _stage(_open(folder), [2], text="half")
    for inputs in ([1], [2]):
        assert not _open(folder).holds("scores", inputs)
    assert _stage(_open(folder), [1], text="new") == "new"


def test_a_stage_whose_file_is_gone_is_done_again_and_says_so(folder: Path) -> None:
    _stage(_open(folder), [1])
    (folder / "scores").unlink()
    said: list[str] = []
    stages = open_run(folder, IDENTITY, lambda stage, share: said.append(stage))
    assert _stage(stages, [1], text="again") == "again"
    assert stages.reused == []
    assert any(line.startswith("scores (again: ") for line in said)


def test_seconds_hold_what_was_spent_before_and_outlive_the_process(folder: Path) -> None:
    first = _open(folder)
    first.do("groups", [1], lambda: None, lambda: None, spent=Usage(5.0, 1 << 50))
    second = _open(folder)
    second.do("groups", [1], lambda: None, lambda: None)
    assert 5.0 <= first.seconds["groups"] < 6.0
    assert first.costs["groups"].peak_bytes == 1 << 50
    assert second.costs == first.costs


def _said(folder: Path) -> tuple[Stages, list[str]]:
    said: list[str] = []
    return open_run(folder, IDENTITY, lambda stage, share: said.append(stage)), said


def test_a_marker_of_an_earlier_version_has_no_hashes_and_counts_as_not_done(folder: Path) -> None:
    _stage(_open(folder), [1])
    marker = folder / "stages" / "scores.json"
    content = read_json(marker, "stage/2")
    write_json(marker, {"schema": "stage/1", "key": content["key"], "seconds": 1.0})
    stages, said = _said(folder)
    assert _stage(stages, [1], text="second") == "second"
    assert any("another version" in line for line in said)


def test_a_file_that_was_changed_is_named_and_its_stage_done_again(folder: Path) -> None:
    _stage(_open(folder), [1], text="0.993")
    (folder / "scores").write_text("0.854")
    stages, said = _said(folder)
    assert not stages.holds("scores", [1])
    assert _stage(stages, [1], text="0.993") == "0.993"
    assert stages.reused == []
    assert "scores (again: scores was changed since it was written)" in said


@pytest.mark.parametrize("change", ["seconds", "key", "files", "cut", "nested", "empty"])
def test_a_changed_marker_counts_as_not_done(folder: Path, change: str) -> None:
    _stage(_open(folder), [1])
    marker = folder / "stages" / "scores.json"
    content = json.loads(marker.read_text())
    if change in ("key", "files"):
        write_json(marker, {**content, change: {}})
    elif change == "seconds":
        write_json(marker, {**content, "cost": {**content["cost"], "seconds": 1e9}})
    else:
        marker.write_text({"cut": marker.read_text()[:40], "nested": "[" * 10**5, "empty": ""}[change])
    stages, _ = _said(folder)
    assert not stages.holds("scores", [1])
    assert _stage(stages, [1], text="second") == "second"
    assert stages.seconds["scores"] < 1e6


def test_a_marker_from_elsewhere_takes_away_nothing_outside_its_folder(folder: Path) -> None:
    (folder.parent / "thesis.tex").write_text("mine")
    _stage(_open(folder), [1])
    marker = folder / "stages" / "scores.json"
    content = read_signed(marker, "stage/2")
    write_json(marker, signed({**content, "files": {"../thesis.tex": "0"}}))
    assert _stage(_open(folder), [1], text="second") == "second"
    assert (folder.parent / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyError("top1"), TypeError("no number"), RuntimeError(""), RecursionError("deep")])
def test_whatever_reading_raises_the_stage_is_done_again(folder: Path, error: Exception) -> None:
    _stage(_open(folder), [1])
    stages, said = _said(folder)
    broken = iter([error])

    def read() -> str:
        for raised in broken:
            raise raised
        return (folder / "scores").read_text()

    assert stages.do("scores", [1], lambda: write_text(folder / "scores", "anew"), read) == "anew"
    assert any(line.startswith(f"scores (again: {type(error).__name__}: ") for line in said)


def test_what_follows_is_done_again_only_where_the_result_came_out_otherwise(folder: Path) -> None:
    """A stage's key for those behind it is of its inputs and of what it wrote."""

    def keys(text: str) -> str:
        (folder / "scores").write_text("damaged")
        stages = _open(folder)
        _stage(stages, [1], text=text)
        return stages.keys["scores"]

    _stage(_open(folder), [1], text="a")
    assert keys("a") == keys("a") != keys("b")


def test_scratch_that_is_gone_at_the_end_is_no_result(folder: Path) -> None:
    def write() -> None:
        write_text(folder / "scratch", "")
        write_text(folder / "result", "")
        (folder / "scratch").unlink()

    _open(folder).do("budget", [1], write, lambda: None)
    again = _open(folder)
    again.do("budget", [1], write, lambda: None)
    assert again.reused == ["budget"]


def test_files_that_a_stage_wrote_can_be_looked_up(folder: Path) -> None:
    _stage(_open(folder), [1])
    _stage(_open(folder), [1], name="onnx")
    hashes = recorded_files(folder)
    assert set(hashes) == {"scores", "onnx"}
    (folder / "onnx").write_text("other")
    (folder / "scores").unlink()
    assert changed_files(folder, hashes) == {
        "onnx": "was changed since it was written",
        "scores": "is gone",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process's peak can't be reset")
def test_each_stage_has_its_own_peak_and_not_that_of_an_earlier_one(folder: Path) -> None:
    def fill(size: int) -> None:
        """Pages of their own: what earlier tests freed and the C library keeps would not show."""
        with mmap.mmap(-1, size) as pages:
            np.frombuffer(pages, np.uint8)[:] = 1

    stages = _open(folder)
    for name, size in (("large", 256 << 20), ("small", 1)):
        stages.do(name, [1], lambda size=size: fill(size), lambda: None)
    large, small = (stages.costs[name].peak_bytes for name in ("large", "small"))
    assert large is not None
    assert small is not None
    assert 200 << 20 < large - small < 300 << 20


def test_what_ships_goes_as_soon_as_a_stage_is_done_anew_and_stays_otherwise(folder: Path) -> None:
    _stage(_open(folder), [1])
    for name in SHIPPED:
        path = folder / name
        write_text(path / "manifest.json" if name == "bundle" else path, "of the earlier run")
    _stage(_open(folder), [1])
    assert all((folder / name).exists() for name in SHIPPED)
    _stage(_open(folder), [2])
    assert not any((folder / name).exists() for name in SHIPPED)


def test_opening_a_run_writes_nothing(tmp_path: Path) -> None:
    _open(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


def _other_run(folder: Path) -> None:
    with open_run(folder, {**IDENTITY, "weights": "others"}, lambda stage, share: None).begun():
        pass


def _other_thing(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("\\begin{document}")


def _file(folder: Path) -> None:
    folder.write_text("a file")


def _device(folder: Path) -> None:
    folder.symlink_to(os.devnull)


def test_another_model_and_its_data_are_named_without_hashes(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", {**IDENTITY, "model": "net", "data": 64 * "a"}, lambda stage, share: None).begun():
        pass
    with pytest.raises(FolderError, match=r"the run of model 'net' \(now 'm'\) and other evaluation images;") as caught:
        _open(tmp_path / "run")
    assert 64 * "a" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_other_run, "holds the run of other weights; give another --out, or delete that folder"),
        (_other_thing, "is no run of this program"),
        (_file, "is no run of this program"),
        (_device, "is no run of this program"),
    ],
)
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(
    tmp_path: Path, make: Callable[[Path], None], said: str
) -> None:
    make(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FolderError, match="give another --out") as caught:
        _open(tmp_path / "run")
    assert said in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_device_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="is not a folder you may write to"):
        _open(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "left",
    [
        ".part-run.json",
        ".part-77-0a-scores.json",
        ".model.onnx.x7ab",
        ".bundle.q1",
        "engines/.build-q1",
        "engines/.sm86.fp32.engine.77",
    ],
)
def test_what_a_killed_writer_left_neither_blocks_a_run_nor_stays(tmp_path: Path, left: str) -> None:
    folder = tmp_path / "run"
    if left != ".part-run.json":
        with _open(folder).begun():
            pass
    is_folder = left in (".bundle.q1", "engines/.build-q1")
    write_text(folder / left / "model.onnx" if is_folder else folder / left, "half")
    with _open(folder).begun():
        assert not (folder / left).exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EROFS])
def test_a_full_disk_is_one_line_with_a_remedy_and_keeps_what_was_finished(folder: Path, number: int) -> None:
    _stage(_open(folder), [1])
    stages = _open(folder)

    def full() -> None:
        raise OSError(number, os.strerror(number), str(folder / "onnx"))

    with pytest.raises(FolderError, match="run the same command again") as caught, stages.begun():
        stages.do("onnx", [1], full, lambda: None)
    assert os.strerror(number) in str(caught.value)
    assert _open(folder).holds("scores", [1])
    assert not _open(folder).holds("onnx", [1])


def test_a_short_write_of_numpys_counts_as_a_full_disk(folder: Path) -> None:
    with pytest.raises(FolderError, match="49152 requested and 2968 written"), _open(folder).begun():
        raise OSError("49152 requested and 2968 written")


def _doubled(number: int, images: str, progress: Callable[[float], None]) -> list[int]:
    progress(0.5)
    return [2 * number, len(images)]


LISTED: Keeper[list[int]] = Keeper(
    lambda folder, result: write_json(folder / "numbers.json", {"schema": "numbers/1", "all": result}),
    lambda folder: list(read_json(folder / "numbers.json", "numbers/1")["all"]),
)


def test_a_stage_is_made_of_its_inputs_and_read_back_while_they_are_the_same(folder: Path) -> None:
    first, second = _open(folder), _open(folder)

    assert first.make("double", _doubled, LISTED, number=3, images="ab") == [6, 2]
    assert second.make("double", _doubled, LISTED, number=3, images="ab") == [6, 2]
    assert (first.reused, second.reused) == ([], ["double"])


@pytest.mark.parametrize("change", [{"number": 4}, {"images": "abc"}])
def test_every_input_is_in_a_stages_key(folder: Path, change: dict[str, object]) -> None:
    _open(folder).make("double", _doubled, LISTED, number=3, images="ab")

    again = _open(folder)
    again.make("double", _doubled, LISTED, **{"number": 3, "images": "ab", **change})

    assert again.reused == []


def test_what_is_known_of_an_input_stands_for_it(folder: Path) -> None:
    _open(folder).make("double", _doubled, LISTED, number=3, images=Known("ab", "hash"))

    same, other = _open(folder), _open(folder)
    same.make("double", _doubled, LISTED, number=3, images=Known("xyz", "hash"))
    other.make("double", _doubled, LISTED, number=3, images=Known("ab", "another hash"))

    assert (same.reused, other.reused) == (["double"], [])


def test_other_sources_are_another_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _open(folder).make("double", _doubled, LISTED, number=3, images="ab")

    monkeypatch.setattr("compressor.run.stages.source_hash", lambda: "of tomorrow")
    again = _open(folder)
    again.make("double", _doubled, LISTED, number=3, images="ab")

    assert again.reused == []


def test_a_function_that_sees_more_than_its_arguments_is_no_stage(folder: Path) -> None:
    unseen = 2

    def closure(number: int, progress: Callable[[float], None]) -> list[int]:
        return [unseen * number]

    with pytest.raises(TypeError, match="sees more than its arguments"):
        _open(folder).make("double", closure, LISTED, number=3)


HOLDER = """
import sys
from pathlib import Path
from compressor.run.stages import open_run
with open_run(Path(sys.argv[1]), {"model": "m", "weights": "w", "data": "d"}, lambda stage, share: None).begun():
    print("begun", flush=True)
    sys.stdin.read()
"""


@contextmanager
def _held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes to the folder."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        yield process
        process.kill()


def test_a_second_process_in_the_folder_is_refused_in_one_line_that_names_the_first(folder: Path) -> None:
    stages = _open(folder)
    with _held(folder) as process:
        (folder / ".part-7-x").write_text("the first one's")
        said = rf"is being written by process {process.pid} on .*; wait until that run ends.*another --out"
        with pytest.raises(FolderError, match=said):
            _open(folder)
        with pytest.raises(FolderError, match=said), stages.begun():
            pass
        assert (folder / ".part-7-x").is_file()
    with _open(folder).begun():  # whose process was killed
        assert not (folder / ".part-7-x").exists()
    assert not list(folder.glob(".*"))


def test_a_lock_file_of_a_process_that_is_gone_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("process 1 on elsewhere")
    with _open(tmp_path / "run").begun():
        pass
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["run.json"]


def test_an_error_of_another_kind_keeps_its_own_name(folder: Path) -> None:
    with pytest.raises(ConnectionResetError), _open(folder).begun():
        raise ConnectionResetError(errno.ECONNRESET, "peer")


@pytest.mark.parametrize("damage", [lambda path: path.write_text("{"), Path.unlink], ids=["damaged", "gone"])
def test_a_folder_whose_name_was_lost_goes_on(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    """Its stages say what they stand for: those of the same inputs are taken, and the name is written again."""

    def stage() -> list[str]:
        stages = open_run(tmp_path / "run", {"model": "m"}, lambda name, share: None)
        with stages.begun():
            stages.do("scores", [1], lambda: write_text(tmp_path / "run" / "scores", "x"), lambda: None)
        return stages.reused

    assert stage() == []
    damage(tmp_path / "run" / "run.json")
    assert stage() == ["scores"]
    assert read_json(tmp_path / "run" / "run.json", "run/1")["model"] == "m"
