"""A bundle from elsewhere is data: whatever is wrong with it is refused in one line, or without effect."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from compressor.device import builder, engines, isolation, tensorrt
from compressor.device.built import write_check
from compressor.device.bundle import Manifest, ModelFile, open_bundle, read_bundle, verify_bundle, write_bundle
from compressor.device.images import load_inputs
from compressor.device.lowering import Lowering
from compressor.device.parity import compare
from compressor.errors import CompressorError, DataError, EngineError, GateError
from compressor.inputs.images import Preprocessing as HostPreprocessing
from compressor.inputs.sources import load_images

from .conftest import CLASSES, PREPROCESSING, SIZE, Answer, Command, small_model, small_outputs
from .tampering import INPUT, OUTPUT, archive, archive_of, npy, odd_model, png_of, put, replace_file, signed

ROOT = Path(__file__).resolve().parents[2]
MODEL = "models/small.onnx"
PIXELS = (3, SIZE, SIZE)
QUICK = ("--runs", "2", "--seconds", "0", "--rounds", "1", "--threads", "1")


def assert_refused(answer: Answer, words: str = "") -> None:
    assert answer.code in (1, 2, 4, 5), answer
    assert answer.err.startswith("error: "), answer.err
    assert answer.err.count("\n") == 1, answer.err
    assert len(answer.err) < 1000, answer.err
    assert answer.err.strip().isprintable()
    assert words in answer.err


# --- manifests as bytes ------------------------------------------------------------------------------------------

NESTED = b'{"schema": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
RAW = {
    "nested lists": NESTED,
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "no JSON": b"manifest",
    "a number": b"5",
    "null": b"null",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"schema": 1}'.encode("utf-16"),
    "other bytes": bytes(range(256)),
    "5000 digits": b'{"schema": ' + b"9" * 5000 + b"}",
    "NaN": b'{"schema": NaN}',
    "another schema": b'{"schema": "compressor.bundle/3", "digest": "' + b"0" * 64 + b'"}',
    "a schema of lists": b'{"schema": [[[]]], "digest": "' + b"0" * 64 + b'"}',
}


@pytest.mark.parametrize("name", RAW)
def test_a_manifest_of_any_bytes_is_one_line(bundle: Path, image: Path, command: Command, name: str) -> None:
    (bundle / "manifest.json").write_bytes(RAW[name])
    for words in (("verify", bundle), ("run", bundle, image), ("build", bundle), ("benchmark", bundle)):
        assert_refused(command(*words), "manifest.json")


@pytest.mark.parametrize("name", ["name", "files"])
def test_a_name_that_stands_twice_is_refused_under_the_right_digest(bundle: Path, command: Command, name: str) -> None:
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(path.read_text().replace("{", f'{{"{name}": {json.dumps(content[name])},', 1))
    assert_refused(command("verify", bundle), "twice")


def test_a_linked_manifest_is_refused(bundle: Path, tmp_path: Path, command: Command) -> None:
    (bundle / "manifest.json").rename(tmp_path / "elsewhere.json")
    (bundle / "manifest.json").symlink_to(tmp_path / "elsewhere.json")
    assert_refused(command("verify", bundle), "link")


# --- manifests signed again --------------------------------------------------------------------------------------

LEAF = {"name": "input", "shape": [3, SIZE, SIZE], "dtype": "float32"}
METRIC = {"of": "m", "metric": "top-1", "value": 0.9, "low": 0.8, "high": 1, "n": 9, "is_share": True, "runtime": ""}
FIELDS: tuple[tuple[str, Any], ...] = (
    *(("metrics", value) for value in ({}, None, [5], [{}], [{**METRIC, "more": 1}])),
    *(("metrics", [{**METRIC, key: value}]) for key, value in (("n", 0), ("low", 1.5), ("value", "0.9"), ("of", 5))),
    *(("metrics", [{**METRIC, "value": value}]) for value in (1e40, True, None)),
    *(("not_checked", value) for value in ("x", None, [5], ["x" * 100_000])),
    *(("name", value) for value in (5, None, [], "n" * 100_000, ...)),
    *((f"files|{MODEL}", value) for value in ({}, None, [], "x", ...)),
    *((f"files|{MODEL}|sha256", value) for value in (..., 5, "", "x" * 64, "A" * 64, None)),
    *((f"files|{MODEL}|bytes", value) for value in (..., "5", -1, True, 1e9, None, 10**400)),
    ("files", []),
    ("files|golden.npz", ...),
    *(
        (f"files|{name}", {"sha256": "0" * 64, "bytes": 1})
        for name in (
            *("../out", "/etc/passwd", "a/../../b", "..\\b", "C:b", "", ".", "a//b", "./a", "a/"),
            *("n" * 5000, "n" * 250, "a\nb", "a\x1b[2Jb", "\ud800", "a\0b", "manifest.json", "built/a.plan"),
        )
    ),
    *(("models", value) for value in (..., {}, None, [5], [[]], [{}])),
    *(("models|0|path", value) for value in (..., 5, "other.onnx", "../x", "n" * 5000)),
    *(("models|0|library", value) for value in ("foo", "onnxruntime", "json", 5, None, [])),
    *(("models|0|precision", value) for value in (..., 5, "n" * 5000)),
    *(("models|0|made_for", value) for value in (5, "n" * 5000)),
    ("models|0|code", "import os"),
    *(("models|0|limits", value) for value in (..., 5, [], {})),
    *(("models|0|limits|relative", value) for value in ("1", None, -1, 1e300, True, float("inf"), float("nan"))),
    *(("models|0|limits|cosine", value) for value in ("1", 2, -1e300, float("-inf"))),
    *(("models|0|limits|top1_agreement", value) for value in ("1", -1, 2)),
    *(("preprocessing", value) for value in (..., 5, [], {})),
    *(("preprocessing|size", v) for v in ("ab", [], [16], [16.0, 16.0], [0, 16], [-1, 16], [True, True], [10**9] * 2)),
    *(("preprocessing|size", v) for v in ([[16, 16], 16], [None, 1], [16, 16, 16], [16000, 16000])),
    *(("preprocessing|resize", v) for v in ([], [0], ["20"], [1, 2, 3], [10**7], 20, [16000, 16000])),
    *(("preprocessing|mean", v) for v in ([], ["a"] * 3, [0.5] * 2, [float("nan")] * 3, [1e300] * 3, None)),
    *(("preprocessing|std", v) for v in ([0, 0, 0], [0.2], [-1] * 3, [1e-300] * 3, [float("inf")] * 3, ["a"] * 3)),
    *(("preprocessing|interpolation", v) for v in (5, "__class__", "best", None, [])),
    *(("labels", value) for value in (..., 5, "abcde", [5], [None], [[]], ["n" * 100_000], {})),
    *(("licences", value) for value in (..., 5, [5])),
    *(("build", value) for value in (..., 5, [5], [{}], [{"target": "SM87"}])),
    *(("provenance", value) for value in (..., 5, [], {"macs": "many"}, {"parameters": [1]})),
    *((leaves, value) for leaves in ("inputs", "outputs") for value in (..., None, 5, [], {}, [5], [{}], [[]])),
    *((leaves, [LEAF, LEAF]) for leaves in ("inputs", "outputs")),  # one name twice
    *((f"{leaves}|0|code", "import os") for leaves in ("inputs", "outputs")),
    *(("outputs|0|name", value) for value in (..., 5, None, "", "n" * 5000, "a\x1b[2J", "a\nb", "\ud800")),
    *(
        ("outputs|0|dtype", value)
        for value in (..., 5, None, "", "object", "O", "complex64", "U4", "f4,f4", "__class__")
    ),
    *(("outputs|0|shape", v) for v in (..., 5, None, "ab", [0], [-1], [True], [5.0], ["5"], [[5]], [1] * 8, [10**30])),
    *(("outputs|0|shape", v) for v in ([1 << 28], [1 << 29] * 7)),  # 1 GB a sample, and what overflows
    *(("inputs|0|shape", v) for v in ([3, SIZE], [3, SIZE, SIZE + 1], [SIZE, SIZE, 3], [])),  # the images are others
    *(("inputs|0|dtype", v) for v in ("float64", "float16", "uint8")),
    ("inputs", [LEAF, {**LEAF, "name": "mask"}]),
    *(("task", value) for value in (..., 5, None, [], "n" * 5000)),
    *(("decode", value) for value in (..., 5, [], "dense", {}, {"kind": "dense"}, {"kind": 5, "parameters": {}})),
    *(("decode", {"kind": "dense", "parameters": value}) for value in (None, [], "x")),
    ("decode", {"kind": "dense", "parameters": {}, "code": "import os"}),
)


@pytest.mark.parametrize(("where", "value"), FIELDS, ids=lambda part: repr(part)[:30])
def test_every_field_is_held_to_its_kind_and_size(
    bundle: Path, image: Path, command: Command, where: str, value: Any
) -> None:
    put(bundle, where, value)
    assert_refused(command("verify", bundle), "manifest")
    assert_refused(command("run", bundle, image), "manifest")


def test_a_label_that_would_steer_the_terminal_is_shown_not_obeyed(bundle: Path, image: Path, command: Command) -> None:
    put(bundle, "labels", ["\x1b[2J\nerror: none", "\u202e", "c", "d", "e"])
    answer = command("run", bundle, image)
    assert answer.code == 0
    assert answer.out.count("\n") == 1
    assert answer.out.strip().isprintable()
    json.loads(command("run", bundle, image, "--json").out)


def test_a_label_that_no_file_can_hold_is_refused(bundle: Path, image: Path, command: Command) -> None:
    put(bundle, "labels", ["a", "\ud800", "c", "d", "e"])
    assert_refused(command("run", bundle, image), "no text in Unicode")


# --- golden files ------------------------------------------------------------------------------------------------

ZEROS = np.zeros((2, *PIXELS), np.float32)
OUTPUTS = np.zeros((2, CLASSES), np.float32)
WITH_NAN = np.full((2, CLASSES), np.nan, np.float32)
GOLDEN: dict[str, bytes] = {
    "empty": b"",
    "no zip": b"PK no",
    "text": b"golden",
    "no members": archive(),
    "no outputs": archive(**{INPUT: ZEROS}),
    "no inputs": archive(**{OUTPUT: OUTPUTS}),
    "zero rows": archive(**{INPUT: ZEROS[:0], OUTPUT: OUTPUTS[:0]}),
    "other rows": archive(**{INPUT: ZEROS, OUTPUT: OUTPUTS[:1]}),
    "scalar outputs": archive(**{INPUT: ZEROS, OUTPUT: np.float32(1)}),
    "no classes": archive(**{INPUT: ZEROS, OUTPUT: OUTPUTS[:, :0]}),
    "whole numbers": archive(**{INPUT: ZEROS, OUTPUT: np.zeros((2, CLASSES), np.int64)}),
    "float64 inputs": archive(**{INPUT: ZEROS.astype(np.float64), OUTPUT: OUTPUTS}),
    "another size": archive(**{INPUT: np.zeros((2, 3, SIZE, SIZE + 1), np.float32), OUTPUT: OUTPUTS}),
    "one image": archive(**{INPUT: ZEROS[0], OUTPUT: OUTPUTS[0]}),
    "NaN outputs": archive(**{INPUT: ZEROS, OUTPUT: WITH_NAN}),
    "infinite inputs": archive(**{INPUT: ZEROS + np.float32(np.inf), OUTPUT: OUTPUTS}),
    "texts": archive(**{INPUT: ZEROS, OUTPUT: np.array([["a"], ["b"]])}),
    "complex": archive(**{INPUT: ZEROS, OUTPUT: OUTPUTS.astype(complex)}),
    "4 TB declared": archive_of({INPUT: npy("(1000000000, 3, 16, 16)"), OUTPUT: npy("(2, 5)", data=bytes(40))}),
    "negative shape": archive_of({INPUT: npy("(-2, 3, 16, 16)"), OUTPUT: npy("(2, 5)", data=bytes(40))}),
    "a shape of texts": archive_of({INPUT: npy("('a', 'b')"), OUTPUT: npy("(2, 5)", data=bytes(40))}),
    "a nested header": archive_of({INPUT: npy("(" * 3000), OUTPUT: npy("(2, 5)", data=bytes(40))}),
    "a long header": archive_of({INPUT: npy(" " * 60_000 + "(2,)"), OUTPUT: npy("(2, 5)", data=bytes(40))}),
    "a header of 4 GB": archive_of({INPUT: b"\x93NUMPY\x02\x00" + b"\xff" * 4, OUTPUT: b""}),
    "version 3": archive_of({INPUT: npy("(2,)", version=3), OUTPUT: npy("(2, 5)", data=bytes(40))}),
    "objects": archive_of({INPUT: npy("(2,)", descr="'|O'", data=b"\x80\x04N."), OUTPUT: b""}),
    "records": archive_of({INPUT: npy("(2,)", descr="[('a', '<f4')]", data=bytes(8)), OUTPUT: b""}),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_file_of_any_content_is_one_line(bundle: Path, command: Command, name: str) -> None:
    replace_file(bundle, "golden.npz", GOLDEN[name])
    assert_refused(command("verify", bundle), "golden.npz")
    assert_refused(command("benchmark", bundle), "golden.npz")


def test_a_golden_file_that_unpacks_to_zeros_without_end_takes_no_memory(bundle: Path, command: Command) -> None:
    size = 200 << 20
    rows = size // (4 * 3 * SIZE * SIZE)
    data = archive_of({INPUT: npy(f"({rows}, 3, 16, 16)", data=bytes(size)), OUTPUT: b""})
    assert len(data) < size // 100
    replace_file(bundle, "golden.npz", data)
    tracemalloc.start()
    assert_refused(command("verify", bundle), "declares")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20


def test_a_truncated_golden_file_with_the_right_hash_is_one_line(bundle: Path, command: Command) -> None:
    whole = (bundle / "golden.npz").read_bytes()
    for length in range(0, len(whole), len(whole) // 12):
        replace_file(bundle, "golden.npz", whole[:length])
        assert_refused(command("verify", bundle), "golden.npz")


# --- models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scalar", "classes", "nan"])
def test_answers_that_are_none_are_an_error(bundle: Path, image: Path, command: Command, kind: str) -> None:
    replace_file(bundle, MODEL, odd_model(kind))
    assert_refused(command("verify", bundle))
    assert_refused(command("run", bundle, image, "--runtime", "onnxruntime"), "answers")
    assert command("run", bundle, image, "--json").out == ""
    reported = command("verify", bundle, "--json").out
    assert json.loads(reported, parse_constant=_no_constant)["passed"] is False


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_a_declared_shape_of_many_outputs_is_not_allocated(bundle: Path, command: Command) -> None:
    """256 outputs of 2 MB a sample, as the manifest says; the golden file holds 6 samples of 12 KB."""
    outputs = [{"name": f"o{index}", "shape": [1 << 19], "dtype": "float32"} for index in range(256)]
    put(bundle, "outputs", outputs)
    tracemalloc.start()
    assert_refused(command("verify", bundle), "golden.npz holds no output.o0")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20


# --- files nobody vouches for ------------------------------------------------------------------------------------


def with_recipe(bundle: Path, libraries: tuple[str, ...] = ("tensorrt",)) -> Path:
    profiles = {"input": [[1, *PIXELS], [1, *PIXELS], [8, *PIXELS]]}
    recipe = {"target": "SM87", "libraries": libraries, "model": MODEL, "precision": "fp32", "profiles": profiles}
    put(bundle, "build", [recipe])
    return bundle


EXTRAS: dict[str, Callable[[Path], object]] = {
    "a module": lambda b: (b / "onnxruntime.py").write_text("raise SystemExit(99)"),
    "weights aside": lambda b: (b / "models" / "weights.bin").write_bytes(b"x"),
    "a hidden file": lambda b: (b / ".x").write_bytes(b"x"),
    "a linked folder": lambda b: (b / "more").symlink_to(b.parent),
    "a linked built": lambda b: (b / "built").symlink_to(b.parent),
    "a dangling link": lambda b: (b / "more").symlink_to(b / "nothing"),
    "a module in built": lambda b: _place(b / "built" / "tensorrt.py", b"x"),
    "a file in built": lambda b: _place(b / "built" / "notes.txt", b"x"),
    "a folder in built": lambda b: _place(b / "built" / "more" / "x.plan", b"x"),
    "a hidden file in built": lambda b: _place(b / "built" / ".x.plan", b"x"),
    "a linked engine": lambda b: (_place(b / "built" / "y.plan", b"x"), (b / "built" / "x.plan").symlink_to(b / MODEL)),
}


def _place(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.mark.parametrize("name", EXTRAS)
def test_a_file_that_is_not_in_the_manifest_stops_every_verb(
    bundle: Path, image: Path, command: Command, name: str
) -> None:
    EXTRAS[name](with_recipe(bundle))
    for words in (("verify", bundle), ("run", bundle, image), ("build", bundle), ("benchmark", bundle, *QUICK)):
        assert_refused(command(*words), "in the")


def test_what_a_build_leaves_is_no_reason_to_stop(bundle: Path, image: Path, command: Command) -> None:
    _place(bundle / "built" / ".build-abc" / "SM87-fp32.plan", b"x")
    _place(bundle / "built" / ".SM87-fp32.plan.json.123", b"x")
    assert command("verify", bundle).code == 0
    assert command("run", bundle, image).code == 0


# --- engines built here ------------------------------------------------------------------------------------------


def plant(bundle: Path, name: str = "x", *, library: str = "tensorrt", seed: int = 0, **changed: Any) -> Path:
    """An ONNX file in an engine's place, with a sidecar as `compressor build` writes it."""
    path = bundle / "built" / f"{name}.plan"
    _place(path, small_model(seed=seed).SerializeToString())
    record = builder.EngineRecord(
        path=str(path),
        sha256=builder.sha256_of(path),
        size_bytes=path.stat().st_size,
        onnx_sha256=builder.sha256_of(bundle / MODEL),
        key="k",
        library=library,
        library_version="10.3",
        compute_capabilities=(),
        precision="fp32",
        profiles={"input": ((1, *PIXELS), (1, *PIXELS), (4, *PIXELS))},
        build_s=1.0,
        cached=False,
        status="built",
        lowering=Lowering(False, "not read"),
    )
    builder.write_sidecar(replace(record, **changed))
    return path


PLANTED: dict[str, dict[str, Any]] = {
    "an ONNX file": {"library": "onnxruntime"},
    "an unknown library": {"library": "foo"},
    "a module's name": {"library": "json"},
    "of another model": {"onnx_sha256": "0" * 64},
    "of other bytes": {"sha256": "0" * 64},
    "a hash of no kind": {"sha256": None},
    "profiles of no kind": {"profiles": {"input": 5}},
    "a profile of no order": {"profiles": {"input": ((4, 3), (1, 3), (1, 3))}},
    "a status of no kind": {"status": 5},
    "a time that is none": {"build_s": float("nan")},
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_engine_is_refused_and_never_run(bundle: Path, image: Path, command: Command, name: str) -> None:
    plant(bundle, seed=1, **PLANTED[name])
    for words in (("verify", bundle), ("run", bundle, image), ("benchmark", bundle, *QUICK)):
        assert_refused(command(*words), "x.plan")


@pytest.mark.parametrize("text", ["", "[]", "5", "[" * 100_000, '{"schema": "compressor.engine/1"}', "\x00\xff"])
def test_a_sidecar_of_any_content_is_one_line(bundle: Path, image: Path, command: Command, text: str) -> None:
    builder.sidecar_of(plant(bundle)).write_text(text)
    assert_refused(command("verify", bundle), "x.plan")
    assert_refused(command("run", bundle, image), "x.plan")


@pytest.mark.usefixtures("engines_run")
def test_an_engine_is_preferred_once_it_passed_the_golden_outputs(
    bundle: Path, image: Path, images: NDArray[np.float32], command: Command
) -> None:
    path = plant(bundle)
    before = command("run", bundle, image, "--json")
    assert json.loads(before.out)["model"].endswith(MODEL)
    assert before.err.startswith("note: built/x.plan is not used: it was not checked")
    assert "not used" in command("verify", bundle).out
    write_check(path, compare(images[:, :, 0, 0], images[:, :, 0, 0]))
    after = command("run", bundle, image, "--json")
    assert (json.loads(after.out)["model"], after.err) == (str(path), "")


@pytest.mark.usefixtures("engines_run")
def test_a_check_counts_for_its_engine_and_its_manifest_alone(
    bundle: Path, tmp_path: Path, images: NDArray[np.float32]
) -> None:
    write_check(plant(bundle), compare(images[:, :, 0, 0], images[:, :, 0, 0]))
    assert open_bundle(bundle)[1].path.endswith("x.plan")
    other = tmp_path / "other.bundle"
    shutil.copytree(bundle, other)
    put(other, "name", "another")
    assert open_bundle(other)[1].path.endswith(MODEL)
    plant(bundle, seed=1)  # another engine under the old one's record
    assert open_bundle(bundle)[1].path.endswith(MODEL)


@pytest.mark.usefixtures("engines_run")
def test_an_engine_with_a_forged_check_does_not_answer(
    bundle: Path, image: Path, images: NDArray[np.float32], command: Command
) -> None:
    write_check(plant(bundle, seed=1), compare(images[:, :, 0, 0], images[:, :, 0, 0]))
    assert_refused(command("run", bundle, image), "differs from the golden outputs")
    assert_refused(command("verify", bundle), "x.plan")


@pytest.mark.usefixtures("engines_run")
@pytest.mark.parametrize("seed", [0, 1])
def test_a_build_checks_what_it_built(
    bundle: Path, command: Command, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    def build(onnx_path: Path, out_path: Path, **how: Any) -> builder.EngineRecord:
        plant(bundle, out_path.stem, seed=seed)
        return builder.read_sidecar(out_path)

    monkeypatch.setattr(engines, "build_engine", build)
    answer = command("build", with_recipe(bundle))
    if seed:
        assert_refused(answer, "it was removed")
        assert list((bundle / "built").iterdir()) == []
    else:
        assert answer.code == 0
        assert open_bundle(bundle)[1].path.endswith("built/SM87-fp32.plan")


def test_a_recipe_imports_nothing_but_libraries_for_engines(
    bundle: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "payload.py").write_text("raise SystemExit('payload')")
    monkeypatch.syspath_prepend(str(tmp_path))
    asked: list[str] = []
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name, *more: asked.append(name))
    assert_refused(command("build", with_recipe(bundle, ("payload", "os.path", "a\x1b[2J"))), "no library for engines")
    assert asked == []
    assert "payload" not in sys.modules
    for name in ("payload", "json"):
        with pytest.raises(EngineError, match="no library for engines"):
            tensorrt.import_library(name)


@pytest.mark.parametrize("profiles", [5, {"input": 5}, {"input": [[1], [2]]}, {"input": [[2], [1], [0]]}])
def test_a_recipe_of_no_shapes_is_one_line(bundle: Path, command: Command, profiles: Any) -> None:
    put(with_recipe(bundle), "build|0|profiles", profiles)
    assert_refused(command("build", bundle), "manifest.json is damaged")


@pytest.mark.usefixtures("engines_run")
def test_a_recipe_says_the_shapes_of_every_input(pair_bundle: Path, command: Command) -> None:
    shapes = {"image": [[1, 3, 4, 4]] * 3, "tokens": [[1, 2]] * 3}
    recipe = {"target": "SM87", "libraries": ["tensorrt"], "model": "models/pair.onnx", "precision": "fp32"}
    put(pair_bundle, "build", [{**recipe, "profiles": shapes}])
    assert_refused(command("build", pair_bundle), "says nothing of the shapes of 'mask'")


@pytest.mark.usefixtures("engines_run")
def test_a_recipe_without_shapes_is_one_line(bundle: Path, command: Command) -> None:
    put(with_recipe(bundle), "build|0|profiles", {})
    assert_refused(command("build", bundle), "says nothing of the input's shapes")


# --- code beside a bundle ----------------------------------------------------------------------------------------

MODULES = ("json", "numpy", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "argparse", "tempfile")


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder of modules that leave a mark when they are imported."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open('MARK', 'a').write({name!r})\nraise SystemExit(99)\n")
    return folder


def in_folder(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}"}  # an empty entry is the current folder
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=folder, timeout=120, input=""
    )


@pytest.mark.parametrize("version", [(3, 10), sys.version_info[:2]])
def test_a_worker_imports_nothing_from_the_current_folder(
    trap: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}.{os.pathsep}")
    words = isolation.command("compressor.device.worker", version)
    done = subprocess.run(
        words, capture_output=True, text=True, env=isolation.environment(), cwd=trap, timeout=120, input=""
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not (trap / "MARK").exists()


def test_a_benchmark_in_a_folder_of_modules_runs_none_of_them(bundle: Path, trap: Path) -> None:
    code = "import sys; sys.path.remove(''); sys.path[:] = [p for p in sys.path if p != sys.argv[1]]; del sys.argv[1]; "
    code += "from compressor.device.__main__ import main; sys.exit(main())"
    done = in_folder(trap, "-c", code, str(trap), "benchmark", str(bundle), *QUICK, "--runtime", "onnxruntime")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (trap / "MARK").exists()


@pytest.mark.parametrize("entry", ["compressor", "compressor.device"])
def test_a_verb_started_as_a_module_imports_nothing_from_the_current_folder(
    bundle: Path, trap: Path, entry: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    words = [sys.executable, "-m", entry, "verify", str(bundle)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=trap, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (trap / "MARK").exists()


# --- inputs ------------------------------------------------------------------------------------------------------


GREY = np.arange(40 * 40).reshape(40, 40)
INPUTS: dict[str, bytes] = {
    "a.npy": b"",
    "b.npy": b"\x93NUMPY",
    "4TB.npy": npy("(1000000000000,)"),
    "4TB-images.npy": npy("(1000000000, 3, 16, 16)"),
    "negative.npy": npy("(-1, 3, 16, 16)"),
    "nested.npy": npy("(" * 3000),
    "objects.npy": npy("(1,)", descr="'|O'", data=b"\x80\x04N."),
    "texts.npy": npy("(1,)", descr="'<U4'", data=bytes(16)),
    "no-images.npy": npy("(0, 3, 16, 16)"),
    "no-pixels.npy": npy("(0, 16, 16, 3)", descr="'|u1'"),
    "flat.npy": npy("(3,)", data=bytes(12)),
    "nan.npy": npy("(1, 3, 16, 16)", data=b"\xff" * (4 * 3 * SIZE * SIZE)),
    "doubles.npy": npy("(1, 3, 16, 16)", descr="'<f8'", data=bytes(8 * 3 * SIZE * SIZE)),
    "short.npy": npy("(1, 3, 16, 16)", data=bytes(100)),
    "empty.npz": b"",
    "text.npz": b"PK no",
    "nothing.npz": archive(),
    "two.npz": archive(a=OUTPUTS, b=OUTPUTS),
    "4TB.npz": archive_of({"images": npy("(1000000000000,)")}),
    "cut.npz": archive(images=ZEROS)[:-40],
    "cut-early.npz": archive(images=ZEROS)[:2000],
    "bad-crc.npz": archive(images=ZEROS).replace(bytes(64), b"\1" * 64, 1),
    "bomb.png": png_of(20_000, 20_000),
    "larger-bomb.png": png_of(60_000, 60_000),
    "half.png": png_of(50, 50),
    "text.png": b"no image",
    "empty.jpg": b"",
    "text.gif": b"GIF89a\xff\xff\xff\xff",
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_of_any_bytes_is_one_line(bundle: Path, tmp_path: Path, command: Command, name: str) -> None:
    (tmp_path / name).write_bytes(INPUTS[name])
    assert_refused(command("run", bundle, tmp_path / name), name)


def test_a_strip_that_would_grow_without_end_is_refused(bundle: Path, tmp_path: Path, command: Command) -> None:
    put(bundle, "preprocessing|resize", [256])
    Image.new("RGB", (1, 3000)).save(tmp_path / "strip.png")
    assert_refused(command("run", bundle, tmp_path / "strip.png"), "256 x 768000")


PICTURES: dict[str, Image.Image] = {
    "8.png": Image.fromarray((GREY % 256).astype(np.uint8)),
    "16.png": Image.fromarray((GREY * 40).astype(np.uint16)),
    "16.tif": Image.fromarray((GREY * 40).astype(np.uint16)),
    "32.tif": Image.fromarray(GREY.astype(np.int32)),
    "float.tif": Image.fromarray(GREY.astype(np.float32)),
    "1.png": Image.fromarray((GREY % 2).astype(bool)),
    "palette.png": Image.fromarray((GREY % 256).astype(np.uint8)).convert("P"),
    "cmyk.jpg": Image.new("CMYK", (40, 30), (10, 20, 30, 40)),
    "alpha.png": Image.new("RGBA", (30, 40), (10, 20, 30, 40)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_host_and_device_decode_alike(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    PICTURES[name].save(folder / name)
    how = PREPROCESSING
    on_host = load_images(str(tmp_path)).prepared(
        HostPreprocessing(how.size, how.resize, "bilinear", how.mean, how.std)
    )
    if name in ("16.png", "16.tif", "32.tif", "float.tif"):
        for read in (lambda: on_host[0], lambda: load_inputs(folder / name, how)):
            with pytest.raises(DataError, match="8 bits a channel; convert it"):
                read()
    else:
        np.testing.assert_array_equal(load_inputs(folder / name, how)[0], on_host[0].numpy())


def test_a_folder_of_inputs_is_taken(bundle: Path, tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    assert_refused(command("run", bundle, folder), "holds no image")
    for name in ("b.png", "a.JPG", "notes.txt"):
        Image.new("RGB", (30, 20)).save(folder / name, "PNG")
    answer = command("run", bundle, folder)
    assert answer.code == 0
    assert [line.split(": ")[0] for line in answer.out.splitlines()] == [str(folder / n) for n in ("a.JPG", "b.png")]


# --- flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        *(("run", "--top", value) for value in ("-1", "0", "x", "1e9", "9" * 30)),
        *(("run", "--threads", value) for value in ("-5", "x", "1.5")),
        *(("run", "--runtime", value) for value in ("openvinno", "json")),
        *(("run", "--out", value) for value in ("{folder}", "{folder}/none/x.npz")),
        *(("verify", "--runtime", value) for value in ("openvinno", "json")),
        *(("benchmark", "--cores", value) for value in ("a", "0,a", "-1", "0,,1", "99999", "²")),
        *(("benchmark", "--batch", value) for value in ("0", "-1", "1000000", "x")),
        *(("benchmark", "--rounds", value) for value in ("0", "-1")),
        *(("benchmark", "--runs", value) for value in ("0", "-1")),
        *(("benchmark", "--seconds", value) for value in ("-1", "nan", "inf", "x")),
        *(("benchmark", "--rate-hz", value) for value in ("-1", "nan", "inf")),
        *(("benchmark", "--runtime", value) for value in ("openvinno", "json")),
    ],
    ids=" ".join,
)
def test_a_flag_of_a_wrong_value_is_one_line(
    bundle: Path, image: Path, tmp_path: Path, command: Command, flags: tuple[str, str, str]
) -> None:
    verb, name, value = flags
    inputs = (image,) if verb == "run" else ()
    before = sorted(tmp_path.iterdir())
    assert_refused(command(verb, bundle, *inputs, f"{name}={value.format(folder=tmp_path)}"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_runtime_that_is_near_another_is_suggested(bundle: Path, image: Path, command: Command) -> None:
    for words in (("verify", bundle), ("run", bundle, image), ("benchmark", bundle)):
        assert_refused(command(*words, "--runtime", "openvinno"), "Did you mean 'openvino'")


def test_outputs_never_lie_beside_the_folder_that_was_named(
    bundle: Path, image: Path, tmp_path: Path, command: Command
) -> None:
    folder = tmp_path / "answers"
    folder.mkdir()
    assert_refused(command("run", bundle, image, "--out", folder), "is a folder")
    assert not (tmp_path / "answers.npz").exists()
    assert command("run", bundle, image, "--out", folder / "a.npz").code == 0
    with np.load(folder / "a.npz") as outputs:
        assert outputs["output_0"].shape == (1, CLASSES)
    assert [p.name for p in folder.iterdir()] == ["a.npz"]


def test_a_runs_folder_is_told_where_its_bundle_is(bundle: Path, tmp_path: Path, command: Command) -> None:
    bundle.rename(tmp_path / "bundle")
    assert_refused(command("verify", tmp_path), f"one folder down: {tmp_path / 'bundle'}")


# --- a bundle that is replaced while it is read -------------------------------------------------------------------


def test_a_bundle_that_is_replaced_meanwhile_is_one_line(
    bundle: Path, model_file: Path, images: NDArray[np.float32]
) -> None:
    manifest = replace(read_bundle(bundle), files={})
    outputs, ended = small_outputs(small_model(), images).astype(np.float32), threading.Event()

    def replacing() -> None:
        while not ended.is_set():
            write_bundle(bundle, {MODEL: model_file}, manifest=manifest, golden_inputs=images, golden_outputs=outputs)

    writer = threading.Thread(target=replacing)
    writer.start()
    reports = []
    try:
        for _ in range(60):
            with suppress(CompressorError):  # any other error is the test's failure
                reports.append(verify_bundle(bundle))
    finally:
        ended.set()
        writer.join()
    assert verify_bundle(bundle).passed
    assert all(report.checks for report in reports)


@pytest.mark.parametrize("place", ["sha256_of", "shipped_files", "read_golden"])
def test_a_file_that_is_gone_when_it_is_read_is_one_line(
    bundle: Path, image: Path, command: Command, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def gone(*arguments: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory", str(bundle / MODEL))

    monkeypatch.setattr(f"compressor.device.bundle.{place}", gone)
    assert_refused(command("verify", bundle), "changed while it was read")


def test_a_bundle_that_could_not_be_read_again_is_not_written(
    tmp_path: Path, model_file: Path, images: NDArray[np.float32]
) -> None:
    outputs = small_outputs(small_model(), images).astype(np.float32)
    whole = Manifest("small", (ModelFile("m.onnx"),), PREPROCESSING)
    odd = (
        replace(whole, labels=("x" * 100_000,)),
        replace(whole, preprocessing=replace(PREPROCESSING, std=(0.0, 1.0, 1.0))),
        replace(whole, provenance={"macs": float("nan")}),
    )
    for manifest in odd:
        with pytest.raises(CompressorError):
            write_bundle(
                tmp_path / "b",
                {"m.onnx": model_file},
                manifest=manifest,
                golden_inputs=images,
                golden_outputs=outputs,
            )
    with pytest.raises(GateError, match=r"output\.output that are not finite"):
        write_bundle(
            tmp_path / "b",
            {"m.onnx": model_file},
            manifest=whole,
            golden_inputs=images,
            golden_outputs=np.full_like(outputs, np.nan),
        )
    assert list(tmp_path.iterdir()) == []


def test_the_forgers_digest_is_the_manifests_own(bundle: Path) -> None:
    """Without this, every test above that signs again would be refused for its digest alone."""
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    assert json.loads(signed(content)) == content
    put(bundle, "name", "another")
    replace_file(bundle, MODEL, (bundle / MODEL).read_bytes())
    assert verify_bundle(bundle).passed
    assert read_bundle(bundle).name == "another"
    assert read_bundle(bundle).files[MODEL]["sha256"] == hashlib.sha256((bundle / MODEL).read_bytes()).hexdigest()
