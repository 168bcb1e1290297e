"""A `tokenizers.Tokenizer` from the metadata of a GGUF file: byte-level BPE of the usual families, and SentencePiece BPE.

A GGUF file names its pre-tokenizer instead of holding it; a wrong guess silently shifts every token, so a name that is
not known here is an error. The expressions are those of the models' own tokenizer.json files.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.gguf_file import CONTROL, GGUFFile

_UNKNOWN, _USER_DEFINED = 2, 4  # token types
_MARK = "\u2581"  # SentencePiece's visible space

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    pattern = Regex(f"{_CONTRACTIONS}|{_WORDS}|{digits}|{_REST}")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, behavior="isolated"), byte_level])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _qwen2() -> pre_tokenizers.PreTokenizer:
    return _split(r"\p{N}")


def _llama3() -> pre_tokenizers.PreTokenizer:
    return _split(r"\p{N}{1,3}")


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "gpt2": _gpt2,
    "smollm": _single_digits_gpt2,
    "qwen2": _qwen2,
    "deepseek-r1-qwen": _qwen2,
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
}


def build(file: GGUFFile) -> Tokenizer:
    """The file's tokenizer. Raises ValueError for a kind that is not known or metadata that contradicts itself."""
    kind = file.field("tokenizer.ggml.model", str)
    tokens = file.field("tokenizer.ggml.tokens", list)
    vocab = {token: i for i, token in enumerate(tokens)}
    if not tokens or not isinstance(tokens[0], str) or len(vocab) != len(tokens):
        raise ValueError(f"{file.path.name}: the vocabulary is empty or names a token twice")
    try:
        if kind == "gpt2":
            tokenizer = _byte_level(file, vocab)
        elif kind == "llama":
            tokenizer = _sentencepiece(file, vocab)
        else:
            raise ValueError(f"{file.path.name}: tokenizers of kind {kind!r} are not supported (only gpt2 and llama)")
        _add_tokens(tokenizer, tokens, file.field("tokenizer.ggml.token_type", list, []))
        # Where a file does not say, its kind does: SentencePiece's put it there, and so does Llama 3's byte-level one.
        _add_bos(tokenizer, file, tokens, default=kind == "llama" or _pre_tokenizer(file) is _llama3)
    except ValueError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"{file.path.name}: the tokenizer is broken: {error}") from None
    if tokenizer.get_vocab_size() != len(tokens):
        raise ValueError(f"{file.path.name}: the tokenizer has {tokenizer.get_vocab_size()} tokens, not {len(tokens)}")
    return tokenizer


def _pre_tokenizer(file: GGUFFile) -> Callable[[], pre_tokenizers.PreTokenizer]:
    name = file.field("tokenizer.ggml.pre", str, "default")
    if name not in _PRE_TOKENIZERS:
        raise ValueError(f"{file.path.name}: the pre-tokenizer {name!r} is not supported (only {', '.join(_PRE_TOKENIZERS)})")
    return _PRE_TOKENIZERS[name]


def _byte_level(file: GGUFFile, vocab: dict[str, int]) -> Tokenizer:
    pre = _pre_tokenizer(file)
    merges = [tuple(merge.split(" ", 1)) for merge in file.field("tokenizer.ggml.merges", list)]
    if not all(len(merge) == 2 for merge in merges):
        raise ValueError(f"{file.path.name}: a merge is not a pair")
    # Llama 3 looks a whole word up before it merges.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre is _llama3))
    if pre is _qwen2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GGUFFile, vocab: dict[str, int]) -> Tokenizer:
    """SentencePiece BPE. The file holds scores; merging the best-scored pair first is a ranking of merges."""
    scores = file.field("tokenizer.ggml.scores", list)
    if len(scores) != len(vocab):
        raise ValueError(f"{file.path.name}: {len(scores)} scores for {len(vocab)} tokens")
    unknown = file.field("tokenizer.ggml.unknown_token_id", int, 0)
    tokens = list(vocab)
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for token, i in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[i], i, vocab[left], vocab[right], left, right))
    ranked.sort()
    merges = [(left, right) for *_, left, right in ranked]
    unk = tokens[unknown] if 0 <= unknown < len(tokens) else None
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    prefix = file.field("tokenizer.ggml.add_space_prefix", bool, True)
    steps: list[normalizers.Normalizer] = [normalizers.Prepend(_MARK)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _MARK)])
    strip: list[decoders.Decoder] = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control tokens and what stands for the unknown are special; user-defined ones are found whole in text but are text."""
    for kinds, special in (((CONTROL, _UNKNOWN), True), ((_USER_DEFINED,), False)):
        names = [t for t, found in zip(tokens, types, strict=False) if found in kinds and t]
        added = [AddedToken(name, special=special, normalized=False) for name in names]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)


def _add_bos(tokenizer: Tokenizer, file: GGUFFile, tokens: list[str], default: bool) -> None:
    bos = file.field("tokenizer.ggml.bos_token_id", int, -1)
    if not file.field("tokenizer.ggml.add_bos_token", bool, default) or not 0 <= bos < len(tokens):
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[f"{tokens[bos]}:0", "$A:0"], special_tokens=[(tokens[bos], bos)]
    )
