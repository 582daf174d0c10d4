"""Secrets in the environment of a training appear neither in its output nor in files or database."""

from __future__ import annotations

import functools
import os
import secrets
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from motip.errors import MotipError
from motip.storage import paths
from motip.storage.redaction import redact
from motip.storage.retries import with_retries
from tests.helpers.small_curriculum import write_files

ROOT = Path(__file__).resolve().parents[2]


def planted() -> dict[str, str]:
    """Variables as users set them, with random values that cannot occur by chance."""
    secret = secrets.token_hex
    return {
        "AWS_ACCESS_KEY_ID": "AKIA" + secret(8).upper(),
        "AWS_SECRET_ACCESS_KEY": secret(20),
        "AWS_SESSION_TOKEN": secret(40),
        "RAY_AUTH_TOKEN": secret(32),
        "MLFLOW_TRACKING_USERNAME": "user" + secret(8),
        "MLFLOW_TRACKING_PASSWORD": secret(16),
        "HF_TOKEN": "hf_" + secret(17),
        "AWS_ENDPOINT_URL": f"http://me:{secret(16)}@127.0.0.1:9",
    }


def needles(variables: dict[str, str]) -> list[str]:
    """Strings that must not occur: the values, and the password inside an address."""
    return [value.partition("me:")[2].partition("@")[0] or value for value in variables.values()]


def found_in(folder: Path, words: list[str]) -> list[str]:
    return [
        f"{path.relative_to(folder)}: ...{word[-4:]}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for content in [path.read_bytes()]
        for word in words
        if word.encode() in content
    ]


def job(script: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_", "MLFLOW_"))}
    command = [sys.executable, f"ray_jobs/{script}", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**kept, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://u:pa/ss@host/db", "postgresql://<redacted>@host/db"),
        ("postgresql://u:p@ss@host/db", "postgresql://<redacted>@host/db"),
        ("postgresql://u:p?s#s@host/db", "postgresql://<redacted>@host/db"),
        ("postgresql://host/db?sslmode=require&sslpassword=pass", "postgresql://host/db?<redacted>"),
        ("postgresql+psycopg2://u:p@/s@s@host:5432/db?x=1", "postgresql+psycopg2://<redacted>@host:5432/db?x=1"),
        ("https://u:pa/ss@host/x", "https://<redacted>@host/x"),
        ("https://u:p@ss@host/x", "https://<redacted>@host/x"),
        ("http://u:5000@host/x", "http://<redacted>@host/x"),
        ("postgresql://u:12/ss@host/db", "postgresql://<redacted>@host/db"),
        ("see http://h:5000/x@y, http://u:p@h:80/", "see http://h:5000/x@y, http://<redacted>@h:80/"),
        ("https://token@host/x", "https://<redacted>@host/x"),
        ("https://h/x?X-Amz-Security-Token=pass&a=1", "https://h/x?<redacted>"),
        ("https://h/x?a=1&AWSSecretKey=pass", "https://h/x?<redacted>"),
        ("https://h/x?sv=1&sig=pass", "https://h/x?<redacted>"),
        # The match ends with the address: words and JSON values around it are unchanged.
        ("see mysql://u:pa/ss@h/d, mail me@home", "see mysql://<redacted>@h/d, mail me@home"),
        ("see http://host:5000/ or ask me@home", "see http://host:5000/ or ask me@home"),
        ('{"a": "ftp://u:p/s@h", "b": "me@home"}', '{"a": "ftp://<redacted>@h", "b": "me@home"}'),
        ("'ftp://u:p@s@h' 'me@home'", "'ftp://<redacted>@h' 'me@home'"),
    ],
)
def test_redact_removes_the_secret_of_an_address_only(address: str, shown: str) -> None:
    assert redact(address) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/data@v2/x?y=a@b",
        "https://host/picture@2x.png",
        "http://127.0.0.1:5000/#/compare?runs=1",
        "http://h:5000/x@y",
        "HTTPS://host:8443/?mail=a@b",
        "http://[::1]:5000/#/x@y",
        "http://h:/x@y",
        "sqlite:////data/me@home/mlflow.db",
        "file:///a:b/c@d",
        "me@home",
        "https://host/x?page=2&config=big",
    ],
)
def test_an_address_without_a_secret_is_unchanged(address: str) -> None:
    assert redact(address) == address


def test_the_search_finds_planted_secrets(tmp_path: Path) -> None:
    variables = planted()
    assert len(set(needles(variables))) == len(variables)
    for index, word in enumerate(needles(variables)):
        (tmp_path / f"{index}.bin").write_bytes(b"\0\xff" + word.encode() + b"\0")
    assert len(found_in(tmp_path, needles(variables))) == len(variables)


def test_a_training_writes_no_secret(tmp_path: Path) -> None:
    variables = planted()
    path, storage = write_files(tmp_path), tmp_path / "storage"
    options = ["--config", path, "--data-root", tmp_path, "--storage", storage, "--workers", 0]
    done = job("curriculum.py", *options, "--until", "BDD-Foundation", **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    database = storage / "mlflow" / "mlflow.db"
    with sqlite3.connect(database) as opened:
        (params,) = opened.execute("select count(*) from params").fetchone()
    assert params > 50 and list((storage / "mlflow" / "artifacts").rglob("config.json"))
    assert [word for word in needles(variables) if word in done.stdout + done.stderr] == []
    assert found_in(tmp_path, needles(variables)) == []


def test_an_error_message_contains_no_secret(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An unreachable object store at an address with a password."""
    variables = planted()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(paths, "with_retries", functools.partial(with_retries, for_s=0.5))
    paths.s3.cache_clear()
    try:
        with pytest.raises(MotipError, match="S3 request failed") as refused:
            paths.location("s3://bucket/motip").exists()
    finally:
        paths.s3.cache_clear()
    assert [word for word in needles(variables) if word in str(refused.value) + caplog.text] == []
