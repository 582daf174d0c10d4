"""MLflow server or database: address, creation, and classification of its errors."""

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
from motip.lineage.relocate import artifact_path, previous_location, relocating_client
from motip.storage.redaction import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_LOGIN = {"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
"""MLflow error codes of refused credentials, which may have expired and can be renewed."""

_TRANSIENT = _LOGIN | {
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "CANCELLED",
    "ABORTED",
}
"""MLflow error codes of transient errors."""

_TRANSIENT_STATUS = (401, 408, 425, 429)
_TRANSIENT_S3 = ("ExpiredToken", "RequestTimeout", "RequestTimeTooSkewed", "SlowDown", "Throttling")
"""HTTP statuses below 500, and codes of object stores, of transient errors."""

_PERMANENT_OS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
_PERMANENT_ERRNO = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EFBIG)
"""File system errors that are permanent; others are transient, such as those of a full, read-only or absent disk."""

_TRANSPORTS = ("requests", "urllib3", "botocore", "boto3", "google", "azure")
"""Packages whose errors mean that the connection to a server or artifact store failed."""


class Unreachable(Exception):
    """The tracking server or database cannot be used now; a retry may succeed.

    Args:
        server_up: the server responds, but cannot accept this entry; other entries may succeed.
        login: the server responds, but refuses the credentials.
    """

    def __init__(self, text: str, *, server_up: bool = False, login: bool = False) -> None:
        super().__init__(f"the login is not accepted; an expired token? {text}" if login else text)
        self.server_up = server_up
        self.login = login


class Store:
    """MLflow client created on first use from explicit addresses, independent of MLflow's global state.

    Picklable; each process creates its own client.
    """

    def __init__(self, tracking_uri: str | None, storage: Path | str, experiment: str, patience: float = 120.0) -> None:
        self.storage = local_storage(storage)
        self.folder = self.storage / "mlflow"
        self.uri = _absolute(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None, self.storage)
        self.experiment = experiment
        self._patience = patience
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
        """The SQLite file, None for a server or another database."""
        return Path(self.uri.removeprefix("sqlite:///").partition("?")[0]) if self.uri.startswith("sqlite:") else None

    @property
    def experiment_id(self) -> str:
        self.client()
        return self._experiment_id

    def client(self) -> MlflowClient:
        """The client; the first call of all processes creates the database and the experiment.

        An existing database can be read in a read-only storage.

        Raises:
            Unreachable: the server does not answer.
            MotipError: the address is invalid, or access is refused.
        """
        if self._client is None:
            with _quiet_mlflow(), self._creation_lock(), self.errors():
                client = relocating_client(self.uri, self._artifact_path)
                self._experiment_id = self._find_experiment(client)
                self._client = client
        return self._client

    def check_location(self) -> None:
        """Check that the database can be written, before a start.

        Warns if MLflow's own pages look for artifacts in another folder, since the storage was moved or copied.

        Raises:
            Unreachable, MotipError: as ``client``; or the folder is not writable.
        """
        client = self.client()
        if self._database is not None and not os.access(self._database.parent, os.W_OK):
            raise _not_writable(self._database.parent, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        if self._database is None or self._database.parent != self.folder:
            return
        with self.errors():
            recorded = str(client.get_experiment(self._experiment_id).artifact_location)
        before = previous_location(recorded, self._artifacts)
        if before is not None:
            logger.warning(
                "the storage was moved from %s: artifacts are read and written in %s; for MLflow's own pages run "
                "`motip lineage relocate %s %s`",
                before.parents[1],
                self.folder,
                before.parents[1],
                self.storage,
            )

    def probe(self) -> None:
        """Read the experiment, to distinguish one refused request from an outage.

        A proxy answers 403 or 404 to every request while the MLflow behind it restarts.

        Raises:
            Unreachable: MLflow accepts nothing now.
        """
        try:
            with self.errors():
                self.client().get_experiment(self.experiment_id)
        except Exception as error:
            refusal = "" if isinstance(error, Unreachable) else "it refuses every request: "
            raise Unreachable(refusal + reason_of(error)) from error

    def retry(self, action: Callable[[], Result]) -> Result:
        """The result of ``action``, retried for the patience while the server is unreachable.

        Raises:
            MotipError: the server stays unreachable, refuses the request, or refuses the credentials (no retries).
        """
        deadline, pause = time.monotonic() + self._patience, 0.5
        while True:
            try:
                with self.errors():
                    return action()
            except Unreachable as error:
                if error.login:
                    # Interactive start: fail immediately, since retrying cannot fix credentials.
                    raise MotipError(
                        f"MLflow refuses the credentials: {str(error)[:300]}",
                        where=self.shown_uri,
                        fix="renew MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
                    ) from error
                if time.monotonic() + pause > deadline:
                    raise MotipError(
                        "MLflow cannot be reached",
                        where=self.shown_uri,
                        found=str(redact(str(error)))[:300],
                        expected=f"an answer within {self._patience:g} s",
                        fix="start the server, correct MLFLOW_TRACKING_URI, or unset it to use a database "
                        f"under {self.folder}",
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, 10)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Translate errors of MLflow and its transports into Unreachable or MotipError; others stay unchanged."""
        try:
            yield
        except (Unreachable, MotipError):
            raise
        except Exception as error:
            translated = _translate(error, self.shown_uri)
            if translated is error:
                raise
            raise translated from error

    def _find_experiment(self, client: MlflowClient) -> str:
        if client.get_experiment_by_name(self.experiment) is None:
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

    def _artifact_path(self, recorded: str) -> Path | None:
        """Folder in this storage of artifacts recorded at a location; None leaves the location to MLflow."""
        own_database = self._database is not None and self._database.parent == self.folder
        if not own_database or not recorded.startswith(("/", "file:///")):
            return None
        return artifact_path(recorded, self._artifacts)

    @contextlib.contextmanager
    def _creation_lock(self) -> Iterator[None]:
        """Lock for creating the schema: simultaneous migrations of a new database corrupt it.

        An existing database in a read-only folder is used without the lock.

        Raises:
            MotipError: the folder is not writable.
        """
        if self.is_server:
            yield
            return
        folder = self.folder if self._database is None else self._database.parent
        with contextlib.ExitStack() as opened:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stream = opened.enter_context((folder / ".first-start.lock").open("w"))
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError as error:
                exists = self._database is not None and self._database.is_file()
                if not exists or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise _not_writable(folder, error) from error
            yield


def local_storage(storage: Path | str) -> Path:
    """Folder for the database and the offsets: ``storage`` itself, or ~/motip if it is a remote URI."""
    text = str(storage)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    elif "://" in text:
        text = "~/motip"
    return Path(text).expanduser().resolve()


@contextlib.contextmanager
def _quiet_mlflow() -> Iterator[None]:
    """No telemetry, short timeouts for an unreachable server, no log lines of migrations."""
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
    """The address with absolute paths: a relative database would depend on the working directory."""
    if uri is None:
        return f"sqlite:///{storage / 'mlflow' / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        path, mark, options = uri.removeprefix("sqlite:///").partition("?")
        return f"sqlite:///{(storage / path).resolve()}{mark}{options}"
    if "://" not in uri or uri.startswith("file:"):
        raise MotipError(
            "MLflow no longer stores runs in plain folders",
            where="MLFLOW_TRACKING_URI",
            found=uri,
            expected="an address such as http://host:5000 or sqlite:////data/mlflow.db",
            fix="unset it to use a database under --storage, or give one of these",
        )
    return uri


def _not_writable(folder: Path, error: OSError) -> MotipError:
    return MotipError(
        f"cannot write the MLflow database here: {error.strerror or error}",
        where=folder,
        expected="a writable folder",
        fix="choose another --storage, or set MLFLOW_TRACKING_URI to a server",
    )


def reason_of(error: Exception) -> str:
    """An error as one line without secrets."""
    text = error.what if isinstance(error, MotipError) else str(error)
    if not isinstance(error, (MotipError, Unreachable)):
        text = f"{type(error).__name__}: {text}"
    return str(redact(text)).partition("\n")[0][:500]


def _translate(error: Exception, where: str) -> Exception:
    """Unreachable if a retry may succeed, MotipError if MLflow refuses; the error itself if it is neither's."""
    status, s3_code = _answer(error)
    code, module = getattr(error, "error_code", None), type(error).__module__
    lost = isinstance(error, (ConnectionError, TimeoutError)) or module.split(".")[0] in _TRANSPORTS
    if status is not None:
        transient = status >= 500 or status in _TRANSIENT_STATUS or s3_code in _TRANSIENT_S3
    elif code is not None:
        transient = code in _TRANSIENT
    elif module.startswith("sqlalchemy."):
        transient = type(error).__name__ in ("OperationalError", "TimeoutError")
    elif lost:
        transient = True
    elif isinstance(error, OSError):
        transient = not isinstance(error, _PERMANENT_OS) and error.errno not in _PERMANENT_ERRNO
    else:
        return error
    text = str(redact(str(error)))
    if transient:
        login = status == 401 or (status is None and code in _LOGIN)
        answers = status is not None or (isinstance(error, OSError) and not lost)
        return Unreachable(text, server_up=answers and not login, login=login)
    return MotipError(
        f"MLflow refuses: {text[:500]}",
        where=where,
        found=code or type(error).__name__,
        fix="check the address and the rights of MLFLOW_TRACKING_URI (or the database file, and the artifacts "
        "beside it); a run that was deleted in MLflow cannot be continued",
    )


def _answer(error: BaseException | None) -> tuple[int | None, str]:
    """HTTP status and error code in the answer of a server or object store, also if a transport wrapped the error."""
    seen: list[BaseException] = []
    while error is not None and not any(error is each for each in seen):  # an error may be its own context
        if hasattr(error, "error_code"):
            # MLflow reports a status that has no error code, such as 413 from a proxy, as an internal error.
            match = re.search(r"failed with error code (\d{3}) ", str(error))
            return (int(match[1]) if match else None), ""
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
        if response is not None:
            return getattr(response, "status_code", None), ""
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None, ""
