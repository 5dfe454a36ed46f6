"""A stretch of work: its seconds, and peaks only where they are its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from compressor.device import usage
from compressor.device.usage import Usage


def test_where_the_peak_can_not_be_reset_it_is_known_only_if_it_rises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(usage, "_CLEAR_REFS", tmp_path / "no" / "such" / "file")
    peaks = iter([100, 100, 100, 140])
    monkeypatch.setattr(usage, "resident_bytes", lambda: next(peaks))
    assert usage.begin().read().peak_bytes is None
    assert usage.begin().read().peak_bytes == 140


def test_a_system_that_says_nothing_gives_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(usage, "_CLEAR_REFS", tmp_path / "no" / "such" / "file")
    monkeypatch.setattr(usage, "resident_bytes", lambda: -1)
    assert usage.begin().read().peak_bytes is None


def test_two_stretches_add_seconds_and_keep_the_larger_peak() -> None:
    assert Usage(2.0, 10, 7).after(Usage(1.0, 30)) == Usage(3.0, 30, 7)
    assert Usage(2.0, 10).after(Usage(1.0)) == Usage(3.0)


def test_a_meter_reads_the_seconds_since_it_began_and_the_peak_since_its_reset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(usage, "_CLEAR_REFS", tmp_path / "clear_refs")
    monkeypatch.setattr(usage, "resident_bytes", lambda: 70)
    moments = iter([10.0, 12.5])
    monkeypatch.setattr(usage.time, "perf_counter", lambda: next(moments))
    meter = usage.begin()
    assert (tmp_path / "clear_refs").read_text() == "5"  # proc(5): what resets the peak, and nothing else does
    assert meter.peak_before == -1
    assert meter.read() == Usage(2.5, 70, None)


def test_a_gpus_peak_is_reset_and_read_only_where_somebody_uses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    gpu = SimpleNamespace(
        is_initialized=lambda: True,
        reset_peak_memory_stats=lambda: calls.append("reset"),
        max_memory_allocated=lambda: 99,
    )
    monkeypatch.setitem(usage.sys.modules, "torch", SimpleNamespace(cuda=gpu))
    assert usage.begin().read().gpu_peak_bytes == 99
    assert calls == ["reset"]
    gpu.is_initialized = lambda: False
    assert usage.begin().read().gpu_peak_bytes is None
    assert calls == ["reset"]


def test_a_stretch_without_a_gpu_leaves_the_others_peak() -> None:
    assert Usage(1.0, 5, None).after(Usage(1.0, 5, 8)).gpu_peak_bytes == 8
    assert Usage(1.0, 5, 3).after(Usage(1.0, 5, 8)).gpu_peak_bytes == 8
