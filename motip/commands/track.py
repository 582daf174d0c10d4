"""`motip track`: a video in, the video with its tracks and their MOT rows out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer


def track(
    checkpoint: Annotated[str, typer.Option(help="Our or a published checkpoint (.pth), or exported weights.")],
    video_path: Annotated[str, typer.Option(help="Video file, pattern such as img1/%08d.jpg, or folder of images.")],
    output_path: Annotated[str, typer.Option(help="The video to write (.mp4); the tracks go beside it (.txt).")],
    config_path: Annotated[
        str | None, typer.Option(help="Configuration. Our checkpoints carry theirs and need none.")
    ] = None,
    score_thresh: Annotated[
        float | None, typer.Option(help="Detections above this score count (default: DET_THRESH of the checkpoint).")
    ] = None,
    newborn_thresh: Annotated[
        float | None, typer.Option(help="Tracks start above this score (default: NEWBORN_THRESH of the checkpoint).")
    ] = None,
    longterm_patience: Annotated[
        int | None, typer.Option(help="Frames a lost track can be recognised again by its looks; 0 = off.")
    ] = None,
    longterm_similarity: Annotated[
        float | None, typer.Option(help="Likeness (cosine, -1 to 1) from which a track counts as recognised.")
    ] = None,
    longterm_capacity: Annotated[
        int | None, typer.Option(help="Lost tracks remembered at most (default: LONGTERM_CAPACITY, 1000).")
    ] = None,
    miss_tolerance: Annotated[
        int | None, typer.Option(help="Frames an object may be missing and keep its id (default: MISS_TOLERANCE).")
    ] = None,
    start_frame: Annotated[int | None, typer.Option(help="First frame, counted from 1.")] = None,
    end_frame: Annotated[int | None, typer.Option(help="Last frame, included.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frame rate, where the source does not state it.")] = None,
    trail: Annotated[int, typer.Option(min=0, help="Frames a trail reaches back; 0 = no trails.")] = 30,
    fp16: Annotated[bool, typer.Option("--fp16", help="Run the detector in half precision.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Track a video and draw the tracks on it.

    Writes OUTPUT_PATH (H.264, frame rate and frame count of the source) and, with the suffix .txt, its tracks as MOT
    rows (frame,id,x,y,w,h,score,class,-1). Ctrl-C ends the video at the frame it has come to; both files are whole.

    Example: motip track --checkpoint checkpoint_best.pth --video_path street.mp4 --output_path street_tracked.mp4
    --score_thresh 0.4 --longterm_patience 30
    """
    from motip.commands.checkpoint import open_checkpoint
    from motip.commands.show import console, note
    from motip.report.tracked_video import checked_output, track_video
    from motip.report.video import open_source

    output = checked_output(output_path)
    source = open_source(video_path, start=start_frame, end=end_frame, fps=fps)
    loaded = open_checkpoint(
        checkpoint,
        config_path,
        device,
        det_thresh=score_thresh,
        newborn_thresh=newborn_thresh,
        longterm_patience=longterm_patience,
        longterm_similarity=longterm_similarity,
        longterm_capacity=longterm_capacity,
        miss_tolerance=miss_tolerance,
        dtype="FP16" if fp16 else None,
    )
    with _interruption() as stop, _progress(source.frames) as advance:
        done = track_video(
            loaded.model, source, loaded.settings, output, loaded.classes, trail=trail,
            on_frame=advance, stopped=stop.is_set,
        )  # fmt: skip
    for text in (*source.notes, *done.result.notes):
        note(text)
    if source.damaged:
        note(f"{source.damaged} damaged packets of the video could not be decoded")
    if done.result.counters.get("newborns_refused"):
        note(f"{done.result.counters['newborns_refused']} times an object waited because every ID label was taken")
    what = f"{done.frames} frames" if not stop.is_set() else f"interrupted after {done.frames} frames"
    again = f", {done.recalled} times re-identified" if loaded.settings.longterm_patience else ""
    boxes = len(done.result.rows)
    console().print(
        f"{what}, {done.tracks} tracks, {boxes} boxes{again}, {done.result.fps:.1f} frames/s: "
        f"{done.video} and {done.rows}",
        highlight=False,
        soft_wrap=True,
    )
    if stop.is_set():
        raise typer.Exit(130)


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of tearing a frame apart; a second one ends the program at once."""
    asked = threading.Event()

    def ask(_signal: int, _frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(total: int | None) -> Iterator[object]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from motip.commands.show import console

    columns = (
        TextColumn("tracking"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    screen = console()
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("tracking", total=total)
        yield lambda frames: progress.update(task, completed=frames)
