"""`motip job submit`: submit a Ray job with this folder's code and follow its log."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Submit jobs to a Ray cluster. To list or stop them: ray job --help")


@app.callback()
def _group() -> None:
    """Keeps `submit` a subcommand: Typer collapses a group with a single command."""


@app.command("submit", context_settings={"allow_interspersed_args": False})
def submit(
    command: Annotated[list[str], typer.Argument(help="The job's command, after `--`.")],
    address: Annotated[
        str | None,
        typer.Option(help="Dashboard address (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)."),
    ] = None,
    working_dir: Annotated[str, typer.Option(help="Folder to upload, without the files in its .rayignore.")] = ".",
    max_mb: Annotated[float, typer.Option(help="Upload limit in MB (10^6 bytes); a larger package is refused.")] = 50.0,
    storage: Annotated[str | None, typer.Option(help="Added to the command as --storage.")] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]",
            help="Environment variable of the job; without a value, the value in this shell. Can be repeated.",
        ),
    ] = None,
    no_follow: Annotated[
        bool, typer.Option("--no-follow", help="Return after the submission, without following the log.")
    ] = False,
) -> None:
    """Upload this folder's code to the cluster, run a command with it, and print the job's log until it ends.

    Authentication uses the token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token. Variables with names of
    secrets are refused, because Ray shows a job's environment. Ctrl-C leaves the job running. Exit status 1: the job
    failed or was stopped.

    Example: motip job submit --storage s3://bucket/motip -- python ray_jobs/curriculum.py
    --config configs/curriculum.yaml --data-root s3://bucket/raw --workers 1:4
    """
    from motip.cli import job_submission

    # Check everything before anything is uploaded.
    package = job_submission.list_package(Path(working_dir))
    print(package.describe())
    job_submission.check_size(package, max_mb)
    line = job_submission.build_entrypoint(command, storage)
    environment = job_submission.job_environment(env or ())
    # Connect and submit.
    client = job_submission.connect_to_jobs(address)
    url = client.get_address()
    if job_submission.is_unencrypted(url):
        print(
            f"warning: {job_submission.redact_url(url)} receives the token unencrypted; "
            "an SSH tunnel (`ray dashboard`) is safer"
        )
    job = job_submission.submit_package(client, line, package, environment)
    print(f"job {job} on {job_submission.redact_url(url)}: {line}")
    if environment:
        print(f"  environment: {', '.join(sorted(environment))}")
    print(f"  log: ray job logs --follow {job}    stop: ray job stop {job}", flush=True)
    if no_follow:
        return
    # Follow the log.
    try:
        status = job_submission.follow_log(client, job, _write)
    except KeyboardInterrupt:
        print(f"\nno longer following; the job keeps running. Stop it with: ray job stop {job}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"job {job}: {status.value}")
    if status.value != "SUCCEEDED":
        raise typer.Exit(1)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
