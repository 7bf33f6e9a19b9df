from __future__ import annotations

import dataclasses
import html.parser
import itertools
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from data_prep.command import ConfigError
from data_prep.config import Prep
from data_prep.inspect import UNKNOWN, inspect_shards, main, page, table
from data_prep.shards import Manifest, ShardReader, describe_tar, publish, write_tar

Prepare = Callable[..., tuple[Path, Manifest]]


@pytest.fixture
def repetitive(prepare: Prepare) -> tuple[Path, Manifest]:
    """Shards in which rare languages are repeated, and so some segments."""
    return prepare(smoothing=0.2)


def read_alone(folder: Path) -> list[dict[str, Any]]:
    """The training blocks as webdataset alone decodes them."""
    import webdataset

    urls = sorted(str(path) for path in folder.glob("train-*.tar"))
    return list(webdataset.WebDataset(urls, shardshuffle=False).decode())


def count_alone(blocks: list[dict[str, Any]], pad_id: int) -> tuple[list[Any], Counter[int]]:
    """Every segment as its language and ids, and how many rows have so many tokens."""
    segments: list[tuple[str, tuple[int, ...]]] = []
    rows: Counter[int] = Counter()
    for block in blocks:
        flat = block["input_ids.npy"].reshape(-1).tolist()
        bounds = itertools.pairwise(block["cu_seqlens.npy"].tolist())
        seq_len = block["input_ids.npy"].shape[1]
        for language, (start, stop) in zip(block["json"]["segment_languages"], bounds, strict=True):
            if language is not None:
                segments.append((language, tuple(flat[start:stop])))
        for start in range(0, len(flat), seq_len):
            row = flat[start : start + seq_len]
            rows[len(row) - row.count(pad_id)] += 1
    return segments, rows


def assert_counts(findings: Any, blocks: list[dict[str, Any]]) -> None:
    pad_id = findings.manifest.special_ids["pad"]
    segments, rows = count_alone(blocks, pad_id)
    occurrences = Counter(ids for _, ids in segments)
    assert findings.row_tokens == rows
    assert findings.segments == len(segments)
    assert findings.duplicates == sum(n for n in occurrences.values() if n > 1)
    for name, one in findings.languages.items():
        own = [ids for language, ids in segments if language == name]
        assert one.lengths == Counter(map(len, own))
        assert one.segments == len(own)
        assert one.mean_length == pytest.approx(sum(map(len, own)) / max(len(own), 1))
        assert one.duplicates == sum(occurrences[ids] > 1 for ids in own)
        edges = [0, *findings.bins]
        assert findings.histogram(one) == [
            sum(low < len(ids) <= high for ids in own) for low, high in itertools.pairwise(edges)
        ]
        assert len(one.samples) <= 3


def test_counts_are_those_of_webdataset_alone(repetitive: tuple[Path, Manifest]) -> None:
    folder, manifest = repetitive
    reader, blocks = ShardReader(str(folder)), read_alone(folder)
    findings = inspect_shards(reader, blocks=10**6)
    assert_counts(findings, blocks)
    assert findings.duplicates > 10
    assert len(findings.languages) == 15
    assert (findings.blocks_read, findings.blocks) == (len(blocks), len(blocks))
    assert findings.bins == [8, 16, 32, 64]
    lengths = [sum(n * k for k, n in one.lengths.items()) for one in findings.languages.values()]
    assert lengths == [one.tokens for one in findings.languages.values()]
    for name, one in findings.languages.items():
        assert one.documents == manifest.accounting[name]["documents_in"]
        assert one.heldout_rows == manifest.heldout_rows[name]
    assert sum(one.share for one in findings.languages.values()) == pytest.approx(1)
    assert findings.fill == sum(manifest.tokens.values()) / (manifest.rows * manifest.seq_len)
    for what in (0, 1):
        unit = ("documents", "chars")[what]
        assert sum(counts[what] for counts in findings.dropped.values()) == sum(
            counts.get(f"{unit}_in", 0)
            - counts.get(f"{unit}_train", 0)
            - counts.get(f"{unit}_heldout", 0)
            for counts in manifest.accounting.values()
        )


def test_few_blocks_are_drawn_where_there_are_many(repetitive: tuple[Path, Manifest]) -> None:
    folder = repetitive[0]
    reader, blocks = ShardReader(str(folder)), read_alone(folder)
    read: list[int] = []
    plain = reader.read_sample

    def read_sample(index: int, **options: Any) -> Any:
        read.append(index)
        return plain(index, **options)

    reader.read_sample = read_sample  # type: ignore[method-assign]
    findings = inspect_shards(reader, blocks=5)
    assert len(read) == len(set(read)) == findings.blocks_read == 5
    assert read != list(range(5))
    assert_counts(findings, [blocks[index] for index in read])
    assert f"5 of {len(blocks)} training blocks, drawn at random" in table(findings)
    again = inspect_shards(ShardReader(str(folder)), blocks=5)
    assert page(again) == page(findings)


def test_samples_are_the_text_that_was_prepared(
    prepare: Prepare,
    write_jsonl: Callable[..., Path],
    tmp_path: Path,
    capsys: Any,
    teacher_dir: Path,
) -> None:
    texts = {"de": [f"Satz Nummer {n} auf Deutsch." for n in range(30)],
             "sw": ["Habari ya asubuhi."]}  # fmt: skip
    for language, lines in texts.items():
        write_jsonl(tmp_path / f"{language}.jsonl", [{"text": line} for line in lines])
    folder, _ = prepare(input=[str(tmp_path / "*.jsonl")], heldout_rows=0, smoothing=1.0)
    assert main([str(folder), "--tokenizer", str(teacher_dir), "--samples", "4"]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    german = [line.removeprefix("[de] ") for line in shown if line.startswith("[de]")]
    assert len(german) == 4
    assert all(any(part in text for text in texts["de"]) for part in german)  # rows cut some texts
    swahili = [line.removeprefix("[sw] ") for line in shown if line.startswith("[sw]")]
    orders = itertools.permutations(swahili)
    assert "Habari ya asubuhi." in {"".join(pieces) for pieces in orders}


HOSTILE = "<script>alert('x')</script> & <img src=x onerror=alert(1)> \u001b[31m"


def hostile_shards(folder: Path, like: Manifest) -> None:
    """One block whose language and rule are hostile too."""
    folder.mkdir()
    ids = [0, 5, 6, 2, 1, 1, 1, 1]
    sample = {
        "__key__": "train-000000-00000000",
        "input_ids.npy": np.array([ids], dtype=np.uint16),
        "cu_seqlens.npy": np.array([0, 4, 8], dtype=np.int32),
        "json": {"rows": 1, "tokens": {HOSTILE: 4}, "padding": 4,
                 "segment_languages": [HOSTILE, None]},
    }  # fmt: skip
    write_tar(folder / "train-000000.tar", [sample])
    manifest = dataclasses.replace(
        like, seq_len=8, rows=1, tokens={HOSTILE: 4}, heldout_rows={},
        accounting={HOSTILE: {"documents_in": 1, f"documents_{HOSTILE}": 1}},
        shards=(describe_tar(folder / "train-000000.tar"),),
    )  # fmt: skip
    publish(folder, manifest)


class Tags(html.parser.HTMLParser):
    """The tags and the text of a page, as a browser would take them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers |= {name for name, _ in attrs if name.startswith("on")}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_text_is_text(tmp_path: Path, prepared: tuple[Path, Manifest]) -> None:
    hostile_shards(tmp_path / HOSTILE.replace("/", "|"), prepared[1])
    reader = ShardReader(str(tmp_path / HOSTILE.replace("/", "|")))
    findings = inspect_shards(reader, samples=2, decode=lambda ids: f"{HOSTILE} sample")
    seen = Tags(page(findings))
    assert not {"script", "img"} & seen.tags
    assert not seen.handlers
    assert f"{HOSTILE} sample" in seen.text
    assert seen.text.count(HOSTILE) >= 5  # the language thrice, its rule, its sample
    assert "\u001b" not in table(findings)


def test_shards_of_older_releases_do_not_say_languages(
    prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    reader = ShardReader(str(prepared[0]))
    plain = reader.read_sample

    def read_sample(index: int, **options: Any) -> Any:
        ids, bounds, meta = plain(index, **options)
        return ids, bounds, {key: meta[key] for key in meta if key != "segment_languages"}

    reader.read_sample = read_sample  # type: ignore[method-assign]
    findings = inspect_shards(reader, blocks=10**6)
    segments, _ = count_alone(read_alone(prepared[0]), prepared[1].special_ids["pad"])
    assert findings.languages[UNKNOWN].lengths == Counter(len(ids) for _, ids in segments)
    assert findings.languages["de"].segments == 0
    assert findings.languages["de"].tokens == prepared[1].tokens["de"]
    table(findings), page(findings)


def test_a_url_is_inspected_like_a_folder(
    prepared: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    memory = fsspec.filesystem("memory")
    for path in filter(Path.is_file, prepared[0].iterdir()):
        memory.pipe_file(f"/inspected/{path.name}", path.read_bytes())
    for url in (str(prepared[0]), "memory://inspected"):
        assert main([url, "--samples", "0"]) == 0
    text = capsys.readouterr().out
    here, there = text[: len(text) // 2], text[len(text) // 2 :]
    first, second = text.split(str(prepared[0]))[1].split("memory://inspected")
    assert first == second
    assert here != there


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--samples", "-1"], "--samples -1"),
        (["--blocks", "0", "--samples", "0"], "--blocks 0"),
        (["--tokenizer", "/no/such"], "/no/such"),
    ],
)
def test_what_cannot_be_done_is_refused(
    prepared: tuple[Path, Manifest], options: list[str], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        main([str(prepared[0]), *options])


def test_another_tokenizer_is_refused(
    prepared: tuple[Path, Manifest], tmp_path: Path, teacher_dir: Path
) -> None:
    folder = Path(shutil.copytree(prepared[0], tmp_path / "copy"))
    publish(folder, dataclasses.replace(prepared[1], tokenizer_fingerprint="0" * 64))
    with pytest.raises(ConfigError, match=r"is not the one that made .* not 000000000000"):
        main([str(folder), "--tokenizer", str(teacher_dir)])


def test_the_command_writes_the_page_and_names_damage(
    prepared: tuple[Path, Manifest],
    tmp_path: Path,
    small_prep: Prep,
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    folder = Path(shutil.copytree(prepared[0], tmp_path / "copy"))
    out = tmp_path / "report.html"
    ask = ["data_prep.inspect", str(folder), "--output", str(out)]
    done = command(*ask, "--tokenizer", str(small_prep.tokenizer))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == str(out)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    block = ShardReader(str(folder)).blocks()[2]
    data = bytearray((folder / "train-000000.tar").read_bytes())
    data[block.offset + block.bytes // 2] ^= 1
    (folder / "train-000000.tar").write_bytes(data)
    out.unlink()
    done = command(*ask, "--samples", "0")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"train-000000.tar, block at byte {block.offset} is damaged" in line
    assert not out.exists()
    assert command("data_prep.inspect", str(tmp_path / "no"), "--samples", "0").returncode == 2
