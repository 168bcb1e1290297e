"""A Dockerfile, read: its stages, and its steps with ARG and ENV put in as Docker does. It carries nothing out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

from dockerfile_parse import DockerfileParser
from dockerfile_parse.util import WordSplitter, extract_key_values

SHELL = ("/bin/sh", "-c")
# A shell expands what stands in these; in all others Docker does.
LEFT_TO_THE_SHELL = frozenset({"RUN", "CMD", "ENTRYPOINT", "HEALTHCHECK"})


@dataclass(frozen=True)
class Step:
    name: str  # RUN, COPY ...
    value: str
    line: int

    def words(self) -> list[str]:
        return list(WordSplitter(self.value).split())

    def flags(self) -> tuple[dict[str, str], str]:
        """The leading --key=value flags, and what follows them."""
        flags, rest = {}, self.value
        while rest.startswith("--"):
            flag, _, rest = rest.partition(" ")
            key, _, value = flag.removeprefix("--").partition("=")
            flags[key] = value
            rest = rest.lstrip()
        return flags, rest


@dataclass(frozen=True)
class Stage:
    base: str  # an image, or the name of an earlier stage
    name: str
    steps: list[Step] = field(default_factory=list)

    def last(self, name: str) -> Step | None:
        return next((step for step in reversed(self.steps) if step.name == name), None)


@dataclass
class Scope:
    """What is known at one step of a stage."""

    env: dict[str, str] = field(default_factory=dict)
    args: dict[str, str] = field(default_factory=dict)

    def expand(self, text: str) -> str:
        return str(WordSplitter(text, args=self.args, envs=self.env).dequote())

    def pairs(self, step: Step) -> dict[str, str]:
        return dict(extract_key_values(env_replace=True, args=self.args, envs=self.env, instruction_value=step.value))


def read(path: Path) -> list[Step]:
    with TemporaryFile() as copy:  # the parser wants a file that it may write to
        copy.write(path.read_bytes())
        structure = DockerfileParser(fileobj=copy).structure
    return [Step(one["instruction"], one["value"], one["startline"] + 1) for one in structure if one["instruction"] != "COMMENT"]


def stages(steps: list[Step], build_args: Mapping[str, str]) -> tuple[list[Stage], dict[str, str]]:
    """The stages, and the arguments above the first FROM."""
    found: list[Stage] = []
    scope = Scope()
    for step in steps:
        if step.name == "FROM":
            words = scope.expand(step.value).split()
            named = words[2] if len(words) == 3 and words[1].upper() == "AS" else str(len(found))
            found.append(Stage(words[0], named))
        elif found:
            found[-1].steps.append(step)
        else:
            scope.args |= argument(step, build_args, {})
    return found, scope.args


def argument(step: Step, build_args: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str]:
    """What ARG makes known: what the builder was given, its default, or what stood above the first FROM; else nothing."""
    assert step.name == "ARG", f"line {step.line}: {step.name} before FROM"
    name, given, default = step.value.partition("=")
    if name in build_args:
        return {name: build_args[name]}
    return {name: str(WordSplitter(default).dequote())} if given else {name: before[name]} if name in before else {}


def command(value: str) -> list[str]:
    """The exec form as it is, the shell form handed to a shell."""
    return list(json.loads(value)) if value.startswith("[") else [*SHELL, value]
