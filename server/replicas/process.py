"""One `outrider serve` as a child process on a free port of the loopback: started, asked for its address, ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from server.supervisor import ROOT

COMMAND = (sys.executable, "-P", "-m", "server.replicas.child")
READY = re.compile(r"outrider is ready: (http://\S+)")
KEPT_LINES = 5  # of what it wrote last, for an error's message


class ServerProcess:
    """Blocks until the server is ready. Raises RuntimeError, with what it said, when it ends before."""

    def __init__(self, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        """`settings`: those of `outrider serve`, by name; where it listens is ours to say. `environment`: beside our own."""
        own = {key: value for key, value in settings.items() if key not in ("host", "port")}
        with tempfile.TemporaryDirectory(prefix="outrider-") as folder:  # mode 0700: there may be a key among them
            file = Path(folder) / "settings.yaml"
            file.write_text(yaml.safe_dump(own), encoding="utf-8")
            self._process = _start(environment or {}, "--config", str(file), "--host", "127.0.0.1", "--port", "0")
            self._said: deque[str] = deque(maxlen=KEPT_LINES)
            self._log = threading.Thread(target=self._pass_on, daemon=True)
            self._log.start()
            try:
                self.url = self._wait_ready()
            except BaseException:
                self._process.kill()
                self._close()
                raise

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def stop(self, seconds: float) -> None:
        """Let it finish what it has, for so long at most. A second call does nothing."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._close()

    def _wait_ready(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := READY.search(line):
                return found[1]
        code = self._process.wait()
        self._log.join()
        raise RuntimeError(f"outrider serve ended with {code}: {' | '.join(self._said) or 'it said nothing'}")

    def _close(self) -> None:
        self._process.wait()
        self._log.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _pass_on(self) -> None:
        """Its log is this process's log."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said.append(line.strip())
            sys.stderr.write(line)


def _start(environment: Mapping[str, str], *flags: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | environment | {"PYTHONPATH": path}
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, *flags], stdin=pipe, stdout=pipe, stderr=pipe, env=env, text=True)
