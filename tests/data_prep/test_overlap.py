from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.clean import normalise
from data_prep.command import ConfigError, RunError
from data_prep.overlap import Overlap

WORDS = [f"word{i}" for i in range(100)]
SENTENCE = "The quick brown fox, it is said, jumps over the lazy dog every single morning"
HAN = "自然語言處理是人工智慧和語言學領域的分支學科探討如何處理及運用自然語言"


@pytest.fixture(scope="session")
def eval_sets(corpus: Path) -> Path:
    folder = corpus.parent / "eval"
    if not folder.is_dir():
        pytest.skip(f"no evaluation sets at {folder}")
    return folder


def overlap(tmp_path: Path, text: str, ngram: int = 13) -> Overlap:
    (tmp_path / "eval.txt").write_text(text, encoding="utf-8")
    return Overlap([str(tmp_path / "eval.txt")], ngram)


@pytest.mark.parametrize("at", [0, 1, 50, 87])
def test_any_thirteen_words_in_a_row_match(tmp_path: Path, at: int) -> None:
    known = overlap(tmp_path, " ".join(WORDS))
    document = f"before {' '.join(WORDS[at : at + 13])} after"
    assert known.matches(document) == str(tmp_path / "eval.txt")
    assert known.matches(f"before {' '.join(WORDS[at : at + 12])} after") is None
    broken = [*WORDS[at : at + 6], "another", *WORDS[at + 6 : at + 13]]
    assert known.matches(" ".join(broken)) is None


def test_case_punctuation_and_lines_do_not_hide_a_match(tmp_path: Path) -> None:
    known = overlap(tmp_path, SENTENCE)
    assert known.matches(SENTENCE.upper().replace(" ", " -- ").replace(",", "\n"))
    assert known.matches(SENTENCE.replace("fox", "wolf")) is None


def test_scripts_without_spaces_match_by_two_or_four_times_as_many_characters(
    tmp_path: Path,
) -> None:
    known = overlap(tmp_path, f"{HAN[:20]}，{HAN[20:]}。")
    assert known.matches(f"An English text that quotes {HAN[5:31]} in it")
    assert known.matches(f"Eight English words in front of it all {HAN[5:14]}") is None
    thai = "".join(map(chr, range(0x0E01, 0x0E2F))) * 2
    known = overlap(tmp_path, thai)
    assert known.matches(f"x {thai[5:57]} x")
    assert known.matches(f"x {thai[5:56]} x") is None


def test_random_documents_match_where_brute_force_does(tmp_path: Path) -> None:
    rng = random.Random(3)
    texts = [[rng.choice("abc") for _ in range(rng.randrange(30))] for _ in range(40)]
    (tmp_path / "e.json").write_text(json.dumps([" ".join(text) for text in texts]))
    known = Overlap([f"{tmp_path}/e.json"], 7)
    runs = {tuple(text[i : i + 7]) for text in texts for i in range(len(text) - 6)}
    matched = 0
    for _ in range(2000):
        document = [rng.choice("abc") for _ in range(rng.randrange(20))]
        expected = any(tuple(document[i : i + 7]) in runs for i in range(len(document) - 6))
        assert (known.matches(" ".join(document)) is not None) == expected
        matched += expected
    assert 500 < matched < 1900


def write_csv(path: Path, fields: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerow(fields)


SQUAD = {"data": [{"paragraphs": [{"context": "no", "qas": [{"question": SENTENCE}]}]}]}
WRITERS: dict[str, Callable[[Path], object]] = {
    "a.json": lambda path: path.write_text(json.dumps(SQUAD)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(SQUAD).encode())),
    "a.jsonl": lambda path: path.write_text(f'{{"n": 1}}\n\n{json.dumps({"q": [SENTENCE]})}\n'),
    "a.tsv": lambda path: path.write_text(f'id\ttext\n1\t"{SENTENCE}\r\n'),
    "a.csv": lambda path: write_csv(path, ["1", f'He said: "{SENTENCE},\n{SENTENCE}"']),
    "a.csv.gz": lambda path: path.write_bytes(gzip.compress(f'1,"{SENTENCE}"\r\n'.encode())),
    "a.txt": lambda path: path.write_text(f"\ufeff{SENTENCE.replace(' ', chr(10))}", "utf-8"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_texts_are_found_in_files_of_any_kind(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    known = Overlap([f"{tmp_path}/*"], 13)
    assert known.files == [str(tmp_path / name)]
    assert known.matches(f"x {SENTENCE} x") == str(tmp_path / name)


def test_fields_and_paragraphs_are_texts_of_their_own(tmp_path: Path) -> None:
    half = " ".join(WORDS[:7]), " ".join(WORDS[7:14])
    long = "\tz " * 20 + " ".join(WORDS[20:40])
    (tmp_path / "a.tsv").write_text("\t".join(half) + f"\n{long}\n")
    (tmp_path / "b.txt").write_text("\n\n".join(half) + f"\n \n{long}\n")
    (tmp_path / "c.jsonl").write_text(json.dumps([*half, long]))
    known = Overlap([f"{tmp_path}/*"], 13)
    assert known.matches(" ".join(half)) is None
    assert known.matches(" ".join(WORDS[20:40])) == str(tmp_path / "a.tsv")


def test_the_first_file_has_what_several_hold(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.txt"):
        (tmp_path / name).write_text(SENTENCE)
    (tmp_path / "c.txt").write_text(f"{SENTENCE} {' '.join(WORDS[:20])}")
    known = Overlap([f"{tmp_path}/c*", f"{tmp_path}/*"], 13)
    assert [Path(file).name for file in known.files] == ["a.txt", "b.txt", "c.txt"]
    assert known.matches(SENTENCE) == str(tmp_path / "a.txt")
    assert known.matches(" ".join(WORDS[:20])) == str(tmp_path / "c.txt")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.json", b"{", r"a\.json is not UTF-8 json"),
        ("a.jsonl", b'{"a": 1}\nno\n', r"a\.jsonl is not UTF-8 jsonl"),
        ("a.json", b"[" * 100_000, r"a\.json is not UTF-8 json"),
        ("a.json", b'"\\ud800 ' + SENTENCE.encode() + b'"', r"a\.json is not UTF-8 json"),
        ("a.txt", b"\xff\xfe", r"a\.txt is not UTF-8 txt"),
        ("a.csv", b'a,"b', r"a\.csv is not UTF-8 csv"),
        ("a.parquet", b"", r"a\.parquet.* which is not one of \.json"),
        ("a.txt", b"too short", r"a\.txt holds no text of 13 words or more"),
        ("a.txt", b"", r"a\.txt holds no text of 13 words or more"),
    ],
)
def test_files_that_are_not_as_they_should_be_are_refused(
    tmp_path: Path, name: str, content: bytes, named: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=named):
        Overlap([f"{tmp_path}/*"], 13)


def test_a_glob_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prep\.exclude=.* matches no file"):
        Overlap([f"{tmp_path}/*.json"], 13)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    text = "\n".join(f"{i * 7919 % 10007} {SENTENCE}" for i in range(3000))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode())[:-50])
    with pytest.raises(RunError, match=r"a\.txt\.gz cannot be read to its end"):
        Overlap([f"{tmp_path}/*"], 13)


def test_documents_with_evaluation_texts_in_them_are_found(eval_sets: Path, corpus: Path) -> None:
    """Real text with a real evaluation text put into it matches; without it, none does."""
    known = Overlap([f"{eval_sets}/xquad/*.json", f"{eval_sets}/xnli/test-*.tsv"], 13)
    rng = random.Random(0)
    for language in ("ar", "de", "el", "en", "es", "hi", "ru", "th", "tr", "vi", "zh"):
        with gzip.open(corpus / f"{language}.jsonl.gz") as lines:
            texts = [normalise(json.loads(line)["text"]) for line in lines][:300]
        assert not any(known.matches(text) for text in texts), language
        articles = json.loads((eval_sets / "xquad" / f"xquad.{language}.json").read_text("utf-8"))
        for article in rng.sample(articles["data"], 5):
            context = article["paragraphs"][0]["context"]
            half = normalise(context[len(context) // 4 : -len(context) // 4])
            document = rng.choice(texts)
            at = rng.randrange(len(document))
            assert known.matches(f"{document[:at]} {half} {document[at:]}") is not None, language
