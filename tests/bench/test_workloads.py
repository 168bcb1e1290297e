"""What the arms are asked: prompts of the right kind, and none twice unless on purpose."""

from __future__ import annotations

import pytest

from bench.workloads import AGAIN, GROUPS, SERVED, WORKLOADS, chosen, named, warm_up


def test_workloads_have_prompts_of_their_category() -> None:
    for workload in WORKLOADS:
        prompts = workload.prompts()
        assert len(prompts) == workload.requests >= workload.concurrency
        if workload.category:
            assert {prompt.category for prompt in prompts} == {workload.category}
        else:
            assert len({prompt.category for prompt in prompts}) == 7


@pytest.mark.parametrize("part", [1.0, 0.5])
def test_a_first_asking_meets_no_state(part: float) -> None:
    for group in GROUPS:
        asked = [prompt.id for w in group if not w.name.endswith(AGAIN) for prompt in w.shortened(part).prompts()]
        assert len(set(asked)) == len(asked)


def test_a_second_asking_asks_the_same_after_the_first() -> None:
    names = [workload.name for workload in WORKLOADS]
    again = [name for name in names if name.endswith(AGAIN)]
    assert again == ["open again", "copy again", "math again"]
    for name in again:
        first = name.removesuffix(AGAIN)
        assert named(name).prompts() == named(first).prompts()
        assert names.index(first) < names.index(name)


def test_shortened_workloads_still_fill_their_streams() -> None:
    assert named("copy").shortened(0.5).requests == 5
    assert named("open").shortened(0.5).requests == 3
    assert named("32 streams").shortened(0.1).requests == 32


def test_choosing_a_second_asking_brings_the_first() -> None:
    assert [[w.name for w in group] for group in chosen(["copy again", "32 streams"])] == [["copy", "copy again"], ["32 streams"]]
    assert [w.name for group in chosen([]) for w in group] == [w.name for w in WORKLOADS]
    with pytest.raises(ValueError, match="no workload 'chat'"):
        chosen(["chat"])


def test_warming_up_uses_no_prompt_that_is_measured() -> None:
    texts = {prompt.messages[-1]["content"] for workload in WORKLOADS for prompt in workload.prompts()}
    asked = [prompt.messages[-1]["content"] for prompt in warm_up(8).prompts()]
    assert len(set(asked)) == 8
    assert not texts & set(asked)


def test_servers_are_asked_all_but_the_padded_batch() -> None:
    assert {w.name for w in WORKLOADS} - set(SERVED) == {"8 in a batch"}
