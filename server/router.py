"""Which of several engines gets a prompt: the one that has the fewest tokens to compute until it is through with it.

    score of an engine = tokens of the prompt that its prefix cache lacks + tokens it still owes to requests it has

The smallest wins. Both terms are tokens that a step of that engine has to take, and under load steps are filled to the same
number of them whoever they belong to: so a saved token outweighs exactly one queued token, and there is no threshold to
tune. A prompt stays where its prefix is until the others there cost more than computing the prefix once more; it then
takes the prefix along, and what everybody asks for ends up everywhere. Equal scores go to the engine with fewer requests, then to
the one that was sent fewer different blocks, so that new prefixes spread.

What an engine owes to a request is the part of the prompt that it lacked, until the first token comes, and the answer: as
long as answers have been lately, since nobody knows, and never more than it may be. Every request passes through this process,
so both are known here at once, without asking an engine.

What an engine's cache holds is guessed from what it was sent: the blocks of prompts, as many as it has KV blocks, the least
recently sent forgotten first. Answers are left out. A wrong guess costs time, never correctness.

Others decide in two modes: SGLang's router and Ray Serve's prefix-aware one follow the prefix while queues are about equally
long (so and so many requests) and the shortest queue otherwise, vLLM's balancer counts waiting and running requests and knows no
prefixes. NVIDIA Dynamo adds up blocks as this does, with a weight.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

from engine.messages import EngineInfo, TokenDelta
from engine.request import Request

DIGEST_BYTES = 16  # two prefixes with one digest would be sent to one engine: no harm
MAX_BLOCKS = 1 << 18  # remembered per engine
FIRST_GUESS = 128.0  # tokens of an answer, before there has been one
MEMORY = 1 / 32  # weight of the latest answer in the mean length


class Engine(Protocol):
    """What the router looks at; `restarts` tells that a cache is a new, empty one."""

    @property
    def ready(self) -> bool: ...
    @property
    def restarts(self) -> int: ...
    @property
    def info(self) -> EngineInfo | None: ...


class Prefixes:
    """Blocks that one engine was sent, by their chained digests; the `capacity` latest."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, digests: Sequence[bytes]) -> int:
        """How many leading blocks are known."""
        return next((i for i, digest in enumerate(digests) if digest not in self._blocks), len(digests))

    def add(self, digests: Sequence[bytes]) -> None:
        """The end of a prompt is forgotten before its beginning, which more prompts can share."""
        for digest in reversed(digests):
            self._blocks[digest] = None
            self._blocks.move_to_end(digest)
        while len(self._blocks) > self.capacity:
            self._blocks.popitem(last=False)


class Route:
    """One engine as the router knows it. Counts since start: `requests`, `prompt_tokens`, `matched_tokens` of them known."""

    def __init__(self, index: int, engine: Engine) -> None:
        self.index = index
        self.engine = engine
        self.owed = 0  # tokens
        self.in_flight = 0
        self.requests = 0
        self.prompt_tokens = 0
        self.matched_tokens = 0
        self._life = -1
        self._prefixes = Prefixes(0)

    @property
    def prefixes(self) -> Prefixes:
        """Empty again when the engine was started again."""
        info, life = self.engine.info, self.engine.restarts
        if info is not None and self._life != life:
            self._life, self._prefixes = life, Prefixes(min(info.num_blocks, MAX_BLOCKS))
        return self._prefixes


class Placement:
    """A request at its engine: `took` hears of every delta, `end` comes when the stream has ended, however it did."""

    def __init__(self, router: Router, route: Route, request: Request, lacking: int) -> None:
        self.index = route.index
        self._router = router
        self._route = route
        self._n = request.n
        self._tokens = 0
        self._open = request.n  # samples
        self._owed = 0
        self._answers = request.n * min(round(router.answer_length), request.params.max_tokens)
        route.in_flight += 1
        self._owe(lacking + self._answers)

    def took(self, delta: TokenDelta) -> None:
        self._tokens += len(delta.token_ids)
        self._open -= delta.finish_reason is not None
        # An answer that is longer than others have been goes on by one token at least.
        self._owe(max(self._answers - self._tokens, self._open))

    def end(self) -> None:
        self._owe(0)
        self._route.in_flight -= 1
        if self._tokens:
            self._router.answer_length += MEMORY * (self._tokens / self._n - self._router.answer_length)

    def _owe(self, tokens: int) -> None:
        self._route.owed += tokens - self._owed
        self._owed = tokens


class Router:
    """Lives in one event loop; remembers at most MAX_BLOCKS blocks per engine, 137 bytes each."""

    def __init__(self, engines: Sequence[Engine], block_size: int, *, affinity: bool = True) -> None:
        """affinity: False where engines keep no prefix cache; then only what they owe counts."""
        self.routes = [Route(index, engine) for index, engine in enumerate(engines)]
        self.block_size = block_size
        self.affinity = affinity
        self.answer_length = FIRST_GUESS  # tokens, a running mean

    def place(self, request: Request) -> Placement:
        """With no engine ready the choice means nothing: whichever it is will say why it takes no requests."""
        size = len(request.prompt_ids)
        digests = chain(request, self.block_size) if self.affinity else []
        most = (size - 1) // self.block_size  # the last token of a prompt is always computed
        ready = [route for route in self.routes if route.engine.ready] or self.routes
        known = {route.index: self.block_size * min(route.prefixes.match(digests), most) for route in ready}

        def score(route: Route) -> tuple[int, int, int, int]:
            return size - known[route.index] + route.owed, route.in_flight, len(route.prefixes), route.requests

        best = min(ready, key=score)
        best.prefixes.add(digests)
        best.requests += 1
        best.prompt_tokens += size
        best.matched_tokens += known[best.index]
        return Placement(self, best, request, size - known[best.index])


def chain(request: Request, block_size: int) -> list[bytes]:
    """One digest per full block of the prompt, each standing for the salt and every token up to its end."""
    width = block_size * array("I").itemsize
    tokens = array("I", request.prompt_ids).tobytes()
    digest = blake2b(request.cache_salt.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
    digests = []
    for start in range(0, len(tokens) - width + 1, width):
        digest = blake2b(tokens[start : start + width], digest_size=DIGEST_BYTES, key=digest).digest()
        digests.append(digest)
    return digests
