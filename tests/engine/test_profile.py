"""The profile: time-boxed, resumable, finds stairs; what is kept is read again, and nothing else is."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine import cost_store
from engine.config import EngineConfig
from engine.cost import CostModel
from engine.cost_store import CostFile
from engine.costs import Costs
from engine.messages import EngineInfo
from engine.probe import Probe
from engine.profile import Profile
from tests.fakes import fake_info

INFO = fake_info(
    max_model_len=4096, num_blocks=1000, block_size=16, max_num_seqs=64, max_num_batched_tokens=512, device="cpu",
    weight_bytes=270_000_000, kv_bytes=256 << 20,
)  # fmt: skip


def stairs(tokens: int) -> float:
    """Milliseconds: rows come in eights."""
    return 8.0 + 0.4 * (-(-tokens // 8) * 8)


class Machine:
    """Takes virtual time for a step, as a real one would: stairs, context, sequences, some noise."""

    def __init__(self, speed: float = 1.0, noise: float = 0.0, cost: Callable[[int], float] = stairs) -> None:
        self.now = 0.0
        self.speed, self.noise, self.cost = speed, noise, cost
        self.rng = random.Random(0)
        self.probes: list[Probe] = []
        self.info = INFO

    def clock(self) -> float:
        return self.now

    def true(self, probe: Probe) -> float:
        sequences = probe.sequences + bool(probe.prompt)
        milliseconds = self.cost(probe.tokens) + 0.1 * (sequences - 1) + 0.0005 * probe.tokens * probe.context
        return milliseconds / 1000 / self.speed

    def probe(self, probe: Probe) -> float:
        self.probes.append(probe)
        seconds = self.true(probe) * self.rng.lognormvariate(0, self.noise) if self.noise else self.true(probe)
        self.now += seconds
        return seconds

    def platform(self) -> dict[str, str]:
        return {"device": "a machine"}

    def tier(self, tokens: int) -> int:
        return tokens


def profiled(machine: Machine, seconds: float, profile: Profile | None = None) -> Profile:
    profile = profile or Profile(INFO)
    profile.measure(machine.probe, seconds, machine.clock)
    return profile


def errors(profile: Profile, machine: Machine, counts: range) -> list[float]:
    cost = CostModel(profile.tables())
    return [abs(cost.verify_seconds(n, 0, 1) / (machine.cost(n) / 1000 / machine.speed) - 1) for n in counts]


def test_it_finds_the_stairs() -> None:
    machine = Machine()
    profile = profiled(machine, 60)
    assert profile.complete and machine.now < 20
    assert max(errors(profile, machine, range(1, 33))) < 0.05
    assert max(errors(profile, machine, range(33, 129))) < 0.08
    cost = CostModel(profile.tables())
    assert cost.verify_seconds(16, 0, 1) < 1.01 * cost.verify_seconds(9, 0, 1) < 0.95 * cost.verify_seconds(17, 0, 1)


def test_context_and_sequences() -> None:
    cost = CostModel(profiled(Machine(), 60).tables())
    assert cost.verify_seconds(16, 16 * 512, 16) == pytest.approx(Machine().true(Probe(16, 0, 512)), rel=0.05)
    assert cost.verify_seconds(8, 1024, 1) == pytest.approx(Machine().true(Probe(1, 7, 1024)), rel=0.1)


def test_with_noise_it_is_still_right() -> None:
    machine = Machine(noise=0.1)
    assert np.mean(errors(profiled(machine, 60), machine, range(1, 129))) < 0.06


@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("speed", [0.05, 1.0])
def test_it_keeps_to_its_time_and_always_answers(seconds: float, speed: float) -> None:
    machine = Machine(speed)
    profile = profiled(machine, seconds)
    # One step to warm up and the one that was running when the time was over.
    assert machine.now <= seconds + 2.2 * machine.true(Probe(1, 15, 0))
    assert not profile.complete
    cost = CostModel(profile.tables())
    found = cost.verify_seconds(np.arange(1, 600), 1000, 4)
    assert (found > 0).all() and (np.diff(found) >= 0).all()


def test_a_second_is_enough_for_a_rough_table() -> None:
    machine = Machine(noise=0.05)
    assert max(errors(profiled(machine, 1.0), machine, range(1, 129))) < 0.25


def test_it_goes_on_where_it_stopped() -> None:
    machine = Machine()
    profile = Profile(INFO)
    for _ in range(100):
        profile = profiled(machine, 0.4, Profile(INFO, profile.samples()))
        if profile.complete:
            break
    assert profile.complete
    assert max(errors(profile, machine, range(1, 33))) < 0.05
    machine.probes.clear()
    again = profiled(machine, 10, Profile(INFO, profile.samples()))
    assert again.complete and set(machine.probes) <= set(again.coarse[:2])


def test_another_day_the_machine_is_slower() -> None:
    """What is measured then is brought to the scale of what was kept: no false stair between the two."""
    day, night = Machine(1.0), Machine(0.5)
    profile = profiled(day, 0.5)
    profile = profiled(night, 60, Profile(INFO, profile.samples()))
    assert profile.complete
    assert max(errors(profile, day, range(1, 65))) < 0.08


def test_probes_fit_the_engine() -> None:
    info = fake_info(max_model_len=64, num_blocks=8, block_size=4, max_num_seqs=4, max_num_batched_tokens=24)
    machine = Machine()
    profile = Profile(info)
    profile.measure(machine.probe, 60, machine.clock)
    assert profile.complete and machine.probes
    for probe in machine.probes:
        assert probe.fits(info)
        assert probe.tokens <= 24 and probe.blocks(4) <= 8 and probe.sequences <= 4


# ---- kept on disk


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "weights.safetensors").write_bytes(b"weights" * 1000)
    return EngineConfig(model=str(model), cache_dir=str(tmp_path / "cache"))


def files(config: EngineConfig) -> list[Path]:
    return sorted(cost_store.folder(config).glob("*"))


def test_the_next_start_measures_nothing_and_begins_corrected(config: EngineConfig) -> None:
    first = Costs(config, Machine(), INFO, seconds=60)
    assert first.model.measured and len(files(config)) == 1
    slower = first.model.verify_seconds(16, 0, 1) * 1.2
    for _ in range(500):
        first.model.observe(16, 0, 1, slower)
    first.save()
    machine = Machine()
    second = Costs(config, machine, INFO)
    assert machine.probes == []
    assert second.model.verify_seconds(16, 0, 1) == pytest.approx(slower, rel=0.02)


def test_another_machine_model_or_setting_has_its_own_table(config: EngineConfig) -> None:
    class Other(Machine):
        def platform(self) -> dict[str, str]:
            return {"device": "another machine"}

    Costs(config, Machine(), INFO, seconds=1)
    Costs(config, Other(), INFO, seconds=1)
    Costs(config, Machine(), msgspec.structs.replace(INFO, dtype="float32"), seconds=1)
    (Path(config.model) / "weights.safetensors").write_bytes(b"other" * 1000)
    Costs(config, Machine(), INFO, seconds=1)
    assert len(files(config)) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"\x80\x04 no json",
        lambda raw: raw.replace(b'"a machine"', b'"another machine"'),
        lambda raw: raw.replace(b'"format": 1', b'"format": 99'),
        lambda raw: raw.replace(b'"drift": 1.0', b'"drift": -1.0'),
    ],
    ids=["empty", "cut", "garbage", "foreign", "newer", "impossible"],
)
def test_a_file_that_cannot_be_used_is_measured_again(
    config: EngineConfig, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    good = Costs(config, Machine(), INFO, seconds=60).model.tables()
    (file,) = files(config)
    raw = file.read_bytes()
    assert damage(raw) != raw
    file.write_bytes(damage(raw))
    machine = Machine()
    with caplog.at_level(logging.WARNING):
        again = Costs(config, machine, INFO, seconds=60)
    assert "is not used" in caplog.text
    assert machine.probes and again.model.tables().verify.seconds == good.verify.seconds
    assert msgspec.json.decode(file.read_bytes(), type=CostFile).complete


def test_a_disk_that_cannot_be_written_costs_a_warning(config: EngineConfig, caplog: pytest.LogCaptureFixture) -> None:
    assert config.cache_dir is not None
    Path(config.cache_dir).write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        costs = Costs(config, Machine(), INFO, seconds=1)
    assert "cannot be kept" in caplog.text and costs.model.measured


def test_without_a_profile_it_guesses_and_keeps_what_it_learned(config: EngineConfig) -> None:
    config = msgspec.structs.replace(config, profile=False)
    machine = Machine()
    costs = Costs(config, machine, INFO)
    assert machine.probes == [] and files(config) == [] and not costs.model.measured
    for _ in range(100):
        costs.model.observe(4, 0, 1, 0.2)
    costs.save()
    again = Costs(config, machine, INFO)
    assert not again.model.measured and again.model.verify_seconds(4, 0, 1) == pytest.approx(0.2, rel=0.1)
    assert Costs(msgspec.structs.replace(config, profile=True), machine, INFO, seconds=1).model.measured


def test_an_executor_that_cannot_be_measured_gets_a_guess(config: EngineConfig) -> None:
    costs = Costs(config, object(), INFO)
    costs.save()
    assert not costs.model.measured and files(config) == []
    assert math.isfinite(costs.model.verify_seconds(4, 100, 2))


def test_the_files_lie_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cost_store.folder(EngineConfig(model="m")) == tmp_path / "outrider" / "cost"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cost_store.folder(EngineConfig(model="m")) == tmp_path / "home" / ".cache" / "outrider" / "cost"


def test_info_is_enough(config: EngineConfig) -> None:
    info: EngineInfo = fake_info()
    assert Profile(info).tables().verify.measured is False
