"""Carries out a Dockerfile's steps, in their order, in root file systems that debootstrap makes: `docker build` without Docker.

What stands in the file is what runs; a step or a flag that is not known here is an error, never passed over. Not the same as
Docker: the base is Debian's own minimal system instead of the image of that name, nothing is kept in layers, and pip is told
what this machine's pip is told (its certificates, its folders of wheels).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from docker.utils import exclude_paths

from tests.image.dockerfile import Scope, Stage, Step, argument, command, read, stages
from tests.image.namespaces import Spec, run

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # what every base image says in its own ENV
MACHINE = "/run/machine"  # where the machine's own files lie during a step
PIP_SETTINGS = {"cert", "find-links", "index-url", "extra-index-url"}


@dataclass
class Image:
    """A root file system, and what its Dockerfile says about running it."""

    root: Path
    scope: Scope = field(default_factory=lambda: Scope(env={"PATH": PATH}))
    labels: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    volumes: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    stop_signal: str = "SIGTERM"


class Builder:
    """`where` is an empty folder; build.log in it gets what the steps write."""

    def __init__(self, context: Path, where: Path, build_args: Mapping[str, str]) -> None:
        self.context, self.where, self.build_args = context, where, build_args
        self.log = where / "build.log"
        ignored = (context / ".dockerignore").read_text().splitlines()
        patterns = [line for line in ignored if line.strip() and not line.startswith("#")]
        self.sent = {Path(path) for path in exclude_paths(str(context), patterns)}
        self.built: dict[str, Image] = {}

    def build(self, dockerfile: Path) -> Image:
        """The last stage. Raises RuntimeError when a step fails."""
        found, before = stages(read(dockerfile), self.build_args)
        for stage in found:
            self.built[stage.name] = self._stage(stage, before)
        return self.built[found[-1].name]

    def _stage(self, stage: Stage, before: Mapping[str, str]) -> Image:
        root = self.where / stage.name
        subprocess.run(["cp", "-a", "--reflink=auto", str(self._base(stage.base)), str(root)], check=True)
        image = Image(root)
        for step in stage.steps:
            if step.name == "ARG":
                image.scope.args |= argument(step, self.build_args, before)
            else:
                self._carry_out(step, image)
        return image

    def _base(self, name: str) -> Path:
        if name in self.built:
            return self.built[name].root
        debian = re.fullmatch(r"debian:(\w+)-slim", name)
        assert debian, f"there is no way to make {name} here"
        base = self.where / f"debian-{debian[1]}"
        if not base.exists():
            done = subprocess.run(["debootstrap", "--variant=minbase", debian[1], str(base)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"debootstrap failed:\n{done.stdout[-2000:]}{done.stderr}")
        return base

    def _carry_out(self, step: Step, image: Image) -> None:
        match step.name:
            case "RUN":
                self._run(step, image)
            case "COPY":
                self._copy(step, image)
            case "ENV":
                image.scope.env |= image.scope.pairs(step)
            case "LABEL":
                image.labels |= image.scope.pairs(step)
            case "WORKDIR":
                image.workdir = str(Path(image.workdir) / image.scope.expand(step.value))
                inside(image.root, image.workdir).mkdir(parents=True, exist_ok=True)
            case "USER":
                image.user = image.scope.expand(step.value)
            case "VOLUME":
                image.volumes += json.loads(step.value)
            case "EXPOSE":
                image.ports.append(int(image.scope.expand(step.value)))
            case "STOPSIGNAL":
                image.stop_signal = step.value
            case "HEALTHCHECK":
                image.healthcheck = command(step.flags()[1].removeprefix("CMD "))
            case "ENTRYPOINT":
                image.entrypoint = command(step.value)
            case _:
                raise ValueError(f"line {step.line}: {step.name} is not known here")

    def _run(self, step: Step, image: Image) -> None:
        flags, script = step.flags()
        assert not flags and image.user == "0:0", f"line {step.line}: flags, or another user, are not known here"
        with self.log.open("a") as log:
            log.write(f"\n# line {step.line}: {script}\n")
        with surroundings(image.root) as (mounts, env):
            argv = command(script)
            known = image.scope.args | image.scope.env  # an ENV hides an ARG of its name
            run(Spec(str(image.root), argv, env | known, cwd=image.workdir, mounts=mounts), self.log)

    def _copy(self, step: Step, image: Image) -> None:
        flags, rest = step.flags()
        assert flags.keys() <= {"from"}, f"line {step.line}: {flags} are not known here"
        *sources, target = image.scope.expand(rest).split()
        to = inside(image.root, str(Path(image.workdir) / target))
        many = target.endswith("/") or len(sources) > 1
        for source in sources:
            if "from" in flags:
                copy_tree(inside(self.built[flags["from"]].root, source), to)
            elif (self.context / source).is_dir():
                self._copy_sent(Path(source), to)
            else:
                self._copy_file(Path(source), to / Path(source).name if many else to)

    def _copy_sent(self, folder: Path, to: Path) -> None:
        files = [path for path in self.sent if folder in path.parents and (self.context / path).is_file()]
        assert files, f".dockerignore leaves nothing of {folder}"
        for path in files:
            self._copy_file(path, to / path.relative_to(folder))

    def _copy_file(self, path: Path, to: Path) -> None:
        assert path in self.sent, f".dockerignore leaves {path} out"
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.context / path, to)


def inside(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def copy_tree(source: Path, to: Path) -> None:
    """The contents of a folder, as COPY has it; all become root's."""
    to.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-dR", "--preserve=mode,timestamps,links", f"{source}/.", str(to)], check=True)


@contextmanager
def surroundings(root: Path) -> Iterator[tuple[list[tuple[str, str]], dict[str, str]]]:
    """Mounts and variables by which a step finds names, and pip what this machine's pip finds; nothing of it stays."""
    mounts, env = [("/etc/resolv.conf", "/etc/resolv.conf")], {}
    folder = inside(root, MACHINE)
    inside(root, "/etc/resolv.conf").touch()
    folder.mkdir(parents=True)
    for key, value in pip_settings().items():
        words = []
        for word in value.split():
            if Path(word).exists():
                target = f"{MACHINE}/{len(mounts)}"
                place = inside(root, target)
                place.mkdir() if Path(word).is_dir() else place.touch()
                mounts.append((word, target))
                word = target
            words.append(word)
        env[f"PIP_{key.upper().replace('-', '_')}"] = " ".join(words)
    try:
        yield mounts, env
    finally:
        shutil.rmtree(folder)


def pip_settings() -> dict[str, str]:
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\S*\.([a-z-]+)='(.*)'$", listed, flags=re.MULTILINE)
    return {key: value for key, value in found if key in PIP_SETTINGS and "file:" not in value}
