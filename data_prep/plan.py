"""The third stage: which tokens are in which row. Only numbers move; ids stay where they are.

Documents lie in the partitions in the order of a keyed digest of their text, which is random, and
the same for any order of files and any number of ranks. A group of partitions gives some of the
rows; a document's further copies are taken up by partitions far from its own.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.config import Prep
from data_prep.container import Container, ContainerWriter, write_container
from data_prep.mixing import Dose
from data_prep.pack import FRAME, MIN_PIECE, Segment, cut, nearest_cut, pack
from data_prep.spill import Counts
from data_prep.tokenizer import Tokenizer
from data_prep.tokens import TOKENISED, TokenFiles, draw_of, tokens_of_draws

# `length` ids of the partition's file from `offset`; the frame around them is not counted.
SEGMENT = np.dtype(
    [("partition", "<u4"), ("language", "<u2"), ("length", "<u4"), ("offset", "<u8")]
)
WINDOW = 1 << 16  # segments packed together: large enough for full rows, small enough for a cache
GROUP_TOKENS = 8 << 20  # to train on, in one group of partitions


@dataclasses.dataclass
class Rows:
    """Rows of segments.

    Args:
        segments: SEGMENT records, row by row.
        starts: [rows + 1], where each row begins in `segments`.
    """

    segments: npt.NDArray[np.void]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.void]:
        return self.segments[self.starts[row] : self.starts[row + 1]]

    @classmethod
    def of(cls, rows: Sequence[Sequence[Any]]) -> Rows:
        """From tuples of SEGMENT's fields."""
        flat = [segment for row in rows for segment in row]
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(np.array(flat, dtype=SEGMENT), starts)

    def write(self, writer: ContainerWriter) -> None:
        """Add them to a file."""
        writer.append("segments", self.segments)
        writer.append("starts", self.starts)

    @classmethod
    def load(cls, file: Container) -> Rows:
        """What `write` wrote."""
        return cls(file.read("segments"), file.read("starts"))


@dataclasses.dataclass
class HeldOut:
    """Text that is never trained on.

    Args:
        rows: language -> its rows.
        until: language -> digest: all its documents up to there are held out.
        draws: language -> [pools, DRAWS] framed tokens that are no longer there to train on.
        counts: what became of these documents.
    """

    rows: dict[str, Rows]
    until: dict[str, tuple[int, int]]
    draws: dict[str, npt.NDArray[np.int64]]
    counts: Counts


def take_heldout(files: TokenFiles, prep: Prep, languages: Sequence[str]) -> HeldOut:
    """The first documents of each language, in the order of digests, until the rows are full.

    Documents are laid end to end and cut where a row is full. What is left of the last one is
    dropped rather than trained on. At most half of a language's documents are taken.

    Args:
        files: all documents.
        prep: the recipe's section.
        languages: those to hold out from.
    """
    held = HeldOut({}, {}, {}, Counts())
    limits = {language: number // 2 for language, number in files.num_documents().items()}
    fillers = {language: _Filler(prep, limits[language]) for language in languages}
    for partition in range(len(files)):
        open_ones = {files.languages.index(n): f for n, f in fillers.items() if not f.is_full}
        if not open_ones:
            break
        for record in _of_languages(files.documents(partition), list(open_ones)):
            open_ones[int(record["language"])].take(record, partition)
    for language, filler in fillers.items():
        held.rows[language] = Rows.of([row for row in filler.rows if row])
        taken = np.array(filler.taken, dtype=TOKENISED)
        held.draws[language] = tokens_of_draws(taken, prep)
        if filler.taken:
            held.until[language] = (int(taken["hi"][-1]), int(taken["lo"][-1]))
            held.counts.drop(
                language, "heldout", int(taken["chars"].sum()) - filler.remainder, len(taken)
            )
            if filler.remainder:
                held.counts[language, "chars_heldout_remainder"] += filler.remainder
    return held


def _of_languages(table: npt.NDArray[np.void], languages: Sequence[int]) -> npt.NDArray[np.void]:
    return table[np.isin(table["language"], languages)]


class _Filler:
    """Fills a language's held-out rows, document after document."""

    def __init__(self, prep: Prep, limit: int) -> None:
        self._seq_len, self._num_rows, self._limit = prep.seq_len, prep.heldout_rows, limit
        self._free = prep.seq_len
        self.rows: list[list[Any]] = [[]]
        self.taken: list[np.void] = []
        self.remainder = 0  # about how many characters of the last document are in no row
        self.is_full = not self._num_rows or not limit

    def take(self, record: np.void, partition: int) -> None:
        """Lay a document into the rows, unless they are full."""
        if self.is_full:
            return
        start, end = 0, int(record["tokens"])
        while start < end:
            if self._free < MIN_PIECE + FRAME:
                if len(self.rows) == self._num_rows:
                    self.is_full = True
                    break
                self.rows.append([])
                self._free = self._seq_len
            length = min(self._free - FRAME, end - start)
            offset = int(record["offset"]) + start
            self.rows[-1].append((partition, int(record["language"]), length, offset))
            start += length
            self._free -= length + FRAME
        if start:
            self.taken.append(record.copy())
            self.remainder = round((end - start) / end * int(record["chars"]))
        self.is_full |= len(self.taken) == self._limit


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which partitions give rows together: consecutive ones, enough for full rows."""

    bounds: tuple[int, ...]

    @classmethod
    def of(cls, num_partitions: int, num_tokens: int) -> Groups:
        """As many groups as the tokens to train on fill, at most one a partition."""
        number = max(1, min(num_partitions, num_tokens // GROUP_TOKENS))
        return cls(tuple(num_partitions * group // number for group in range(number + 1)))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, group: int) -> range:
        return range(self.bounds[group], self.bounds[group + 1])


def rows_path(work: Path, group: int) -> Path:
    """Where a group's rows are."""
    return work / f"rows-{group:06d}"


def heldout_path(work: Path, language: str) -> Path:
    """Where a language's held-out rows are."""
    return work / f"heldout-{language}"


def plan_group(
    files: TokenFiles,
    partitions: range,
    path: Path,
    doses: Mapping[str, Sequence[Dose]],
    until: Mapping[str, tuple[int, int]],
    prep: Prep,
    tokenizer: Tokenizer,
    seed: int,
) -> None:
    """Cut, shuffle and pack a group's documents into the file `path`, unless that is done.

    Raises:
        RunError: the file cannot be written.
    """
    if path.exists():
        return
    counts = Counts()
    choice = _Choice(files, doses, until, len(prep.pools))
    parts = [choice.segments(partition, prep, tokenizer, counts) for partition in partitions]
    segments = np.concatenate(parts)
    rng = np.random.Generator(np.random.Philox([seed, partitions.start]))
    order = rng.permutation(len(segments))
    rows: list[list[Any]] = []
    for start in range(0, len(order), WINDOW):
        window = segments[order[start : start + WINDOW]]
        rows += _pack_window(window, files, prep.seq_len, tokenizer)
    packed = Rows.of([rows[i] for i in rng.permutation(len(rows)).tolist()])
    with write_container(path) as writer:
        packed.write(writer)
        writer.facts["counts"] = counts.to_json()
        writer.facts["tokens"] = _tokens(packed.segments, files.languages)
        writer.facts["lengths"] = length_histogram(packed.segments, files.languages)


def _tokens(segments: npt.NDArray[np.void], languages: Sequence[str]) -> dict[str, int]:
    totals = np.bincount(segments["language"], weights=segments["length"] + np.uint32(FRAME))
    return {languages[i]: int(n) for i, n in enumerate(totals.tolist()) if n}


def length_histogram(
    segments: npt.NDArray[np.void], languages: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Language -> the power of two that a segment's tokens reach -> segments."""
    powers = np.frexp(segments["length"] + np.uint32(FRAME))[1] - 1
    pairs = collections.Counter(zip(segments["language"].tolist(), powers.tolist(), strict=True))
    found: dict[str, dict[str, int]] = {}
    for (language, power), number in sorted(pairs.items()):
        found.setdefault(languages[language], {})[str(1 << power)] = number
    return found


class _Choice:
    """Which documents are trained on, and where their copies go."""

    def __init__(
        self,
        files: TokenFiles,
        doses: Mapping[str, Sequence[Dose]],
        until: Mapping[str, tuple[int, int]],
        num_pools: int,
    ) -> None:
        self._files = files
        names = files.languages
        none = [Dose(0, 0)] * num_pools
        of_names = [doses.get(name, none) for name in names]  # [languages, pools], both below too
        self._copies = np.array([[dose.copies for dose in of_pools] for of_pools in of_names])
        self._draw = np.array([[dose.draw for dose in of_pools] for of_pools in of_names])
        nothing = (0, 0)  # no text's digest
        until_hi, until_lo = zip(*[until.get(name, nothing) for name in names], strict=True)
        self._hi, self._lo = np.array(until_hi, "<u8"), np.array(until_lo, "<u8")
        most = int(self._copies.max())
        self._passes = most + 1
        self._stride = max(1, len(files) // self._passes)

    def segments(
        self, partition: int, prep: Prep, tokenizer: Tokenizer, counts: Counts
    ) -> npt.NDArray[np.void]:
        """A partition's share of what is trained on; counts its own documents."""
        parts = []
        for copy in range(self._passes):
            source = (partition - copy * self._stride) % len(self._files)
            records = self._files.documents(source)
            language, pool = records["language"], records["pool"]
            hi, lo = self._hi[language], self._lo[language]
            free = (records["hi"] > hi) | ((records["hi"] == hi) & (records["lo"] > lo))
            copies, draw = self._copies[language, pool], self._draw[language, pool]
            chosen = free & ((copy < copies) | ((copy == copies) & (draw_of(records) < draw)))
            if copy == 0:
                counts.drop_records(self._files.languages, records[chosen], "train")
                counts.drop_records(self._files.languages, records[free & ~chosen], "mixing")
            if chosen.any():
                ids = self._files.tokens(source)
                parts.append(_segments(records[chosen], source, ids, prep.seq_len, tokenizer))
        return np.concatenate([np.zeros(0, SEGMENT), *parts])


def _segments(
    records: npt.NDArray[np.void],
    partition: int,
    ids: npt.NDArray[Any],
    seq_len: int,
    tokenizer: Tokenizer,
) -> npt.NDArray[np.void]:
    """Documents as segments that each fit a row."""
    is_long = records["tokens"] > seq_len - FRAME
    whole = records[~is_long]
    found = np.zeros(len(whole), dtype=SEGMENT)
    found["partition"], found["language"] = partition, whole["language"]
    found["length"], found["offset"] = whole["tokens"], whole["offset"]
    pieces: list[tuple[int, int, int, int]] = []
    columns = [records[name][is_long].tolist() for name in ("language", "offset", "tokens")]
    for language, start, tokens in zip(*columns, strict=True):
        of_document = ids[start : start + tokens]
        starts_word = tokenizer.starts_word[of_document].tobytes()
        ends_sentence = tokenizer.ends_sentence[of_document].tobytes()
        for length in cut(starts_word, ends_sentence, seq_len):
            pieces.append((partition, language, length, start))
            start += length
    return np.concatenate([found, np.array(pieces, dtype=SEGMENT)])


def _pack_window(
    window: npt.NDArray[np.void], files: TokenFiles, seq_len: int, tokenizer: Tokenizer
) -> list[list[Any]]:
    """Rows of SEGMENT fields. What is cut up to fill holes is cut between words where it can be."""
    partitions, languages = window["partition"].tolist(), window["language"].tolist()
    offsets = window["offset"].tolist()

    def shorten(segment: Segment, length: int) -> int:
        start = offsets[segment.document] + segment.start
        ids = files.tokens(partitions[segment.document])[start : start + length + 1]
        return nearest_cut(tokenizer.starts_word[ids].tobytes(), 0, length)

    items = [Segment(i, 0, length) for i, length in enumerate(window["length"].tolist())]
    return [
        [(partitions[i], languages[i], length, offsets[i] + start) for i, start, length in row]
        for row in pack(items, seq_len, shorten)
    ]


def block_slices(num_rows: int, prep: Prep) -> list[list[tuple[int, int]]]:
    """For each shard the row ranges [start, stop) of its blocks.

    Only the last block can be short. It has a shard of its own, so that a later generation can
    take up its rows and leave that shard out.
    """
    whole = num_rows // prep.rows_per_block
    blocks = [(i * prep.rows_per_block, (i + 1) * prep.rows_per_block) for i in range(whole)]
    shards = [blocks[i : i + prep.blocks_per_shard] for i in range(0, whole, prep.blocks_per_shard)]
    rest = (whole * prep.rows_per_block, num_rows)
    return [*shards, [rest]] if rest[0] < rest[1] else shards
