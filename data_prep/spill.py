"""The first stage: text is read, cleaned and spilled, unit by unit.

A unit's spill has every clean document under its digest, grouped by the digest's high bits: the
partition that will tokenise it. The digest is keyed with the seed, so that the order of digests is
a shuffle of the corpus, the same for any order of files.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.clean import Cleaner
from data_prep.command import RunError
from data_prep.config import Prep
from data_prep.container import Container, ContainerWriter, write_container
from data_prep.documents import Fault, read_raw
from data_prep.exchange import KEY, merge_runs, partition_of, read_partition, write_run
from data_prep.sources import Unit

# `language` is a place in the unit's list of them, `pool` one in `Prep.pools`; `bytes` of text are
# spilled with the record.
DOCUMENT = np.dtype(
    [*KEY, ("language", "<u2"), ("pool", "<u2"), ("chars", "<u4"), ("bytes", "<u4")]
)
RUN_BYTES = 64 << 20  # of text held before it is written
MAX_LANGUAGES = 1000
FEW_SPILLS = 512  # that every partition opens without much ado; more are merged
MERGED_BYTES, MERGED_UNITS = 2 << 30, 256  # in one file


class Counts(collections.Counter[tuple[str, str]]):
    """(language, what) -> number. What is counted: see docs/data_format.md."""

    def drop(self, language: str, rule: str, chars: int, documents: int = 1) -> None:
        """Count documents that a rule takes away."""
        self[language, f"documents_{rule}"] += documents
        self[language, f"chars_{rule}"] += chars

    def drop_records(
        self, languages: Sequence[str], records: npt.NDArray[np.void], rule: str
    ) -> None:
        """Count documents by their records' `chars` and `language`, a place in `languages`."""
        for place in np.unique(records["language"]).tolist():
            chars = records["chars"][records["language"] == place]
            self.drop(languages[place], rule, int(chars.sum()), len(chars))

    def to_json(self) -> list[tuple[str, str, int]]:
        """Sorted entries."""
        return [(*key, number) for key, number in sorted(self.items())]

    @classmethod
    def from_json(cls, entries: Iterable[tuple[str, str, int]]) -> Counts:
        """What `to_json` gave."""
        return cls({(language, what): number for language, what, number in entries})


@dataclasses.dataclass(frozen=True)
class CleanDocument:
    """A document that stays."""

    language: str
    text: str


def read_documents(
    unit: Unit, prep: Prep, cleaner: Cleaner, counts: Counts, faults: list[Fault]
) -> Iterator[CleanDocument]:
    """The documents of a unit, cleaned, in order; what is dropped is counted under its rule.

    Raises:
        RunError: something cannot be read, and prep.on_error is `stop`.
    """
    for language, text, size in read_raw(unit, prep, faults):
        counts[language, "documents_in"] += 1
        counts[language, "chars_in"] += size
        if text is None:
            counts.drop(language, "broken", size)
            continue
        clean, rule = cleaner(language, text)
        if clean is None:
            counts.drop(language, str(rule), size)
        else:
            counts[language, "chars_normalised_away"] += size - len(clean)
            yield CleanDocument(language, clean)


def spill_path(work: Path, unit: int) -> Path:
    """Where a unit's documents are spilled."""
    return work / f"read-{unit:06d}"


def merged_path(work: Path, group: int) -> Path:
    """Where a group of units' spills are merged."""
    return work / f"read-merged-{group:06d}"


def spill(
    unit: Unit, path: Path, prep: Prep, cleaner: Cleaner, num_partitions: int, seed: int
) -> None:
    """Read a unit into the file `path`, unless an earlier start has done so.

    Raises:
        RunError: the spill cannot be written, or something cannot be read and that is to stop it.
    """
    if path.exists():
        return
    counts, faults = Counts(), list[Fault]()
    cleaner.excluded_by.clear()
    languages: dict[str, int] = {}
    documents = read_documents(unit, prep, cleaner, counts, faults)
    with write_container(path) as writer:
        records: list[tuple[int, int, int, int, int, int]] = []
        texts: list[bytes] = []
        num_bytes = 0
        for document in documents:
            text = document.text.encode()
            language = languages.setdefault(document.language, len(languages))
            _check_languages(languages, prep)
            places = (language, unit.source.pool)
            records.append((*key_of(text, seed), *places, len(document.text), len(text)))
            texts.append(text)
            num_bytes += len(text)
            if num_bytes >= RUN_BYTES:
                _write_run(writer, records, texts, num_partitions)
                records, texts, num_bytes = [], [], 0
        _write_run(writer, records, texts, num_partitions)
        writer.facts["languages"] = list(languages)
        writer.facts["counts"] = counts.to_json()
        writer.facts["excluded_by"] = dict(cleaner.excluded_by)
        writer.facts["faults"] = [dataclasses.astuple(fault) for fault in faults]


def key_of(text: bytes, seed: int) -> tuple[int, int]:
    """The two halves of a text's digest. The second says where it stands in a random draw."""
    digest = hashlib.blake2b(text, digest_size=16, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def _write_run(
    writer: ContainerWriter, records: Sequence[object], texts: list[bytes], num_partitions: int
) -> None:
    if records:
        table = np.array(records, dtype=DOCUMENT)
        write_run(writer, table, partition_of(table["hi"], num_partitions), num_partitions, texts)


def _check_languages(languages: Collection[str], prep: Prep) -> None:
    if len(languages) > MAX_LANGUAGES:
        raise RunError(
            f"prep.lang_key={prep.lang_key!r} names more than {MAX_LANGUAGES} languages (the "
            f"latest: {list(languages)[-1]!r}), so it is probably not a language; correct the key"
        )


class Spills:
    """Spills, of units or merged: what is known of them before their documents are read."""

    def __init__(self, paths: Sequence[Path], prep: Prep) -> None:
        self._files = [Container(path) for path in paths]
        self.counts = Counts()
        self.faults: list[Fault] = []
        self.excluded_by: collections.Counter[str] = collections.Counter()
        self._of_unit: list[list[str]] = []
        for facts in (file.facts for file in self._files):
            self.counts.update(Counts.from_json(facts["counts"]))
            self.faults += [Fault(*fault) for fault in facts["faults"]]
            self.excluded_by.update(facts["excluded_by"])
            self._of_unit.append(facts["languages"])
        self.languages = sorted({name for names in self._of_unit for name in names})
        _check_languages(self.languages, prep)

    def read(self, partition: int) -> tuple[npt.NDArray[np.void], bytes]:
        """A partition's DOCUMENT records, whose languages are places in `languages`, and texts."""
        tables, payloads = [np.zeros(0, DOCUMENT)], []
        for index, file in enumerate(self._files):
            table, payload = read_partition([file], partition, DOCUMENT)
            tables.append(self._relabelled(index, table))
            payloads.append(payload)
        return np.concatenate(tables), b"".join(payloads)

    def _relabelled(self, index: int, table: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        """Records of one of the files, with places in `languages`."""
        names = self._of_unit[index]
        places = np.array([self.languages.index(name) for name in names] or [0], dtype="<u2")
        table["language"] = places[table["language"]]
        return table

    def merge(self, path: Path) -> None:
        """Write all of it as one file that reads the same.

        Raises:
            RunError: the file cannot be written.
        """
        with write_container(path) as writer:
            merge_runs(writer, self._files, self._relabelled)
            writer.facts["languages"] = self.languages
            writer.facts["counts"] = self.counts.to_json()
            writer.facts["excluded_by"] = dict(self.excluded_by)
            writer.facts["faults"] = [dataclasses.astuple(fault) for fault in self.faults]


def merge_groups(sizes: Sequence[int]) -> list[range]:
    """Which spills are merged: consecutive ones, up to MERGED_BYTES and MERGED_UNITS together.

    Few spills stay as they are: what it costs to open them grows with their number times that of
    the partitions, which is a number of the same order.

    Args:
        sizes: bytes of each unit's spill.
    """
    groups: list[range] = []
    held = 0
    for index, size in enumerate(sizes):
        fits = groups and held + size <= MERGED_BYTES and len(groups[-1]) < MERGED_UNITS
        if fits and len(sizes) > FEW_SPILLS:
            groups[-1], held = range(groups[-1].start, index + 1), held + size
        else:
            groups.append(range(index, index + 1))
            held = size
    return groups


def merge_spills(paths: Sequence[Path], merged: Path, prep: Prep) -> None:
    """Merge units' spills into one file and remove them, unless an earlier start has done so.

    Raises:
        RunError: the file cannot be written.
    """
    if not merged.exists():
        Spills(paths, prep).merge(merged)
    for path in paths:
        path.unlink(missing_ok=True)
