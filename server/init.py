"""What process 1 of a container owes: it passes signals on, and buries the processes that lost their parent.

The kernel ignores a signal that process 1 has no handler for: a server that is still fetching its model could not be stopped.
And orphans, such as the ranks of an engine that was killed, become children of process 1: if it does not wait for them they
stay, dead, for as long as the container runs. So the server is not process 1 but its child. This is no shell and no
supervisor: it starts nothing twice.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def run(main: Callable[[], int]) -> int:
    """main() and its exit code; in a child when this is process 1. To be called before any thread is started."""
    if os.getpid() != 1:
        return main()
    watched = {*PASSED_ON, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    child = os.fork()
    if child:
        return _look_after(child, watched)
    # A group of its own: Ctrl-C in a terminal reaches process 1 alone, and is not passed on a second time.
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
    return main()


def _look_after(child: int, watched: set[signal.Signals]) -> int:
    while True:
        number = signal.sigwait(watched)
        if number != signal.SIGCHLD:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
        elif (code := _bury(child)) is not None:
            return code


def _bury(child: int) -> int | None:
    """Wait for all who died; the child's exit code if it was among them (a signal's number + 128, as shells have it)."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (died := os.waitpid(-1, os.WNOHANG))[0]:
            if died[0] == child:
                code = os.waitstatus_to_exitcode(died[1])
                found = code if code >= 0 else 128 - code
    return found
