"""Documents to rows: pure functions of the documents' keys and lengths, of settings and the seed.

Documents are ordered by a digest of their text, never by the file or rank that they came from, so
the plan is the same for any order of files and any number of ranks.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_prep.config import Prep
from data_prep.pack import FRAME, MIN_PIECE, Segment, cut, pack

WINDOW = 1 << 16  # segments packed together: large enough for full rows, small enough for a cache
DOCUMENT = np.dtype(
    [("key", "S16"), ("language", "S32"), ("tokens", "<u4"), ("chars", "<u4"), ("unit", "<u4"),
     ("offset", "<u8")]
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What goes where.

    Args:
        documents: DOCUMENT records, sorted by language and key; segments refer to them by index.
        train: rows of segments, in their final order.
        heldout: the held-out rows of each language.
        dropped: (language, rule) -> documents and characters that are in neither.
    """

    documents: npt.NDArray[np.void]
    train: list[list[Segment]]
    heldout: dict[str, list[list[Segment]]]
    dropped: dict[tuple[str, str], int]

    def tokens(self) -> dict[str, int]:
        """Tokens to train on of each language, padding excluded."""
        totals: dict[str, int] = {}
        languages = [name.decode() for name in self.documents["language"]]
        for row in self.train:
            for segment in row:
                language = languages[segment.document]
                totals[language] = totals.get(language, 0) + segment.length + FRAME
        return totals

    def kept(self) -> dict[tuple[str, str], int]:
        """(language, what) -> documents and characters that are in at least one row.

        Counted from the rows themselves, independently of what was dropped.
        """
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        heldout = [row for rows in self.heldout.values() for row in rows]
        for part, rows in (("train", self.train), ("heldout", heldout)):
            num_kept: collections.Counter[int] = collections.Counter()
            for row in rows:
                for segment in row:
                    num_kept[segment.document] += segment.length
            for document, kept in num_kept.items():
                record = self.documents[document]
                language = record["language"].decode()
                counts[language, f"documents_{part}"] += 1
                counts[language, f"chars_{part}"] += int(record["chars"]) - _chars_of_tokens(
                    record, max(0, int(record["tokens"]) - kept)
                )
        return dict(counts)


def _chars_of_tokens(record: np.void, num_tokens: int) -> int:
    """About how many of a document's characters this many of its tokens stand for."""
    return round(num_tokens / int(record["tokens"]) * int(record["chars"]))


def make_plan(documents: npt.NDArray[np.void], prep: Prep, seed: int) -> Plan:
    """Remove duplicates, set held-out rows apart, mix the languages, shuffle, pack.

    Args:
        documents: DOCUMENT records of the whole corpus, in any order.
        prep: the recipe's section.
        seed: of the shuffle, and of which documents are held out.
    """
    dropped: dict[tuple[str, str], int] = {}
    documents = _drop_duplicates(documents, dropped)
    rng = np.random.Generator(np.random.Philox(seed))
    heldout: dict[str, list[list[Segment]]] = {}
    remaining: dict[str, npt.NDArray[np.int64]] = {}
    for name in np.unique(documents["language"]):
        language = name.decode()
        indices = rng.permutation(np.flatnonzero(documents["language"] == name))
        num_taken = 0
        if prep.heldout_rows:
            heldout[language], num_taken = _take_heldout(documents, indices, prep, dropped)
        remaining[language] = indices[num_taken:]
    chosen = _mix(documents, remaining, prep.smoothing, dropped)
    segments = [
        segment
        for document in chosen
        for segment in cut(int(document), int(documents["tokens"][document]), prep.seq_len)
    ]
    order = rng.permutation(len(segments))
    rows: list[list[Segment]] = []
    for start in range(0, len(order), WINDOW):
        rows += pack([segments[i] for i in order[start : start + WINDOW]], prep.seq_len)
    train = [rows[i] for i in rng.permutation(len(rows))]
    return Plan(documents=documents, train=train, heldout=heldout, dropped=dropped)


def _count(dropped: dict[tuple[str, str], int], documents: npt.NDArray[np.void], rule: str) -> None:
    for name in np.unique(documents["language"]):
        of_language = documents[documents["language"] == name]
        language = name.decode()
        for what, number in (
            (f"documents_{rule}", len(of_language)),
            (f"chars_{rule}", int(of_language["chars"].sum())),
        ):
            dropped[language, what] = dropped.get((language, what), 0) + number


def _drop_duplicates(
    documents: npt.NDArray[np.void], dropped: dict[tuple[str, str], int]
) -> npt.NDArray[np.void]:
    """One document of each text; of copies under two languages, the alphabetically first's."""
    order = np.lexsort((documents["offset"], documents["unit"], documents["language"],
                        documents["key"]))  # fmt: skip
    documents = documents[order]
    first = np.ones(len(documents), dtype=bool)
    first[1:] = documents["key"][1:] != documents["key"][:-1]
    _count(dropped, documents[~first], "duplicate")
    unique: npt.NDArray[np.void] = documents[first]
    silent = unique["tokens"] == 0
    _count(dropped, unique[silent], "no_tokens")
    unique = unique[~silent]
    unique = unique[np.lexsort((unique["key"], unique["language"]))]
    return unique


def _take_heldout(
    documents: npt.NDArray[np.void],
    indices: npt.NDArray[np.int64],
    prep: Prep,
    dropped: dict[tuple[str, str], int],
) -> tuple[list[list[Segment]], int]:
    """The language's held-out rows, and how many documents they took.

    Documents are laid end to end and cut where a row is full. What is left of the last one is
    dropped rather than trained on. At most half of a language's documents are taken.
    """
    rows: list[list[Segment]] = [[]]
    free = prep.seq_len
    available = indices[: len(indices) // 2]
    for taken, document in enumerate(available):
        start, end = 0, int(documents["tokens"][document])
        while start < end:
            if free < MIN_PIECE + FRAME:
                if len(rows) == prep.heldout_rows:
                    record = documents[document]
                    if start:
                        dropped[record["language"].decode(), "chars_heldout_remainder"] = (
                            _chars_of_tokens(record, end - start)
                        )
                    return rows, taken + (start > 0)
                rows.append([])
                free = prep.seq_len
            length = min(free - FRAME, end - start)
            rows[-1].append(Segment(int(document), start, length))
            start += length
            free -= length + FRAME
    return [row for row in rows if row], len(available)


def _mix(
    documents: npt.NDArray[np.void],
    remaining: dict[str, npt.NDArray[np.int64]],
    smoothing: float,
    dropped: dict[tuple[str, str], int],
) -> npt.NDArray[np.int64]:
    """Documents to train on, some several times: language shares p ~ tokens ** smoothing.

    The corpus keeps its size in tokens: rich languages give up what poor ones are repeated by.
    """
    tokens = {name: int(documents["tokens"][i].sum()) for name, i in remaining.items() if len(i)}
    weights = {name: n**smoothing for name, n in tokens.items()}
    total, total_weight = sum(tokens.values()), sum(weights.values())
    chosen: list[npt.NDArray[np.int64]] = []
    for language, n in tokens.items():
        quota = round(total * weights[language] / total_weight)
        whole, rest = divmod(quota, n)
        indices = remaining[language]
        ends = np.cumsum(documents["tokens"][indices].astype(np.int64))
        num_rest = int(np.searchsorted(ends, rest, side="right"))
        if not whole:
            num_rest = max(num_rest, 1)
            _count(dropped, documents[indices[num_rest:]], "mixing")
        chosen += [indices] * whole + [indices[:num_rest]]
    return np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)


def block_slices(num_rows: int, prep: Prep) -> list[list[tuple[int, int]]]:
    """For each shard the row ranges [start, stop) of its blocks; only the last may be short."""
    blocks = [
        (start, min(start + prep.rows_per_block, num_rows))
        for start in range(0, num_rows, prep.rows_per_block)
    ]
    return [
        blocks[i : i + prep.blocks_per_shard] for i in range(0, len(blocks), prep.blocks_per_shard)
    ]


def balance(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Items to ranks, largest first to the least loaded: which rank does what changes no output."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(item)
        loads[rank] += sizes[item]
    return shares
