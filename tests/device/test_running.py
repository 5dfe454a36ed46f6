"""`compressor run`: labelled folders and their figure, formats and files, cameras and videos."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from PIL import Image

from compressor.device import cameras, running
from compressor.device.__main__ import main
from compressor.device.bundle import Decode, Manifest, ModelFile, declared, read_bundle, write_bundle
from compressor.device.images import Preprocessing
from compressor.device.metrics import Metric
from compressor.device.stated import stated_figure
from compressor.records import Quality

from .conftest import PREPROCESSING, SIZE, Command
from .tampering import put
from .test_attacks import assert_refused

ON_ORT = ("--runtime", "onnxruntime")
COUNT = 12
GREY = Preprocessing((8, 8), (8,), "nearest", (0.0,), (1.0,))


def channel_model(task: str) -> onnx.ModelProto:
    """Grey images in. Of each pixel whether it is dark or bright; or of cells of 4 pixels boxes around bright ones."""
    value = helper.make_tensor_value_info
    if task == "segmentation":
        nodes = [
            helper.make_node("Sub", ["half", "input"], ["dark"]),
            helper.make_node("Sub", ["input", "half"], ["bright"]),
            helper.make_node("Concat", ["dark", "bright"], ["output"], axis=1),
        ]
        outputs = [value("output", 1, ["batch", 2, 8, 8])]
    else:
        nodes = [
            helper.make_node("AveragePool", ["input"], ["mean"], kernel_shape=[4, 4], strides=[4, 4]),
            helper.make_node("Sub", ["mean", "half"], ["off"]),
            helper.make_node("Mul", ["off", "steep"], ["scores"]),
            helper.make_node("Mul", ["off", "nothing"], ["zero"]),
            helper.make_node("Add", ["zero", "steep"], ["centerness"]),
            helper.make_node("Concat", ["zero"] * 4, ["zeros"], axis=1),
            helper.make_node("Add", ["zeros", "two"], ["boxes"]),
        ]
        shapes = {"scores": 1, "boxes": 4, "centerness": 1}
        outputs = [value(name, 1, ["batch", channels, 2, 2]) for name, channels in shapes.items()]
    numbers = {"half": 0.5, "steep": 20.0, "nothing": 0.0, "two": 2.0}
    constants = [onnx.numpy_helper.from_array(np.float32(number), name) for name, number in numbers.items()]
    graph = helper.make_graph(nodes, task, [value("input", 1, ["batch", 1, 8, 8])], outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def channel_bundle(folder: Path, task: str) -> Path:
    images = np.zeros((1, 1, 8, 8), np.float32)
    path = folder / f"{task}.onnx"
    path.write_bytes(channel_model(task).SerializeToString())
    if task == "segmentation":
        names, outputs = ("output",), (np.stack([0.5 - images[:, 0], images[:, 0] - 0.5], 1),)
    else:
        names = ("scores", "boxes", "centerness")
        maps = [np.full((1, channels, 2, 2), number) for channels, number in ((1, -10), (4, 2), (1, 20))]
        outputs = tuple(array.astype(np.float32) for array in maps)
    decode = Decode("dense", {"strides": [4], "threshold": 0.5, "iou": 0.5, "most": 10}) if len(names) > 1 else None
    manifest = Manifest(
        task,
        (ModelFile("m.onnx"),),
        GREY,
        labels=("digit",) if decode else ("dark", "bright"),
        outputs=declared(names, outputs),
        task=task,
        decode=decode,
    )
    golden = outputs if len(outputs) > 1 else outputs[0]
    target = folder / f"{task}.bundle"
    return write_bundle(target, {"m.onnx": path}, manifest=manifest, golden_inputs=images, golden_outputs=golden)


@pytest.fixture
def pictures(tmp_path: Path) -> Iterator[Path]:
    """Images of the model's size, all alike but for noise, and the class the bundle's model gives most of them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for index in range(COUNT):
        Image.fromarray(draw.integers(0, 256, (SIZE + 4, SIZE + 4, 3), np.uint8)).save(folder / f"{index:02}.png")
    return folder


def rows_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["run", *words, *ON_ORT, "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    content: dict[str, Any] = json.loads(said.out)
    return content


def answers(bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """The first class of each file, by its name."""
    results = rows_of(capsys, str(bundle), str(folder), "--top", "1")["results"]
    return {Path(name).name: entries[0][0]["index"] for name, entries in results.items()}


def test_a_table_of_labels_is_judged_and_compared_with_what_the_manifest_states(
    bundle: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = answers(bundle, pictures, capsys)
    wrong = {name: (index + (place < 3)) % 5 for place, (name, index) in enumerate(given.items())}
    rows = [f"{name},{label}" for name, label in wrong.items()]
    (pictures / "labels.csv").write_text("\n".join(["filename,label", *rows]))
    figures = {"metric": "top-1", "value": 0.875, "low": 0.839, "high": 0.9039, "n": 400, "is_share": True}
    put(bundle, "metrics", [{"of": "models/small.onnx", "runtime": "onnxruntime", **figures}])

    said = rows_of(capsys, str(bundle), str(pictures))
    assert (said["quality"]["correct"], said["quality"]["n"], said["samples"]) == (COUNT - 3, COUNT, COUNT)
    assert said["stated"]["value"] == 0.875
    assert main(["run", str(bundle), str(pictures), *ON_ORT]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("top-1 75.00 % (")
    assert last.endswith("of 12; the manifest states top-1 87.50 % (83.90 to 90.39 %) of 400")


def test_class_folders_are_judged_by_the_manifests_names(
    bundle: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, index in answers(bundle, pictures, capsys).items():
        folder = tmp_path / "sorted" / read_bundle(bundle).labels[index]
        folder.mkdir(parents=True, exist_ok=True)
        (pictures / name).rename(folder / name)
    assert rows_of(capsys, str(bundle), str(tmp_path / "sorted"))["quality"]["value"] == 1

    folder.rename(folder.with_name("gnu"))
    assert main(["run", str(bundle), str(tmp_path / "sorted")]) == 2
    assert "class 'gnu' in" in capsys.readouterr().err


def test_samples_without_a_label_are_answered_and_counted(
    bundle: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "labels.csv").write_text("filename,label\n00.png,0\n01.png,-1\n")
    assert main(["run", str(bundle), str(pictures), *ON_ORT]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert "of 1; the manifest states no figure; 1 samples have no label" in last


def test_masks_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, street = channel_bundle(tmp_path, "segmentation"), tmp_path / "street"
    for name in ("images", "masks"):
        (street / name).mkdir(parents=True)
    draw = np.random.default_rng(0)
    for index in range(4):
        bright = draw.integers(0, 2, (8, 8)).astype(np.uint8)
        Image.fromarray(200 * bright).save(street / "images" / f"{index}.png")
        mask = bright.copy()
        mask[0, 0] = 255  # ignored
        mask[0, 1] = 1 - mask[0, 1]  # wrong
        Image.fromarray(mask).save(street / "masks" / f"{index}.png")
    said = rows_of(capsys, str(bundle), str(street))
    assert said["quality"]["metric"] == "mIoU"
    assert 0.93 < said["quality"]["value"] < 0.98  # 1 of 63 pixels: about 62 / 64
    shares = next(iter(said["results"].values()))[0]
    assert {entry["label"] for entry in shares} == {"dark", "bright"}
    assert sum(entry["share"] for entry in shares) == pytest.approx(1)

    Image.fromarray(np.zeros((9, 8), np.uint8)).save(street / "masks" / "0.png")
    assert main(["run", str(bundle), str(street)]) == 2
    assert "has no usable target: its mask has 8 x 9 pixels, the image 8 x 8" in capsys.readouterr().err


def test_cocos_boxes_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, traffic = channel_bundle(tmp_path, "detection"), tmp_path / "traffic"
    traffic.mkdir()
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4, 4:] = 250
    Image.fromarray(pixels).save(traffic / "a.png")
    Image.fromarray(pixels).resize((16, 16), Image.Resampling.NEAREST).save(traffic / "b.png")
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 7, "name": "digit"}],
        "annotations": [
            {"image_id": 1, "category_id": 7, "bbox": [4, 0, 4, 4]},
            {"image_id": 2, "category_id": 7, "bbox": [8, 0, 8, 8]},  # of an image that is twice as large
        ],
    }
    (traffic / "annotations.json").write_text(json.dumps(content))
    for given in (traffic, traffic / "annotations.json"):
        said = rows_of(capsys, str(bundle), str(given))
        assert (said["quality"]["metric"], said["quality"]["value"]) == ("mAP", 1.0)

    assert main(["run", str(bundle), str(traffic), *ON_ORT, "--format", "csv"]) == 0
    first = next(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert (first["label"], [float(first[side]) for side in ("x0", "y0", "x1", "y1")]) == ("digit", [4, 0, 8, 4])


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_labels_of_another_kind_are_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    for name in ("images", "masks"):
        (tmp_path / "s" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "s" / name / "0.png")
    if task == "segmentation":
        (tmp_path / "s" / "labels.csv").write_text("filename,label\nimages/0.png,0\n")
        bundle = channel_bundle(tmp_path, task)
    assert main(["run", str(bundle), str(tmp_path / "s")]) == 2
    expected = {"segmentation": "class for each image; a segmentation is held to a mask", "classification": "mask for"}
    assert expected[task] in capsys.readouterr().err


def test_an_unlabelled_folder_has_no_figure(bundle: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "quality" not in rows_of(capsys, str(bundle), str(pictures))


# --- formats and files --------------------------------------------------------------------------------------------


def test_json_lines_and_csv_have_a_row_as_soon_as_a_sample_is_answered(
    bundle: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    for path in (lines, table):
        assert main(["run", str(bundle), str(pictures), *ON_ORT, "--top", "2", "--output", str(path)]) == 0
        assert capsys.readouterr().out == ""
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [Path(row["file"]).name for row in rows] == [f"{index:02}.png" for index in range(COUNT)]
    assert all(row["ms"] > 0 and len(row["results"][0]) == 2 for row in rows)
    with table.open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 2 * COUNT
    assert [cells[1]["rank"], cells[1]["label"]] == ["2", rows[0]["results"][0][1]["label"]]


def test_other_answers_are_a_line_an_output(
    pair_bundle: Path, pair_inputs: tuple[NDArray[Any], ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "in.npz", **dict(zip(("image", "tokens", "mask"), pair_inputs, strict=True)))
    assert main(["run", str(pair_bundle), str(tmp_path / "in.npz"), *ON_ORT, "--format", "csv"]) == 0
    cells = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["output"] for row in cells] == ["scores", "best", "maps.0"]


def test_a_file_is_whole_or_not_there(
    bundle: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "05.png").write_bytes(b"no image")
    target = tmp_path / "rows.csv"
    target.write_text("earlier")
    assert main(["run", str(bundle), str(pictures), *ON_ORT, "--output", str(target)]) == 2
    assert "05.png can't be read as an image" in capsys.readouterr().err
    assert target.read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_nothing_else_is_replaced_by_answers(bundle: Path, pictures: Path, command: Command, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "link.csv").symlink_to(tmp_path / "rows.csv")
    image = pictures / "05.png"
    before = {path: path.read_bytes() for path in (image, *bundle.glob("*.*"))}
    for flag, place, said in (
        ("--output", bundle / "rows.csv", "would change"),
        ("--out", bundle / "golden", "would change"),
        ("--output", image, "would change"),
        ("--output", tmp_path / "pipe.csv", "a link or a device"),
        ("--output", tmp_path / "link.csv", "a link or a device"),
    ):
        assert_refused(command("run", bundle, image, *ON_ORT, flag, place, "--format", "csv"), said)
    assert_refused(command("benchmark", bundle, "--samples", bundle / "golden.npz"), "would change")
    assert {path: path.read_bytes() for path in (image, *bundle.glob("*.*"))} == before


def test_a_name_that_is_no_text_is_told_all_the_same(bundle: Path, pictures: Path, command: Command) -> None:
    odd = os.fsdecode(os.fsencode(pictures) + b"/\xff.png")
    os.rename(pictures / "05.png", odd)
    rows = pictures.parent / "rows.csv"
    assert command("run", bundle, odd, *ON_ORT, "--output", rows).code == 0
    assert "\\udcff.png" in rows.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--json", "--format", "csv"), "--json and --format csv ask for two formats"),
        (("--format", "xml"), "invalid choice: 'xml'"),
        (("--output", "gone/rows.csv"), "--output gone/rows.csv: there is no folder gone"),
        (("--output", "rows.xlsx"), "no format is called .xlsx; give --format"),
        (("--serve",), "--serve takes images from its page"),
        (("--port", "70000"), "'70000' is no port"),
        (("--model", "int4"), "the bundle has no model 'int4'"),
    ],
)
def test_wrong_flags_are_one_line(
    bundle: Path, pictures: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert main(["run", str(bundle), str(pictures), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_ctrl_c_leaves_what_was_answered(
    bundle: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = running.samples_of

    def three(*arguments: Any, **options: Any) -> Iterator[Any]:
        for index, sample in enumerate(whole(*arguments, **options)):
            if index == 3:
                raise KeyboardInterrupt
            yield sample

    monkeypatch.setattr(running, "samples_of", three)
    target = tmp_path / "rows.jsonl"
    assert main(["run", str(bundle), str(pictures), *ON_ORT, "--output", str(target)]) == 0
    assert len(target.read_text().splitlines()) == 3
    assert "interrupted after 3 samples" in capsys.readouterr().err


def test_only_the_figure_of_the_file_that_runs_is_stated(bundle: Path) -> None:
    figures = [Metric(of, "mIoU", 0.9, 0.88, 0.92, 400) for of in ("dense", "models/small.onnx")]
    manifest = replace(read_bundle(bundle), metrics=tuple(figures))
    assert stated_figure(manifest, Path("x/models/small.onnx")) == Quality("mIoU", 0.9, 400, 0.88, 0.92)
    assert stated_figure(replace(manifest, metrics=(figures[0],)), "x/models/small.onnx") is None
    assert stated_figure(manifest, "x/dense") is None


# --- cameras and videos -------------------------------------------------------------------------------------------


class Capture:
    """As OpenCV's, of frames that get brighter; camera 9 and damaged files give none."""

    def __init__(self, source: Any) -> None:
        self.left = 0 if source == 9 or "damaged" in str(source) else 4

    def isOpened(self) -> bool:
        return self.left > 0

    def read(self) -> tuple[bool, Any]:
        self.left -= 1
        return self.left >= 0, np.full((30, 40, 3), (10, 20, 240), np.uint8) if self.left >= 0 else None

    def release(self) -> None:
        self.left = 0


@pytest.fixture
def opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(VideoCapture=Capture, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cv2", module)
    monkeypatch.setattr(cameras, "_require_source", lambda source: None)


@pytest.mark.usefixtures("opencv")
def test_frames_are_red_green_blue_and_end_with_the_video() -> None:
    frames = list(cameras.frames_of(Path("x.mp4")))
    assert len(frames) == 4
    assert frames[0][0, 0].tolist() == [240, 20, 10]
    assert len(list(cameras.frames_of(0, most=2))) == 2


@pytest.mark.usefixtures("opencv")
@pytest.mark.parametrize("word", ["0", "camera:0", "street.mp4"])
def test_a_camera_or_a_video_is_answered_frame_by_frame(
    bundle: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    results = rows_of(capsys, str(bundle), word, "--frames", "3")["results"]
    assert [name.rpartition("[")[2] for name in results] == ["0]", "1]", "2]"]


@pytest.mark.usefixtures("opencv")
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("9", "camera 9 gives no frame: another program may hold it"),
        ("damaged.mp4", "damaged.mp4 gives no frame: it is damaged"),
        ("300", "there is no camera 300"),
    ],
)
def test_what_gives_no_frame_is_one_line(
    bundle: Path, capsys: pytest.CaptureFixture[str], word: str, said: str
) -> None:
    assert main(["run", str(bundle), word, *ON_ORT]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_what_is_missing_for_a_camera_is_said(
    bundle: Path, pair_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert main(["run", str(bundle), "0", *ON_ORT]) == 6
    assert "needs OpenCV: pip install opencv-python-headless" in capsys.readouterr().err
    assert main(["run", str(pair_bundle), "0", *ON_ORT]) == 2
    assert "0 gives images, and the bundle's model takes none" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="cameras are files on Linux")
def test_an_absent_camera_or_video_is_said_before_opencv_tries(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(VideoCapture=None, __spec__=SimpleNamespace()))
    assert main(["run", str(bundle), "250", *ON_ORT]) == 2
    assert "there is no camera 250 (/dev/video250): " in capsys.readouterr().err
    assert main(["run", str(bundle), "gone.mp4", *ON_ORT]) == 2
    assert "no video at gone.mp4" in capsys.readouterr().err


def test_a_file_called_as_a_camera_is_a_file(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20)).save("0.png")
    Path("0.png").rename("0")
    assert list(rows_of(capsys, str(bundle), "0")["results"]) == ["0"]
    assert PREPROCESSING.size == (SIZE, SIZE)
