"""Addresses of databases: passwords stay out of every line, and a file is a study that is found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.errors import RecipeError
from compressor.searching import storage
from compressor.searching.storage import masked, open_study, require_storage


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host/name", "postgresql://me:***@host/name"),
        ("postgresql://me@host/name", "postgresql://me@host/name"),
        ("sqlite:///study.db", "sqlite:///study.db"),
        ("", ""),
        ("no address", "no address"),
    ],
)
def test_an_address_is_shown_without_its_password(url: str, shown: str) -> None:
    assert masked(url) == shown


@pytest.mark.parametrize("url", ["nonsense://me:secret@nowhere/x", "no address", "sqlite:////no/such/folder/x.db"])
def test_a_database_that_is_not_there_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    with pytest.raises(RecipeError) as refused:
        require_storage(url)
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)
    assert "leave it out for a file" in str(refused.value)


def test_a_study_in_a_file_is_joined_by_its_name(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    for expected in (0, 1):
        with open_study(url, "one", seed=0, images=10) as study:
            assert len(study.trials) == expected
            study.add_trial(storage.optuna.trial.create_trial(value=0.5))
    with open_study(url, "two", seed=0, images=10) as study:
        assert study.trials == []


def test_a_driver_of_its_own_is_named_for_postgresql(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[str] = []
    monkeypatch.setattr(storage.optuna.storages, "RDBStorage", lambda url, **options: addresses.append(url))
    for url in ("postgres://me:secret@host/x", "postgresql://host/x", "postgresql+psycopg://host/x"):
        storage._storage_at(url)
    assert all(address.startswith("postgresql+psycopg://") for address in addresses)
    assert "me:secret@" in addresses[0]  # the driver needs it
