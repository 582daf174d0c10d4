"""Send a job to a running cluster: what is uploaded, what the job is told, and its log."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from motip.errors import MotipError
from motip.lineage.provenance import COMMIT_VARIABLE, provenance, redact

if TYPE_CHECKING:
    from ray.job_submission import JobStatus, JobSubmissionClient

MB = 1_000_000
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
"""Where `ray dashboard cluster.yaml` ends on this machine."""

ABSOLUTE_FLAGS = ("--storage", "--data-root")


@dataclass(frozen=True)
class Package:
    """What a job is sent with.

    Attributes:
        folder: the working directory of the job.
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


def package(folder: Path) -> Package:
    """List what Ray would upload of a folder: everything that its .rayignore and .gitignore files do not name.

    Ray's own walk is used, so what is measured is what is sent.

    Raises:
        MotipError: it is no folder.
    """
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise MotipError("there is no such folder to send", where="--working-dir", found=folder)
    _before_ray_is_imported()
    from ray._private.runtime_env.packaging import _dir_travel

    files: list[tuple[int, str]] = []

    def note(path: Path) -> None:
        if path.is_file():
            files.append((path.stat().st_size, str(path.relative_to(folder))))

    use_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    _dir_travel(folder, [], note, include_gitignore=use_gitignore, logger=_Silent())  # type: ignore[arg-type]
    return Package(folder, tuple(sorted(files, key=lambda file: (-file[0], file[1]))))


def check_size(sent: Package, max_mb: float) -> None:
    """Raises MotipError where the package is larger than `max_mb` (10^6 bytes): nothing has been sent then."""
    if sent.size <= max_mb * MB:
        return
    largest = ", ".join(f"{path} ({size / MB:.1f} MB)" for size, path in sent.files[:3])
    raise MotipError(
        "the package is too large to send; nothing was sent",
        where=sent.folder,
        found=f"{sent.size / MB:.1f} MB; the largest: {largest}",
        expected=f"at most {max_mb:g} MB (--max-mb)",
        fix="name what the job does not need in .rayignore; data and weights belong into the storage or S3",
    )


def job_environment(wanted: Sequence[str]) -> dict[str, str]:
    """Variables for the job from `NAME=VALUE`, or `NAME` for the value it has here; the commit of this checkout, and
    time to save when it is stopped.

    Raises:
        MotipError: a variable that is not set here, or one that holds a secret. Ray keeps a job's environment in its
            job list and writes it to logs on every node.
    """
    variables: dict[str, str] = {}
    for text in wanted:
        name, equals, value = text.partition("=")
        if not equals:
            if name not in os.environ:
                raise MotipError(
                    "this variable is not set here", where=f"--env {name}", fix=f"set it, or give --env {name}=VALUE"
                )
            value = os.environ[name]
        if redact(value, name) != value:
            raise MotipError(
                "a secret may not travel with a job: Ray shows a job's environment and writes it to its logs",
                where=f"--env {name}",
                fix="give the nodes an IAM instance profile, or set it in the environment of `ray start` on the nodes",
            )
        variables[name] = value
    # Between SIGTERM and SIGKILL of `ray job stop`: training saves its position in that time (Ray's default is 3 s).
    variables.setdefault("RAY_JOB_STOP_WAIT_TIME_S", "90")
    code = provenance()["git"]
    if code["commit"]:
        variables.setdefault(COMMIT_VARIABLE, code["commit"] + ("-dirty" if code["dirty"] else ""))
    return variables


def entrypoint(command: Sequence[str], storage: str | None = None) -> str:
    """The job's command line, with `--storage` added where it is given and the command has none.

    Raises:
        MotipError: no command, another storage in it, a path that would end in the job's throw-away copy, or a secret.
    """
    words = list(command)
    if not words:
        raise MotipError("no command to run", expected="motip job submit -- python ray_jobs/curriculum.py ...")
    own = _value_of(words, "--storage")
    if storage is not None and own is None:
        words += ["--storage", storage]
    elif storage is not None and own != storage:
        raise MotipError("the storage is named twice", where="--storage", found=f"{storage} and {own}")
    for flag in ABSOLUTE_FLAGS:
        value = _value_of(words, flag)
        if value is not None and "://" not in value and not value.startswith(("/", "~")):
            raise MotipError(
                "a submitted job needs absolute paths: it runs in a copy of the folder that is thrown away",
                where=flag,
                found=value,
                expected="an absolute path, the same on every node, or an s3:// URI",
            )
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if redact(value, name.lstrip("-")) != value if equals else redact(word, before.lstrip("-")) != word:
            raise MotipError(
                "a secret may not stand in a job's command: Ray shows it to everyone who can see the dashboard",
                where=name if equals else before or "the command",
                fix="set it in the environment of `ray start` on the nodes",
            )
    return shlex.join(words)


def connect_to_jobs(address: str | None) -> JobSubmissionClient:
    """A client of the head's job server, with the token of this machine.

    Args:
        address: of the dashboard; None takes RAY_API_SERVER_ADDRESS, else the end of the SSH tunnel here.

    Raises:
        MotipError: nobody answers, or the token is missing or wrong.
    """
    url = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    url = url if "://" in url else f"http://{url}"
    _check_answers(url)
    _before_ray_is_imported()
    # Ray prefers this variable to its own argument.
    os.environ["RAY_API_SERVER_ADDRESS"] = url
    import logging

    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # They name every ignore file on the way and repeat what is said here.
    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(url)
    except AuthenticationError as error:
        raise MotipError(
            "the cluster does not accept the token of this machine",
            where=shown(url),
            expected="the same token as on the head",
            fix="export RAY_AUTH_MODE=token, and copy ~/.ray/auth_token from the head or set RAY_AUTH_TOKEN_PATH",
        ) from error
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise MotipError(
            f"this is no Ray job server: {str(redact(str(error)))[:300]}",
            where=shown(url),
            expected=f"the dashboard of a head, such as {DEFAULT_ADDRESS}",
            fix="give its address with --address, or open the tunnel with `ray dashboard cluster.yaml`",
        ) from error


def send(client: JobSubmissionClient, command: str, sent: Package, environment: dict[str, str]) -> str:
    """Upload the package, start the job, and return its id.

    Raises:
        MotipError: the head refuses it.
    """
    try:
        return str(
            client.submit_job(
                entrypoint=command, runtime_env={"working_dir": str(sent.folder), "env_vars": environment}
            )
        )
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise MotipError(
            f"the head refuses the job: {str(redact(str(error)))[:500]}",
            where=shown(client.get_address()),
            fix="look at `ray job list`: the job may have been started before the answer was lost",
        ) from error


def follow(
    client: JobSubmissionClient, job: str, say: Callable[[str], Any], *, patience: float = 120.0, pause: float = 2.0
) -> JobStatus:
    """Print the job's log until it ends; a connection that breaks is taken up again where it was.

    Args:
        say: called with each piece of the log.
        patience: seconds without any answer after which it is given up; the job goes on.

    Raises:
        MotipError: the head was away for longer than that.
    """
    log = _Log(say)
    last = time.monotonic()
    while True:
        before = log.printed
        try:
            asyncio.run(log.copy(client, job))
            status = client.get_job_status(job)
            if status.is_terminal():
                return status
            last = time.monotonic()
        except Exception as error:  # aiohttp, requests and Ray each have their own for a lost connection
            if log.printed > before:
                last = time.monotonic()
            if time.monotonic() - last > patience:
                raise MotipError(
                    "the connection to the head is lost; the job goes on without this command",
                    where=shown(client.get_address()),
                    found=f"{type(error).__name__}, for {patience:g} s",
                    fix=f"open the tunnel again and follow with `ray job logs --follow {job}`",
                ) from error
        time.sleep(pause)


class _Log:
    """Prints each character of a log once, though the head sends it from its beginning on every connection."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        self._say = say
        self.printed = 0

    async def copy(self, client: JobSubmissionClient, job: str) -> None:
        received = 0
        async for piece in client.tail_job_logs(job):
            fresh = piece[max(0, self.printed - received) :]
            received += len(piece)
            if fresh:
                self._say(fresh)
                self.printed = received


class _Silent:
    """Ray names the ignore files of every folder on its logger; the table of the largest files says enough."""

    def info(self, *_: object) -> None:
        return

    debug = warning = error = info


def shown(url: str) -> str:
    """An address without user name and password."""
    return str(redact(url))


def in_clear_text(url: str) -> bool:
    """Whether the token would cross a network unencrypted."""
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname not in LOOPBACK


def _before_ray_is_imported() -> None:
    """Ray looks at these once, when it is imported."""
    token = Path("~/.ray/auth_token").expanduser()
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") or token.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def _check_answers(url: str) -> None:
    """Fail in seconds where nobody listens."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise MotipError(
            f"no Ray head answers: {getattr(error, 'strerror', None) or error}",
            where=shown(url),
            expected="the dashboard's address, or its end of the SSH tunnel",
            fix="run `ray dashboard cluster.yaml` in another terminal and leave it open, or give --address",
        ) from error


def _value_of(words: Sequence[str], flag: str) -> str | None:
    for index, word in enumerate(words):
        if word == flag and index + 1 < len(words):
            return words[index + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None
