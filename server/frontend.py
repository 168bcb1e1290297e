"""What every route needs: the configuration, the way to the engine, the tokenizer, the counters. One per app, no globals."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import TYPE_CHECKING, cast

from starlette.requests import HTTPConnection

from engine.messages import EngineInfo
from server.admission import Admission
from server.metrics import Metrics
from server.openai.errors import model_not_found, unavailable
from server.resolve import DEFAULT_NAME
from server.version import VERSION

if TYPE_CHECKING:
    from server.config import ServerConfig
    from server.fleet import Fleet
    from server.tokenizer import Tokenizer


class Frontend:
    def __init__(self, config: ServerConfig, client: Fleet, tokenizer: Tokenizer) -> None:
        self.config = config
        self.client = client
        self.tokenizer = tokenizer
        self.model = config.served_model_name or config.model or DEFAULT_NAME  # what clients call it
        self.created = int(time.time())
        # Not for secrets: whoever sets --seed wants the same draws again.
        self._seeds = random.SystemRandom() if config.seed is None else random.Random(config.seed)  # noqa: S311
        self.admission = Admission(config.max_queue)
        self.metrics = Metrics(self.model, client, self.admission, vllm_names=config.vllm_metrics)
        for number, engine in enumerate(client.engines):
            engine.on_stats = partial(self.metrics.observe_engine, number)

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for a model that is not served here."""
        if name != self.model:
            raise model_not_found(name)

    def check_ready(self) -> EngineInfo:
        """Facts about the engine. Raises ApiError 503 while it is starting, restarting or dead."""
        if not (self.client.live and self.client.ready):
            raise unavailable("The engine is not ready.")
        return self.info

    @property
    def info(self) -> EngineInfo:
        """The latest engine's facts. Raises ApiError 503 before there has been one."""
        if self.client.info is None:
            raise unavailable("The engine is not ready.")
        return self.client.info

    def fingerprint(self, lossless: bool) -> str:
        """OpenAI's system_fingerprint: what, besides the request, an answer depends on. Says so when it may not be exact."""
        info = self.info
        lossy = "" if lossless else f"-lossy-{info.verifier}"
        return f"outrider-{VERSION}-{info.dtype}{lossy}"

    def draw_seed(self) -> int:
        """The seed of a request that brings none."""
        return self._seeds.getrandbits(63)

    def vocab_size(self) -> int:
        """Ids the model can embed and the tokenizer can name."""
        return min(self.info.vocab_size, self.tokenizer.vocab_size)


def frontend(connection: HTTPConnection) -> Frontend:
    return cast(Frontend, connection.app.state.frontend)
