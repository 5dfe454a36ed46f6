"""The database a study lives in: its address in, the study out, new or joined; what goes wrong is one line.

A file by default, or any database several machines reach. Knows nothing of trials.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.study import Study
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ..errors import RecipeError
from .sampling import Hopeless, Seeded

HEARTBEAT_S, GRACE_S = 15, 60
_TRIES = 5  # processes that make the tables of a new database at once get in each other's way


@contextmanager
def open_study(url: str, name: str, *, seed: int, images: int) -> Iterator[Study]:
    """The study of that name in that database, new or joined. Raises RecipeError when it can't be reached.

    `images` is how many judge a trial, which says how much of a difference is chance. Connections are closed behind.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = _connect(url)
        try:
            yield optuna.create_study(
                storage=storage,
                study_name=name,
                direction="maximize",
                sampler=Seeded(seed),
                pruner=Hopeless(images),
                load_if_exists=True,
            )
        except (SQLAlchemyError, StorageInternalError) as error:
            raise RecipeError(
                f"the storage {masked(url)!r} does not answer any more ({_first_line(error)}); see to it and run the "
                "same command again: the search goes on where it stopped"
            ) from error
        finally:
            storage.remove_session()
            storage.engine.dispose()


def require_storage(url: str) -> None:
    """Raises RecipeError when there is no such database."""
    _connect(url).engine.dispose()


def _connect(url: str) -> optuna.storages.RDBStorage:
    """Raises RecipeError where no try gets through, or none can."""
    for tries_left in reversed(range(_TRIES)):
        try:
            return _storage_at(url)
        except (SQLAlchemyError, ImportError, ValueError) as error:
            # what is wrong with an address or a driver stays wrong
            may_pass = isinstance(error, SQLAlchemyError) and not isinstance(error, ArgumentError)
            if tries_left and may_pass:
                time.sleep(0.5)
                continue
            raise RecipeError(
                f"the storage {masked(url)!r} can't be used ({_first_line(error)}); give --storage a database "
                "that runs, such as postgresql://user@host/name, or leave it out for a file in the search's folder"
            ) from error
    raise AssertionError


def _storage_at(url: str) -> optuna.storages.RDBStorage:
    address = make_url(url)
    if address.drivername in ("postgres", "postgresql"):
        address = address.set(drivername="postgresql+psycopg")
    # seconds that a file waits for another process's lock
    wait = {"connect_args": {"timeout": 60}} if address.drivername.startswith("sqlite") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.storages.RDBStorage(
            address.render_as_string(hide_password=False),
            engine_kwargs={"pool_pre_ping": True, **wait},
            heartbeat_interval=HEARTBEAT_S,
            grace_period=GRACE_S,
        )


def _first_line(error: Exception) -> str:
    """Of the driver's own message, where the error wraps one; the error's type where there is no text."""
    lines = str(error.__cause__ or error).splitlines()
    return lines[0] if lines else type(error).__name__


def masked(url: str) -> str:
    """The address without its password; what is no address stays as it is."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url
