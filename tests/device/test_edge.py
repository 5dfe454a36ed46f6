"""An edge box: numpy and one runtime, nothing else; the commands, their exit codes and their one-line errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.device.runtimes import available
from compressor.errors import MissingPackageError

from .signing import sign, write_keys

ROOT = Path(__file__).resolve().parents[2]
# 0.15 s where numpy takes 0.1: an idle machine's, and a busy one's are told by numpy
MOST_OF_NUMPYS_TIME = 1.5
ALLOWED_RUNTIMES = ("onnxruntime", "openvino")
# Everything that is not the standard library, numpy or the one runtime is as good as not installed.
BLOCKER = """
import sys
class Only:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        known = top in sys.stdlib_module_names or top in {allowed!r}
        return self.finder.find_spec(name, path, target) if known else None
sys.meta_path[:] = [Only(finder) for finder in sys.meta_path]
"""


def run(
    tmp_path: Path, *arguments: str, runtime: str = "onnxruntime", more: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    allowed = ("compressor", "numpy", runtime, *more)
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(allowed=allowed))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
    )


def test_the_blocker_blocks(tmp_path: Path) -> None:
    for name in ("torch", "onnx", "typer", "rich", "PIL", "openvino"):
        done = run(tmp_path, "-c", f"import {name}")
        assert "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize("runtime", ALLOWED_RUNTIMES)
@pytest.mark.parametrize("entry", ["compressor.device", "compressor"])
def test_verify_and_run_need_numpy_and_one_runtime_only(
    bundle: Path, tmp_path: Path, images: NDArray[np.float32], runtime: str, entry: str
) -> None:
    if available()[runtime]:
        pytest.skip(f"{runtime}: {available()[runtime]}")
    np.save(tmp_path / "in.npy", images[:2])
    verified = run(tmp_path, "-m", entry, "verify", str(bundle), "--json", runtime=runtime)
    assert (verified.returncode, verified.stderr) == (0, "")
    assert json.loads(verified.stdout)["passed"] is True
    ran = run(tmp_path, "-m", entry, "run", str(bundle), "in.npy", "--json", "--top", "1", runtime=runtime)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(json.loads(ran.stdout)["results"]["in.npy"]) == 2


def test_a_signature_needs_cryptography_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "key")
    words = ("-m", "compressor", "verify", str(sign(bundle, private)), "--key", str(public))
    without = run(tmp_path, *words)
    assert without.returncode == 6
    assert without.stderr.startswith("error: checking a signature needs `cryptography`; pip install")
    signed = run(tmp_path, *words, more=("cryptography", "_cffi_backend"))
    assert (signed.returncode, signed.stderr) == (0, "")
    assert "signed by the owner of the key" in signed.stdout


def test_benchmark_works_there_too(bundle: Path, tmp_path: Path) -> None:
    flags = ("--runs", "64", "--seconds", "0", "--rounds", "2", "--threads", "1", "--samples", "raw.json", "--json")
    done = run(tmp_path, "-m", "compressor.device", "benchmark", str(bundle), *flags)
    assert (done.returncode, done.stderr) == (0, "")
    row = json.loads(done.stdout)["timings"][0]
    assert row["n"] == 64
    assert row["p90"].endswith(" ms")
    assert row["p99"] == "n too small (64 of 662)"
    assert len(json.loads((tmp_path / "raw.json").read_text())[0]["samples_ms"]) == 64


def test_an_image_without_pillow_is_a_clear_error(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"x")
    done = run(tmp_path, "-m", "compressor.device", "run", str(bundle), "cat.jpg")
    assert done.returncode == 6
    assert done.stderr.startswith("error: reading cat.jpg needs Pillow: pip install pillow")


def test_the_other_verbs_say_what_to_install(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "compressor", "compress")
    assert done.returncode == 6
    assert done.stderr.count("\n") == 1
    assert "everything but verify, run, build, pack, unpack, list and benchmark of a bundle" in done.stderr
    assert "pip install 'compressor[compress]'" in done.stderr


@pytest.mark.parametrize("entry", ["compressor", "compressor.device"])
@pytest.mark.parametrize("flags", [(), ("--help",), ("-h",)])
def test_the_help_says_what_works_there(tmp_path: Path, entry: str, flags: tuple[str, ...]) -> None:
    done = run(tmp_path, "-m", entry, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    verbs = re.findall(r"^ {4}(\w+)", done.stdout, re.MULTILINE)
    assert verbs == ["verify", "run", "build", "benchmark", "pack", "unpack"]
    assert "pip install 'compressor[compress]'" in " ".join(done.stdout.split())


@pytest.mark.parametrize("words", [("verify",), ("run", "in.npy"), ("benchmark", "--seconds", "0")])
def test_without_a_runtime_it_says_what_to_install(
    bundle: Path, tmp_path: Path, images: NDArray[np.float32], words: tuple[str, ...]
) -> None:
    np.save(tmp_path / "in.npy", images[:2])
    done = run(tmp_path, "-m", "compressor.device", words[0], str(bundle), *words[1:], runtime="none")
    assert done.returncode == MissingPackageError.exit_code, done.stderr
    assert done.stderr.startswith("error: no model of ")
    assert "pip install onnxruntime" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("verb", "words"),
    [("verify", "hash"), ("run", "--serve"), ("build", "TensorRT engines"), ("benchmark", "--rate-hz")],
)
def test_a_verbs_help_is_its_own(tmp_path: Path, verb: str, words: str) -> None:
    done = run(tmp_path, "-m", "compressor", verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert words in done.stdout


LOADED = """
import sys, time
start = time.process_time()
import numpy
numpy_s = time.process_time() - start
import onnxruntime
start = time.process_time()
from compressor import device
device.load
own_s = time.process_time() - start
answers = device.load(sys.argv[1])(numpy.load("in.npy"))
heavy = ("torch", "torchvision", "zennit", "torch_pruning", "optuna", "onnx", "PIL", "cv2", "http.server")
print(len(answers), [name for name in heavy if name in sys.modules], own_s / numpy_s)
"""


def test_a_bundle_is_loaded_in_python_too_and_soon(bundle: Path, tmp_path: Path, images: NDArray[np.float32]) -> None:
    np.save(tmp_path / "in.npy", images)
    ratios: list[float] = []
    for _ in range(3):  # the first may compile what the others read; what else runs here only ever slows one
        done = run(tmp_path, "-c", LOADED, str(bundle))
        assert done.stderr == ""
        count, heavy, ratio = done.stdout.split()
        assert (int(count), heavy) == (len(images), "[]")
        ratios.append(float(ratio))
    assert min(ratios) < MOST_OF_NUMPYS_TIME


def test_the_room_alone_imports_no_numpy(tmp_path: Path) -> None:
    heavy = "[m for m in ('numpy', 'json', 'onnxruntime') if m in sys.modules]"
    done = run(tmp_path, "-c", f"import sys, compressor.device; print({heavy})")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_device_needs_nothing_that_an_arm_board_lacks() -> None:
    """Pure Python, numpy, and of the extra what has wheels for aarch64: no marker, no package for one processor."""
    text = (ROOT / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = (\[.*?\])$", text, re.MULTILINE)
    extra = re.search(r"^device = (\[.*?\])$", text, re.MULTILINE)
    assert dependencies is not None
    assert extra is not None
    assert json.loads(dependencies[1]) == ["numpy>=1.26"]
    names = {re.split(r"[>=]", entry)[0] for entry in json.loads(extra[1])}
    assert names == {"onnxruntime", "pillow"}
    assert not re.search(r"platform_machine|sys_platform|ext-modules|ext_modules", text)
    built = [path.name for path in (ROOT / "compressor").rglob("*") if path.suffix in (".so", ".pyd", ".c", ".pyx")]
    assert built == []


def test_it_lists_what_can_be_known_there(tmp_path: Path) -> None:
    assert "models: " in run(tmp_path, "-m", "compressor", "list").stdout
    for what, name, words in (
        ("runtimes", "pytorch", "not installed: pip install torch"),
        ("criteria", "l1", "sum of the absolute weights"),
        ("targets", "SM87", "also orin"),
        ("models", "timm:NAME", "not installed: pip install timm"),
    ):
        done = run(tmp_path, "-m", "compressor", "list", what, name.lower(), "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert words in json.loads(done.stdout)[name]


def test_a_damaged_bundle_ends_with_the_gates_code(bundle: Path, tmp_path: Path) -> None:
    path = bundle / "models/small.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    done = run(tmp_path, "-m", "compressor.device", "verify", str(bundle))
    assert done.returncode == 4
    size = path.stat().st_size
    assert done.stderr == f"error: models/small.onnx is truncated: {size} bytes, the manifest says {size + 1}\n"
    assert "failed   models/small.onnx" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("verify", "nowhere"), 2, "error: nowhere is no bundle"),
        (("verify", "{bundle}", "--runtime", "tpu"), 2, "no runtime 'tpu'"),
        (("run", "{bundle}", "gone.npy"), 2, "error: no input at gone.npy"),
        (("build", "{bundle}"), 2, "carries no build recipe"),
        (("fly", "{bundle}"), 2, "invalid choice: 'fly'"),
        (("run", "{bundle}"), 2, "the following arguments are required: INPUT; see compressor run --help"),
        (("verify", "{bundle}", "--runtime", "tensorrt"), 5, "tensorrt does not take it"),
    ],
)
def test_bad_input_is_one_line_and_a_code(
    bundle: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    filled = [a.format(bundle=bundle) for a in arguments]
    done = run(tmp_path, "-m", "compressor.device", *filled)
    assert done.returncode == code
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
