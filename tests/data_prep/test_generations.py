from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import build_shards
from data_prep.command import ConfigError
from data_prep.shards import Manifest, ShardReader, generation
from data_prep.verify import find_faults

Prepare = Callable[..., tuple[Path, Manifest]]


def records(start: int, stop: int, language: str = "en") -> list[dict[str, str]]:
    """Texts of their own, about twenty tokens long."""
    words = ["river", "house", "green", "seven", "walks", "under", "cold", "light"]
    return [
        {
            "text": f"{i} " + " ".join(words[(i * 31 + k * k) % 8] for k in range(12)) + f" {i}.",
            "lang": language,
        }
        for i in range(start, stop)
    ]


def contents(folder: Path, language: str | None = None) -> Iterator[tuple[int, ...]]:
    """The ids of every segment."""
    reader = ShardReader(str(folder))
    pad = reader.manifest.special_ids["pad"]
    for index in range(len(reader.blocks(language))):
        input_ids, cu_seqlens = reader.read_block(index, language=language)
        flat, bounds = input_ids.reshape(-1).tolist(), cu_seqlens.tolist()
        for start, stop in itertools.pairwise(bounds):
            if flat[start] != pad:
                yield tuple(flat[start + 1 : stop - 1])


@pytest.fixture
def append(prepare: Prepare, tmp_path: Path, write_jsonl) -> Callable[..., tuple[Path, Manifest]]:
    """Writes records to a new file and prepares all files there are, appending if there are shards.

    Rows keep what is cut from long documents together by having none.
    """
    names = iter("abcdef")

    def add(new: list[dict[str, str]], **changes: Any) -> tuple[Path, Manifest]:
        write_jsonl(tmp_path / "in" / f"{next(names)}.jsonl", new)
        changes = {"smoothing": 1.0, "heldout_rows": 1, "seq_len": 64} | changes
        is_there = (tmp_path / "shards" / "manifest.json").exists()
        return prepare(input=[f"{tmp_path}/in/*"], append=is_there, **changes)

    return add


def test_every_document_is_in_the_rows_once(append, teacher_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    first, second = records(0, 150), records(100, 290) + records(300, 320, "sw")
    append(first)
    folder, manifest = append(second)
    assert manifest.generation == 2
    assert not list(find_faults(folder))
    texts = {record["text"] for record in first + second}
    ids = tokenizer(sorted(texts), add_special_tokens=False)["input_ids"]
    heldout = [t for language in ("en", "sw") for s in contents(folder, language) for t in s]
    trained = [token for segment in contents(folder) for token in segment]
    remainder = collections.Counter(token for of in ids for token in of)
    remainder.subtract(trained + heldout)
    assert min(remainder.values()) == 0  # nothing stands there twice
    lost = sum(c.get("chars_heldout_remainder", 0) for c in manifest.accounting.values())
    assert sum(remainder.values()) < lost
    assert manifest.accounting["en"]["documents_duplicate"] == 50
    for counts in manifest.accounting.values():
        kept = sum(number for what, number in counts.items()
                   if what.startswith("chars_") and what != "chars_in")  # fmt: skip
        assert counts["chars_in"] == kept


def test_earlier_shards_stay_as_they_are(append, digests) -> None:
    folder, before = append(records(0, 300))
    old = digests(folder)
    _, manifest = append(records(300, 500))
    new = digests(folder)
    assert {name: new[name] for name in old if name != "manifest.json"}.items() <= old.items()
    assert new[generation(before.digest)] == old["manifest.json"]
    whole = [s for s in before.shards if s.language or s.blocks[-1].rows == 8]
    assert set(whole) < set(manifest.shards)
    sizes = [b.rows for s in manifest.of_language(None) for b in s.blocks]
    assert set(sizes[:-1]) == {8}
    assert manifest.rows == sum(sizes) > before.rows


def test_rows_of_the_short_block_are_taken_over(append) -> None:
    folder, before = append(records(0, 200), rows_per_block=1000)
    assert [len(s.blocks) for s in before.of_language(None)] == [1]
    earlier = collections.Counter(contents(folder))
    _, manifest = append(records(200, 220), rows_per_block=1000)
    assert earlier < collections.Counter(contents(folder))
    assert before.of_language(None)[0] not in manifest.shards


def test_an_earlier_generation_can_be_read_on(append, tmp_path: Path) -> None:
    folder, before = append(records(0, 200))
    earlier = list(contents(folder))
    append(records(200, 400))
    copy = tmp_path / "earlier"
    copy.mkdir()
    for shard in before.shards:
        (copy / shard.name).symlink_to(folder / shard.name)
    (copy / "manifest.json").symlink_to(folder / generation(before.digest))
    assert list(contents(copy)) == earlier


def test_files_that_are_there_are_not_read_again(append, monkeypatch) -> None:
    append(records(0, 200))
    read: list[str] = []
    split = build_shards.split
    monkeypatch.setattr(
        build_shards, "split", lambda source, size: read.append(source.name) or split(source, size)
    )
    append(records(200, 300))
    assert set(read) == {"b.jsonl"}


def test_a_file_that_is_now_read_otherwise_is_read_again(append, prepare, tmp_path) -> None:
    append([record | {"title": f"Title {record['text']}"} for record in records(0, 60)])
    settings: dict[str, Any] = {"smoothing": 1.0, "heldout_rows": 1, "seq_len": 64, "append": True}
    settings["input"] = [f"{tmp_path}/in/*"]
    _, titled = prepare(**settings, text_key="title")
    assert titled.generation == 2
    assert titled.accounting["en"]["documents_in"] == 120
    assert "documents_duplicate" not in titled.accounting["en"]
    assert prepare(**settings, text_key="title")[1] == titled
    assert prepare(**settings)[1] == titled


def test_weights_may_name_languages_of_earlier_generations(append, prepare, tmp_path) -> None:
    append(records(0, 100) + records(100, 150, "sw"))
    _, manifest = append(records(150, 250) + records(250, 300, "de"), weights={"sw": 2, "de": 3})
    assert manifest.tokens.keys() == {"en", "sw", "de"}
    with pytest.raises(ConfigError, match=r"prep\.weights names 'xx'.* are de, en, sw"):
        append(records(300, 350), weights={"xx": 2.0})


def test_dry_run_of_text_to_add_is_of_that_text(append, prepare, tmp_path, teacher_dir, capsys):
    folder, _ = append(records(0, 100) + records(100, 150, "sw"))
    path = tmp_path / "in" / "z.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records(200, 230, "de")))
    capsys.readouterr()
    words = {"input": f"['{tmp_path}/in/*']", "tokenizer": teacher_dir, "output_dir": folder,
             "seq_len": 64, "rows_per_block": 8, "weights": "{sw: 2}"}  # fmt: skip
    arguments = [f"--prep.{key}={value}" for key, value in words.items()]
    assert build_shards.main([*arguments, "--append", "--dry_run"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[:3]] == ["language", "de", "estimated"]


def test_nothing_new_is_nothing_to_do(append, prepare, tmp_path, digests, capsys) -> None:
    folder, manifest = append(records(0, 100))
    before = digests(folder)
    settings = {"smoothing": 1.0, "heldout_rows": 1, "seq_len": 64}
    _, again = prepare(input=[f"{tmp_path}/in/*"], append=True, **settings)
    assert again == manifest
    assert digests(folder) == before
    assert "nothing to do" in capsys.readouterr().out


def test_only_new_languages_have_rows_held_out(append) -> None:
    folder, before = append(records(0, 200))
    heldout = list(contents(folder, "en"))
    _, manifest = append(records(200, 300) + records(400, 500, "sw"))
    assert list(contents(folder, "en")) == heldout
    assert manifest.heldout_rows == {**before.heldout_rows, "sw": 1}


def test_interrupted_and_started_again(append, prepare, tmp_path, digests, monkeypatch) -> None:
    folder, _ = append(records(0, 200))
    first = digests(folder)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_shards, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            append(records(200, 300))
    assert digests(folder)["manifest.json"] == first["manifest.json"]
    assert not list(find_faults(folder)) or (folder / ".work").exists()
    settings = {"smoothing": 1.0, "heldout_rows": 1, "seq_len": 64}
    prepare(input=[f"{tmp_path}/in/*"], append=True, **settings)
    whole = tmp_path / "whole"
    prepare(input=[f"{tmp_path}/in/a.jsonl"], output_dir=str(whole), **settings)
    prepare(input=[f"{tmp_path}/in/*"], output_dir=str(whole), append=True, **settings)
    assert digests(folder) == digests(whole)


def test_without_shards_there_is_nothing_to_append_to(prepare, tmp_path) -> None:
    with pytest.raises(
        ConfigError, match=r"has no manifest\.json, so there is nothing to append to"
    ):
        prepare(append=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seq_len": 32}, "prep.seq_len is 64 .* and 32 now"),
        ({"seed": 2}, "seed is 1 .* and 2 now"),
        ({"rows_per_block": 4}, "prep.rows_per_block is 8 .* and 4 now"),
    ],
)
def test_rows_that_would_not_go_together_are_refused(append, changes, said) -> None:
    append(records(0, 200))
    with pytest.raises(ConfigError, match=said):
        append(records(200, 210), **changes)


def test_a_manifest_of_the_first_format_is_still_read(prepared) -> None:
    body = json.loads(prepared[1].to_json())
    for key in ("generation", "segment_lengths", "sources", "tokenizer", "digest"):
        del body[key]
    body["format_version"] = 1
    from data_prep.shards import _digest

    text = json.dumps({**body, "digest": _digest(body)})
    manifest = Manifest.from_json(text, where="there")
    assert (manifest.generation, manifest.rows) == (1, prepared[1].rows)
