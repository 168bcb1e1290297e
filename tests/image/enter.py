"""Process 1 of new namespaces: makes them a container's, then becomes the container's program. Started by namespaces.py.

unshare ... python -m tests.image.enter SPEC      SPEC: namespaces.Spec as JSON
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38


def main(spec: dict[str, Any]) -> NoReturn:
    root = Path(spec["root"])
    mount("--bind", str(root), str(root))
    for source, target in spec["mounts"]:
        place(root, source, target)
    mount("-t", "proc", "proc", f"{root}/proc")
    devices(root)
    if spec["read_only"]:
        mount("-o", "remount,bind,ro", str(root))
    if not spec["network"]:
        loopback_up()
    os.chroot(root)
    os.chdir(spec["cwd"])
    os.umask(0o022)
    become(spec["uid"], spec["gid"], locked=spec["locked"])
    os.execvpe(spec["argv"][0], spec["argv"], spec["env"])


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def place(root: Path, source: str, target: str) -> None:
    """A file or folder of the machine, or "tmpfs", at `target`, which is there already."""
    if source == "tmpfs":
        mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{root}{target}")
    else:
        mount("--bind", source, f"{root}{target}")


def devices(root: Path) -> None:
    nodes = [(name, os.stat(f"/dev/{name}").st_rdev) for name in DEVICES]
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", f"{root}/dev")
    for name, number in nodes:
        os.mknod(f"{root}/dev/{name}", 0o020666, number)
        os.chmod(f"{root}/dev/{name}", 0o666)
    os.symlink("/proc/self/fd", f"{root}/dev/fd")
    os.mkdir(f"{root}/dev/shm")
    mount("-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{root}/dev/shm")


def loopback_up() -> None:
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", IFF_UP))


def become(uid: int, gid: int, *, locked: bool) -> None:
    """That user; `locked` as with --cap-drop ALL --security-opt no-new-privileges."""
    libc = ctypes.CDLL(None, use_errno=True)
    if locked:
        for capability in range(int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1):
            assert libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
        assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # unshare --kill-child set it; another user has none


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
