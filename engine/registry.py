"""The methods by name, one line each. Modules are imported when a method is asked for, not before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import Any

from engine.config import EngineConfig
from engine.protocols import Drafter, Policy, Verifier
from engine.successors import Successors

DRAFTERS = {
    "aded": "engine.drafters.aded:AdedDrafter",
    "draft_model": "engine.drafters.draft_model:DraftModelDrafter",
    "lookahead": "engine.drafters.lookahead:LookaheadDrafter",
    "ngram": "engine.drafters.ngram:NgramDrafter",
    "none": "engine.drafters.none:NoneDrafter",
    "prediction": "engine.drafters.prediction:PredictionDrafter",
    "rasd": "engine.drafters.rasd:RasdDrafter",
    "rest": "engine.drafters.rest:RestDrafter",
    "stand": "engine.drafters.stand:StandDrafter",
    "suffix": "engine.drafters.suffix:SuffixDrafter",
    "token_recycling": "engine.drafters.token_recycling:TokenRecyclingDrafter",
}

VERIFIERS = {
    "block": "engine.verifiers.block:BlockVerifier",
    "lenient": "engine.verifiers.lenient:LenientVerifier",
    "match": "engine.verifiers.match:MatchVerifier",
    "optimal": "engine.verifiers.optimal:OptimalVerifier",
    "recursive": "engine.verifiers.recursive:RecursiveVerifier",
    "rejection": "engine.verifiers.rejection:RejectionVerifier",
    "single_coin": "engine.verifiers.single_coin:SingleCoinVerifier",
    "spectr": "engine.verifiers.spectr:SpectrVerifier",
    "traversal": "engine.verifiers.traversal:TraversalVerifier",
    "typical": "engine.verifiers.typical:TypicalVerifier",
}

POLICIES = {
    "fixed": "engine.policies.fixed:FixedPolicy",
    "goodput": "engine.policies.goodput:GoodputPolicy",
    "off": "engine.policies.off:OffPolicy",
}

KINDS = {"drafter": DRAFTERS, "verifier": VERIFIERS, "policy": POLICIES}


@contextmanager
def lent(kind: str, name: str, path: str) -> Iterator[None]:
    """A method from outside the house, known by its name inside the block alone: for measurements."""
    KINDS[kind][name] = path
    try:
        yield
    finally:
        del KINDS[kind][name]  # one process may measure and then serve, as the tests do


def make(kind: str, name: str, **options: Any) -> Any:
    """A drafter, verifier or policy by its name, given its options.

    Raises ValueError for an unknown name, listing the known ones.
    """
    return load(kind, name)(**options)


def load(kind: str, name: str) -> Any:
    """The class behind a name. Raises ValueError for an unknown name, listing the known ones."""
    known = KINDS[kind]
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"there is no {kind} {name!r}{hint}; known: {', '.join(sorted(known))}")
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)


def make_drafter(name: str, offers: Mapping[str, Any] | None = None, **options: Any) -> Drafter:
    """A drafter given its options, and of `offers` what its constructor has a parameter of that name for."""
    drafter: Drafter = make("drafter", name, **(_wanted("drafter", name, offers) | options))
    return drafter


def wants_draft_model(names: Iterable[str]) -> bool:
    """Whether one of these drafters takes a draft model. Raises ValueError for an unknown name."""
    return any("draft_model" in signature(load("drafter", name)).parameters for name in names)


def wants_successors(names: Iterable[str]) -> bool:
    """Whether one of these drafters begins with the target's own bigrams. Raises ValueError for an unknown name."""
    return any("successors" in signature(load("drafter", name)).parameters for name in names)


def drafter_offers(
    config: EngineConfig, vocab_size: int, eos_ids: frozenset[int], draft_model: Any = None, successors: Successors | None = None
) -> dict[str, Any]:
    """What the engine offers to the constructor of every drafter: one that needs it names it as a parameter.

    draft_model: the model of `config.draft_model`, ready to be loaded (engine/draft_runner.py), or None. accepts, prefers and
    chains_only are the verifier's (engine/protocols.py).
    """
    verifier = load("verifier", config.verifier)
    return {
        "accepts": verifier.accepts,
        "prefers": getattr(verifier, "prefers", None),
        "chains_only": getattr(verifier, "chains_only", False),
        "vocab_size": vocab_size,
        "eos_ids": eos_ids,
        "memory_bytes": config.drafter_memory_bytes,  # most bytes of state that outlives a sequence, all salts together
        "draft_model": draft_model,
        "successors": successors,
        "datastore": config.datastore,
    }


def make_verifier(name: str, offers: Mapping[str, Any] | None = None, **options: Any) -> Verifier:
    """A verifier given its options, and of `offers` (siblings: how each drafter chooses them) what it has a parameter for."""
    verifier: Verifier = make("verifier", name, **(_wanted("verifier", name, offers) | options))
    return verifier


def _wanted(kind: str, name: str, offers: Mapping[str, Any] | None) -> dict[str, Any]:
    wanted = signature(load(kind, name)).parameters
    return {key: value for key, value in (offers or {}).items() if key in wanted}


def wants_cost(policy: str) -> bool:
    """Whether a policy asks what steps cost. Raises ValueError for an unknown name."""
    return "cost" in signature(load("policy", policy)).parameters


def make_policy(name: str, **options: Any) -> Policy:
    policy: Policy = make("policy", name, **options)
    return policy


def check_pairing(drafters: Iterable[Drafter], verifier: Verifier) -> None:
    """Raises ValueError when the verifier is not exact for the way a drafter chooses the children of a node."""
    for drafter in drafters:
        if drafter.siblings not in verifier.accepts:
            accepts = ", ".join(sorted(kind.value for kind in verifier.accepts))
            raise ValueError(
                f"drafter {drafter.name!r} with verifier {verifier.name!r} would change the answers: "
                f"the drafter's siblings are {drafter.siblings.value}, the verifier is exact for {accepts}"
            )
