"""The second stage: each partition's documents, each text once, to ids.

What is left of a partition is a file of ids and a table of documents, sorted by language and
digest, so that a language's documents lie together in an order that is random and fixed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.config import Prep
from data_prep.container import Container, ContainerWriter, write_container
from data_prep.exchange import KEY, is_among, read_partition
from data_prep.pack import FRAME
from data_prep.spill import Counts, Spills
from data_prep.tokenizer import Tokenizer

# `language` is a place in the list of all languages, `pool` one in `Prep.pools`.
TOKENISED = np.dtype(
    [
        *KEY,
        *(("language", "<u2"), ("pool", "<u2")),
        *(("chars", "<u4"), ("tokens", "<u4"), ("offset", "<u8")),
    ]
)
BATCH_BYTES = 4 << 20  # text tokenised at a time
MAPPED_BYTES = 128 << 20  # of ids that stay mapped: all of a group of small partitions
DRAWS = 1024  # parts into which a language's documents fall at random, to take a share of them


@dataclasses.dataclass(frozen=True)
class UniqueDocuments:
    """A partition's documents in the order of their digests, each text once.

    Args:
        records: DOCUMENT records; `language` is a place in the list of all languages.
        starts: where each text begins in `texts`.
        texts: UTF-8.
    """

    records: npt.NDArray[np.void]
    starts: npt.NDArray[np.int64]
    texts: bytes

    def text(self, index: int) -> str:
        """A document's text."""
        start = int(self.starts[index])
        return self.texts[start : start + int(self.records["bytes"][index])].decode()

    def where(self, chosen: npt.NDArray[Any]) -> UniqueDocuments:
        """Some of them, by mask or in an order."""
        return UniqueDocuments(self.records[chosen], self.starts[chosen], self.texts)


def unique_documents(spills: Spills, partition: int, counts: Counts) -> UniqueDocuments:
    """Of documents with one text, keep the alphabetically first language's; count the others.

    Within a language, that of the pool with the largest weight stays.
    """
    records, texts = spills.read(partition)
    starts = np.cumsum(records["bytes"], dtype=np.int64) - records["bytes"]
    order = np.lexsort([records[name] for name in ("pool", "language", "lo", "hi")])
    found = UniqueDocuments(records[order], starts[order], texts)
    hi, lo = found.records["hi"], found.records["lo"]
    again = np.zeros(len(order), dtype=bool)
    again[1:] = (hi[1:] == hi[:-1]) & (lo[1:] == lo[:-1])
    counts.drop_records(spills.languages, found.records[again], "duplicate")
    return found.where(~again)


@dataclasses.dataclass(frozen=True)
class Removals:
    """What is known to go before a partition is tokenised.

    Args:
        known: sorted KEY records of texts that are in the shards already.
        similar: files of KEY records: documents that are near duplicates of others.
        lines: files of LINE records: lines that stand in another document.
    """

    known: npt.NDArray[np.void]
    similar: Sequence[Path] = ()
    lines: Sequence[Path] = ()


LINE = np.dtype([*KEY, ("line", "<u4")])


def tokens_path(work: Path, partition: int) -> Path:
    """Where a partition's ids are."""
    return work / f"tokens-{partition:06d}"


def tokenise(
    spills: Spills,
    partition: int,
    path: Path,
    prep: Prep,
    tokenizer: Tokenizer,
    removals: Removals,
) -> None:
    """Tokenise a partition into the file `path`, unless an earlier start has done so.

    Raises:
        RunError: the file cannot be written.
    """
    if path.exists():
        return
    counts = Counts()
    documents = unique_documents(spills, partition, counts)
    for rule, keys in (
        ("duplicate", removals.known),
        ("near_duplicate", np.unique(read_partition(removals.similar, partition, KEY)[0])),
    ):
        goes = is_among(documents.records, keys)
        counts.drop_records(spills.languages, documents.records[goes], rule)
        documents = documents.where(~goes)
    lines = _removed_lines(removals.lines, partition)
    documents = documents.where(np.argsort(documents.records["language"], kind="stable"))
    table = np.zeros(len(documents.records), dtype=TOKENISED)
    for name in ("hi", "lo", "language", "pool", "chars"):
        table[name] = documents.records[name]
    with write_container(path) as writer:
        writer.append("tokens", np.zeros(0, tokenizer.dtype))
        offset = 0
        for start, stop in _batches(documents.records["bytes"]):
            texts = [
                _without_lines(documents, i, lines, table, counts, spills, prep.min_chars)
                for i in range(start, stop)
            ]
            ids, lengths = tokenizer.encode(texts)
            writer.append("tokens", ids)
            table["tokens"][start:stop] = lengths
            table["offset"][start:stop] = offset + np.cumsum(lengths) - lengths
            offset += len(ids)
        silent = table["tokens"] == 0
        counts.drop_records(spills.languages, table[silent & (table["chars"] > 0)], "no_tokens")
        table = table[~silent]
        writer.append("documents", table)
        _write_statistics(writer, spills, table, prep)
        writer.facts["counts"] = counts.to_json()


def _batches(sizes: npt.NDArray[np.uint32]) -> list[tuple[int, int]]:
    """Ranges of documents with at most BATCH_BYTES of text each, or one document."""
    batches, start, total = [], 0, 0
    for index, size in enumerate(sizes.tolist()):
        if total + size > BATCH_BYTES and index > start:
            batches.append((start, index))
            start, total = index, 0
        total += size
    if start < len(sizes):
        batches.append((start, len(sizes)))
    return batches


def _removed_lines(paths: Sequence[Path], partition: int) -> dict[tuple[int, int], list[int]]:
    removed: dict[tuple[int, int], list[int]] = {}
    for hi, lo, line in read_partition(paths, partition, LINE)[0].tolist():
        removed.setdefault((hi, lo), []).append(line)
    return removed


def _without_lines(
    documents: UniqueDocuments,
    index: int,
    lines: dict[tuple[int, int], list[int]],
    table: npt.NDArray[np.void],
    counts: Counts,
    spills: Spills,
    min_chars: int,
) -> str:
    """A document's text in one line, less the lines that go; adjusts its characters in `table`."""
    text = documents.text(index)
    record = documents.records[index]
    goes = set(lines.get((int(record["hi"]), int(record["lo"])), ()))
    if goes:
        kept = [line for i, line in enumerate(text.split("\n")) if i not in goes]
        left = "\n".join(kept)
        language = spills.languages[int(record["language"])]
        counts.drop(language, "duplicate_line", len(text) - len(left), documents=not left)
        if 0 < len(left) < min_chars:
            counts.drop(language, "short", len(left))
            left = ""
        table["chars"][index] = len(left)
        text = left
    return text.replace("\n", " ")


def framed(tokens: npt.NDArray[Any], seq_len: int) -> npt.NDArray[np.int64]:
    """Tokens of documents once they are cut to rows and each piece has its frame.

    A little too few where documents are cut before a row is full, between words.
    """
    content: npt.NDArray[np.int64] = tokens.astype(np.int64)
    num_pieces: npt.NDArray[np.int64] = -(-content // (seq_len - FRAME))
    return content + FRAME * num_pieces


def draw_of(records: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """Each document's part, 0 to DRAWS - 1, by its digest."""
    return (records["lo"] >> np.uint64(64 - DRAWS.bit_length() + 1)).astype(np.int64)


def tokens_of_draws(records: npt.NDArray[np.void], prep: Prep) -> npt.NDArray[np.int64]:
    """[pools, DRAWS] framed tokens of TOKENISED records."""
    shape = (len(prep.pools), DRAWS)
    places = np.ravel_multi_index((records["pool"].astype(np.int64), draw_of(records)), shape)
    tokens = framed(records["tokens"], prep.seq_len)
    sums = np.bincount(places, weights=tokens, minlength=shape[0] * shape[1])
    return sums.astype(np.int64).reshape(shape)


def _write_statistics(
    writer: ContainerWriter, spills: Spills, table: npt.NDArray[np.void], prep: Prep
) -> None:
    """For each language that is there: documents, and framed tokens of each pool and draw."""
    present = np.unique(table["language"]).tolist()
    for place in present:
        tokens = tokens_of_draws(table[table["language"] == place], prep)
        writer.append(f"draws/{spills.languages[place]}", tokens.reshape(-1))
    writer.facts["documents"] = {
        spills.languages[place]: int((table["language"] == place).sum()) for place in present
    }


class TokenFiles:
    """All partitions' ids and documents.

    Args:
        paths: the partitions' files.
        languages: all of them, sorted: what records' `language` is a place in.
    """

    def __init__(self, paths: Sequence[Path], languages: Sequence[str]) -> None:
        self._files = [Container(path) for path in paths]
        largest = max((path.stat().st_size for path in paths), default=1)
        keep = functools.lru_cache(max(1, MAPPED_BYTES // largest))
        self._map = keep(lambda partition: self._files[partition].map("tokens"))
        self.languages = list(languages)

    def __len__(self) -> int:
        return len(self._files)

    def documents(self, partition: int) -> npt.NDArray[np.void]:
        """A partition's TOKENISED records, sorted by language and digest."""
        return self._files[partition].read("documents")

    def tokens(self, partition: int) -> npt.NDArray[Any]:
        """A partition's ids, mapped."""
        return self._map(partition)

    def counts(self) -> Counts:
        """What all partitions dropped."""
        total = Counts()
        for file in self._files:
            total.update(Counts.from_json(file.facts["counts"]))
        return total

    def num_documents(self) -> dict[str, int]:
        """Documents of each language."""
        totals = dict.fromkeys(self.languages, 0)
        for file in self._files:
            for language, number in file.facts["documents"].items():
                totals[language] += number
        return totals

    def draws(self) -> dict[str, npt.NDArray[np.int64]]:
        """Framed tokens of each language that is there, [pools, DRAWS]."""
        totals: dict[str, npt.NDArray[np.int64]] = {}
        for file in self._files:
            for language in file.facts["documents"]:
                found = file.read(f"draws/{language}").reshape(-1, DRAWS)
                totals[language] = totals.get(language, np.int64(0)) + found
        return dict(sorted(totals.items()))
