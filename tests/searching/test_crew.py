"""Processes that help with a search: told on standard input, ended with it, and what they die of is said."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import compressor
from compressor.errors import RecipeError
from compressor.searching import crew as crews
from compressor.searching.crew import crew, device_of, limited_threads, share_of_threads, wait_for

SECRET = "postgresql://me:secret@host/name"
OBEYS = "import sys; open(sys.argv[1], 'w').write(sys.stdin.readline()); sys.stdin.read()"
ENOUGH_S = 60.0


def _script(monkeypatch: pytest.MonkeyPatch, text: str, *words: str) -> None:
    """What runs in place of the worker's module."""
    monkeypatch.setattr(crews, "command", lambda module: [sys.executable, "-c", text, *words])


def _wait_for_words(path: Path) -> str:
    end = time.monotonic() + ENOUGH_S
    while time.monotonic() < end and not (path.is_file() and path.read_text()):
        time.sleep(0.01)
    return path.read_text()


def test_a_helper_is_told_what_to_do_where_nobody_else_reads_and_ends_with_the_block(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _script(monkeypatch, OBEYS, str(tmp_path / "told"))
    said: list[str] = []
    with crew([{"storage": SECRET}], 1, said.append) as helpers:
        assert SECRET in _wait_for_words(tmp_path / "told")
        assert not any(SECRET in str(word) for word in helpers[0].process.args)  # type: ignore[union-attr]
        assert helpers[0].process.poll() is None
    assert helpers[0].process.returncode == 0
    assert said == []


def test_helpers_end_when_the_block_is_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _script(monkeypatch, OBEYS, str(tmp_path / "told"))
    with pytest.raises(KeyboardInterrupt), crew([{}, {}], 1, lambda line: None) as helpers:
        raise KeyboardInterrupt
    assert [helper.process.returncode is not None for helper in helpers] == [True, True]


def test_a_helper_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    _script(monkeypatch, "import time; time.sleep(600)")
    monkeypatch.setattr(crews, "ENDING_S", 0.05)
    with crew([{}], 1, lambda line: None) as helpers:
        pass
    assert helpers[0].process.returncode == -9


def test_what_a_helper_died_of_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    _script(monkeypatch, "import sys; print('error: no memory', file=sys.stderr); sys.exit(1)")
    said: list[str] = []
    with crew([{}], 1, said.append) as helpers:
        wait_for(helpers)
    assert said == ["worker 2 of 2 ended with 1 (error: no memory); the others went on"]


def test_each_process_gets_its_share_of_the_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "import os, sys; open(sys.argv[1], 'w').write(os.environ['OMP_NUM_THREADS']); sys.stdin.read()"
    _script(monkeypatch, text, str(tmp_path / "threads"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [share_of_threads(workers) for workers in (1, 2, 3, 9)] == [8, 4, 2, 1]
    with crew([{}], share_of_threads(2), lambda line: None):
        assert _wait_for_words(tmp_path / "threads") == "4"


def test_this_process_has_its_threads_back_afterwards() -> None:
    before = torch.get_num_threads()
    with limited_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_workers_take_turns_at_the_gpus_unless_one_is_named() -> None:
    assert [device_of("auto", index, 2) for index in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert (device_of("cuda:1", 2, 2), device_of("cpu", 1, 2), device_of("auto", 1, 1)) == ("cuda:1", "cpu", "auto")


WORKER = """
import time
from compressor.searching import worker

def work(request):
    print(request["study"], flush=True)
    time.sleep(600)

worker._work = work
raise SystemExit(worker.main())
"""


def test_a_worker_ends_as_by_ctrl_c_when_its_input_does() -> None:
    """So does one whose other end was killed, and one that a shell started deaf to Ctrl-C."""
    deaf = ["sh", "-c", 'trap \'\' INT; exec "$0" -c "$1"', sys.executable, WORKER]
    process = subprocess.Popen(deaf, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write('{"study": "this one"}\n')
    process.stdin.flush()
    assert process.stdout.readline() == "this one\n"
    _, words = process.communicate(timeout=ENOUGH_S)  # closes its input
    assert (process.returncode, words) == (130, "interrupted\n")


def test_what_lies_in_memory_is_refused_to_several_workers(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="workers = 2: other processes can't see"):
        compressor.search(nn.Flatten(), workers=2, out=str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []
