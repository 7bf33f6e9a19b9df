from __future__ import annotations

import collections
import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.build_shards import build
from data_prep.config import Prep, PrepRecipe
from data_prep.ranks import OneRank
from data_prep.shards import Manifest, ShardReader

WORDS = [f"{a}{b}{c}" for a in "kmprst" for b in "aeiou" for c in ("la", "ni", "ro", "sto", "va")]


def sentence(number: int, words: int = 12) -> str:
    random_ = random.Random(number)
    return " ".join(random_.choices(WORDS, k=words)).capitalize() + "."


def texts_of(folder: Path, decode: Callable[[Any], str]) -> collections.Counter[str]:
    """Every segment, decoded: rows are long enough here to hold documents whole."""
    reader = ShardReader(str(folder))
    found: collections.Counter[str] = collections.Counter()
    for index in range(len(reader.blocks())):
        input_ids, cu_seqlens = reader.read_block(index)
        flat = input_ids.reshape(-1)
        for start, stop in itertools.pairwise(cu_seqlens):
            if flat[start] != reader.manifest.special_ids["pad"]:
                found[decode(flat[start + 1 : stop - 1])] += 1
    return found


@pytest.fixture
def kept(
    prepare: Callable[..., tuple[Path, Manifest]], write_jsonl, tmp_path: Path, tokenizer
) -> Callable[..., tuple[collections.Counter[str], Manifest]]:
    """Prepares documents without mixing or cutting; what is left of them."""

    def run(texts: list[str], **changes: Any) -> tuple[collections.Counter[str], Manifest]:
        write_jsonl(tmp_path / "in" / "en.jsonl", [{"text": text} for text in texts])
        # One document fills no row of this length, so that none is cut up to fill holes.
        settings = {"smoothing": 1.0, "heldout_rows": 0, "seq_len": 1 << 16, "rows_per_block": 1}
        folder, manifest = prepare(input=[f"{tmp_path}/in/*"], **{**settings, **changes})
        return texts_of(folder, tokenizer.decode), manifest

    return run


def assert_accounted(manifest: Manifest) -> None:
    for counts in manifest.accounting.values():
        for what in ("chars", "documents"):
            parts = {k: n for k, n in counts.items() if k.startswith(f"{what}_")}
            total = parts.pop(f"{what}_in")
            assert total == sum(parts.values())


def test_a_line_stays_in_one_document(kept) -> None:
    """Against a brute-force count of lines over the whole corpus."""
    notice = "All rights reserved, reproduction prohibited."
    documents = [[sentence(i), notice, "1.", sentence(1000 + i)] for i in range(30)]
    documents += [[sentence(3), sentence(2000)], [notice, notice], [sentence(4), sentence(4)]]
    texts = ["\n".join(lines) for lines in documents]
    found, manifest = kept(texts, dedup_lines=True)
    left = " ".join(found)
    for line in {line for lines in documents for line in lines if len(line) >= 20}:
        assert left.count(line) == 1, line
    assert left.count("1.") == 30  # too short a line to be dropped
    assert not any("\n" in text for text in found)
    assert_accounted(manifest)
    repeats = 30 + 1 + 1 + 1  # the notice in 30 documents and twice in one, and two sentences
    dropped = manifest.accounting["en"]["chars_duplicate_line"]
    assert dropped >= (repeats - 1) * 20
    assert sum(map(len, found)) == manifest.accounting["en"]["chars_train"]


def test_lines_stay_where_nobody_asks(kept) -> None:
    texts = [f"{sentence(i)}\nAll rights reserved, reproduction prohibited." for i in range(10)]
    found, _ = kept(texts)
    assert found == collections.Counter(text.replace("\n", " ") for text in texts)


def test_a_document_of_others_lines_goes(kept) -> None:
    one, two = sentence(1), sentence(2)
    found, manifest = kept([f"{one}\n{two}", one, two, sentence(3)], dedup_lines=True)
    assert sum(text.count(one) for text in found) == 1
    assert sum(text.count(two) for text in found) == 1
    assert sentence(3) in found
    assert manifest.accounting["en"]["documents_duplicate_line"] >= 1
    assert_accounted(manifest)


def test_what_is_left_of_a_document_can_be_too_short(kept) -> None:
    texts = [f"{sentence(1)}\nshort {i}" for i in range(20)]
    found, manifest = kept(texts, dedup_lines=True, min_chars=20)
    (text,) = found
    assert text.startswith(sentence(1))
    assert manifest.accounting["en"]["documents_short"] == 19
    assert_accounted(manifest)


def test_of_near_duplicates_one_stays(kept) -> None:
    originals = [" ".join(sentence(100 * i + k) for k in range(15)) for i in range(12)]
    copies = [f"{text} Footnote {i}." for i, text in enumerate(originals)]
    found, manifest = kept(originals + copies, near_duplicates=0.8)
    assert manifest.accounting["en"]["documents_near_duplicate"] == 12
    for original in originals:
        assert sum(text.startswith(original) for text in found) == 1
    assert_accounted(manifest)


def test_near_duplicates_stay_where_nobody_asks(kept) -> None:
    text = " ".join(map(sentence, range(15)))
    found, _ = kept([text, f"{text} Footnote."])
    assert len(found) == 2


@pytest.mark.parametrize("size", [2, 3])
def test_verdicts_do_not_depend_on_ranks_or_order(
    on_ranks, write_jsonl, small_prep: Prep, tmp_path: Path, digests, size: int
) -> None:
    texts = [
        "\n".join(sentence(random.Random(i).randrange(40)) for _ in range(3)) for i in range(90)
    ]
    texts += [text + " More." for text in texts[:30]]
    for name, order in (("a", texts), ("b", texts[::-1])):
        for part in range(4):
            write_jsonl(
                tmp_path / name / f"{part}.jsonl",
                [{"text": t, "lang": "en"} for t in order[part::4]],
            )
    changes = {"dedup_lines": True, "near_duplicates": 0.7, "heldout_rows": 1}
    outputs = []
    for name, number in (("a", 1), ("b", size)):
        out = tmp_path / f"{name}-out"
        prep = dataclasses.replace(
            small_prep, input=[f"{tmp_path}/{name}/*"], output_dir=str(out), **changes
        )
        recipe = PrepRecipe(prep=prep)
        if number == 1:
            build(recipe, OneRank())
        else:
            assert (
                on_ranks(number, lambda ranks, recipe=recipe: build(recipe, ranks))
                == [None] * number
            )
        outputs.append({k: v for k, v in digests(out).items() if k != "manifest.json"})
    assert outputs[0] == outputs[1]
