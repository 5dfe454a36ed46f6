"""The database a study lives in: its address in, the study out, new or joined; what goes wrong is one line.

A file by default, or any database several machines reach. Every question to it ends in time: a server that went away
is an error, not a wait. Knows nothing of trials.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.study import Study
from sqlalchemy import Connection, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from ..errors import CompressorError, MissingPackageError, RecipeError
from .sampling import Hopeless, Seeded

LOST = (SQLAlchemyError, StorageInternalError)
"""What a question to a storage that does not answer raises."""
HEARTBEAT_S, GRACE_S = 15, 60
_TRIES = 5  # processes that make the tables of a new database at once get in each other's way
_FILE_LOCK_S = 60.0  # that a file waits for another process's lock
# Of a PostgreSQL client (libpq): what was sent is acknowledged, a connection made, within these; a connection on
# which nothing is sent is asked after as often. With five tries to begin a trial that makes less than a minute.
_CLIENT_LIMITS: dict[str, int | str] = {
    "connect_timeout": 5,  # s
    "tcp_user_timeout": 15_000,  # ms
    "keepalives": 1,
    "keepalives_idle": 5,  # s
    "keepalives_interval": 5,  # s
    "keepalives_count": 3,
    # of the server, ms: locks of a worker that vanished in the middle of a transaction are let go of
    "options": "-c statement_timeout=30000 -c idle_in_transaction_session_timeout=20000",
}
_LIBPQ = ("psycopg", "psycopg2")
_DRIVER_EXTRAS = {"psycopg": "compressor[postgres]"}


@contextmanager
def open_study(url: str, name: str, *, seed: int, images: int) -> Iterator[Study]:
    """The study of that name in that database, new or joined. Raises RecipeError when it can't be reached.

    `images` is how many judge a trial, which says how much of a difference is chance. Connections are closed behind.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # trials are asked for and told here, with a heartbeat of their own (`heartbeat.beating`)
        warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used")
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
        except LOST as error:
            raise RecipeError(
                f"the storage {masked(url)!r} does not answer any more ({_reason(error, url)}); see to it and run the "
                "same command again: the search goes on where it stopped"
            ) from error
        finally:
            storage.remove_session()
            storage.engine.dispose()


def require_storage(url: str) -> None:
    """Raises RecipeError when there is no such database, MissingPackageError when its driver is not installed."""
    _connect(url).engine.dispose()


def _connect(url: str) -> RDBStorage:
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
            raise _refusal(error, url) from error
    raise AssertionError


def _refusal(error: Exception, url: str) -> CompressorError:
    missing = error if isinstance(error, ModuleNotFoundError) else error.__cause__
    if isinstance(missing, ModuleNotFoundError):
        package = str(missing.name)
        wanted = _DRIVER_EXTRAS.get(package, package)
        return MissingPackageError(
            f"{package} not installed, which the storage {masked(url)!r} needs: pip install '{wanted}'"
        )
    return RecipeError(
        f"the storage {masked(url)!r} can't be used ({_reason(error, url)}); give --storage a database "
        "that runs, such as postgresql://user@host/name, or leave it out for a file in the search's folder"
    )


def _storage_at(url: str) -> RDBStorage:
    address = make_url(url)
    if address.drivername in ("postgres", "postgresql"):
        address = address.set(drivername="postgresql+psycopg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = optuna.storages.RDBStorage(
            address.render_as_string(hide_password=False),
            engine_kwargs={"pool_pre_ping": True, "connect_args": _limits_of(address)},
            heartbeat_interval=HEARTBEAT_S,
            grace_period=GRACE_S,
        )
    if _is_file(address):
        _write_in_turns(storage)
    return storage


def _limits_of(address: URL) -> dict[str, int | float | str]:
    """What the driver is told of waiting, but for what the address says itself."""
    if address.get_backend_name() == "sqlite":
        return {"timeout": _FILE_LOCK_S}
    if address.get_driver_name() not in _LIBPQ:
        return {}
    return {name: limit for name, limit in _CLIENT_LIMITS.items() if name not in address.query}


def _is_file(address: URL) -> bool:
    return address.get_backend_name() == "sqlite" and address.database not in (None, "", ":memory:")


def _write_in_turns(storage: RDBStorage) -> None:
    """Every transaction in a file begins as a writer's, so that of two processes one waits for the other.

    Optuna reads a queued trial's state and then takes the trial, which only rows locked by a server keep apart:
    SQLite ignores such locks, and two workers would take the same one.
    """
    storage.engine.dispose()  # connections made before this begin as they please
    event.listen(storage.engine, "connect", _begin_nothing_itself)
    event.listen(storage.engine, "begin", _begin_as_writer)


def _begin_nothing_itself(connection: object, record: object) -> None:
    """Of the standard library's driver, which would begin late, at the first change."""
    connection.isolation_level = None  # type: ignore[attr-defined]


def _begin_as_writer(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _reason(error: Exception, url: str) -> str:
    """The first line of the driver's own message, where errors wrap one; the error's type where there is no text.

    A driver may repeat what it was given, so passwords are taken out.
    """
    innermost: BaseException = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    lines = str(innermost).splitlines()
    text = lines[0] if lines else type(innermost).__name__
    for secret in _secrets_of(url):
        text = text.replace(secret, "***")
    return text


def masked(url: str) -> str:
    """The address without its passwords, those among its options too; what is no address stays as it is."""
    try:
        address = make_url(url)
    except (ArgumentError, ValueError):  # the latter: a port that is no number
        return re.sub(r"(://[^/]*?:).*@", r"\1***@", url)
    hidden = {name: "***" for name in address.query if _is_secret(name)}
    return address.update_query_dict(hidden).render_as_string(hide_password=True).replace("%2A%2A%2A", "***")


def _secrets_of(url: str) -> list[str]:
    try:
        address = make_url(url)
    except (ArgumentError, ValueError):
        return re.findall(r"://[^/]*?:(.+)@", url)
    secrets = [str(address.password or "")]
    for name, values in address.normalized_query.items():
        if _is_secret(name):
            secrets += values
    return list(filter(None, secrets))


def _is_secret(option: str) -> bool:
    return "pass" in option.lower() and "file" not in option.lower()  # a password file's path is none
