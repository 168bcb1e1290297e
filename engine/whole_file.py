"""Files that are written in one piece or not at all: two engines may share a cache directory, and either may be killed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write(file: Path, data: bytes) -> None:
    """Put `data` in the place of `file`, whose folder is made if need be. Raises OSError, with the old file in its place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
