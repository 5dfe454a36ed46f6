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
    """The study of that name in that database, new or joined. Raises RecipeError when it can't be reached."""
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
    for left in reversed(range(_TRIES)):
        try:
            parsed = make_url(url)
            if parsed.drivername in ("postgres", "postgresql"):
                parsed = parsed.set(drivername="postgresql+psycopg")
            wait = {"connect_args": {"timeout": 60}} if parsed.drivername.startswith("sqlite") else {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                return optuna.storages.RDBStorage(
                    parsed.render_as_string(hide_password=False),
                    engine_kwargs={"pool_pre_ping": True, **wait},
                    heartbeat_interval=HEARTBEAT_S,
                    grace_period=GRACE_S,
                )
        except (SQLAlchemyError, ImportError, ValueError) as error:
            if left and isinstance(error, SQLAlchemyError) and not isinstance(error, ArgumentError):
                time.sleep(0.5)
                continue
            raise RecipeError(
                f"the storage {masked(url)!r} can't be used ({_first_line(error)}); give --storage a database "
                "that runs, such as postgresql://user@host/name, or leave it out for a file in the search's folder"
            ) from error
    raise AssertionError


def _first_line(error: Exception) -> str:
    return next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)


def masked(url: str) -> str:
    """The address without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url
