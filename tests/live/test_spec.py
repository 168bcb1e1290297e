"""bench.spec against a real server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from bench import serve, spec
from tests.live.conftest import KEY, Server

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write one sentence about a lighthouse."]},
    {"question_id": 2, "category": "rag", "turns": ["Repeat: one two three four five six one two three four five six"]},
    {"question_id": 3, "category": "rag", "turns": ["What is the capital of France?"]},
]


async def test_both_arms_of_a_live_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    monkeypatch.setattr(serve.append, "__defaults__", (tmp_path,))
    argv = ["--base-url", f"{server.url}/v1", "--api-key", KEY, "--file", str(tmp_path / "q.jsonl"), "--max-tokens", "12"]
    argv += ["--picture", str(tmp_path / "p.png"), "--warmup", "1", "--max-nodes", "4", "--drafter", "suffix"]
    assert await asyncio.to_thread(spec.main, argv) == 0
    record = json.loads((tmp_path / "spec.jsonl").read_text())
    rows = {row["category"]: row for row in record["rows"]}
    assert {name: row["questions"] for name, row in rows.items()} == {"mt_bench": 1, "rag": 2, "all": 3}
    assert rows["all"]["equal"] == 3  # float32: speculation changes no answer
    assert rows["all"]["mat"] >= 1
    assert rows["all"]["steps"] > 0
    assert rows["all"]["decode_on"] > 0 < rows["all"]["decode_off"]
    assert KEY not in (tmp_path / "spec.jsonl").read_text()
    out = capsys.readouterr().out
    assert "| category" in out
    assert "picture" in out
