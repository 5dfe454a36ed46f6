"""Where modules are looked for: never in the current folder, whatever the path and the variables say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from compressor.device import isolation

ROOT = str(Path(isolation.__file__).resolve().parents[2])


def test_python_from_3_11_on_is_asked_not_to_look_here() -> None:
    assert isolation.command("a.module", (3, 11)) == [sys.executable, "-P", "-m", "a.module"]


def test_an_older_python_takes_the_current_folder_out_before_it_imports() -> None:
    executable, option, code = isolation.command("a.module", (3, 10))
    assert (executable, option) == (sys.executable, "-c")
    assert code.index("sys.path[:]") < code.index("runpy.run_module('a.module'")


@pytest.mark.parametrize(
    ("entries", "kept"),
    [("", []), (os.pathsep, []), ("/a" + os.pathsep + "/b", ["/a", "/b"]), (f".{os.pathsep}./{os.pathsep}/a", ["/a"])],
)
def test_a_child_gets_this_package_and_no_entry_for_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, entries: str, kept: list[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", entries)
    assert isolation.environment()["PYTHONPATH"].split(os.pathsep) == [ROOT, *kept]


def test_the_rest_of_the_environment_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_VARIABLE", "its value")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    child = isolation.environment()
    assert (child["A_VARIABLE"], child["PYTHONPATH"]) == ("its value", ROOT)


@pytest.mark.parametrize(
    ("safe_path", "first", "left"),
    [
        (False, "here", ["/lib"]),
        (False, "", ["/lib"]),
        (True, "here", ["here", "/lib"]),
        (False, "/elsewhere", ["/elsewhere", "/lib"]),
        (False, ROOT, [ROOT, "/lib"]),
    ],
)
def test_the_first_entry_goes_only_where_python_put_the_current_folder_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe_path: bool, first: str, left: list[str]
) -> None:
    monkeypatch.chdir(ROOT if first == ROOT else tmp_path)
    here = str(tmp_path)
    path = [here if first == "here" else first, "/lib"]
    monkeypatch.setattr(isolation.sys, "path", path)
    monkeypatch.setattr(isolation.sys, "flags", SimpleNamespace(safe_path=safe_path))
    isolation.leave_current_folder()
    assert path == [here if entry == "here" else entry for entry in left]


@pytest.mark.parametrize("module", ["compressor.device.__main__", "compressor.__main__"])
def test_without_numpy_it_says_what_to_install(module: str) -> None:
    code = f"import sys; sys.modules['numpy'] = None; from {module} import main; sys.exit(main(['verify', 'x']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 6
    assert done.stderr.startswith("error: numpy can't be imported")
    assert done.stderr.rstrip().endswith("-m pip install numpy")
    assert done.stderr.count("\n") == 1
