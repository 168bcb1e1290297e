"""`python -m server.replicas.child FLAGS`: `outrider serve` that ends when its standard input does.

The process that starts it holds the other end of that pipe: when it is gone, however it went, nobody is left to end this one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from server import cli


def _end_with_input() -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock would be in the way of a proper end
        pass
    os.kill(os.getpid(), signal.SIGKILL)  # whoever waits for an answer is gone; the engine ends with its parent


def main() -> int:
    threading.Thread(target=_end_with_input, daemon=True).start()
    return cli.main(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
