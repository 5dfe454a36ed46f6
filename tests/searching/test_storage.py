"""Addresses of databases: passwords stay out of every line, and a file is a study that is found again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from compressor.errors import MissingPackageError, RecipeError
from compressor.searching import storage
from compressor.searching.storage import masked, open_study, require_storage


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host/name", "postgresql://me:***@host/name"),
        ("postgresql://me@host/name", "postgresql://me@host/name"),
        ("sqlite:///study.db", "sqlite:///study.db"),
        (
            "postgresql://me@host/name?password=secret&sslmode=require",
            "postgresql://me@host/name?password=***&sslmode=require",
        ),
        (
            "postgresql://me@host/name?passfile=mine.pgpass",
            "postgresql://me@host/name?passfile=mine.pgpass",
        ),
        ("postgresql://me:secret@host:port/name", "postgresql://me:***@host:port/name"),
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


def test_a_driver_that_is_not_installed_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingPackageError) as refused:
        require_storage("postgresql://me:secret@host/name")
    assert "pip install 'compressor[postgres]'" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_server_is_asked_with_limits_unless_the_address_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(storage.optuna.storages, "RDBStorage", lambda url, **options: asked.append(options))
    for url in ("postgresql://host/x", "postgresql://host/x?connect_timeout=60", "mysql+pymysql://host/x"):
        storage._storage_at(url)
    ours, theirs, other = (options["engine_kwargs"]["connect_args"] for options in asked)
    assert ours["connect_timeout"] == 5
    assert ours["tcp_user_timeout"] == 15_000
    assert "statement_timeout" in ours["options"]
    assert "connect_timeout" not in theirs
    assert theirs["tcp_user_timeout"] == 15_000
    assert other == {}
    assert all(options["engine_kwargs"]["pool_pre_ping"] for options in asked)
    assert all((options["heartbeat_interval"], options["grace_period"]) == (15, 60) for options in asked)


def test_no_password_is_in_what_a_driver_says() -> None:
    url = "postgresql://me:sec%2Fret@host/name?sslpassword=other"
    error = ValueError("can't use me:sec/ret with other\nand more")
    assert storage._reason(error, url) == "can't use me:*** with ***"


def test_two_processes_do_not_take_one_queued_trial_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna reads that a trial waits, then takes it; what reads must keep others from that moment on."""
    monkeypatch.setattr(storage, "_FILE_LOCK_S", 0.01)
    first, second = (storage._storage_at(f"sqlite:///{tmp_path / 'study.db'}") for _ in range(2))
    with first.engine.begin() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM trials")
        with pytest.raises(OperationalError, match="locked"), second.engine.begin():
            pass
    with second.engine.begin() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM trials")
    for opened in (first, second):
        opened.engine.dispose()
