"""`motip track`: a video in; the video with its tracks, their MOT rows and JSON lines out."""

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
    from motip.track.api import Tracking
    from motip.track.detections import Detections


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
    json_path: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE", help="One JSON object per frame; - for stdout, the rest then to stderr."
        ),
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Run the detector in half precision.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Track a video and draw the tracks on it.

    Writes OUTPUT_PATH (H.264, frame rate and frame count of the source) and, with the suffix .txt, its tracks as MOT
    rows (frame,id,x,y,w,h,score,class,-1). Ctrl-C ends the video at the frame it has come to; all files are whole.

    Example: motip track --checkpoint checkpoint_best.pth --video_path street.mp4 --output_path street_tracked.mp4
    --score_thresh 0.4 --longterm_patience 30
    """
    from motip.errors import MotipError
    from motip.report.tracked_video import checked_output, track_video
    from motip.track.api import track as open_tracking

    output = checked_output(output_path)
    lines = None if json_path is None else _checked_lines(json_path, output)
    source = Path(video_path).expanduser().resolve()
    if source in (output.resolve(), None if lines is None else lines.resolve()):
        raise MotipError(
            "the output would replace the video that is tracked",
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
    aside = json_path == "-"
    with (
        _interruption() as stop,
        _Lines.open(lines, float(tracking.source.fps)) if lines is not None else nullcontext() as writer,
        _progress(tracking.source.frames, aside) as advance,
    ):

        def one_more(found: Detections) -> None:
            advance()
            if writer is not None:
                writer.write(found)

        def ended() -> bool:
            return stop.is_set() or (writer is not None and writer.unread)

        done = track_video(tracking, output, trail=trail, on_frame=one_more, stopped=ended)
    ending = ""
    if stop.is_set():
        ending = "interrupted after "
    elif writer is not None and writer.unread:
        ending = "nobody reads the JSON lines any more: ended after "
    _summary(tracking, done, ending, None if aside else lines, aside)
    if stop.is_set():
        raise typer.Exit(130)
    if writer is not None and writer.unread:
        raise typer.Exit(1)


def _summary(tracking: Tracking, done: TrackedVideo, ending: str, lines: Path | None, aside: bool) -> None:
    from motip.cli.console import console, note

    result, source = done.result, tracking.source
    for text in (*source.notes, *result.notes):
        note(text, aside)
    if source.damaged:
        note(f"{source.damaged} damaged packets of the video could not be decoded", aside)
    if result.counters.get("newborns_refused"):
        note(f"{result.counters['newborns_refused']} times an object waited because every ID label was taken", aside)
    again = f", {done.recalled} times re-identified" if tracking.settings.longterm_patience else ""
    files = ", ".join(str(each) for each in (done.video, done.rows, lines) if each is not None)
    found = f"{done.frames} frames, {done.tracks} tracks, {len(result.rows)} boxes{again}"
    console(aside).print(
        f"{ending}{found}, {result.fps:.1f} frames/s: {files}",
        highlight=False,
        soft_wrap=True,
    )


def _checked_lines(path: str, video: Path) -> Path:
    """Where the JSON lines go, once it is sure that they can be written; ``-`` is standard output.

    Raises:
        MotipError: a folder, one of the other outputs, or a place that cannot be written.
    """
    from motip.errors import MotipError
    from motip.report.tracked_video import check_folder

    target = Path(path).expanduser()
    if path == "-":
        return target
    if target.is_dir() or target in (video, video.with_suffix(".txt")):
        raise MotipError(
            "the JSON lines need a file of their own",
            where="--json",
            found=path,
            expected="a path such as tracks.jsonl, or - for standard output",
        )
    check_folder(target.parent, "--json")
    return target


class _Lines:
    """Writes a JSON object per frame, each in a line of its own, as soon as the frame is done.

    Attributes:
        unread: nobody reads standard output any more (`motip track --json - ... | head`).
    """

    def __init__(self, stream: TextIO, fps: float) -> None:
        self.unread = False
        self._stream = stream
        self._fps = fps

    @classmethod
    @contextmanager
    def open(cls, path: Path, fps: float) -> Iterator[_Lines]:
        """A file appears whole when the block ends, and not at all after an error in it."""
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
            self.unread = True
            # Python flushes standard output once more at its end, which would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
def _progress(total: int | None, aside: bool) -> Iterator[Callable[[], Any]]:
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
    screen = console(aside)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("tracking", total=total)
        yield lambda: progress.advance(task)
