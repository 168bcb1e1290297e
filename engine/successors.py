"""What the target itself says follows each token, with nothing but the first token of a text before it: a table of bigrams.

It is read out of the model once, some tokens at a time while nobody is being served (Worker.study), and kept on disk. It holds
nothing that a user wrote and nothing that was trained; a drafter that begins with it (drafters/token_recycling.py) does not
begin with an empty table. Tokens are read in the order of their ids: byte-pair merges come in the order of their frequency.

Replaces the empty matrix that Token Recycling (arXiv 2408.08696) starts from.
"""

from __future__ import annotations

import logging
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine import whole_file

logger = logging.getLogger("outrider.engine.successors")

TOP = 8  # kept of each token


class Successors:
    """ids [V, TOP] of the likeliest next tokens; rows from `known` on are not read yet."""

    def __init__(self, vocab_size: int, file: Path | None = None) -> None:
        """What `file` holds, if it holds as much as a whole row and fits the vocabulary; None: nothing is kept."""
        self.file = file
        self.ids: NDArray[np.int32] = np.zeros((vocab_size, TOP), dtype=np.int32)
        self.known = 0
        self._saved = 0
        if file is not None:
            self._load(file)

    @property
    def complete(self) -> bool:
        return self.known == len(self.ids)

    def of(self, token: int) -> list[int] | None:
        """The likeliest tokens after `token`, likeliest first; None where that is not known."""
        return self.ids[token].tolist() if token < self.known else None

    def unknown(self, count: int) -> list[int]:
        """At most `count` tokens to be read next."""
        return list(range(self.known, min(self.known + count, len(self.ids))))

    def learn(self, ids: NDArray[np.int32]) -> None:
        """The rows [n, TOP] of the first n unknown tokens. Raises ValueError for ids outside the vocabulary."""
        if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < len(self.ids)):
            raise ValueError("successors outside the vocabulary")
        self.ids[self.known : self.known + len(ids)] = ids
        self.known += len(ids)
        if self.complete:
            self.save()

    def save(self) -> None:
        """In one piece or not at all. A disk that is full or read-only costs a warning."""
        if self.file is None or self.known == self._saved:
            return
        data = BytesIO()
        np.save(data, self.ids[: self.known], allow_pickle=False)
        try:
            whole_file.write(self.file, data.getvalue())
            self._saved = self.known
        except OSError as error:
            logger.warning("the successors cannot be kept: %s", error)

    def _load(self, file: Path) -> None:
        try:
            ids = np.load(file, allow_pickle=False)
            if ids.ndim != 2 or ids.shape[1] != TOP or len(ids) > len(self.ids) or ids.dtype != np.int32:
                raise ValueError("it is about something else")
            self.learn(ids)
            self._saved = self.known
        except FileNotFoundError:
            return
        except (OSError, ValueError, EOFError) as error:
            self.known = 0
            logger.warning("the successors in %s are not used: %s", file, error)
