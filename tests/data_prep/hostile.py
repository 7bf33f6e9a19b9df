"""A corpus of everything that text comes as at its worst, and what is to become of each document.

What is expected is written down while the files are written, so none of the code under test has a
part in it.
"""

from __future__ import annotations

import bz2
import collections
import csv
import gzip
import io
import json
import lzma
import random
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from backports import zstd
from isal import igzip

COMPRESS = {
    ".gz": lambda data: gzip.compress(data, 1),
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": zstd.compress,
    ".bz2": bz2.compress,
}
# Latin with combining marks to compose, Arabic and Hebrew with points, Devanagari with joiners,
# Thai without spaces, Han, emoji of several code points, a space that is none, soft hyphens.
WORDS = (
    "word wörd e\u0301te\u0301 q\u0307\u0323 \u202eright-to-left\u202c العَرَبِيَّة مرحبا שָׁלוֹם क्\u200dष "
    "हिन्दी ประเทศไทยสวยงาม 中文字符 日本語の文章 한국어 👩\u200d👩\u200d👧 🇩🇪 "
    "no\u00a0break soft\u00adhyphen 3.14 <s> </s> ▁ ﬁ İstanbul ß"
).split(" ")


def normal(text: str) -> str:
    """The clean text by its description in docs/cleaning.md."""
    spaced = "".join(
        " " if unicodedata.category(c) in ("Cc", "Zs", "Zl", "Zp") or c == "\ufeff" else c
        for c in unicodedata.normalize("NFC", text)
    )
    return " ".join(filter(None, spaced.split(" ")))


class Corpus:
    """Files in a folder, and what is to become of them.

    Attributes:
        folder: of the files.
        faulty: file name -> what faults.jsonl is to say of it, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faulty: dict[str, list[str]] = {}
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._documents: list[tuple[str, str]] = []
        folder.mkdir(parents=True)

    def document(self, language: str, text: str) -> None:
        """A document that can be read."""
        clean = normal(text)
        self._count(language, "in", len(text))
        if clean:
            self._documents.append((clean, language))
            self._counts[language, "chars_normalised_away"] += len(text) - len(clean)
        else:
            self._count(language, "empty", len(text))

    def fault(self, name: str, reason: str, size: int) -> None:
        """A document of this file that cannot be read."""
        language = name.split(".")[0]
        self._count(language, "in", size)
        self._count(language, "broken", size)
        self.faulty.setdefault(name, []).append(reason)

    def _count(self, language: str, what: str, chars: int) -> None:
        self._counts[language, f"documents_{what}"] += 1
        self._counts[language, f"chars_{what}"] += chars

    def outcome(self, tokens: Any) -> tuple[dict[str, dict[str, int]], dict[str, list[str]]]:
        """The accounting, and each language's documents that are in the rows.

        Args:
            tokens: whether a text has any.
        """
        counts, kept = self._counts.copy(), dict[str, list[str]]()
        seen: set[str] = set()
        for clean, language in sorted(self._documents):
            what = "duplicate" if clean in seen else "train" if tokens(clean) else "no_tokens"
            seen.add(clean)
            counts[language, f"documents_{what}"] += 1
            counts[language, f"chars_{what}"] += len(clean)
            if what == "train":
                kept.setdefault(language, []).append(clean)
        accounting: dict[str, dict[str, int]] = {}
        for (language, what), number in counts.items():
            if number:
                accounting.setdefault(language, {})[what] = number
        return accounting, kept

    # Files

    def write(self, name: str, data: bytes) -> None:
        """A file, compressed as its name says."""
        compress = COMPRESS.get(Path(name).suffix)
        (self.folder / name).write_bytes(compress(data) if compress else data)

    def txt(self, name: str, documents: Iterable[str], *, blank: str = "\n") -> None:
        """Documents with blank lines between them."""
        ended = [text + "\n" for text in documents]
        for text in ended:
            self.document(name.split(".")[0], text)
        self.write(name, blank.join(ended).encode())

    def jsonl(self, name: str, records: Iterable[tuple[str, Any] | tuple[str, bytes]]) -> None:
        """A line for each (text, label), or for each (reason, bytes) that is a fault."""
        lines = []
        for text, label in records:
            if isinstance(label, bytes):
                lines.append(label)
                self.fault(name, text, len(label) + 1)
            else:
                lines.append(json.dumps({"text": text, "lang": label}).encode())
                self.document(self.language(name, label), text)
        self.write(name, b"".join(line + b"\n" for line in lines))

    def table(self, name: str, rows: Sequence[tuple[str | bytes | None, Any]]) -> None:
        """A row for each text and label, in a format with columns; None and bytes are faults."""
        for text, label in rows:
            if isinstance(text, str):
                self.document(self.language(name, label), text)
            else:
                reason = "no text under 'text'" if text is None else "not UTF-8"
                self.fault(name, reason, len(text or b""))
        path, kind = self.folder / name, name.partition(".")[2]
        if kind.startswith(("csv", "tsv")):
            stream = io.StringIO(newline="")
            writer = csv.writer(stream, "excel" if kind.startswith("csv") else "excel-tab")
            writer.writerows([("lang", "text"), *((label, text) for text, label in rows)])
            self.write(name, stream.getvalue().encode())
            return
        texts, labels = [text for text, _ in rows], [label for _, label in rows]
        if any(isinstance(text, bytes) for text in texts):
            texts = [text.encode() if isinstance(text, str) else text for text in texts]
        table = pa.table({"text": texts, "lang": labels})
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=7)
        elif kind == "arrow":
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
                out.write_table(table, max_chunksize=5)
        else:
            datasets.Dataset(table).save_to_disk(str(path), num_shards=3)

    @staticmethod
    def language(name: str, label: Any) -> str:
        """By docs/data_format.md."""
        if not label:
            return name.split(".")[0]
        plain = isinstance(label, str) and 0 < len(label) <= 32
        return label if plain and set(label) <= ALLOWED else "und"


ALLOWED = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
ODD_LABELS = ["zh-Hans", "EN", "../../x", " en", "x" * 32, "x" * 33, "🇩🇪", 7, ["en"], "", None]


def prose(random_: random.Random, count: int, words: int = 60) -> list[str]:
    """Different documents of up to so many words, with odd white space between them."""
    spaces = [" "] * 20 + ["  ", "\t", "\u2028", "\u2003", "\x00", "\x85", "\ufeff", "\u3000"]
    return [
        f"{random_.random()}"
        + "".join(
            random_.choice(spaces) + random_.choice(WORDS)
            for _ in range(random_.randrange(1, words))
        )
        for _ in range(count)
    ]


def small_corpus(folder: Path, fitting: Sequence[str] = ()) -> Corpus:
    """Everything hostile that is small.

    Args:
        folder: for the files.
        fitting: documents of particular numbers of tokens.
    """
    corpus, random_ = Corpus(folder), random.Random(11)
    lines = [text.replace("\x00", "\n") for text in prose(random_, 30)]
    for suffix, blank in (("", "\n"), (".xz", "\r\n \t\n"), (".zst", "\n\n\x0b\n"), (".gz", "\n")):
        name = f"sw.{len(suffix)}.txt{suffix}"
        corpus.txt(name, [f"{name} {text}".replace("\n", "\r\n") for text in lines], blank=blank)
    corpus.txt("marks.txt", ["\ufeff\u2028\ufeff", "\u200b\u200b", "\ufeffafter a mark", "\x00"])
    deep = b"[" * 100_000 + b"]" * 100_000
    corpus.jsonl(
        "hi.jsonl.gz",
        [
            *((text, "hi") for text in prose(random_, 30)),
            ("not JSON", b"\xef\xbb\xbf"),
            ("JSON nested too deep", b'{"text": "deep", "more": ' + deep + b"}"),
            ("not UTF-8", b'{"text": "\xff\xfe"}'),
            ("not JSON", b'{"text": "cut'),
            ("no text under 'text'", b'{"text": ["a list"]}'),
            ("no text under 'text'", b"[]"),
            ("a lone surrogate", b'{"text": "\\ud800"}'),
            ("not JSON", b"\x00" * 10),
            *((f"label {label}", label) for label in ODD_LABELS),
            (" \x00\u2028 ", "hi"),
            ("\u200b", "hi"),
            ("said twice", "hi"),
            ("said  twice ", "ar"),
        ],
    )
    for name in ("ar.jsonl.bz2", "ar.jsonl.zst", "ar.jsonl.xz", "ar.jsonl"):
        corpus.jsonl(name, [(f"{name} {text}", None) for text in prose(random_, 20)])
    texts = [(text.replace("\x00", "\r\n"), None) for text in prose(random_, 20)]
    for name in ("he.csv", "he.csv.gz", "th.tsv", "th.tsv.bz2", "th.tsv.xz", "he.csv.zst"):
        corpus.table(name, [(f'"{name}",\t{text}', label) for text, label in texts])
    labels: list[Any] = [label for label in ODD_LABELS if not isinstance(label, int | list)]
    rows = [(f"{i} {text}", labels[i % len(labels)]) for i, text in enumerate(prose(random_, 40))]
    bad = [(None, "zh"), (b"\xff\x00", None), ("", None)]
    corpus.table("zh.parquet", [*rows[:20], *bad, *rows[20:]])
    corpus.table("ja.arrow", [*((f"arrow {text}", label) for text, label in rows), *bad])
    corpus.table("ko", [(f"folder {text}", label) for text, label in rows])
    for name in ("empty.txt", "empty.jsonl", "empty.csv", "empty.jsonl.gz", "empty.txt.xz"):
        (corpus.folder / name).touch()
    corpus.write("empty.tsv.zst", b"")
    words = {"".join(random_.choices("aeghiklmnoprstu", k=6)): None for _ in range(10_000)}
    corpus.jsonl("words.jsonl", [(word, "words") for word in words])
    corpus.jsonl("fit.jsonl", [(text, "fit") for text in fitting])
    corpus.txt("same.txt", ["a" * 1_000_000])
    _cut(corpus, random_)
    (corpus.folder / "loop").symlink_to(corpus.folder)
    return corpus


def _cut(corpus: Corpus, random_: random.Random) -> None:
    """An archive of which the end is missing: its readable lines, by the standard library."""
    lines = [json.dumps({"text": f"cut {text}"}) + "\n" for text in prose(random_, 300)]
    data = gzip.compress("".join(lines).encode())
    data = data[: len(data) // 2]
    (corpus.folder / "cut.jsonl.gz").write_bytes(data)
    readable = zlib.decompressobj(31).decompress(data)
    *whole, rest = readable.split(b"\n")
    for line in whole:
        corpus.document("cut", json.loads(line)["text"])
    corpus.fault("cut.jsonl.gz", "a gz file that was cut off", len(rest))


def large_corpus(folder: Path, long_line: str) -> Corpus:
    """What takes down a machine that reads without measure: bombs, and a line of 50 MB."""
    corpus, zeros = Corpus(folder), bytes(1 << 20)
    corpus.txt("long.txt", [long_line])
    for name, opened in (("bomb.jsonl.gz", igzip.open), ("bomb.txt.zst", zstd.open)):
        with opened(folder / name, "wb") as stream:
            for _ in range(1024):
                stream.write(zeros)
        corpus.fault(name, f"a text of {1 << 30} bytes, over {1 << 26}", 1 << 30)
    return corpus
