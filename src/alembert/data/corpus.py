"""Plain text of any size, for general distillation: tokenised shard by shard, in constant memory."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets.table import concat_tables

from alembert.common.errors import InputError
from alembert.common.progress import progress_bar
from alembert.data.cache import cached_dataset, fingerprint_of
from alembert.data.reading import at, check_encoding
from alembert.data.tokenisation import tokenizer_content, tokenizer_outputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CACHE_VERSION = 1
"""To be raised whenever the same text would be tokenised differently."""
_ENDINGS = (".txt", ".txt.gz")
_SHORTEST_REMAINDER = 8  # text tokens; fewer give attention hardly anything to look at
_LONGEST_LINE = 4_000_000  # bytes; a line is tokenised in one piece
_BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus.

    Attributes:
        dataset: one memory-mapped data set with the columns of `tokenise`.
        shard_rows: rows of each shard, in order; the rows of a shard lie together in one file.
        fingerprint: changes when text, tokenizer, `max_length`, shard size or `max_rows` do.
        source: the file or folder, as it was given.
        tokens: of all rows, special tokens included.
        files: by name, the SHA-256 of what was read: the uncompressed file, or its beginning if `max_rows` were
            reached before its end.
    """

    dataset: Dataset = field(repr=False)
    shard_rows: tuple[int, ...] = field(repr=False)
    fingerprint: str
    source: str
    tokens: int
    files: dict[str, str]

    def describe(self) -> dict[str, Any]:
        """What a run's configuration keeps of the corpus; JSON values."""
        return {
            "name": Path(self.source).resolve().name,
            "rows": len(self.dataset),
            "tokens": self.tokens,
            "shards": len(self.shard_rows),
            "files": dict(self.files),
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True)
class _Shard:
    """A range of a file's bytes that ends at a line's end."""

    path: Path
    first_line: int
    content: bytes


def load_corpus(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    shard_bytes: int = 16_000_000,
    max_rows: int | None = None,
) -> Corpus:
    """Reads and tokenises UTF-8 text files with a paragraph per line, of any size.

    A paragraph longer than `max_length` tokens becomes several rows, each with the tokenizer's special tokens;
    a remainder of fewer than 8 text tokens is dropped. Paragraphs that fit are kept, however short; lines
    without text are skipped. Every shard is cached on disk by its content, so that an interrupted call goes on
    where it was and a changed file costs only the shards that changed.

    Args:
        source: a ``.txt`` or ``.txt.gz`` file, or a folder of them, read in the order of their names.
        tokenizer: its padding and truncation settings do not matter and are left as they are.
        max_length: tokens per row, those that the tokenizer adds included.
        shard_bytes: bytes of text per shard, which is what is held in memory at a time.
        max_rows: at most so many rows, from the beginning; None = all.

    Raises:
        InputError: there is no text file, a file is not UTF-8 or has an overlong line (names file and line), there
            is no text at all, or `max_length` leaves no room for text.
    """
    added = tokenizer.num_special_tokens_to_add(pair=False)
    if max_length <= added:
        raise InputError(
            f"max_length {max_length} leaves no room for text: {added} special tokens are added."
        )
    for name, value in (("shard_bytes", shard_bytes), ("max_rows", max_rows)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1.")
    paths = _text_files(Path(source))
    settings = fingerprint_of(
        _CACHE_VERSION, tokenizer_content(tokenizer), sorted(tokenizer_outputs(tokenizer)), max_length
    )
    shards: list[Dataset] = []
    keys: list[str] = []
    files: dict[str, str] = {}
    rows = 0
    with progress_bar() as bar:
        task = bar.add_task("Tokenising corpus (bytes)", total=sum(path.stat().st_size for path in paths))
        done = 0
        for path in paths:
            digest = hashlib.sha256()
            for shard, position in _read_shards(path, shard_bytes):
                digest.update(shard.content)
                key = fingerprint_of(settings, hashlib.sha256(shard.content).hexdigest())
                dataset = cached_dataset(f"corpus-{key}", partial(_tokenised, shard, tokenizer, max_length))
                keys.append(key)
                if len(dataset):
                    shards.append(dataset)
                    rows += len(dataset)
                bar.update(task, completed=done + position)
                if max_rows is not None and rows >= max_rows:
                    break
            files[path.name] = digest.hexdigest()
            done += path.stat().st_size
            if max_rows is not None and rows >= max_rows:
                break
    if not shards:
        raise InputError(
            f"{source}: there is no text in {'this file' if len(paths) == 1 else 'these files'}."
        )
    fingerprint = fingerprint_of(keys, max_rows)
    shard_rows = [len(shard) for shard in shards]
    tables = [shard.data for shard in shards]
    if max_rows is not None and rows > max_rows:
        shard_rows[-1] -= rows - max_rows
        tables[-1] = tables[-1].slice(0, shard_rows[-1])
    dataset = Dataset(concat_tables(tables), fingerprint=fingerprint)
    tokens = sum(_tokens(table) for table in tables)
    return Corpus(dataset, tuple(shard_rows), fingerprint, str(source), tokens, files)


def _text_files(source: Path) -> list[Path]:
    if source.is_dir():
        paths = sorted(
            path
            for path in source.iterdir()
            if path.name.endswith(_ENDINGS) and not path.name.startswith(".") and path.is_file()
        )
        if not paths:
            raise InputError(f"{source}: there are no {' or '.join(_ENDINGS)} files in this folder.")
        return paths
    if not source.is_file():
        raise InputError(f"{source}: no such file or folder.")
    if not source.name.endswith(_ENDINGS):
        raise InputError(
            f"{source}: a corpus is plain text with a paragraph per line: a {' or '.join(_ENDINGS)} file."
        )
    return [source]


def _read_shards(path: Path, shard_bytes: int) -> Iterator[tuple[_Shard, int]]:
    """Each shard of a file, and how many bytes of the file have been read by then."""
    first_line = 1
    try:
        with path.open("rb") as file:
            stream: BinaryIO = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file  # type: ignore[assignment]
            while content := stream.read(shard_bytes):
                if not content.endswith(b"\n"):
                    content += stream.readline(_LONGEST_LINE)
                yield _Shard(path, first_line, content), file.tell()
                first_line += content.count(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}.") from error


def _tokenised(
    shard: _Shard, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[pa.RecordBatch]:
    outputs = [
        name
        for name in ("input_ids", "attention_mask", "token_type_ids")
        if name in tokenizer_outputs(tokenizer)
    ]
    types = [pa.list_(pa.int32() if name == "input_ids" else pa.int8()) for name in outputs]
    schema = pa.schema([*zip(outputs, types, strict=True), ("length", pa.int32())])
    # A shard without text is cached too, as an empty data set.
    yield pa.RecordBatch.from_pylist([], schema=schema)
    for paragraphs in _batches(_paragraphs(shard)):
        columns = _windows(paragraphs, tokenizer, max_length, outputs)
        columns["length"] = [len(ids) for ids in columns["input_ids"]]
        yield pa.RecordBatch.from_pydict(columns, schema=schema)


def _paragraphs(shard: _Shard) -> Iterator[str]:
    source = str(shard.path)
    # utf-8-sig would take a byte order mark off every shard, not only off the file.
    content = shard.content.removeprefix(b"\xef\xbb\xbf") if shard.first_line == 1 else shard.content
    for number, line in enumerate(content.split(b"\n"), start=shard.first_line):
        if len(line) >= _LONGEST_LINE:
            raise InputError(
                f"{at(source, number)}: the line is longer than {_LONGEST_LINE:,} bytes; put each paragraph on a "
                "line of its own."
            )
        text = line.decode(errors="surrogateescape").strip()
        check_encoding(source, number, None, text)
        if text:
            yield text


def _batches(paragraphs: Iterable[str]) -> Iterator[list[str]]:
    held: list[str] = []
    characters = 0
    for paragraph in paragraphs:
        held.append(paragraph)
        characters += len(paragraph)
        if characters >= _BATCH_CHARACTERS:
            yield held
            held, characters = [], 0
    if held:
        yield held


def _windows(
    paragraphs: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, outputs: Sequence[str]
) -> dict[str, list[Any]]:
    added = tokenizer.num_special_tokens_to_add(pair=False)
    if tokenizer.is_fast:
        encoding = tokenizer(
            paragraphs,
            truncation=True,
            max_length=max_length,
            padding=False,
            return_overflowing_tokens=True,
            stride=0,
        )
        paragraph_of = encoding["overflow_to_sample_mapping"]
    else:
        room = max_length - added
        paragraph_of, rows = [], []
        for index, ids in enumerate(
            tokenizer(paragraphs, add_special_tokens=False, padding=False)["input_ids"]
        ):
            for start in range(0, len(ids), room):
                paragraph_of.append(index)
                rows.append(
                    tokenizer.prepare_for_model(ids[start : start + room], return_token_type_ids=True)
                )
        encoding = {name: [row[name] for row in rows] for name in outputs}
    windows = Counter(paragraph_of)
    shortest = min(_SHORTEST_REMAINDER, max_length - added)
    kept = [
        row
        for row, (paragraph, ids) in enumerate(zip(paragraph_of, encoding["input_ids"], strict=True))
        if len(ids) - added >= (1 if windows[paragraph] == 1 else shortest)
    ]
    return {name: [encoding[name][row] for row in kept] for name in outputs}


def _tokens(table: Any) -> int:
    return int(pc.sum(pc.cast(table.column("length"), pa.int64())).as_py())
