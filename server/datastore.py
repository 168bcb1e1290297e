"""`outrider datastore`: text files -> a datastore in a model's tokens, and what one holds. Searching it is the engine's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from engine.datastore_header import Header
from server.resolve import resolve
from server.tokenizer import Tokenizer

FIELDS = ("text", "prompt", "completion", "content")  # of a .jsonl line, in this order
PORTION = 1 << 16  # characters of one document encoded at once, to the end of a line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see outrider datastore --help")


def run(argv: Sequence[str]) -> Iterator[str]:
    """Do what the command line says; yields what to print. Raises ValueError or OSError, one line fit for the operator."""
    options = _parser().parse_args(list(argv))
    if options.command == "build":
        yield from _build(options.files, options.model, options.out, options.field or FIELDS)
    else:
        yield from _info(options.file, options.model)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="outrider datastore", description="Texts that drafters look the context up in.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="build | info")
    build = commands.add_parser("build", help="index text files", allow_abbrev=False)
    build.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".txt: one document; .jsonl: one per line")
    build.add_argument("--model", help="whose tokens: what `outrider serve` will be given (default: the packaged SmolLM2)")
    build.add_argument("--out", type=Path, required=True, metavar="FILE", help="the datastore")
    build.add_argument(
        "--field",
        action="append",
        metavar="NAME",
        help=f"of a .jsonl line, joined in this order; may be repeated (default: {', '.join(FIELDS)})",
    )
    info = commands.add_parser("info", help="what a datastore holds, and whether it is whole", allow_abbrev=False)
    info.add_argument("file", type=Path, metavar="FILE")
    info.add_argument("--model", help="say whether it fits this model, too")
    return parser


def _build(files: Sequence[Path], model: str | None, out: Path, fields: Sequence[str]) -> Iterator[str]:
    from engine import datastore

    for file in files:
        if file.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"{file}: neither .txt nor .jsonl")
        if not file.is_file():
            raise ValueError(f"no such file: {file}")
    if not out.parent.is_dir():
        raise ValueError(f"no such folder: {out.parent}")
    tokenizer = Tokenizer.load(resolve(model).path)
    documents = (encode(tokenizer, text) for file in files for text in read(file, fields))
    datastore.build(out, documents, tokenizer.vocab_size, tokenizer.fingerprint(tokenizer.vocab_size))
    yield from _describe(out, Header.read(out))


def _info(file: Path, model: str | None) -> Iterator[str]:
    from engine.datastore import Datastore

    store = Datastore(file)
    yield from _describe(file, store.header)
    if not store.verify():
        raise ValueError(f"datastore {file}: its bytes are not those that were written; build it again")
    yield "checksum      right"
    if model is not None:
        check(file, Tokenizer.load(resolve(model).path))
        yield f"fits          {model}"


def _describe(file: Path, header: Header) -> Iterator[str]:
    yield f"datastore     {file}"
    yield f"documents     {header.num_documents:,}"
    yield f"tokens        {header.num_tokens:,}"
    yield f"vocabulary    {header.vocab_size:,} ({header.fingerprint.hex()[:16]})"
    yield f"size          {header.file_bytes / 1e6:,.1f} MB"


def check(file: str | Path, tokenizer: Tokenizer) -> None:
    """Raises ValueError when a datastore was built with another tokenizer, is broken or cannot be read."""
    header = Header.read(file)
    if header.vocab_size > tokenizer.vocab_size or header.fingerprint != tokenizer.fingerprint(header.vocab_size):
        raise ValueError(f"datastore {file}: built for another tokenizer; build it again with --model")


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of one document, special tokens in it as its text has them. Encoded in portions: a large text takes much memory."""
    ids: list[int] = []
    for begin, end in _portions(text):
        ids += tokenizer.encode(text[begin:end], add_special_tokens=False)
    return ids


def _portions(text: str) -> Iterator[tuple[int, int]]:
    """Cuts behind the first line end that is PORTION characters away."""
    begin = 0
    while begin < len(text):
        cut = text.find("\n", begin + PORTION)
        end = len(text) if cut < 0 else cut + 1
        yield begin, end
        begin = end


def read(file: Path, fields: Sequence[str]) -> Iterator[str]:
    """The documents of one file. Raises ValueError, with file and line, for what is not text or not JSON."""
    try:
        if file.suffix == ".txt":
            yield file.read_text(encoding="utf-8")
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _document(line, fields, f"{file}:{number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _document(line: str, fields: Sequence[str], place: str) -> str:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from None
    found = [text for name in fields if isinstance(text := _field(data, name), str)]
    if not found:
        raise ValueError(f"{place}: none of the fields {', '.join(fields)} holds text; name one with --field")
    return "".join(found)


def _field(data: Any, name: str) -> Any:
    return data.get(name) if isinstance(data, dict) else None
