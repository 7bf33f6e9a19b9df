"""What a preparation will need and give, before the long work starts: from samples of the text."""

from __future__ import annotations

import bz2
import lzma
import random
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.clean import Cleaner
from data_prep.command import RunError
from data_prep.config import Prep
from data_prep.mixing import check_mix, mix_table
from data_prep.sources import Source, Unit, split
from data_prep.spill import CleanDocument, Counts, read_documents
from data_prep.tokenizer import Tokenizer
from data_prep.tokens import framed

SAMPLE_BYTES = 1 << 20
_COMPRESS: dict[str | None, Callable[[bytes], bytes]] = {
    "xz": lzma.compress,
    "bz2": bz2.compress,
}  # the other kinds compress about as zlib does


def disk_needed(text_bytes: int, id_bytes: int, merged_bytes: int = 0) -> int:
    """Bytes that a preparation writes at its fullest moment, about.

    First a part of the clean text is there twice, while spills are merged; then the text and its
    ids are there together, then the ids and the shards. An id stands for about four bytes of text.

    Args:
        text_bytes: of clean text.
        id_bytes: of an id.
        merged_bytes: of text that is merged at the same time.
    """
    ids = text_bytes * id_bytes // 4
    return max(text_bytes + min(merged_bytes, text_bytes), text_bytes + ids, 2 * ids)


def check_disk(folder: Path, text_bytes: int, tokenizer: Tokenizer, merged_bytes: int = 0) -> None:
    """Say how much disk space is needed, and refuse to begin where there is less.

    Raises:
        RunError: the folder's file system has less free.
    """
    needed = disk_needed(text_bytes, np.dtype(tokenizer.dtype).itemsize, merged_bytes)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"prep.output_dir={folder} has {free / 1e9:.1f} GB free and about "
            f"{needed / 1e9:.1f} GB are needed, so the disk would be full before the end; name a "
            "larger one"
        )


def estimate_table(
    sources: list[Source],
    prep: Prep,
    tokenizer: Tokenizer,
    seed: int,
    *,
    samples: int = 16,
    earlier: Collection[str] = (),
) -> str:
    """Tokens and language mix, estimated from samples, and the disk space needed, for people.

    Duplicates are not seen in samples, so less may be left.

    Args:
        sources: the text.
        prep: the recipe's section.
        tokenizer: that will be used.
        seed: of the choice of samples.
        samples: of each language, format and pool, at most, of SAMPLE_BYTES each.
        earlier: languages of earlier generations.

    Raises:
        ConfigError: as `check_mix`.
        RunError: a sample cannot be read.
    """
    cleaner = Cleaner(prep)
    random_ = random.Random(seed)
    groups: dict[tuple[str, int], list[Unit]] = {}
    for source in sources:
        stem = source.name.split(".")[0]
        group = (f"{stem}.{source.format}.{source.compression}", source.pool)
        groups.setdefault(group, []).extend(split(source, SAMPLE_BYTES))
    means: dict[str, npt.NDArray[np.float64]] = {}
    variances: dict[str, npt.NDArray[np.float64]] = {}
    text = 0.0
    for (_, pool), units in groups.items():
        total = sum(unit.bytes for unit in units)
        chosen = random_.sample(units, min(samples, len(units)))
        rates: list[dict[str, float]] = []
        for unit in chosen:
            sampled, tokens, size = _sample(unit, prep, cleaner, tokenizer)
            rates.append({name: n / sampled for name, n in tokens.items()} if sampled else {})
            text += total / len(chosen) * (size / sampled if sampled else 0)
        for name in {name for rate in rates for name in rate}:
            values = [rate.get(name, 0.0) for rate in rates]
            for found in (means, variances):
                found.setdefault(name, np.zeros(len(prep.pools)))
            means[name][pool] += total * float(np.mean(values))
            share = 1 - len(chosen) / len(units)  # nothing is uncertain where all was read
            whole = all(unit.bytes <= SAMPLE_BYTES for unit in chosen)
            spread = float(np.var(values, ddof=1)) if len(values) > 1 else (values[0] / 2) ** 2
            if whole:
                spread *= share
            variances[name][pool] += total**2 * spread / len(values)
    check_mix(means, prep, earlier)
    needed = disk_needed(round(text), np.dtype(tokenizer.dtype).itemsize)
    return (
        f"{mix_table(means, prep, variances)}\nestimated from samples, one standard error; "
        f"about {text / 1e9:.2f} GB of text; {needed / 1e9:.2f} GB of disk space are needed"
    )


def _sample(
    unit: Unit, prep: Prep, cleaner: Cleaner, tokenizer: Tokenizer
) -> tuple[float, dict[str, int], int]:
    """Bytes of input that a sample stands for, framed tokens by language, and bytes of text."""
    texts: dict[str, list[str]] = {}
    size = 0
    for document in _some(read_documents(unit, prep, cleaner, Counts(), [])):
        texts.setdefault(document.language, []).append(document.text)
        size += len(document.text.encode())
    tokens = {
        name: int(framed(tokenizer.encode(of_language)[1], prep.seq_len).sum())
        for name, of_language in texts.items()
    }
    if size < SAMPLE_BYTES:
        return unit.bytes, tokens, size
    joined = "\n".join(text for of_language in texts.values() for text in of_language).encode()
    if unit.source.compression is None:
        return min(unit.bytes, size), tokens, size
    compress = _COMPRESS.get(unit.source.compression, zlib.compress)
    return len(compress(joined)), tokens, size


def _some(documents: Iterator[CleanDocument]) -> Iterator[CleanDocument]:
    """The first documents, until there is a sample's worth of text."""
    size = 0
    for document in documents:
        yield document
        size += len(document.text.encode())
        if size >= SAMPLE_BYTES:
            return
