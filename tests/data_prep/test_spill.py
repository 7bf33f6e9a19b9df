from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import exchange
from data_prep import spill as spill_module
from data_prep.command import RunError
from data_prep.config import Prep
from data_prep.container import Container
from data_prep.documents import Fault
from data_prep.sources import Source, Unit
from data_prep.spill import (
    CleanDocument,
    Counts,
    Spills,
    key_of,
    merge_groups,
    merge_spills,
    merged_path,
    read_documents,
    spill,
    spill_path,
)

UNITS = [
    [("sw", " Habari ya asubuhi. "), ("de", "Guten Morgen."), ("sw", "\n"), ("de", None)],
    [],
    [("en", "Good morning."), ("de", "Guten Morgen."), ("en", "Ünïcode — “quotes” 早安。")],
]


def everything(spills: Spills, of: int = 4) -> list[list[tuple[str, str, int, int]]]:
    """Language, text and key of each partition's documents, in the order in which they lie."""
    found = []
    for partition in range(of):
        table, texts = spills.read(partition)
        ends = np.cumsum(table["bytes"], dtype=np.int64).tolist()
        starts = [0, *ends[:-1]]
        pieces = [texts[a:b].decode() for a, b in zip(starts, ends, strict=False)]
        assert sum(map(len, pieces)) == table["chars"].sum()
        assert [len(text) for text in pieces] == table["chars"].tolist()
        names = [spills.languages[place] for place in table["language"]]
        keys = table[["hi", "lo"]].tolist()
        found.append([(n, t, *k) for n, t, k in zip(names, pieces, keys, strict=True)])
    return found


def test_clean_documents_come_back_in_the_partition_of_their_digest(
    spill_units: Callable[..., Spills], tmp_path: Path
) -> None:
    found = everything(spill_units(tmp_path, UNITS))
    expected = collections.Counter(
        (name, text.strip()) for unit in UNITS for name, text in unit if text and text.strip()
    )
    assert (
        collections.Counter((name, text) for part in found for name, text, *_ in part) == expected
    )
    for partition, documents in enumerate(found):
        for _, text, hi, lo in documents:
            assert (hi, lo) == key_of(text.encode(), 1)
            assert hi >> 62 == partition


def test_languages_are_sorted_over_all_units(
    spill_units: Callable[..., Spills], tmp_path: Path
) -> None:
    assert spill_units(tmp_path, UNITS).languages == ["de", "en", "sw"]


def test_every_character_is_counted_once(
    spill_units: Callable[..., Spills], tmp_path: Path
) -> None:
    counts = spill_units(tmp_path, UNITS).counts
    assert +counts == {
        ("sw", "documents_in"): 2,
        ("sw", "chars_in"): 21,
        ("sw", "chars_normalised_away"): 2,
        ("sw", "documents_empty"): 1,
        ("sw", "chars_empty"): 1,
        ("de", "documents_in"): 3,
        ("de", "chars_in"): 35,
        ("de", "documents_broken"): 1,
        ("de", "chars_broken"): 9,
        ("en", "documents_in"): 2,
        ("en", "chars_in"): 35,
    }


def test_counts_survive_json() -> None:
    counts = Counts()
    counts.drop("de", "empty", 3)
    counts.drop("de", "empty", 4, documents=2)
    counts.drop("en", "broken", 0)
    assert counts["de", "chars_empty"] == 7
    assert counts["de", "documents_empty"] == 3
    assert Counts.from_json(counts.to_json()) == counts
    assert counts.to_json() == sorted(counts.to_json())


def test_what_a_cleaner_refuses_is_counted_under_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_raw(unit, prep, faults):
        yield "de", "kurz", 4
        yield "de", "lang genug", 10

    monkeypatch.setattr(spill_module, "read_raw", read_raw)
    counts = Counts()
    documents = read_documents(
        None, Prep(), lambda _, text: (None, "short") if len(text) < 5 else (text, None), counts, []
    )
    assert list(documents) == [CleanDocument("de", "lang genug")]
    assert counts["de", "documents_short"] == 1
    assert counts["de", "chars_short"] == 4


def test_a_key_is_a_digest_of_the_text_under_the_seed() -> None:
    texts = [f"text {number}".encode() for number in range(200)]
    keys = [key_of(text, 1) for text in texts]
    assert keys == [key_of(text, 1) for text in texts]
    assert len(set(keys)) == len({hi for hi, _ in keys}) == len({lo for _, lo in keys}) == 200
    others = [key_of(text, 2) for text in texts]
    assert not {part for key in keys for part in key} & {part for key in others for part in key}
    order, other = (sorted(range(200), key=found.__getitem__) for found in (keys, others))
    assert abs(np.corrcoef(order, other)[0, 1]) < 0.3  # another seed is another shuffle
    whole = hashlib.blake2b(texts[0], digest_size=16, key=bytes([1, 0, 0, 0, 0, 0, 0, 0])).digest()
    assert b"".join(part.to_bytes(8, "big") for part in keys[0]) == whole


@pytest.mark.parametrize("at_once", [1, 4000, 1 << 20])
def test_merged_spills_read_as_their_units_do(
    spill_units: Callable[..., Spills], tmp_path: Path, monkeypatch, at_once: int
) -> None:
    monkeypatch.setattr(spill_module, "RUN_BYTES", 900)
    monkeypatch.setattr(exchange, "MERGED_AT_ONCE", at_once)
    words = [f"word {number} " * (number % 9) for number in range(200)]
    units = [*UNITS, [(language, word) for word in words for language in ("sw", "en")], UNITS[0]]
    for number, chosen in enumerate((units, units[1:2], units[:2])):
        work = tmp_path / str(number)
        one_by_one = spill_units(work, chosen, of=16)
        expected = everything(one_by_one, 16)
        paths = [spill_path(work, unit) for unit in range(len(chosen))]
        for _ in range(2):  # the second time there is nothing to do
            merge_spills(paths, merged_path(work, 0), Prep())
            assert sorted(work.iterdir()) == [merged_path(work, 0)]
        merged = Spills([merged_path(work, 0)], Prep())
        assert everything(merged, 16) == expected
        for what in ("languages", "counts", "faults", "excluded_by"):
            assert getattr(merged, what) == getattr(one_by_one, what)


def test_groups_of_spills_are_all_of_them_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert merge_groups([9] * 512) == [range(i, i + 1) for i in range(512)]
    monkeypatch.setattr(spill_module, "FEW_SPILLS", 3)
    monkeypatch.setattr(spill_module, "MERGED_BYTES", 10)
    monkeypatch.setattr(spill_module, "MERGED_UNITS", 3)
    assert merge_groups([5, 5, 1, 0, 0, 0, 30, 9, 2]) == [
        range(0, 2), range(2, 5), range(5, 6), range(6, 7), range(7, 8), range(8, 9)
    ]  # fmt: skip
    assert merge_groups([]) == []


def test_runs_of_any_size_give_the_same_documents(
    spill_units: Callable[..., Spills], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [[(f"l{n % 3}", f"Text {n} " + "x" * (n % 40)) for n in range(100)]]
    whole = spill_units(tmp_path / "whole", units)
    monkeypatch.setattr(spill_module, "RUN_BYTES", 30)
    runs = spill_units(tmp_path / "runs", units)
    assert Container(spill_path(tmp_path / "whole", 0)).facts["runs"] == 1
    assert Container(spill_path(tmp_path / "runs", 0)).facts["runs"] > 40
    assert everything(runs) == everything(whole)
    assert runs.counts == whole.counts


def test_faults_are_kept_with_the_spill(
    strip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault("de.jsonl", 17, "not UTF-8", 5)

    def read_raw(unit, prep, faults):
        faults.append(fault)
        yield "de", None, 5

    monkeypatch.setattr(spill_module, "read_raw", read_raw)
    for number in range(2):
        spill(None, spill_path(tmp_path, number), Prep(), strip, 4, 1)
    assert Spills([spill_path(tmp_path, 0), spill_path(tmp_path, 1)], Prep()).faults == [
        fault,
        fault,
    ]


def test_excluded_documents_are_counted_by_evaluation_file(
    spill_units: Callable[..., Spills], tmp_path: Path
) -> None:
    units = [[("en", "evaluation 1"), ("de", "evaluation 2")], [("en", "evaluation 1")], UNITS[0]]
    spills = spill_units(tmp_path, units)
    assert spills.excluded_by == {"evaluation 1.jsonl": 2, "evaluation 2.jsonl": 1}
    assert spills.counts["en", "documents_excluded"] == 2
    assert spills.counts["en", "chars_excluded"] == 24


def test_a_finished_unit_is_not_read_again(
    spill_units: Callable[..., Spills], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill_units(tmp_path, UNITS)
    before = spill_path(tmp_path, 0).read_bytes()
    monkeypatch.setattr(spill_module, "read_raw", lambda *_: pytest.fail("read again"))
    spill(None, spill_path(tmp_path, 0), Prep(), None, 4, 1)
    assert spill_path(tmp_path, 0).read_bytes() == before


def test_a_unit_that_fails_leaves_no_spill(
    strip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_raw(unit, prep, faults):
        yield "de", "Text", 4
        raise RunError("de.jsonl cannot be read")

    monkeypatch.setattr(spill_module, "read_raw", read_raw)
    unit = Unit(Source("/de.jsonl", "de.jsonl", 9, "jsonl", None, ""), 0, 9, 9)
    with pytest.raises(RunError, match="cannot be read"):
        spill(unit, spill_path(tmp_path, 0), Prep(), strip, 4, 1)
    assert not spill_path(tmp_path, 0).exists()


def test_a_key_that_is_no_language_is_refused(
    spill_units: Callable[..., Spills], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill_module, "MAX_LANGUAGES", 3)
    prep = Prep(lang_key="url")
    units = [[(name, "text") for name in names] for names in ("abc", "bcd")]
    spill_units(tmp_path / "three", units[:1], prep=prep)
    message = "prep.lang_key='url' names more than 3 languages .*'d'.*correct the key"
    with pytest.raises(RunError, match=message):
        spill_units(tmp_path / "unit", [[(name, "text") for name in "abcd"]], prep=prep)
    assert not list((tmp_path / "unit").glob("read-*[0-9]"))
    with pytest.raises(RunError, match=message):
        spill_units(tmp_path / "units", units, prep=prep)
