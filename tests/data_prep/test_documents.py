from __future__ import annotations

import gzip
import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.command import ConfigError, RunError
from data_prep.config import Prep
from data_prep.documents import Counts, find_inputs, normalise, read_documents


def read(path: Path, **prep: str) -> tuple[list[tuple[str, str]], Counts]:
    counts = Counts()
    documents = list(read_documents(path, Prep(**prep), counts))
    return [(document.language, document.text) for document in documents], counts


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a \t\r\n b  ", "a b"),
        ("e\u0301", "\u00e9"),  # NFC
        ("a\x00b\x07c\x7fd\u0085e\ufefff", "a b c d e f"),
        ("a\u00a0\u3000b", "a b"),
        ("ﬁ ½", "ﬁ ½"),  # compatibility characters are the tokenizer's to fold
        ("\x00\ufeff \n", ""),
    ],
)
def test_normalise(raw: str, clean: str) -> None:
    assert normalise(raw) == clean


@given(st.text())
def test_normalise_has_nothing_left_to_do(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert not re.search(r"[\x00-\x1f]|\s\s|^\s|\s$", once)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"text": "hello"}, ("en", "hello")),
        ({"text": "hello", "lang": "sw"}, ("sw", "hello")),
        ({"text": "hello", "lang": "zh-Hans_1"}, ("zh-Hans_1", "hello")),
        ({"text": "hello", "lang": None}, ("en", "hello")),
        ({"text": "hello", "lang": ""}, ("en", "hello")),
        ({"text": "hello", "lang": "../../etc"}, ("und", "hello")),
        ({"text": "hello", "lang": "a" * 33}, ("und", "hello")),
        ({"text": "hello", "lang": "e\n"}, ("und", "hello")),
        ({"text": "hello", "lang": 5}, ("und", "hello")),
        ({"text": "hello", "lang": ["en"]}, ("und", "hello")),
        (b'{"text": "hello"}\r', ("en", "hello")),
        (b'\xef\xbb\xbf{"text": "hello"}', ("en", "hello")),  # byte order mark
        ({"text": "he\x00llo"}, ("en", "he llo")),
        ({"text": "ok \U0001f600"}, ("en", "ok \U0001f600")),
    ],
)
def test_a_line_of_jsonl(tmp_path: Path, write_jsonl, line: object, expected) -> None:
    documents, counts = read(write_jsonl(tmp_path / "en.jsonl", [line]))
    assert documents == [expected]
    assert not any("broken" in what or "empty" in what for _, what in counts)


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b'{"text": "cut off',
        b'{"text": "\xff\xfe"}',  # not UTF-8
        b'{"text": "\xed\xa0\x80"}',  # a surrogate, encoded
        b'{"text": "\\ud800 lone"}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": ["a"]}',
        b'{"other": "a"}',
        b'["text"]',
        b'"text"',
        b"5",
        b"[" * 100_000,
        b"\x00",
        b"\xff\xfe{\x00",  # UTF-16
    ],
)
def test_a_broken_line_is_counted_and_the_next_one_read(
    tmp_path: Path, write_jsonl, line: bytes
) -> None:
    documents, counts = read(write_jsonl(tmp_path / "en.jsonl", [line, {"text": "next"}]))
    assert documents == [("en", "next")]
    assert counts["en", "documents_in"] == 2
    assert counts["en", "documents_broken"] == 1
    assert counts["en", "chars_broken"] == len(line) + 1
    assert counts["en", "chars_in"] == len(line) + 1 + len("next")


def test_empty_documents_and_what_cleaning_takes_are_counted(tmp_path: Path, write_jsonl) -> None:
    path = write_jsonl(
        tmp_path / "en.jsonl", [{"text": " \x00\n"}, {"text": ""}, {"text": "a  b "}]
    )
    documents, counts = read(path)
    assert documents == [("en", "a b")]
    assert counts == {
        ("en", "documents_in"): 3,
        ("en", "chars_in"): 8,
        ("en", "documents_empty"): 2,
        ("en", "chars_empty"): 3,
        ("en", "chars_normalised_away"): 2,
    }


def test_composition_exclusions_make_text_longer_and_the_count_negative(tmp_path, write_jsonl):
    _, counts = read(write_jsonl(tmp_path / "hi.jsonl", [{"text": "\u0958"}]))
    assert counts["hi", "chars_normalised_away"] == -1


def test_keys_are_the_recipes(tmp_path: Path, write_jsonl) -> None:
    path = write_jsonl(
        tmp_path / "x.jsonl.gz", [{"body": "b", "l": "de", "text": "t", "lang": "en"}]
    )
    assert read(path, text_key="body", lang_key="l")[0] == [("de", "b")]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_txt_documents_are_separated_by_blank_lines(
    tmp_path: Path, newline: bytes, suffix: str
) -> None:
    lines = [b"\xef\xbb\xbfone", b"more", b"", b" \t", b"two \xff", b"", b"three"]
    data = newline.join(lines)
    path = tmp_path / f"sw.part1{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    documents, counts = read(path)
    assert documents == [("sw", "one more"), ("sw", "three")]
    assert counts["sw", "documents_in"] == 3
    assert counts["sw", "chars_broken"] == len(b"two \xff" + newline)


def test_a_file_without_a_document_is_read_in_peace(tmp_path: Path) -> None:
    for name in ("en.txt", "en.jsonl"):
        (tmp_path / name).write_bytes(b"\n\r\n  \n")
        assert read(tmp_path / name) == ([], Counts())


def test_a_file_name_that_is_no_language_is_und(tmp_path: Path, write_jsonl) -> None:
    assert read(write_jsonl(tmp_path / "my text.jsonl", [{"text": "a"}]))[0] == [("und", "a")]


def test_the_last_suffix_decides_the_format(tmp_path: Path) -> None:
    path = tmp_path / "en.jsonl.backup.txt"
    path.write_text('{"text": "a"}')
    assert read(path)[0] == [("en", '{"text": "a"}')]


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "no deflate", "not gzip", "gone"])
def test_a_file_that_cannot_be_read_to_its_end_is_named(
    tmp_path: Path, write_jsonl, damage: str
) -> None:
    records = [{"text": f"{i} {i * 7919 % 1013}"} for i in range(2000)]
    path = write_jsonl(tmp_path / "en.jsonl.gz", records)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-100])
    elif damage == "corrupt":
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    elif damage == "no deflate":
        data[10] |= 0b110  # a kind of block that there is not
        path.write_bytes(data)
    elif damage == "not gzip":
        path.write_bytes(gzip.decompress(data))
    else:
        path.unlink()
    with pytest.raises(RunError, match=re.escape(str(path))):
        read(path)


def test_one_character_five_million_times(tmp_path: Path, write_jsonl, tokenizer) -> None:
    text = "a" * 5_000_000
    path = write_jsonl(tmp_path / "en.jsonl", [{"text": text}, {"text": "\x00" * 5_000_000}])
    started = time.monotonic()
    documents, counts = read(path)
    assert documents == [("en", text)]
    assert counts["en", "chars_empty"] == 5_000_000
    (ids,) = tokenizer.encode([documents[0][1]])
    assert len(ids) > 1_000_000
    assert time.monotonic() - started < 60  # a quadratic step would take hours


def test_find_inputs_sorts_and_names_each_file_once(tmp_path: Path) -> None:
    for name in ("b/en.txt", "a/en.txt", "a/de.jsonl.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_inputs([f"{tmp_path}/**/*.txt", f"{tmp_path}/a/*"])
    assert found == [tmp_path / "a/de.jsonl.gz", tmp_path / "a/en.txt", tmp_path / "b/en.txt"]


def test_find_inputs_refuses_globs_without_a_file(tmp_path: Path) -> None:
    (tmp_path / "en.txt").touch()
    with pytest.raises(ConfigError, match=r"prep\.input=.*\*\.jsonl.* matches no file"):
        find_inputs([f"{tmp_path}/*.txt", f"{tmp_path}/*.jsonl"])


def test_find_inputs_refuses_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "en.csv").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match=r"en\.csv"):
        find_inputs([f"{tmp_path}/*"])
