"""`motip job submit`: run a job of this folder on the cluster and follow its log."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Jobs on a cluster. Looking at them and stopping them: ray job --help")


@app.callback()
def _group() -> None:
    """Keeps `submit` a verb of its own: a group with one command would swallow its name."""


@app.command("submit", context_settings={"allow_interspersed_args": False})
def submit(
    command: Annotated[list[str], typer.Argument(help="The job's command, after `--`.")],
    address: Annotated[
        str | None,
        typer.Option(help="Of the dashboard (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)."),
    ] = None,
    working_dir: Annotated[str, typer.Option(help="Folder to send; .rayignore says what of it.")] = ".",
    max_mb: Annotated[float, typer.Option(help="Refuse to send more than this (10^6 bytes).")] = 50.0,
    storage: Annotated[str | None, typer.Option(help="Added to the command as --storage.")] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="A variable for the job; without a value, that of this shell."),
    ] = None,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Return when the job has been sent.")] = False,
) -> None:
    """Send this folder's code to the cluster, run a command in it, and print the job's log until it ends.

    It uses the token that Ray finds here (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token). Variables whose
    names say that they hold a secret are refused: Ray shows a job's environment. Ctrl-C leaves the job running. Exit
    status 1: the job failed or was stopped.

    Example: motip job submit --storage s3://bucket/motip -- python ray_jobs/curriculum.py
    --config configs/curriculum.yaml --data-root s3://bucket/raw --workers 1:4
    """
    from motip.cli import job_submission

    sent = job_submission.package(Path(working_dir))
    print(sent.describe())
    job_submission.check_size(sent, max_mb)
    line = job_submission.entrypoint(command, storage)
    environment = job_submission.job_environment(env or ())
    client = job_submission.connect_to_jobs(address)
    url = client.get_address()
    if job_submission.in_clear_text(url):
        print(
            f"warning: {job_submission.shown(url)} receives the token unencrypted; "
            "an SSH tunnel (`ray dashboard`) is safer"
        )
    job = job_submission.send(client, line, sent, environment)
    print(f"job {job} on {job_submission.shown(url)}: {line}")
    if environment:
        print(f"  environment: {', '.join(sorted(environment))}")
    print(f"  again: ray job logs --follow {job}    stop: ray job stop {job}", flush=True)
    if no_follow:
        return
    try:
        status = job_submission.follow(client, job, _write)
    except KeyboardInterrupt:
        print(f"\nno longer following; the job goes on. Stop it with: ray job stop {job}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"job {job}: {status.value}")
    if status.value != "SUCCEEDED":
        raise typer.Exit(1)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
