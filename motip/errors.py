"""MotipError, the error for problems that the user can fix, and its handling at entry points."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Collection, Iterable, Iterator


class MotipError(Exception):
    """A problem with the user's input or environment.

    Args:
        what: description, one sentence without full stop.
        where: file, line, key or command with the problem.
        found: actual value or state.
        expected: required value or state.
        fix: suggested action.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(self.render())

    def render(self) -> str:
        """The message: ``what``, then one labelled line for each of the other parts that is set."""
        lines = [self.what]
        for label, value in (
            ("where", self.where),
            ("found", self.found),
            ("expected", self.expected),
            ("fix", self.fix),
        ):
            if value is not None:
                lines.append(f"  {label + ':':<10}{value}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        # Default pickling drops keyword-only arguments, and errors pass between processes on a cluster.
        return _rebuild, (self.what, self.where, self.found, self.expected, self.fix)


def _rebuild(what: str, where: object, found: object, expected: object, fix: str | None) -> MotipError:
    return MotipError(what, where=where, found=found, expected=expected, fix=fix)


def check_known(
    names: str | Iterable[str],
    known: Collection[str],
    what: str,
    *,
    where: object = None,
    fix: str | None = None,
) -> None:
    """Check that names are known; the error lists the known ones.

    Args:
        names: one name (`expected: one of …`), or several (`expected: some of …`).
        known: all allowed names, in the order of the list.
        what: first line of the error; `{name}` or `{name!r}` stands for the unknown name. Without either the name is
            the error's `found`.

    Raises:
        MotipError: for the first name that is not in ``known``.
    """
    quantity, each = ("one", [names]) if isinstance(names, str) else ("some", names)
    unknown = next((name for name in each if name not in known), None)
    if unknown is None:
        return
    text = what.replace("{name!r}", repr(unknown)).replace("{name}", unknown)
    raise MotipError(
        text,
        where=where,
        found=unknown if text == what else None,
        expected=f"{quantity} of {', '.join(known) or 'none'}",
        fix=fix,
    )


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str | None:
    """Text for an error's `fix` that suggests the closest known name, case ignored, or None if none is similar."""
    folded = {each.lower(): each for each in known}
    matches = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    return f"did you mean {prefix}{folded[matches[0]]}?" if matches else None


def find_motip_error(error: BaseException | None) -> MotipError | None:
    """The first MotipError among ``error``, its causes and contexts, and the errors that Ray wrapped, or None."""
    visited: set[int] = set()
    queue: list[object] = [error]
    while queue:
        current = queue.pop(0)
        if not isinstance(current, BaseException) or id(current) in visited:
            continue
        visited.add(id(current))
        if isinstance(current, MotipError):
            return current
        queue += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        queue += list(getattr(current, "worker_failures", {}).values())
    return None


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Print a MotipError to stderr and exit with status 2 (130 on Ctrl+C); other errors keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted; finished work is kept, run the same command again to resume", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        problem = find_motip_error(error) or _missing_library(error)
        if problem is None:
            raise
        print(f"error: {problem.render()}", file=sys.stderr)
        raise SystemExit(2) from None


_PACKAGES = {"libGL": "libgl1", "libgthread": "libglib2.0-0", "libglib": "libglib2.0-0"}
"""Debian packages of the system libraries that OpenCV's wheel needs."""


def _missing_library(error: BaseException) -> MotipError | None:
    """MotipError for an import that failed because of a missing system library, else None."""
    text = str(error)
    if not isinstance(error, ImportError) or "cannot open shared object file" not in text:
        return None
    library = text.split(":")[0].strip()
    package = next((name for start, name in _PACKAGES.items() if library.startswith(start)), None)
    return MotipError(
        f"a system library is missing: {library}",
        where="import of a Python package (OpenCV needs libGL and GLib)",
        expected=f"{library} on the library path",
        fix=f"install it, on Debian or Ubuntu: apt-get install {package or 'the package that contains it'}",
    )
