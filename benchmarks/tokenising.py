"""Megabytes of text per second of one core that become ids, against `tokenizers` alone.

    python benchmarks/tokenising.py [--tokenizer models/pocket-teacher] [--megabytes 40] [--json]

Texts of all languages of a corpus in random order, and those of each language alone, go through
`data_prep.tokenizer.Tokenizer` in batches of 3 MB. `first` is by a new one, which has met no word;
`again` is the same text a second time, where only words too long to be kept are new: what a large
corpus gives lies between. `tokenizers` is its encode_batch_fast on the same batches. All ids are
compared.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # before tokenizers is imported: all on one core
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.harness import arguments, cpu_seconds, report
from data_prep.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
BATCH_BYTES = 3_000_000


def main() -> None:
    """Read, measure, report."""
    parser = arguments(__doc__)
    parser.add_argument("--tokenizer", default=str(REPOSITORY / "models" / "pocket-teacher"))
    parser.add_argument("--corpus", default=str(REPOSITORY.parent / "shared" / "data" / "corpus"))
    parser.add_argument("--megabytes", type=float, default=40, help="of all languages together")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(Path(options.corpus).glob("*.jsonl.gz"))
    each = int(options.megabytes * 1e6 / len(files))
    languages = {path.name.split(".")[0]: list(texts_of(path, each)) for path in files}
    mixed = [text for texts in languages.values() for text in texts]
    random.Random(1).shuffle(mixed)
    cases = {"all, mixed": mixed, **languages}
    rows = [measure(name, texts, options.tokenizer) for name, texts in cases.items()]
    ratio = ("all, mixed: first / tokenizers", rows[0]["first MB/s"] / rows[0]["tokenizers MB/s"])
    report("tokenising", rows, ratio, options, tokenizer=Path(options.tokenizer).name, cores=1)


def texts_of(path: Path, num_bytes: int) -> Iterator[str]:
    """The first texts of a file, about so many bytes of them."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            text: str = json.loads(line)["text"]
            yield text
            num_bytes -= len(text.encode())
            if num_bytes <= 0:
                return


def batches_of(texts: list[str]) -> list[list[str]]:
    """The texts in order, in batches of some megabytes."""
    batches: list[list[str]] = [[]]
    filled = 0
    for text in texts:
        if filled > BATCH_BYTES:
            batches.append([])
            filled = 0
        batches[-1].append(text)
        filled += len(text.encode())
    return batches


def measure(name: str, texts: list[str], source: str) -> dict[str, Any]:
    """A row of the table."""
    batches = batches_of(texts)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = Tokenizer(source)
    tokenizer.encode(["x" * 100] * 1000)  # its comparisons are over

    first, ids = timed(lambda: [tokenizer.encode(batch)[0] for batch in batches])
    again, _ = timed(lambda: [tokenizer.encode(batch)[0] for batch in batches])
    alone = 0.0
    for batch, of_batch in zip(batches, ids, strict=True):
        encode = tokenizer._backend.encode_batch_fast
        seconds, right = timed(functools.partial(encode, batch, add_special_tokens=False))
        alone += seconds
        assert np.array_equal(of_batch, [id_ for encoding in right for id_ in encoding.ids])
    return {
        "text": name,
        "MB": megabytes,
        "tokens": sum(len(of_batch) for of_batch in ids),
        "first MB/s": megabytes / first,
        "again MB/s": megabytes / again,
        "tokenizers MB/s": megabytes / alone,
    }


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it returns."""
    started = cpu_seconds()
    result = function()
    return cpu_seconds() - started, result


if __name__ == "__main__":
    main()
