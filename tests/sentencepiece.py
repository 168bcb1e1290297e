"""A small SentencePiece-style tokenizer: visible spaces, byte fallback, a merge for every way to build a token.

What Llama 2's tokenizer.json looks like, trained on our own prompts: rare characters are left to the 256 byte tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.prompts import PROMPTS

MARK = "\u2581"  # SentencePiece's visible space
SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def build(num_learned: int = 700) -> Tokenizer:
    """Ids: the special tokens, the bytes, then at most `num_learned` characters and merged pieces."""
    vocab = {piece: i for i, piece in enumerate((*SPECIAL, *BYTES, *_learn(num_learned)))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_merges(vocab), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write(folder: Path, max_length: int) -> int:
    """tokenizer.json and tokenizer_config.json and a template showing the last message; returns the vocabulary size."""
    tokenizer = build()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "chat_template": "{{ bos_token }}{{ messages[-1]['content'] }}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": max_length,
        "pad_token": "</s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return tokenizer.get_vocab_size()


def _learn(count: int) -> list[str]:
    """Characters and pieces in the order in which they were learned; no piece crosses a space."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(MARK)
    trainer = trainers.BpeTrainer(vocab_size=count, limit_alphabet=90, show_progress=False)
    learner.train_from_iterator(PROMPTS, trainer)
    return sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Earlier pieces first; a piece that several pairs make has a merge for each of them."""
    merges: list[tuple[str, str]] = []
    for piece in list(vocab)[len(SPECIAL) + len(BYTES) :]:
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in pairs if left in vocab and right in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges
