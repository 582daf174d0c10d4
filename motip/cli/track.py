"""`motip track`: track a video; write an annotated video, MOT rows and JSON lines."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from motip.report.tracked_video import TrackedVideo
    from motip.tracking.api import TrackIterator
    from motip.tracking.detections import Detections


def track(
    checkpoint: Annotated[
        str, typer.Option(help="Checkpoint of this project or of published MOTIP (.pth), or exported weights.")
    ],
    video_path: Annotated[str, typer.Option(help="Video file, pattern such as img1/%08d.jpg, or folder of images.")],
    output_path: Annotated[str, typer.Option(help="Video to write (.mp4); the tracks go to the same name with .txt.")],
    config_path: Annotated[
        str | None,
        typer.Option(help="Configuration, for published checkpoints; this project's checkpoints contain theirs."),
    ] = None,
    score_thresh: Annotated[
        float | None, typer.Option(help="Minimum score of a detection (default: DET_THRESH of the checkpoint).")
    ] = None,
    newborn_thresh: Annotated[
        float | None,
        typer.Option(help="Minimum score to start a track (default: NEWBORN_THRESH of the checkpoint)."),
    ] = None,
    longterm_patience: Annotated[
        int | None,
        typer.Option(help="Frames for which a lost track can be re-identified by its appearance; 0 = off."),
    ] = None,
    longterm_similarity: Annotated[
        float | None, typer.Option(help="Minimum cosine similarity (-1 to 1) for a re-identification.")
    ] = None,
    longterm_capacity: Annotated[
        int | None, typer.Option(help="Maximum number of lost tracks in memory (default: LONGTERM_CAPACITY, 1000).")
    ] = None,
    miss_tolerance: Annotated[
        int | None,
        typer.Option(help="Frames for which an undetected object keeps its track id (default: MISS_TOLERANCE)."),
    ] = None,
    start_frame: Annotated[int | None, typer.Option(help="First frame to track, counted from 1.")] = None,
    end_frame: Annotated[int | None, typer.Option(help="Last frame to track, inclusive.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frame rate, if the source does not state it.")] = None,
    trail: Annotated[int, typer.Option(min=0, help="Length of the trails in frames; 0 = no trails.")] = 30,
    json_path: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write one JSON object per frame; - for stdout (messages then go to stderr).",
        ),
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Run the detector in half precision.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Track a video and draw the tracks on it.

    Writes OUTPUT_PATH (H.264, frame rate and frame count of the source) and, with the suffix .txt, its tracks as MOT
    rows (frame,id,x,y,w,h,score,class,-1). Ctrl-C ends the video at the current frame; all files are complete.

    Example: motip track --checkpoint checkpoint_best.pth --video_path street.mp4 --output_path street_tracked.mp4
    --score_thresh 0.4 --longterm_patience 30
    """
    from motip.errors import MotipError
    from motip.report.tracked_video import checked_output, track_video
    from motip.tracking.api import track as open_tracking

    output = checked_output(output_path)
    lines = None if json_path is None else _checked_lines(json_path, output)
    source = Path(video_path).expanduser().resolve()
    if source in (output.resolve(), None if lines is None else lines.resolve()):
        raise MotipError(
            "the output would replace the input video",
            where="--output_path, --json",
            found=source,
            fix="name another file",
        )
    tracking = open_tracking(
        video_path,
        checkpoint,
        config_path,
        device=device,
        start_frame=start_frame,
        end_frame=end_frame,
        fps=fps,
        det_thresh=score_thresh,
        newborn_thresh=newborn_thresh,
        longterm_patience=longterm_patience,
        longterm_similarity=longterm_similarity,
        longterm_capacity=longterm_capacity,
        miss_tolerance=miss_tolerance,
        dtype="FP16" if fp16 else None,
    )
    # Track, draw and write until the end, Ctrl-C, or a closed pipe.
    to_stderr = json_path == "-"
    with (
        _interruption() as stop,
        _JsonLines.open(lines, float(tracking.source.fps)) if lines is not None else nullcontext() as writer,
        _progress(tracking.source.frames, to_stderr) as advance,
    ):

        def on_frame(found: Detections) -> None:
            advance()
            if writer is not None:
                writer.write(found)

        def stopped() -> bool:
            return stop.is_set() or (writer is not None and writer.closed)

        done = track_video(tracking, output, trail=trail, on_frame=on_frame, stopped=stopped)
    # Summary and exit status.
    ending = ""
    if stop.is_set():
        ending = "interrupted after "
    elif writer is not None and writer.closed:
        ending = "the reader of the JSON lines closed the pipe: stopped after "
    _summary(tracking, done, ending, None if to_stderr else lines, to_stderr)
    if stop.is_set():
        raise typer.Exit(130)
    if writer is not None and writer.closed:
        raise typer.Exit(1)


def _summary(tracking: TrackIterator, done: TrackedVideo, ending: str, lines: Path | None, to_stderr: bool) -> None:
    from motip.cli.console import console, note

    result, source = done.result, tracking.source
    for text in (*source.notes, *result.notes):
        note(text, to_stderr)
    if source.damaged:
        note(f"{source.damaged} damaged packets of the video could not be decoded", to_stderr)
    if result.counters.get("newborns_refused"):
        refused = result.counters["newborns_refused"]
        note(f"{refused} times no new track could start because every ID label was in use", to_stderr)
    again = f", {done.recalled} times re-identified" if tracking.settings.longterm_patience else ""
    files = ", ".join(str(each) for each in (done.video, done.rows, lines) if each is not None)
    found = f"{done.frames} frames, {done.tracks} tracks, {len(result.rows)} boxes{again}"
    console(to_stderr).print(
        f"{ending}{found}, {result.fps:.1f} frames/s: {files}",
        highlight=False,
        soft_wrap=True,
    )


def _checked_lines(path: str, video: Path) -> Path:
    """The path of the JSON lines, checked to be writable; ``-`` is standard output.

    Raises:
        MotipError: a folder, one of the other outputs, or a path that cannot be written.
    """
    from motip.errors import MotipError
    from motip.report.tracked_video import check_folder

    target = Path(path).expanduser()
    if path == "-":
        return target
    if target.is_dir() or target in (video, video.with_suffix(".txt")):
        raise MotipError(
            "the JSON lines need a separate file",
            where="--json",
            found=path,
            expected="a path such as tracks.jsonl, or - for standard output",
        )
    check_folder(target.parent, "--json")
    return target


class _JsonLines:
    """Writes one JSON object per frame and line, flushed after every frame.

    Attributes:
        closed: the reader closed standard output (`motip track --json - ... | head`).
    """

    def __init__(self, stream: TextIO, fps: float) -> None:
        self.closed = False
        self._stream = stream
        self._fps = fps

    @classmethod
    @contextmanager
    def open(cls, path: Path, fps: float) -> Iterator[_JsonLines]:
        """Write to a file, which appears atomically when the block ends without an error, or to standard output."""
        from motip.storage.atomic import atomic_write

        if str(path) == "-":
            yield cls(sys.stdout, fps)
            return
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            yield cls(stream, fps)

    def write(self, found: Detections) -> None:
        try:
            print(json.dumps(found.to_json(self._fps), separators=(",", ":")), file=self._stream, flush=True)
        except BrokenPipeError:
            self.closed = True
            # Python flushes standard output again at exit, which would raise again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that the current frame is completed; a second one raises KeyboardInterrupt."""
    requested = threading.Event()

    def handle(_signal: int, _frame: object) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _progress(total: int | None, to_stderr: bool) -> Iterator[Callable[[], Any]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from motip.cli.console import console

    columns = (
        TextColumn("tracking"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    screen = console(to_stderr)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("tracking", total=total)
        yield lambda: progress.advance(task)
