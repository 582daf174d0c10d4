"""Recording of the configuration keys that are read, by which a test checks that every key is used."""

from __future__ import annotations

import contextlib
import itertools
import sys
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

from motip.config import Config


@contextlib.contextmanager
def record_reads() -> Iterator[set[str]]:
    """Collect the keys read by attribute access within the context, in this process; validation does not count."""
    names: set[str] = set()

    def read(config: Config, name: str) -> Any:
        if name in Config.model_fields:
            # A rule may read a key through a property, whose own read passes through this function.
            callers = itertools.islice(traceback.walk_stack(sys._getframe(1)), 3)
            if not any("Config._check" in frame.f_code.co_qualname for frame, _ in callers):
                names.add(name)
        return object.__getattribute__(config, name)

    with mock.patch.object(Config, "__getattribute__", read):
        yield names
