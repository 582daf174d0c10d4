"""`motip job submit` against a fake job server: package, authentication, secrets, log."""

from __future__ import annotations

import io
import os
import secrets
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from motip.cli import job_submission
from motip.errors import MotipError
from tests.helpers.job_server import JOB, JobServer, job_server

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ("--", "python", "ray_jobs/curriculum.py", "--workers", "1:4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small project with files that must not be uploaded."""
    project = tmp_path / "project"
    sizes = {
        "ray_jobs/curriculum.py": 40,
        "motip/code.py": 3000,
        "outputs/big.bin": 90_000_000,
        ".git/pack": 80_000_000,
        "motip/built.db": 10,
        ".env": 12,
        "key.pem": 12,
    }
    for name, size in sizes.items():
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.truncate(size)  # sparse file
    (project / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    return project


def submit(
    folder: Path, server: JobServer | None, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process, since Ray reads its token once per process."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_", "MLFLOW_"))}
    kept |= {"HOME": str(folder.parent), "OMP_NUM_THREADS": "1", **environment}
    where = ("--address", server.address) if server else ()
    command = [
        sys.executable,
        "-m",
        "motip.cli",
        "job",
        "submit",
        "--working-dir",
        str(folder),
        *where,
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=120)


def test_submit_uploads_code_with_the_token_and_follows_the_log(folder: Path) -> None:
    token = secrets.token_hex(32)
    path = folder.parent / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text(token)
    with job_server(token=token) as server:
        options = ("--storage", "s3://bucket/motip", "--env", "AWS_REGION", "--env", "A=b c")
        ran = submit(folder, server, *options, *COMMAND, AWS_REGION="eu-west-1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (sent,) = server.uploaded
    names = zipfile.ZipFile(io.BytesIO(sent)).namelist()
    assert sorted(names) == [".rayignore", "motip/code.py", "ray_jobs/curriculum.py"]
    (job,) = server.jobs
    assert job["entrypoint"] == "python ray_jobs/curriculum.py --workers 1:4 --storage s3://bucket/motip"
    variables = job["runtime_env"]["env_vars"]
    assert (variables["AWS_REGION"], variables["A"]) == ("eu-west-1", "b c")
    assert variables.keys() <= {"AWS_REGION", "A", "MOTIP_GIT_COMMIT", "RAY_JOB_STOP_WAIT_TIME_S"}
    assert "hello\nworld\n" in ran.stdout and f"job {JOB}: SUCCEEDED" in ran.stdout
    assert "3 files, 0.00 MB" in ran.stdout and "motip/code.py" in ran.stdout
    assert token not in ran.stdout + ran.stderr + str(server.jobs)
    assert "INFO" not in ran.stderr


def test_large_package_is_rejected_before_the_upload(folder: Path) -> None:
    with (folder / "motip" / "weights.bin").open("wb") as stream:
        stream.truncate(60_000_000)
    with job_server() as server:
        ran = submit(folder, server, *COMMAND)
        assert ran.returncode == 2 and server.paths == []
        assert "too large; nothing was uploaded" in ran.stderr and "motip/weights.bin (60.0 MB)" in ran.stderr
        assert "60.00 MB  motip/weights.bin" in ran.stdout
        assert "big.bin" not in ran.stdout + ran.stderr
        assert submit(folder, server, "--max-mb", "70", "--no-follow", *COMMAND).returncode == 0
    assert len(server.uploaded) == 1 and len(server.uploaded[0]) == pytest.approx(60_000_000, rel=0.01)
    assert not any("logs" in path for path in server.paths)


@pytest.mark.parametrize("status", ["FAILED", "STOPPED"])
def test_failed_job_is_exit_status_1(folder: Path, status: str) -> None:
    with job_server(status=status) as server:
        ran = submit(folder, server, *COMMAND)
    assert ran.returncode == 1 and f"job {JOB}: {status}" in ran.stdout


def test_broken_connection_is_one_message_with_the_command_to_follow_on(folder: Path) -> None:
    with job_server(log="line 0\nline 1\n", cuts=[7, 0]) as server:
        ran = submit(folder, server, *COMMAND)
    assert ran.returncode == 2 and "line 0\n" in ran.stdout and "line 1" not in ran.stdout
    assert "connection to the head is lost; the job keeps running" in ran.stderr and "Traceback" not in ran.stderr
    assert f"ray job logs --follow {JOB}" in ran.stderr


def test_wrong_token_and_unreachable_head_are_one_message(folder: Path) -> None:
    wrong = secrets.token_hex(32)
    with job_server(token=secrets.token_hex(32)) as server:
        ran = submit(folder, server, *COMMAND, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=wrong)
    assert ran.returncode == 2 and "does not accept the token" in ran.stderr and "Traceback" not in ran.stderr
    assert wrong not in ran.stdout + ran.stderr and server.uploaded == []
    ran = submit(folder, None, "--address", "http://127.0.0.1:9", *COMMAND)
    assert ran.returncode == 2 and "the Ray head is not reachable" in ran.stderr and "ray dashboard" in ran.stderr


SECRET = "planted" + "0123456789abcdef"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--env", "AWS_SECRET_ACCESS_KEY"), "AWS_SECRET_ACCESS_KEY"),
        (("--env", f"RAY_AUTH_TOKEN={SECRET}"), "RAY_AUTH_TOKEN"),
        (("--env", f"MLFLOW_TRACKING_URI=https://me:{SECRET}@host"), "MLFLOW_TRACKING_URI"),
        ((*COMMAND, "--set", f"API_KEY={SECRET}"), "API_KEY"),
        ((*COMMAND, "--password", SECRET), "--password"),
        ((*COMMAND, f"--data-root=https://me:{SECRET}@host"), "--data-root"),
        ((*COMMAND, f"https://me:{SECRET}@host/data"), "1:4"),
    ],
)
def test_secrets_are_rejected_and_not_printed(
    folder: Path, arguments: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    arguments = arguments if "--" in arguments else (*arguments, *COMMAND)
    options, command = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    with pytest.raises(MotipError, match="secret") as rejected:
        job_submission.build_entrypoint(command)
        job_submission.job_environment(options[1::2])
    assert named in str(rejected.value) and SECRET not in str(rejected.value)


def test_relative_paths_in_the_command_are_errors() -> None:
    for flag in ("--storage", "--data-root"):
        with pytest.raises(MotipError, match="absolute"):
            job_submission.build_entrypoint(["python", "x.py", flag, "here"])
    for place in ("/data", "~/motip", "s3://bucket/x"):
        assert place in job_submission.build_entrypoint(["python", "x.py"], place)
    with pytest.raises(MotipError, match="twice"):
        job_submission.build_entrypoint(["python", "x.py", "--storage=/a"], "/b")
    with pytest.raises(MotipError, match="not set here"):
        job_submission.job_environment(["MOTIP_NO_SUCH_VARIABLE"])


def test_unencrypted_addresses_are_detected() -> None:
    assert job_submission.is_unencrypted("http://10.0.0.1:8265")
    assert not job_submission.is_unencrypted("http://127.0.0.1:8265")
    assert not job_submission.is_unencrypted("https://head:8265")


def test_rayignore_contains_all_of_gitignore() -> None:
    """.rayignore alone excludes all that .gitignore does, so that a copy without .git uploads the same files."""
    lines = set((ROOT / ".rayignore").read_text().split())
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.strip()]
    assert [line for line in ignored if line not in lines and f"{line}/" not in lines] == []


def test_ray_packs_code_and_configurations_only(tmp_path: Path) -> None:
    """Ray's own package of this checkout, filtered by .rayignore and .gitignore."""
    from ray._private.runtime_env.packaging import create_package

    packed = tmp_path / "package.zip"
    create_package(str(ROOT), packed, include_gitignore=True)
    assert packed.stat().st_size < 5 * 2**20
    names = zipfile.ZipFile(packed).namelist()
    assert {"motip/curriculum/run.py", "configs/curriculum.yaml"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    files = {name for name in names if not name.endswith("/")}
    assert {path for _, path in job_submission.list_package(ROOT).files} == files, "what is listed is what Ray uploads"


def test_package_of_this_checkout_is_small_and_has_the_files_of_jobs() -> None:
    package = job_submission.list_package(ROOT)
    paths = {path for _, path in package.files}
    assert {"ray_jobs/curriculum.py", "motip/cli/job_submission.py", "configs/curriculum.yaml", ".rayignore"} <= paths
    assert not [path for path in paths if path.startswith(("tests/", "docs/", ".git/", ".venv/", "outputs/"))]
    assert package.size < 10 * job_submission.MB
