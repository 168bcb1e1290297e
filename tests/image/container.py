"""`docker run` of an Image: read-only root, a volume for /cache, the image's user, no network but a loopback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.image.build import Image, inside
from tests.image.namespaces import Spec, start


@dataclass
class Container:
    process: subprocess.Popen[str]  # unshare, whose only child is the container's process 1
    spec: Spec
    errors: Path

    @property
    def first(self) -> int:
        """Process 1, by the number that it has out here."""
        outer = self.process.pid
        (pid,) = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        return int(pid)

    @property
    def out(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def said(self) -> str:
        return self.errors.read_text(errors="replace")

    def execute(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """`docker exec`: as the container's user, in all of its namespaces."""
        user = (f"--setuid={self.spec.uid}", f"--setgid={self.spec.gid}")
        command = ["nsenter", f"--target={self.first}", "--mount", "--pid", "--ipc", "--uts", "--net", "--root", "--wd", *user]
        env = dict(self.spec.env)
        return subprocess.run([*command, *argv], env=env, capture_output=True, text=True, timeout=120)

    def outside(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """A program of this machine that shares nothing with the container but its network."""
        return subprocess.Popen(["nsenter", f"--target={self.first}", "--net", *argv], **options)

    def from_outside(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        with self.outside(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(argv, process.returncode, out, err)

    def stop(self) -> int:
        """`docker stop`; the exit code."""
        os.kill(self.first, signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def running(image: Image, where: Path, *flags: str, user: str | None = None, volume: bool = True) -> Iterator[Container]:
    """`where` is an empty folder of this machine. A volume starts with what the image holds in its place, as Docker has it."""
    uid, gid = map(int, (user or image.user).split(":"))
    mounts = [("tmpfs", "/tmp")]
    for path in image.volumes if volume else []:
        folder = where / Path(path).name
        subprocess.run(["cp", "-a", str(inside(image.root, path)), str(folder)], check=True)
        mounts.append((str(folder), path))
    argv = [*image.entrypoint, *flags]
    spec = Spec(
        str(image.root), argv, image.scope.env, uid, gid, image.workdir, mounts, read_only=True, network=False, locked=True
    )
    errors = where / "errors.log"
    with errors.open("w") as stderr:
        process = start(spec, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        yield Container(process, spec, errors)
    finally:
        process.kill()  # and with it, by --kill-child, everything inside
        process.communicate()
        shutil.rmtree(where)
