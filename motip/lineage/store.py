"""The MLflow server or database: where it is, its first start, and what its errors mean."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from motip.errors import MotipError
from motip.lineage.provenance import redact
from motip.lineage.relocate import follow, moved_from, present, resolving_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_LOGIN = {"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
"""MLflow error codes of a name, password or token that is not accepted. It may have expired, and be renewed."""

_PASSING = {
    *_LOGIN,
    *("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED"),
    *("RESOURCE_EXHAUSTED", "CANCELLED", "ABORTED"),
}
"""MLflow error codes that another try may not meet."""


_PASSING_STATUS = (401, 408, 425, 429)
_PASSING_S3 = ("ExpiredToken", "RequestTimeout", "RequestTimeTooSkewed", "SlowDown", "Throttling")
"""HTTP statuses below 500, and codes of object stores, that another try may not meet."""

_LASTING_OS = {
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EINVAL, errno.EFBIG),
}
"""Errors of a file system that do not pass by themselves; a full or read-only disk, or one that is away, does."""

_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors of a file system that is there to be read only."""

_TRANSPORTS = ("requests", "urllib3", "botocore", "boto3", "google", "azure")
"""Packages whose errors mean that something between here and an artifact store failed."""


class Unreachable(Exception):
    """The tracking server or database cannot be used now; a later try may succeed.

    Args:
        answers: it is there, but cannot take what it was given: others may fare better.
        login: it is there, but does not know who is asking.
    """

    def __init__(self, text: str, *, answers: bool = False, login: bool = False) -> None:
        super().__init__(f"the login is not accepted; an expired token? {text}" if login else text)
        self.answers = answers
        self.login = login


class Store:
    """A client made on first use, from explicit addresses: nothing depends on MLflow's global state.

    Can be pickled into workers; each process makes its own client.
    """

    def __init__(self, tracking_uri: str | None, storage: Path | str, experiment: str) -> None:
        self.storage = local_storage(storage)
        self.folder = self.storage / "mlflow"
        self.uri = _absolute(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None, self.storage)
        self.experiment = experiment
        self._artifacts = self.folder / "artifacts"
        self._client: MlflowClient | None = None
        self._experiment_id = ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    @property
    def shown_uri(self) -> str:
        """The address without user name and password."""
        return str(redact(self.uri))

    @property
    def is_server(self) -> bool:
        return self.uri.startswith(("http://", "https://"))

    @property
    def _database(self) -> Path | None:
        """The file that is spoken to without a server."""
        return Path(self.uri.removeprefix("sqlite:///").partition("?")[0]) if self.uri.startswith("sqlite:") else None

    @property
    def experiment_id(self) -> str:
        self.client()
        return self._experiment_id

    def client(self) -> MlflowClient:
        """The client; the first call of all processes creates the database and the experiment once.

        What is there already can be read in a storage that cannot be written to.

        Raises:
            Unreachable: the server does not answer.
            MotipError: the address is not one that MLflow understands, or access is refused.
        """
        if self._client is None:
            with quiet_mlflow(), self._first_start(), self.errors():
                client = resolving_client(self.uri, self._present)
                self._experiment_id = self._find_experiment(client)
                self._client = client
        return self._client

    def follow(self) -> None:
        """Make the database of a storage that was moved tell of the new place; for what is about to start a run.

        Raises:
            Unreachable, MotipError: as ``client``; or the database cannot be changed.
        """
        client = self.client()
        with self._first_start(reading=False):
            if self._database is None or self._database.parent != self.folder:
                return
            with self.errors():
                recorded = str(client.get_experiment(self._experiment_id).artifact_location)
            if moved_from(recorded, self._artifacts) is not None:
                follow(self._database, recorded, self._artifacts)

    def patiently(self, action: Callable[[], Result], patience: float) -> Result:
        """The result of ``action``, tried again for ``patience`` seconds while the server is away."""
        deadline, pause = time.monotonic() + patience, 0.5
        while True:
            try:
                with self.errors():
                    return action()
            except Unreachable as error:
                if error.login:
                    # Somebody sits before a start, and no waiting renews a password.
                    raise MotipError(
                        f"MLflow does not let us in: {str(error)[:300]}",
                        where=self.shown_uri,
                        fix="renew MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
                    ) from error
                if time.monotonic() + pause > deadline:
                    raise MotipError(
                        "MLflow cannot be reached",
                        where=self.shown_uri,
                        found=str(redact(str(error)))[:300],
                        expected=f"an answer within {patience:g} s",
                        fix="start the server, correct MLFLOW_TRACKING_URI, or unset it to use a database "
                        f"under {self.folder}",
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, 10)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what MLflow and its transports raise into Unreachable or into a MotipError."""
        try:
            yield
        except (Unreachable, MotipError):
            raise
        except Exception as error:
            text = str(redact(str(error)))
            passing = _is_passing(error)
            if passing is None:
                raise
            if passing:
                login = _is_login(error)
                raise Unreachable(text, answers=_answers(error) and not login, login=login) from error
            raise MotipError(
                f"MLflow refuses: {text[:500]}",
                where=self.shown_uri,
                found=getattr(error, "error_code", None) or type(error).__name__,
                fix="check the address and the rights of MLFLOW_TRACKING_URI (or the database file, and the artifacts "
                "beside it); a run that was deleted in MLflow cannot be continued",
            ) from error

    def _find_experiment(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            location = None if self.is_server else self._artifacts.as_uri()
            try:
                return str(client.create_experiment(self.experiment, artifact_location=location))
            except Exception as error:
                if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(self.experiment)
        if found is None or found.lifecycle_stage != "active":
            raise MotipError(
                f"the MLflow experiment {self.experiment!r} was deleted",
                where=self.shown_uri,
                expected="an active experiment",
                fix="restore it (mlflow experiments restore) or remove it for good (mlflow gc)",
            )
        return str(found.experiment_id)

    def _present(self, place: str) -> Path | None:
        """Where artifacts recorded at ``place`` are in this storage; None where MLflow is to deal with them."""
        beside = self._database is not None and self._database.parent == self.folder
        return present(place, self._artifacts) if beside and place.startswith(("/", "file:///")) else None

    @contextlib.contextmanager
    def _first_start(self, *, reading: bool = True) -> Iterator[None]:
        """One process at a time creates the schema: simultaneous migrations of a new database break it.

        Args:
            reading: a database that is there is enough; the lock is left out where it cannot be written.

        Raises:
            MotipError: the folder cannot be written to.
        """
        if self.is_server:
            yield
            return
        folder = self.folder
        if self._database is not None:
            folder = self._database.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stream = (folder / ".first-start.lock").open("w")
        except OSError as error:
            there = self._database is not None and self._database.is_file()
            if not (reading and there and error.errno in _NO_RIGHT):
                raise MotipError(
                    f"cannot keep the MLflow database here: {error.strerror or error}",
                    where=folder,
                    expected="a writable folder",
                    fix="choose another --storage, or set MLFLOW_TRACKING_URI to a server",
                ) from error
            stream = None
        with stream or contextlib.nullcontext():
            if stream is not None:
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def local_storage(storage: Path | str) -> Path:
    """The folder for the database and the spool: ``storage`` itself, or ~/motip where storage is a remote URI."""
    text = str(storage)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    elif "://" in text:
        text = "~/motip"
    return Path(text).expanduser().resolve()


@contextlib.contextmanager
def quiet_mlflow() -> Iterator[None]:
    """No telemetry, short waits for a server that is away (the spool does the waiting), no migration chatter."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    loggers = [logging.getLogger(name) for name in ("mlflow.store.db.utils", "alembic")]
    levels = [logger.level for logger in loggers]
    import mlflow  # noqa: F401  (its import sets the levels of its own loggers)

    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _absolute(uri: str | None, storage: Path) -> str:
    """The address with every path in it absolute: a relative database would follow the working directory."""
    if uri is None:
        return f"sqlite:///{storage / 'mlflow' / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        path, mark, options = uri.removeprefix("sqlite:///").partition("?")
        return f"sqlite:///{(storage / path).resolve()}{mark}{options}"
    if "://" not in uri or uri.startswith("file:"):
        raise MotipError(
            "MLflow no longer keeps runs in plain folders",
            where="MLFLOW_TRACKING_URI",
            found=uri,
            expected="an address such as http://host:5000 or sqlite:////data/mlflow.db",
            fix="unset it to use a database under --storage, or give one of these",
        )
    return uri


def _is_passing(error: Exception) -> bool | None:
    """Whether another try may succeed; None for an error that comes neither from MLflow nor from the way to it."""
    code, status = getattr(error, "error_code", None), _http_status(error)
    if status is not None:
        return status >= 500 or status in _PASSING_STATUS or _s3_code(error) in _PASSING_S3
    if code is not None:
        return code in _PASSING
    module, name = type(error).__module__, type(error).__name__
    if module.startswith("sqlalchemy."):
        return name in ("OperationalError", "TimeoutError")
    if isinstance(error, (ConnectionError, TimeoutError)) or module.split(".")[0] in _TRANSPORTS:
        return True
    return error.errno not in _LASTING_OS if isinstance(error, OSError) else None


def _is_login(error: Exception) -> bool:
    status = _http_status(error)
    return status == 401 or (status is None and getattr(error, "error_code", None) in _LOGIN)


def _answers(error: Exception) -> bool:
    """Whether the error is that of somebody who was reached: a status, or a local file system."""
    if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.split(".")[0] in _TRANSPORTS:
        return _http_status(error) is not None
    return isinstance(error, OSError) or _http_status(error) is not None


def _http_status(error: BaseException) -> int | None:
    """The status that a server or an object store refused with, also where a transport wrapped it in its own error."""
    if hasattr(error, "error_code"):
        # MLflow calls a status without a code of its own, such as 413 from a proxy, an internal error.
        told = re.search(r"failed with error code (\d{3}) ", str(error))
        return int(told[1]) if told else None
    response = getattr(error, "response", None)
    facts = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    for status in (
        getattr(response, "status_code", None),
        facts.get("HTTPStatusCode"),
        getattr(error, "status_code", None),
        getattr(error, "code", None),
    ):
        if isinstance(status, int) and 400 <= status < 600:
            return int(status)
    before = error.__cause__ or error.__context__
    wrapped = type(error).__module__.split(".")[0] in _TRANSPORTS and before is not None
    return _http_status(before) if wrapped and before is not None else None


def _s3_code(error: BaseException | None) -> str:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # raised again while it is handled, an error is its own context
        seen.add(id(error))
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    return ""
