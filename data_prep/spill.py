"""Spills: what is left of an input file once it is read, cleaned and tokenised. One unit a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.config import Prep
from data_prep.documents import Counts, Document, read_documents
from data_prep.durable import durable_write
from data_prep.pack import Segment
from data_prep.plan import DOCUMENT
from data_prep.tokenizer import Tokenizer

BATCH_CHARS = 1 << 22  # text tokenised at a time: enough for every core, little memory


def spill(path: Path, unit: int, work: Path, prep: Prep, tokenizer: Tokenizer) -> None:
    """Tokenise one file into `work`, unless an earlier start has done so.

    The unit's .json appears last and says that it is finished.

    Raises:
        RunError: the file cannot be read to its end, or the spill cannot be written.
    """
    stem = work / f"unit-{unit:06d}"
    if stem.with_suffix(".json").exists():
        return
    counts = Counts()
    tables = [np.zeros(0, dtype=DOCUMENT)]
    offset = 0
    with durable_write(stem.with_suffix(".tokens")) as stream:
        for batch in _batches(read_documents(path, prep, counts)):
            encoded = tokenizer.encode([document.text for document in batch])
            table = np.zeros(len(batch), dtype=DOCUMENT)
            for row, (document, ids) in enumerate(zip(batch, encoded, strict=True)):
                key = hashlib.sha256(document.text.encode()).digest()[:16]
                num_chars = len(document.text)
                table[row] = (key, document.language, len(ids), num_chars, unit, offset)
                offset += len(ids)
                stream.write(ids.tobytes())
            tables.append(table)
    with durable_write(stem.with_suffix(".npy")) as stream:
        np.save(stream, np.concatenate(tables))
    with durable_write(stem.with_suffix(".json")) as stream:
        stream.write(json.dumps([[*key, n] for key, n in sorted(counts.items())]).encode())


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document.text)
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


class Spills:
    """What all units left: every document's record, its tokens by memory map, and the counts."""

    def __init__(self, work: Path, num_units: int, dtype: npt.DTypeLike) -> None:
        stems = [work / f"unit-{unit:06d}" for unit in range(num_units)]
        self.documents = np.concatenate([np.load(f"{stem}.npy") for stem in stems])
        self.counts = Counts()
        for stem in stems:
            for language, what, n in json.loads(Path(f"{stem}.json").read_text()):
                self.counts[language, what] += n
        self._tokens = [
            np.memmap(f"{stem}.tokens", dtype=dtype, mode="r")
            if os.path.getsize(f"{stem}.tokens")
            else np.zeros(0, dtype=dtype)
            for stem in stems
        ]

    def tokens(self, record: np.void, segment: Segment) -> npt.NDArray[Any]:
        """The ids of a segment's content."""
        start = int(record["offset"]) + segment.start
        return self._tokens[int(record["unit"])][start : start + segment.length]
