"""Ray job submission: upload package, entrypoint and environment of a job, and its log."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pathspec import PathSpec

from motip.errors import MotipError
from motip.lineage.provenance import COMMIT_VARIABLE, provenance
from motip.storage.redaction import redact

if TYPE_CHECKING:
    from ray.job_submission import JobStatus, JobSubmissionClient

MB = 1_000_000
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
"""Local end of the tunnel that `ray dashboard cluster.yaml` opens."""

_ABSOLUTE_FLAGS = ("--storage", "--data-root")
"""Options whose local paths must be absolute in a submitted job."""


@dataclass(frozen=True)
class Package:
    """The files uploaded with a job.

    Attributes:
        folder: becomes the working directory of the job.
        files: (bytes, path in the folder), largest first. Ray packs them uncompressed, so their sum is the upload.
    """

    folder: Path
    files: tuple[tuple[int, str], ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(size for size, _ in self.files)

    def describe(self, largest: int = 5) -> str:
        lines = [f"package of {self.folder}: {len(self.files)} files, {self.size / MB:.2f} MB; the largest:"]
        return "\n".join(lines + [f"  {size / MB:8.2f} MB  {path}" for size, path in self.files[:largest]])


def list_package(folder: Path) -> Package:
    """List the files of a folder that Ray would upload: all but those in its .rayignore and .gitignore files.

    Raises:
        MotipError: not a folder.
    """
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise MotipError("the folder to upload does not exist", where="--working-dir", found=folder)
    files = [(path.stat().st_size, str(path.relative_to(folder))) for path in _uploaded(folder)]
    return Package(folder, tuple(sorted(files, key=lambda file: (-file[0], file[1]))))


def _uploaded(folder: Path, above: Sequence[tuple[Path, PathSpec]] = ()) -> Iterator[Path]:
    """The files below a folder that no ignore file in it or above it excludes.

    Ray's documented rules: patterns as in a .gitignore, relative to the folder of the ignore file.
    """
    names = [".rayignore"]
    if os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1":
        names.append(".gitignore")
    present = [folder / name for name in names if (folder / name).is_file()]
    specs = [*above, *((folder, PathSpec.from_lines("gitignore", path.read_text().splitlines())) for path in present)]
    for path in folder.iterdir():
        if any(spec.match_file(str(path.relative_to(base))) for base, spec in specs):
            continue
        if path.is_dir():
            yield from _uploaded(path, specs)
        elif path.is_file():
            yield path


def check_size(package: Package, max_mb: float) -> None:
    """Raise MotipError if the package is larger than `max_mb` (10^6 bytes)."""
    if package.size <= max_mb * MB:
        return
    largest = ", ".join(f"{path} ({size / MB:.1f} MB)" for size, path in package.files[:3])
    raise MotipError(
        "the package is too large; nothing was uploaded",
        where=package.folder,
        found=f"{package.size / MB:.1f} MB; the largest: {largest}",
        expected=f"at most {max_mb:g} MB (--max-mb)",
        fix="list files that the job does not need in .rayignore; put data and weights into the storage or S3",
    )


def job_environment(variables: Sequence[str]) -> dict[str, str]:
    """Environment of the job: the given variables, the commit of this checkout, and Ray's stop timeout.

    Args:
        variables: `NAME=VALUE`, or `NAME` for its value in this process.

    Raises:
        MotipError: a variable without a value in this process, or a secret: Ray lists a job's environment and writes
            it to logs on every node.
    """
    environment: dict[str, str] = {}
    for text in variables:
        name, equals, value = text.partition("=")
        if not equals:
            if name not in os.environ:
                raise MotipError(
                    "this variable is not set here", where=f"--env {name}", fix=f"set it, or give --env {name}=VALUE"
                )
            value = os.environ[name]
        if redact(value, name) != value:
            raise MotipError(
                "a job's environment may not contain a secret: Ray shows it and writes it to its logs",
                where=f"--env {name}",
                fix="give the nodes an IAM instance profile, or set it in the environment of `ray start` on the nodes",
            )
        environment[name] = value
    # Seconds between SIGTERM and SIGKILL of `ray job stop`, for training to save a checkpoint (Ray's default is 3).
    environment.setdefault("RAY_JOB_STOP_WAIT_TIME_S", "90")
    code = provenance()["git"]
    if code["commit"]:
        environment.setdefault(COMMIT_VARIABLE, code["commit"] + ("-dirty" if code["dirty"] else ""))
    return environment


def build_entrypoint(command: Sequence[str], storage: str | None = None) -> str:
    """The job's command line, with `--storage` added if it is given and the command has none.

    Raises:
        MotipError: no command, a different `--storage` in it, a relative path, or a secret.
    """
    words = list(command)
    if not words:
        raise MotipError("no command to run", expected="motip job submit -- python ray_jobs/curriculum.py ...")
    own = _value_of(words, "--storage")
    if storage is not None and own is None:
        words += ["--storage", storage]
    elif storage is not None and own != storage:
        raise MotipError("the storage is given twice", where="--storage", found=f"{storage} and {own}")
    for flag in _ABSOLUTE_FLAGS:
        value = _value_of(words, flag)
        if value is not None and "://" not in value and not value.startswith(("/", "~")):
            raise MotipError(
                "a submitted job needs absolute paths: it runs in a temporary copy of the folder",
                where=flag,
                found=value,
                expected="an absolute path, the same on every node, or an s3:// URI",
            )
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if redact(value, name.lstrip("-")) != value if equals else redact(word, before.lstrip("-")) != word:
            raise MotipError(
                "a job's command may not contain a secret: Ray shows it on the dashboard",
                where=name if equals else before or "the command",
                fix="set it in the environment of `ray start` on the nodes",
            )
    return shlex.join(words)


def connect_to_jobs(address: str | None) -> JobSubmissionClient:
    """A client of the head's job server, authenticated with the token of this machine.

    Args:
        address: of the dashboard; None: RAY_API_SERVER_ADDRESS, else _DEFAULT_ADDRESS.

    Raises:
        MotipError: no connection, or the token is missing or wrong.
    """
    url = address or os.environ.get("RAY_API_SERVER_ADDRESS") or _DEFAULT_ADDRESS
    url = url if "://" in url else f"http://{url}"
    _check_reachable(url)
    _set_ray_environment()
    # This variable takes precedence over the client's argument.
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # These loggers list every ignore file and repeat this module's messages.
    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(url)
    except AuthenticationError as error:
        raise MotipError(
            "the cluster does not accept the token of this machine",
            where=redact_url(url),
            expected="the same token as on the head",
            fix="export RAY_AUTH_MODE=token, and copy ~/.ray/auth_token from the head or set RAY_AUTH_TOKEN_PATH",
        ) from error
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise MotipError(
            f"not a Ray job server: {str(redact(str(error)))[:300]}",
            where=redact_url(url),
            expected=f"the dashboard of a head, such as {_DEFAULT_ADDRESS}",
            fix="give its address with --address, or open the tunnel with `ray dashboard cluster.yaml`",
        ) from error


def submit_package(client: JobSubmissionClient, command: str, package: Package, environment: dict[str, str]) -> str:
    """Upload the package, start the job, and return its id.

    Raises:
        MotipError: the head rejects the job.
    """
    try:
        return str(
            client.submit_job(
                entrypoint=command, runtime_env={"working_dir": str(package.folder), "env_vars": environment}
            )
        )
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise MotipError(
            f"the head rejected the job: {str(redact(str(error)))[:500]}",
            where=redact_url(client.get_address()),
            fix="check `ray job list`: the job may have started although the response was lost",
        ) from error


def follow_log(client: JobSubmissionClient, job: str, write: Callable[[str], Any]) -> JobStatus:
    """Write the job's log until the job ends, and return its status.

    Args:
        write: called with each new part of the log.

    Raises:
        MotipError: the connection is lost; the job keeps running.
    """

    async def copy() -> None:
        async for part in client.tail_job_logs(job):
            write(part)

    try:
        asyncio.run(copy())
        status = client.get_job_status(job)
        if not status.is_terminal():
            raise ConnectionError("the log ended before the job")
        return status
    except Exception as error:  # aiohttp, requests and Ray raise different types for a lost connection
        raise MotipError(
            "the connection to the head is lost; the job keeps running",
            where=redact_url(client.get_address()),
            found=type(error).__name__,
            fix=f"open the tunnel again and follow with `ray job logs --follow {job}`",
        ) from error


def redact_url(url: str) -> str:
    """The address without user name and password."""
    return str(redact(url))


def is_unencrypted(url: str) -> bool:
    """Whether the token would cross a network unencrypted."""
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname not in _LOOPBACK


def _set_ray_environment() -> None:
    """Set variables that Ray reads when it is imported."""
    token = Path("~/.ray/auth_token").expanduser()
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") or token.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def _check_reachable(url: str) -> None:
    """Raise MotipError within 10 s if the address does not accept connections."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise MotipError(
            f"the Ray head is not reachable: {getattr(error, 'strerror', None) or error}",
            where=redact_url(url),
            expected="the dashboard's address, or its end of the SSH tunnel",
            fix="run `ray dashboard cluster.yaml` in another terminal and leave it open, or give --address",
        ) from error


def _value_of(words: Sequence[str], flag: str) -> str | None:
    """The value of an option in a command line, None if it is not given."""
    for index, word in enumerate(words):
        if word == flag and index + 1 < len(words):
            return words[index + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None
