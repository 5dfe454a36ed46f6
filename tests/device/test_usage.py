from __future__ import annotations

from pathlib import Path

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
