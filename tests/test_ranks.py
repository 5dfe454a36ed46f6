"""One run by several processes gives what one process gives; what one of them does alone, and what ends them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from compressor import distributed
from compressor.errors import RanksError
from compressor.inputs.images import Batches
from tests import ranks_worker

ORDER = 1e-10  # of a score: sums in another order
WORKER = Path(ranks_worker.__file__)
Arrays = Mapping[str, np.ndarray]


def started(task: str, ranks: int, folder: Path, *, timeout_s: float = 120) -> list[subprocess.Popen[str]]:
    """The processes, as `torchrun` starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), distributed.TIMEOUT_VARIABLE: str(timeout_s), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(WORKER), task, str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return processes


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Each one's exit code and what it said."""
    ends = []
    for process in processes:
        _, said = process.communicate(timeout=120)
        ends.append((process.returncode, said))
    return ends


def results(ranks: int, folder: Path) -> list[Arrays]:
    ends = ended(started("everything", ranks, folder))
    assert all(code == 0 for code, _ in ends), ends
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(ranks)]


@pytest.fixture(scope="module")
def alone() -> Arrays:
    return ranks_worker.everything()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[Arrays]:
    return results(2, tmp_path_factory.mktemp("ranks"))


def require_alike(one: Arrays, others: list[Arrays]) -> None:
    assert all(set(one) == set(other) for other in others)
    for name, expected in one.items():
        for found in (other[name] for other in others):
            if name == "sent":
                continue
            assert found.shape == expected.shape, name
            if name.startswith("plan|"):
                assert (found == expected).all(), name
                continue
            # float32 gradients are summed in another order, three passes long
            within = 1e-3 if name.startswith(("recovered", "distances")) else 1e-6
            within = within if name.startswith(("repaired", "recovered", "distances", "correct")) else ORDER
            assert np.abs(found - expected).max() <= within * max(np.abs(expected).max(), 1e-12), name


@pytest.mark.thorough
def test_two_processes_come_to_what_one_comes_to(alone: Arrays, together: list[Arrays]) -> None:
    require_alike(alone, together)


@pytest.mark.thorough
def test_three_processes_do_too(alone: Arrays, tmp_path: Path) -> None:
    require_alike(alone, results(3, tmp_path))


@pytest.mark.thorough
def test_all_processes_have_the_same_bits(together: list[Arrays]) -> None:
    first, second = together
    assert all((first[name] == second[name]).all() for name in first if name != "sent")


@pytest.mark.thorough
def test_what_is_sent_is_counted(alone: Arrays, together: list[Arrays]) -> None:
    assert int(alone["sent"]) == 0
    assert int(together[0]["sent"]) > 10_000


@pytest.mark.thorough
def test_the_first_may_work_alone_for_longer_than_the_time_out(tmp_path: Path) -> None:
    ends = ended(started("longer_than_the_time_out", 2, tmp_path, timeout_s=4))
    assert [code for code, _ in ends] == [0, 0], ends
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        assert int(found["value"]) == 7
        assert found["squares"].tolist() == [1, 4, 9, 16, 25]


@pytest.mark.thorough
def test_an_error_of_the_first_ends_the_others(tmp_path: Path) -> None:
    (first, first_said), (second, second_said) = ended(started("failing", 2, tmp_path))
    assert (first, second) == (1, RanksError.exit_code)
    assert first_said.strip() == "CompressorError: the first can't"
    assert "RanksError: the first process of this run ended: the first can't" in second_said


@pytest.mark.thorough
def test_one_that_is_not_heard_of_any_more_is_an_error_within_the_time_out(tmp_path: Path) -> None:
    begin = time.monotonic()
    first, second = started("silent", 2, tmp_path, timeout_s=3)
    _, said = first.communicate(timeout=60)
    second.kill()
    second.communicate()
    assert first.returncode == RanksError.exit_code
    assert "the other processes of this run can't be reached" in said
    assert "the same command again" in said
    assert time.monotonic() - begin < 50  # most of it is importing


def test_a_time_out_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(distributed.TIMEOUT_VARIABLE, "soon")
    with pytest.raises(RanksError, match="COMPRESSOR_RANKS_TIMEOUT = 'soon' is no time; write seconds"):
        distributed._timeout_s()


def test_shares_are_whole_batches_and_each_is_somebodys() -> None:
    images: Batches = ranks_worker.pool(ranks_worker.COUNT, seed=1)
    shares = [images.share(rank, 4) for rank in range(4)]
    assert [len(share) for share in shares] == [2, 2, 1, 1]
    assert sum(len(list(share)) for share in shares) == len(images) == 6
    second = list(images)[1][0]
    assert (next(iter(shares[1]))[0] == second).all()


def test_alone_nothing_is_shared_out() -> None:
    assert not distributed.shares_out(5)
    assert list(distributed.own_share([1, 2, 3])) == [1, 2, 3]
    assert distributed.each([1, 2], str) == ["1", "2"]
    assert distributed.by_first(lambda: 3) == distributed.from_first(3) == 3
    assert distributed.bytes_from_first(b"ab") == b"ab"
