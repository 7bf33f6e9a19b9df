"""`python -m data_prep.inspect SHARDS`: what prepared shards hold, as a table and as a web page.

Counts come from the manifest and are of everything. What only rows tell (lengths of segments, how
full rows are, repeated segments, samples of text) is of all training blocks where they are few,
otherwise of some drawn at random, and the output says which. Every block read is checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.command import EXIT_FINISHED, ConfigError, OptionParser, run_command
from data_prep.durable import write_durably
from data_prep.shards import Manifest, ShardReader
from data_prep.tokenizer import Tokenizer

BLOCKS = 256  # some seconds, and memory for their segments' hashes
SEED = 1  # of what is drawn: the same shards give the same page
UNKNOWN = "unknown"  # language of segments in shards that do not say it
_KEPT = ("in", "train", "heldout")  # what accounting counts besides what was dropped
_TEMPLATE = "inspect.html.j2"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; write the page where --output names one."""
    parser = OptionParser(prog="python -m data_prep.inspect", description=__doc__)
    parser.add_argument("shards", help="folder or fsspec URL that holds manifest.json")
    parser.add_argument("--samples", type=int, default=3, help="texts of each language to show")
    parser.add_argument("--tokenizer", help="hub id or folder; turns samples back into text")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="blocks to read at most")
    parser.add_argument("--output", type=Path, help="HTML page to write")
    options = parser.parse_args(argv)
    _check_options(options)
    reader = ShardReader(options.shards)
    decode = _decoder(options.tokenizer, reader) if options.samples else None
    findings = inspect_shards(reader, options.blocks, options.samples, decode)
    print(table(findings))
    if options.output is not None:
        write_durably(options.output, page(findings))
        print(options.output)
    return EXIT_FINISHED


def _check_options(options: argparse.Namespace) -> None:
    if options.samples < 0:
        raise ConfigError(f"--samples {options.samples} is below 0; use 0 for none, or more")
    page: Path | None = options.output
    if page is not None and (page.is_dir() or not page.absolute().parent.is_dir()):
        raise ConfigError(
            f"--output {page} is no file in a folder that exists, so the page could not be "
            "written; name one"
        )
    if options.blocks < 1:
        raise ConfigError(f"--blocks {options.blocks} is below 1; use 1 or more")


def _decoder(source: str | None, reader: ShardReader) -> Callable[[npt.NDArray[Any]], str]:
    source = source or reader.manifest.tokenizer
    if not source:
        raise ConfigError(
            f"samples need the tokenizer that made {reader.url}, which its manifest does not name; "
            "name it with --tokenizer, or use --samples 0"
        )
    tokenizer = Tokenizer(source)
    if tokenizer.fingerprint != reader.manifest.tokenizer_fingerprint:
        raise ConfigError(
            f"the tokenizer {source!r} is not the one that made {reader.url} (fingerprint "
            f"{tokenizer.fingerprint[:12]}, not {reader.manifest.tokenizer_fingerprint[:12]}), so "
            "samples would be other words; name that one with --tokenizer"
        )
    return tokenizer.decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language:
    """What there is of a language. `documents` to `heldout_rows` are of everything.

    Args:
        documents: read by the preparation; None where the manifest does not count them.
        tokens: to train on, padding excluded.
        share: of all tokens.
        heldout_rows: rows that are never trained on.
        lengths: tokens of a segment, its frame included -> how many segments were read.
        duplicates: segments among them whose ids were read more than once.
        samples: texts of some of them.
    """

    documents: int | None
    tokens: int
    share: float
    heldout_rows: int
    lengths: Counter[int]
    duplicates: int
    samples: tuple[str, ...]

    @property
    def segments(self) -> int:
        """How many were read."""
        return self.lengths.total()

    @property
    def mean_length(self) -> float:
        """Tokens of a segment; 0 where none was read."""
        return sum(length * n for length, n in self.lengths.items()) / max(self.segments, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found in the training rows of a folder of shards.

    Args:
        url: of the folder.
        digest: of its manifest.
        manifest: as it was read.
        blocks: training blocks in all.
        blocks_read: those that lengths, fill, duplicates and samples are of.
        languages: by name.
        row_tokens: tokens in a row, padding excluded -> how many rows were read.
        dropped: rule -> documents and characters that it left out, over all languages.
    """

    url: str
    digest: str
    manifest: Manifest
    blocks: int
    blocks_read: int
    languages: dict[str, Language]
    row_tokens: Counter[int]
    dropped: dict[str, tuple[int, int]]

    @property
    def fill(self) -> float:
        """The share of all training rows' places that is text."""
        manifest = self.manifest
        return sum(manifest.tokens.values()) / max(manifest.rows * manifest.seq_len, 1)

    @property
    def full_rows(self) -> float:
        """The share of the rows read that have no padding."""
        return self.row_tokens[self.manifest.seq_len] / max(self.row_tokens.total(), 1)

    @property
    def segments(self) -> int:
        """How many were read, of all languages."""
        return sum(language.segments for language in self.languages.values())

    @property
    def duplicates(self) -> int:
        """Segments among them whose ids were read more than once."""
        return sum(language.duplicates for language in self.languages.values())

    @property
    def extent(self) -> str:
        """What was read, in words."""
        if self.blocks_read == self.blocks:
            return f"all {self.blocks:,} training blocks were read"
        return (
            f"{self.blocks_read:,} of {self.blocks:,} training blocks, drawn at random, were read; "
            "segments, lengths, full rows and duplicates are of these, and repetitions beyond "
            "them are not seen"
        )

    @property
    def bins(self) -> list[int]:
        """The largest length of each bin of the histograms: powers of two, then a row."""
        seq_len = self.manifest.seq_len
        return [2**power for power in range(3, (seq_len - 1).bit_length())] + [seq_len]

    def histogram(self, language: Language) -> list[int]:
        """Segments of a language in each bin."""
        edges = self.bins
        counts = [0] * len(edges)
        for length, n in language.lengths.items():
            counts[int(np.searchsorted(edges, length))] += n
        return counts


def inspect_shards(
    reader: ShardReader,
    blocks: int = BLOCKS,
    samples: int = 0,
    decode: Callable[[npt.NDArray[Any]], str] | None = None,
) -> Findings:
    """Look into the training blocks, into `blocks` of them at most.

    Args:
        reader: of the shards.
        blocks: to read at most.
        samples: texts to show of each language; 0 needs no `decode`.
        decode: gives the text of a segment's ids [length].

    Raises:
        RunError: a block is damaged.
    """
    draw = random.Random(SEED)
    manifest, num_blocks = reader.manifest, len(reader.blocks())
    numbers = sorted(draw.sample(range(num_blocks), min(blocks, num_blocks)))
    lengths: dict[str, Counter[int]] = {}
    hashes: dict[str, list[int]] = {}
    drawn: dict[str, list[npt.NDArray[Any]]] = {}
    row_tokens: Counter[int] = Counter()
    for number in numbers:
        input_ids, cu_seqlens, meta = reader.read_sample(number)
        row_tokens.update(_tokens_of_rows(input_ids, cu_seqlens, manifest.special_ids["pad"]))
        for language, ids in _segments(input_ids, cu_seqlens, meta, manifest.special_ids["pad"]):
            lengths.setdefault(language, Counter())[len(ids)] += 1
            hashes.setdefault(language, []).append(_hash(ids))
            _keep_some(drawn.setdefault(language, []), ids, len(hashes[language]), samples, draw)
    duplicates = _count_duplicates(hashes)
    total = sum(manifest.tokens.values())
    return Findings(
        url=reader.url,
        digest=reader.digest,
        manifest=manifest,
        blocks=num_blocks,
        blocks_read=len(numbers),
        languages={
            name: Language(
                documents=manifest.accounting.get(name, {}).get("documents_in"),
                tokens=manifest.tokens.get(name, 0),
                share=manifest.tokens.get(name, 0) / max(total, 1),
                heldout_rows=manifest.heldout_rows.get(name, 0),
                lengths=lengths.get(name, Counter()),
                duplicates=duplicates.get(name, 0),
                samples=tuple(decode(ids) for ids in drawn.get(name, ())) if decode else (),
            )
            for name in sorted({*manifest.tokens, *manifest.accounting, *lengths})
        },
        row_tokens=row_tokens,
        dropped=_dropped(manifest),
    )


def _segments(
    input_ids: npt.NDArray[Any],
    cu_seqlens: npt.NDArray[np.int32],
    meta: dict[str, Any],
    pad_id: int,
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Each segment's language and ids [length], without the padding's."""
    segments = np.split(input_ids.reshape(-1), cu_seqlens[1:-1])
    languages = meta.get("segment_languages") or [UNKNOWN] * len(segments)
    for language, ids in zip(languages, segments, strict=True):
        if ids[0] != pad_id:
            yield language, ids


def _tokens_of_rows(
    input_ids: npt.NDArray[Any], cu_seqlens: npt.NDArray[np.int32], pad_id: int
) -> list[int]:
    """Tokens of each row, padding excluded."""
    starts, sizes = cu_seqlens[:-1], np.diff(cu_seqlens)
    is_text = input_ids.reshape(-1)[starts] != pad_id
    rows = starts[is_text] // input_ids.shape[1]
    tokens: list[int] = np.bincount(
        rows, weights=sizes[is_text], minlength=input_ids.shape[0]
    ).astype(np.int64).tolist()  # fmt: skip
    return tokens


def _hash(ids: npt.NDArray[Any]) -> int:
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def _keep_some(
    kept: list[npt.NDArray[Any]], ids: npt.NDArray[Any], number: int, most: int, draw: random.Random
) -> None:
    """Keep the language's `number`-th segment so that in the end all are equally likely kept."""
    if len(kept) < most:
        kept.append(ids.copy())
    elif (place := draw.randrange(number)) < most:
        kept[place] = ids.copy()


def _count_duplicates(hashes: dict[str, list[int]]) -> dict[str, int]:
    """Of each language, the segments whose hash is there more than once in any language."""
    if not hashes:
        return {}
    each = {name: np.array(values, dtype=np.uint64) for name, values in hashes.items()}
    values, counts = np.unique(np.concatenate(list(each.values())), return_counts=True)
    repeated = values[counts > 1]
    return {name: int(np.isin(own, repeated).sum()) for name, own in each.items()}


def _dropped(manifest: Manifest) -> dict[str, tuple[int, int]]:
    documents: Counter[str] = Counter()
    chars: Counter[str] = Counter()
    for counts in manifest.accounting.values():
        for key, value in counts.items():
            what, _, rule = key.partition("_")
            (documents if what == "documents" else chars)[rule] += value
    rules = sorted({*+documents, *+chars, *-chars} - set(_KEPT))  # without those that never applied
    return {rule: (documents[rule], chars[rule]) for rule in rules}


def table(findings: Findings) -> str:
    """The findings for a terminal."""
    manifest = findings.manifest
    lines = [
        f"{findings.url}: {manifest.rows:,} rows of {manifest.seq_len} tokens in "
        f"{len(manifest.shards):,} shards, {findings.fill:.2%} full; {findings.extent}",
        f"lengths: a bar for segments of up to each of {', '.join(map(str, findings.bins))} tokens",
        "",
        f"{'language':<10}{'documents':>12}{'tokens':>16}{'share':>8}{'held-out rows':>15}"
        f"{'segments':>12}{'mean':>7}{'repeated':>10}  lengths",
    ]
    for name, one in findings.languages.items():
        documents = "" if one.documents is None else f"{one.documents:,}"
        lines.append(
            f"{name:<10}{documents:>12}{one.tokens:>16,}{one.share:>8.1%}{one.heldout_rows:>15,}"
            f"{one.segments:>12,}{one.mean_length:>7.1f}{_share(one.duplicates, one.segments):>10}"
            f"  {_bars(findings.histogram(one))}"
        )
    repeated = _share(findings.duplicates, findings.segments)
    lines += ["", f"repeated segments: {repeated} of {findings.segments:,}"]
    lines.append(f"rows without padding: {findings.full_rows:.1%}")
    for rule, (documents_out, chars) in findings.dropped.items():
        lines.append(f"dropped: {documents_out:,} documents, {chars:,} characters: {rule}")
    if any(one.samples for one in findings.languages.values()):
        lines.append("")
    for name, one in findings.languages.items():
        lines += [f"[{name}] {text}" for text in one.samples]
    return "\n".join(map(_printable, lines))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else ""


def _bars(counts: Sequence[int]) -> str:
    """A histogram in one line; an empty bin is a dot, so that a rare one can be told from it."""
    most = max([*counts, 1])
    return "".join("·" if not n else "▁▂▃▄▅▆▇█"[min(7, 8 * n // most)] for n in counts)


def _printable(text: str) -> str:
    """The text without what could move a terminal's cursor or change its colours."""
    return "".join(char if char.isprintable() else " " for char in text)


def page(findings: Findings) -> str:
    """The findings as one self-contained web page without scripts. All text is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(findings=findings, share=_share)


if __name__ == "__main__":
    run_command(main)
