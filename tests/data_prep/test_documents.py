from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from data_prep import documents, streams
from data_prep.command import ConfigError, RunError
from data_prep.config import Prep
from data_prep.documents import MAX_FAULTS, Fault, Raw, read_raw
from data_prep.sources import find_sources, split

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".bz2": bz2.compress,
    ".zst": zstd.compress,
}
DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {  # of a file that may be cut off
    ".gz": lambda data: zlib.decompressobj(31).decompress(data),
    ".xz": lambda data: lzma.LZMADecompressor().decompress(data),
    ".bz2": lambda data: bz2.BZ2Decompressor().decompress(data),
    ".zst": lambda data: zstd.ZstdDecompressor().decompress(data),
}
WHOLE = 2**40


def read(path: Path, unit_bytes: int = WHOLE, **prep: str) -> tuple[list[Raw], list[Fault]]:
    """All units of a file, one after the other."""
    faults: list[Fault] = []
    (source,) = find_sources([str(path)])
    units = split(source, unit_bytes)
    return [raw for unit in units for raw in read_raw(unit, Prep(**prep), faults)], faults


def kept(raws: list[Raw]) -> list[tuple[str, str]]:
    return [(raw.language, raw.text) for raw in raws if raw.text is not None]


# A line of JSON


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
        ({"text": ""}, ("en", "")),
        (b'{"text": "hello"}\r', ("en", "hello")),
        (b'\xef\xbb\xbf{"text": "hello"}', ("en", "hello")),  # byte order mark
        (b'{"text": "hello", "score": NaN}', ("en", "hello")),
        (b'{"text": "hello", "other": "\\ud800"}', ("en", "hello")),
        (b'{"text": "hello", "n": 1e999}', ("en", "hello")),
        (b'{"text": "hello", "n": 123456789012345678901234567890}', ("en", "hello")),
        (b'{"text": "hello", "text": "again"}', ("en", "again")),
        ({"text": "he\x00llo"}, ("en", "he\x00llo")),
        ({"text": "\u202eשלום"}, ("en", "\u202eשלום")),
        ({"text": "ok \U0001f600"}, ("en", "ok \U0001f600")),
        ({"text": "hello", "meta": {"page": "x" * 3_000_000}}, ("en", "hello")),
    ],
)
def test_a_line_of_jsonl(tmp_path: Path, write_jsonl, line: object, expected) -> None:
    raws, faults = read(write_jsonl(tmp_path / "en.jsonl", [line]))
    assert raws == [Raw(*expected, len(expected[1]))]
    assert faults == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "not JSON"),
        (b'{"text": "cut off', "not JSON"),
        (b'{"text": "\xff\xfe"}', "not UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),  # a surrogate, encoded
        (b'{"text": "a", "other": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800 lone"}', "a lone surrogate"),
        (b'{"text": 5}', "no text under 'text'"),
        (b'{"text": null}', "no text under 'text'"),
        (b'{"text": ["a"]}', "no text under 'text'"),
        (b'{"other": "a"}', "no text under 'text'"),
        (b'["text"]', "no text under 'text'"),
        (b'"text"', "no text under 'text'"),
        (b"5", "no text under 'text'"),
        (b"[" * 100_000, "JSON nested too deep"),
        (b'{"text": "a", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b"\x00", "not JSON"),
        (b"\xff\xfe{\x00", "not UTF-8"),  # UTF-16
        (b"{\x00}\x00", "not JSON"),  # UTF-16 without a mark
    ],
)
def test_a_broken_line_is_a_fault_and_the_next_one_is_read(
    tmp_path: Path, write_jsonl, line: bytes, reason: str
) -> None:
    path = write_jsonl(tmp_path / "en.jsonl", [{"text": "first"}, line, {"text": "next"}])
    raws, (fault,) = read(path)
    assert raws == [Raw("en", "first", 5), Raw("en", None, len(line) + 1), Raw("en", "next", 4)]
    assert reason in fault.reason
    assert fault.url == str(path)
    assert path.read_bytes()[fault.offset :][: fault.bytes] == line + b"\n"


def test_keys_are_the_recipes(tmp_path: Path, write_jsonl) -> None:
    path = write_jsonl(
        tmp_path / "x.jsonl.gz", [{"body": "b", "l": "de", "text": "t", "lang": "en"}]
    )
    assert kept(read(path, text_key="body", lang_key="l")[0]) == [("de", "b")]


def test_a_file_name_that_is_no_language_is_und(tmp_path: Path, write_jsonl) -> None:
    raws, _ = read(write_jsonl(tmp_path / "my text.jsonl", [{"text": "a"}, b"broken"]))
    assert [raw.language for raw in raws] == ["und", "und"]


def test_stop_refuses_the_first_fault_and_names_it(tmp_path: Path, write_jsonl) -> None:
    path = write_jsonl(tmp_path / "en.jsonl", [{"text": "a"}, b"broken"])
    with pytest.raises(RunError, match=r"en\.jsonl has a fault at 14: not JSON .* 7 bytes"):
        read(path, on_error="stop")


def test_all_faults_are_counted_and_so_many_listed(tmp_path: Path, write_jsonl) -> None:
    path = write_jsonl(tmp_path / "en.jsonl", [b"broken"] * (MAX_FAULTS + 5))
    raws, faults = read(path)
    assert raws == [Raw("en", None, 7)] * (MAX_FAULTS + 5)
    assert len(faults) == MAX_FAULTS
    _, faults = read(path, unit_bytes=path.stat().st_size // 2 + 1)
    assert len(faults) == MAX_FAULTS + 5  # the limit is a unit's


# Units: any division is the whole, as a reader sees it that holds all of the file


def all_of_jsonl(data: bytes) -> list[Raw]:
    """As the documentation says it, without a thought for memory or speed."""
    raws = []
    for line in io.BytesIO(data):
        if len(line) > documents.MAX_TEXT:  # of spaces, too
            raws.append(Raw("en", None, len(line)))
        elif line.strip():
            try:
                text = json.loads(line.decode())["text"]
                raws.append(Raw("en", text, len(text)))
            except (ValueError, TypeError):
                raws.append(Raw("en", None, len(line)))
    return raws


def all_of_txt(data: bytes) -> list[Raw]:
    raws, document = [], b""
    for line in [*io.BytesIO(data), b""]:
        if line.strip() or len(line) > documents.MAX_TEXT:
            document += line
        elif document:
            try:
                if len(document) > documents.MAX_TEXT:
                    raise ValueError
                raws.append(Raw("en", document.decode(), len(document.decode())))
            except ValueError:
                raws.append(Raw("en", None, len(document)))
            document = b""
    return raws


ENDS = st.sampled_from([b"\n", b"\r\n", b"\n", b"\r", b""])
SPACES = st.integers(46, 60).map(lambda count: b" " * count)  # about MAX_TEXT of small_limits
JSON_LINES = st.one_of(
    st.text(max_size=12).map(lambda text: json.dumps({"text": text}).encode()),
    st.text(max_size=12).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()),
    SPACES,
    st.integers(37, 46).map(lambda count: json.dumps({"text": "x" * count}).encode()),
    st.sampled_from([b"", b"  ", b"\t\x0b\x0c ", b"broken", b"{", b'{"text": "\xff"}']),
).filter(lambda line: b"\xed" not in line)
TXT_LINES = st.one_of(
    st.text(max_size=8).map(lambda text: text.encode("utf-8", "ignore")),
    SPACES,
    st.integers(47, 53).map(lambda count: b"x" * count),
    st.sampled_from([b"", b"", b" ", b"\t \x0b", b"\xff", b"x" * 70, "日本語".encode()]),
)


@st.composite
def files(draw: st.DrawFn, lines: st.SearchStrategy[bytes]) -> bytes:
    return b"".join(line + draw(ENDS) for line in draw(st.lists(lines, max_size=12)))


def check_units(tmp_path: Path, suffix: str, data: bytes, oracle, sizes: list[int]) -> None:
    path = tmp_path / f"en{suffix}"
    path.write_bytes(data)
    expected = oracle(data)
    (source,) = find_sources([str(path)])
    for unit_bytes in sizes:
        faults: list[Fault] = []
        units = split(source, unit_bytes)
        raws = [raw for unit in units for raw in read_raw(unit, Prep(), faults)]
        assert raws == expected, unit_bytes
        assert [fault.bytes for fault in faults] == [r.size for r in expected if r.text is None]


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines over several blocks, and too long ones, without megabytes."""
    monkeypatch.setattr(documents, "BLOCK", 7)
    monkeypatch.setattr(documents, "MAX_TEXT", 50)


@given(st.data())
def test_units_of_any_size_are_all_of_a_jsonl_file(tmp_path_factory, data) -> None:
    content = data.draw(files(JSON_LINES))
    check_units(
        tmp_path_factory.mktemp("units"), ".jsonl", content, all_of_jsonl, [*range(1, 20), WHOLE]
    )


@given(st.data())
def test_units_of_any_size_are_all_of_a_txt_file(tmp_path_factory, data) -> None:
    content = data.draw(files(TXT_LINES))
    check_units(
        tmp_path_factory.mktemp("units"), ".txt", content, all_of_txt, [*range(1, 20), WHOLE]
    )


@pytest.mark.parametrize(
    ("suffix", "lines", "oracle"),
    [(".jsonl", JSON_LINES, all_of_jsonl), (".txt", TXT_LINES, all_of_txt)],
)
def test_units_with_lines_over_several_blocks(
    tmp_path_factory, small_limits, suffix: str, lines, oracle
) -> None:
    @given(files(lines))
    def check(content: bytes) -> None:
        folder = tmp_path_factory.mktemp("units")
        check_units(folder, suffix, content, oracle, [*range(1, 20), 64, WHOLE])

    check()


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize(
    ("kind", "oracle"), [(".jsonl", all_of_jsonl), (".txt", all_of_txt)], ids=["jsonl", "txt"]
)
def test_what_is_compressed_reads_as_if_it_were_not(
    tmp_path: Path, suffix: str, kind: str, oracle
) -> None:
    lines = [json.dumps({"text": f"{i} é日 {i * 7919}"}).encode() for i in range(20_000)]
    lines[777], lines[5000:5003] = b"\xff", [b"", b"  ", b""]
    data = b"\n".join(lines)
    half = data.index(b"\n", len(data) // 2) - 3
    path = tmp_path / f"en{kind}{suffix}"
    for content in (
        COMPRESS[suffix](data),
        COMPRESS[suffix](data[:half]) + COMPRESS[suffix](data[half:]),  # two members
    ):
        path.write_bytes(content)
        raws, faults = read(path, unit_bytes=1000)
        assert raws == oracle(data)
        assert len(faults) == 1
    path.write_bytes(COMPRESS[suffix](data[:half]) + bytes(200_000) + COMPRESS[suffix](data[half:]))
    assert read(path)[0] == oracle(data)  # padding
    path.write_bytes(b"")
    assert read(path) == ([], [])


def test_real_text_in_units(corpus: Path, tmp_path: Path) -> None:
    data = gzip.decompress((corpus / "th.jsonl.gz").read_bytes())
    path = tmp_path / "th.jsonl"
    path.write_bytes(data)
    texts = [json.loads(line)["text"] for line in data.splitlines()]
    for file, unit_bytes in ((path, 99_991), (path, WHOLE), (corpus / "th.jsonl.gz", 99_991)):
        raws, faults = read(file, unit_bytes)
        assert raws == [Raw("th", text, len(text)) for text in texts]
        assert faults == []


# Damage


def some_lines(count: int = 30_000) -> tuple[list[str], bytes]:
    texts = [f"{i} {i * 7919 % 1013} é" for i in range(count)]
    return texts, b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
def test_what_precedes_the_end_of_a_cut_file_is_kept(
    tmp_path: Path, suffix: str, kind: str
) -> None:
    texts, data = some_lines(80_000)
    path = tmp_path / f"en{kind}{suffix}"
    content = COMPRESS[suffix](data)
    content = content[: len(content) // 2]
    path.write_bytes(content)
    raws, (fault,) = read(path)
    assert raws[-1] == Raw("en", None, fault.bytes)
    assert "cut off" in fault.reason
    assert fault.offset == len(content)
    if kind == ".jsonl":  # a .txt file without a blank line is one document, and that is cut
        assert [raw.text for raw in raws[:-1]] == texts[: len(raws) - 1]
        assert len(raws) > (20_000 if suffix != ".zst" else 1)
        decoded = DECOMPRESS[suffix](content)
        # of the last few bits, decoders may make a character more or less
        assert abs(fault.bytes - (len(decoded) - decoded.rfind(b"\n") - 1)) <= 1
    else:
        assert len(raws) == 1
        assert fault.bytes > 500_000


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_what_precedes_corrupt_bytes_is_kept(tmp_path: Path, suffix: str) -> None:
    texts, data = some_lines(80_000)
    path = tmp_path / f"en.jsonl{suffix}"
    half = COMPRESS[suffix](data)
    path.write_bytes(half + b"\x07 what is this" + b"\xff" * 100_000)
    raws, (fault,) = read(path)
    assert [raw.text for raw in raws[:-1]] == texts
    assert len(half) - streams.COMPRESSED_BLOCK <= fault.offset <= len(half)
    assert raws[-1].size == fault.bytes == path.stat().st_size - fault.offset
    assert f"not {suffix[1:]} from here on" in fault.reason


def test_a_changed_byte_of_an_archive_is_found(tmp_path: Path) -> None:
    _, data = some_lines()
    content = bytearray(gzip.compress(data))
    content[-6] ^= 1  # of the checksum
    path = tmp_path / "en.jsonl.gz"
    path.write_bytes(content)
    raws, faults = read(path)
    assert "checksum" in faults[-1].reason
    assert raws[-1].text is None
    path.write_bytes(data)
    raws, (fault,) = read(path)
    assert raws == [Raw("en", None, len(data))]
    assert fault.offset == 0


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_a_bomb_is_left_before_it_fills_anything(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BOMB_BYTES", 2**24)
    monkeypatch.setattr(streams, "MAX_EXPANSION", 100)
    path = tmp_path / f"en.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](b'{"text": "a"}\n' + bytes(2**26)))
    raws, (fault,) = read(path)
    assert raws[0] == Raw("en", "a", 1)
    assert fault.reason == "expands more than 100 times"
    assert len(raws) == 2
    monkeypatch.setattr(streams, "BOMB_BYTES", 2**27)
    assert len(read(path)[1]) == 1
    assert "expands" not in read(path)[1][0].reason  # a small file that expands is none


def test_a_file_that_became_shorter_is_refused(tmp_path: Path, write_jsonl) -> None:
    path = write_jsonl(tmp_path / "en.jsonl", [{"text": "a"}] * 100)
    (source,) = find_sources([str(path)])
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(RunError, match=r"ends at byte 500 and had 1400"):
        list(read_raw(split(source, WHOLE)[0], Prep(), []))
    path.unlink()
    with pytest.raises(RunError, match=r"en\.jsonl cannot be read at byte 0"):
        list(read_raw(split(source, WHOLE)[0], Prep(), []))


# Tables


def test_csv_by_the_standard_librarys_reader(tmp_path: Path) -> None:
    rows = [
        ["7", "plain", "sw"],
        ["8", 'with "quotes", and, commas', ""],
        ["9", "over\nseveral\r\n\n\nlines é日", "hi"],
        ["10", "", "x y"],
    ]
    for suffix, dialect in ((".csv", "excel"), (".tsv", "excel-tab")):
        for compression, compress in COMPRESS.items():
            stream = io.StringIO(newline="")
            csv.writer(stream, dialect).writerows([["id", "text", "lang"], *rows])
            path = tmp_path / f"en{suffix}{compression}"
            path.write_bytes(compress(b"\xef\xbb\xbf" + stream.getvalue().encode()))
            raws, faults = read(path, unit_bytes=10)
            languages = ["sw", "en", "hi", "und"]
            expected = [
                Raw(lg, row[1], len(row[1])) for lg, row in zip(languages, rows, strict=True)
            ]
            assert raws == expected
            assert faults == []


def test_broken_rows_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "en.csv"
    lines = [
        b"lang,text",
        b"de,good",
        b"de",
        b"",
        b'de,"a"b',
        b"de,\xff",
        b"de,a\x00b",
        b'de,"never closed',
        b"sw,lost with it",
    ]
    path.write_bytes(b"\n".join(lines))
    raws, faults = read(path)
    assert raws == [
        Raw("de", "good", 4),
        Raw("en", None, 3),
        Raw("en", None, 8),
        Raw("en", None, 5),
        Raw("de", "a\x00b", 3),
        Raw("en", None, 32),
    ]
    content = path.read_bytes()
    assert [content[fault.offset :][: fault.bytes] for fault in faults] == [
        b"de\n",
        b'de,"a"b\n',
        b"de,\xff\n",
        b'de,"never closed\nsw,lost with it',
    ]
    assert [fault.reason.split(" (")[0] for fault in faults] == [
        "no text under 'text'",
        "not a row of csv",
        "not UTF-8",
        "not a row of csv",
    ]


def test_csv_without_the_column_is_refused_and_an_empty_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "en.csv"
    path.write_text("id,body\n1,a\n")
    with pytest.raises(ConfigError, match=r"text_key='text' is no column .* are id, body"):
        read(path)
    assert kept(read(path, text_key="body")[0]) == [("en", "a")]
    path.write_text("")
    assert read(path) == ([], [])


def test_a_field_too_long_is_a_broken_row(tmp_path: Path, small_limits) -> None:
    path = tmp_path / "en.csv"
    lines = ["é" * 23, "é" * 12 + "\n" + "é" * 12, "é" * 12 + "\n" + "é" * 13, "x\n" * 26, "next"]
    path.write_text("text\n" + "".join(f'"{line}"\n' for line in lines))
    raws, faults = read(path)
    assert raws == [
        *(Raw("en", text, len(text)) for text in lines[:2]),  # 46 and 49 bytes
        Raw("en", None, 51 + 3),  # 26 characters, of 51 bytes, and the quotes and line end
        Raw("en", None, 52 + 3),
        Raw("en", "next", 4),
    ]
    assert faults[0].reason == "a text of 51 bytes, over 50"
    assert "field limit" in faults[1].reason


@pytest.mark.parametrize("name", ["en.parquet", "en.arrow"])
def test_a_text_too_long_in_a_table_is_a_broken_row(tmp_path: Path, small_limits, name) -> None:
    texts = ["x" * 50, "é" * 26, "x" * 51, "next"]
    table = pa.table({"text": texts})
    if name.endswith("arrow"):
        with pa.ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    else:
        write_parquet(tmp_path / name, table)
    raws, faults = read(tmp_path / name)
    assert raws == [
        Raw("en", texts[0], 50), Raw("en", None, 52), Raw("en", None, 51), Raw("en", "next", 4)
    ]  # fmt: skip
    assert [fault.offset for fault in faults] == [1, 2]
    assert faults[0].reason.startswith("a text of 52 bytes, over 50")


def test_a_line_too_long_ends_a_csv_file(tmp_path: Path, small_limits) -> None:
    path = tmp_path / "en.csv"
    path.write_bytes(b"text\ngood\n" + b"x" * 100 + b"\nnever\nread\n")
    raws, (fault,) = read(path)
    assert raws == [Raw("en", "good", 4), Raw("en", None, 101 + 11)]
    assert fault.offset == 10


def write_parquet(path: Path, table: pa.Table, **options) -> Path:
    pq.write_table(table, path, **options)
    return path


def not_utf8(values: list[bytes | None]) -> pa.Array:
    return pa.array(values, pa.binary()).view(pa.string())


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
)
@pytest.mark.parametrize("format", ["parquet", "arrow", "stream"])
def test_tables_in_units_of_any_size(tmp_path: Path, kind, format: str) -> None:
    texts = [f"{i} é日 " * (i % 7) for i in range(1000)]
    texts[5], languages = None, ["sw", None, "", "x y", "hi"] * 200
    table = pa.table({"id": range(1000), "text": texts, "lang": languages})
    table = table.set_column(1, "text", table.column("text").cast(kind))
    path = tmp_path / f"en.{'parquet' if format == 'parquet' else 'arrow'}"
    if format == "parquet":
        pq.write_table(table, path, row_group_size=90)
    else:
        new = pa.ipc.new_file if format == "arrow" else pa.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=90)
    names = ["sw", "en", "en", "und", "hi"] * 200
    expected = [
        Raw(lg, t, len(t)) if t is not None else Raw("en", None, 0)
        for lg, t in zip(names, texts, strict=True)
    ]
    (source,) = find_sources([str(path)])
    for unit_bytes in (1, 5000, WHOLE):
        raws, (fault,) = read(path, unit_bytes)
        assert raws == expected
        assert fault.offset == 5
        assert fault.bytes == 0
        units = split(source, unit_bytes)
        assert len(units) == (1 if unit_bytes == WHOLE or format == "stream" else len(units))
        if unit_bytes == 1:
            assert len(units) == (1 if format == "stream" else 12)


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_a_text_of_a_table_that_is_not_utf8(tmp_path: Path, format: str) -> None:
    for column in (not_utf8([b"a", b"\xff\xfe", b"c"]), pa.array([b"a", b"\xff\xfe", b"c"])):
        table = pa.table({"text": column})
        path = tmp_path / f"en.{format}"
        if format == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
        raws, (fault,) = read(path)
        assert raws == [Raw("en", "a", 1), Raw("en", None, 2), Raw("en", "c", 1)]
        assert (fault.offset, fault.bytes) == (1, 2)
        assert fault.reason.startswith("not UTF-8")


def test_a_damaged_row_group_is_left_out_and_the_next_one_read(tmp_path: Path) -> None:
    texts = [f"{i} {i * 7919 % 1013}" * 20 for i in range(4000)]
    path = write_parquet(
        tmp_path / "en.parquet",
        pa.table({"text": texts}),
        row_group_size=1000,
        write_page_checksum=True,
        data_page_size=2000,
        write_batch_size=50,
        use_dictionary=False,
    )
    chunk = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    at = chunk.data_page_offset + chunk.total_compressed_size * 3 // 4
    content[at : at + 64] = bytes(64)
    path.write_bytes(content)
    raws, (fault,) = read(path, unit_bytes=1)
    lost = next(i for i, raw in enumerate(raws) if raw.text is None)
    assert [raw.text for raw in raws] == [*texts[:lost], None, *texts[2000:]]
    assert 1000 < lost < 2000
    assert fault.offset == lost
    assert fault.bytes == chunk.total_compressed_size * (2000 - lost) // 1000
    assert "row group 1 is damaged" in fault.reason


@pytest.mark.parametrize("name", ["en.parquet", "en.arrow"])
@pytest.mark.parametrize("damage", ["cut", "no bytes", "other bytes"])
def test_a_table_that_cannot_be_opened_is_one_fault(tmp_path: Path, name: str, damage: str) -> None:
    table = pa.table({"text": ["a" * 1000] * 1000})
    path = tmp_path / name
    if name == "en.parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    content = path.read_bytes()
    changed = {"cut": content[:-100], "no bytes": b"", "other bytes": b"\x01" * 1000}[damage]
    path.write_bytes(changed)
    raws, (fault,) = read(path)
    assert raws == [Raw("en", None, len(changed))]
    assert (fault.offset, fault.bytes) == (0, len(changed))


def test_a_cut_arrow_stream_keeps_what_precedes(tmp_path: Path) -> None:
    table = pa.table({"text": [f"text {i}" for i in range(10_000)]})
    path = tmp_path / "en.arrow"
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    raws, (fault,) = read(path)
    assert [raw.text for raw in raws[:-1]] == table["text"].to_pylist()[: len(raws) - 1]
    assert len(raws) - 1 in (4000, 5000)
    assert fault.offset + fault.bytes == len(content) // 2


def test_damaged_offsets_of_an_arrow_file_lead_nowhere(tmp_path: Path) -> None:
    table = pa.table({"text": [f"text {i}" for i in range(1000)]})
    path = tmp_path / "en.arrow"
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    content = bytearray(path.read_bytes())
    at = content.index(b"".join(i.to_bytes(4, "little") for i in (8, 16, 24)))  # of the 2nd batch
    content[at : at + 4] = (2**31 - 1).to_bytes(4, "little")
    path.write_bytes(content)
    raws, (fault,) = read(path)
    assert len(raws) == 901
    assert "record batch is damaged" in fault.reason


def test_an_empty_table_is_read_in_peace(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "en.parquet", pa.table({"text": pa.array([], pa.string())}))
    assert read(path) == ([], [])


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_a_table_without_the_column_is_refused(tmp_path: Path, format: str) -> None:
    table = pa.table({"id": [1], "body": ["a"], "text": [[1]]})
    path = tmp_path / f"en.{format}"
    if format == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(ConfigError, match=r"text_key='x' is no column .* id, body, text"):
        read(path, text_key="x")
    with pytest.raises(ConfigError, match=r"text_key='text' is a column of list<.*text is needed"):
        read(path)
    assert kept(read(path, text_key="body")[0]) == [("en", "a")]


# Hostile input


PEAK = """
import re, sys
from pathlib import Path
from data_prep.config import Prep
from data_prep.documents import read_raw
from data_prep.sources import find_sources, split
faults = []
def high_water():  # of this program; getrusage would count its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = high_water()
documents = characters = broken = 0
for unit in split(find_sources([sys.argv[1]])[0], 2**40):
    for raw in read_raw(unit, Prep(), faults):
        documents += 1
        characters += raw.size
        broken += raw.text is None
        del raw
reason = faults[0].reason if faults else ""
print(documents, characters, broken, (high_water() - before) // 1024, reason)
"""


def peak(path: Path, repo: Path) -> tuple[int, int, int, int, str]:
    """Documents, characters, broken ones, MiB more than before and the first reason."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    documents, characters, broken, mebibytes, *reason = done.stdout.split(" ", 4)
    return int(documents), int(characters), int(broken), int(mebibytes), "".join(reason).strip()


MIB_ALLOWED = 500


@pytest.mark.parametrize("fill", [b"a", b"\\u00e9", "é😀".encode()])
@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".csv", ".jsonl.gz"])
def test_a_line_of_50_megabytes_is_kept_and_of_csv_of_30(
    tmp_path: Path, repo: Path, suffix: str, fill: bytes
) -> None:
    count = (50_000_000 if suffix != ".csv" else 30_000_000) // len(fill)
    path = tmp_path / f"en{suffix}"
    head, tail = (b'{"text": "', b'"}\n') if "json" in suffix else (b"text\n", b"\n")
    data = head + fill * count + tail
    path.write_bytes(gzip.compress(data, 1) if suffix.endswith("gz") else data)
    documents, characters, broken, mebibytes, _ = peak(path, repo)
    assert (documents, broken) == (1, 0)
    text = data.decode() if suffix == ".txt" else (fill * count).decode()
    if "json" in suffix and b"\\" in fill:
        text = "é" * count
    assert characters == len(text)
    assert mebibytes < MIB_ALLOWED


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".txt.gz"])
def test_a_line_of_half_a_gigabyte_is_passed_over(tmp_path: Path, repo: Path, suffix: str) -> None:
    path = tmp_path / f"en{suffix}"
    with gzip.open(path, "wb", 1) if suffix.endswith("gz") else open(path, "wb") as stream:
        for _ in range(512):
            stream.write(b"abcdefgh" * 2**17)
        stream.write(b'\n\n{"text": "next"}\n')
    documents, characters, broken, mebibytes, reason = peak(path, repo)
    assert (documents, broken) == (2, 1)
    assert characters in (2**29 + 1 + 4, 2**29 + 1 + 17)
    assert mebibytes < 150
    assert reason == f"a text of {2**29 + 1} bytes, over {documents and 2**26}"


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl.gz", b"\0"),
        (".jsonl.gz", b"\n"),
        (".txt.zst", b" "),
        (".txt.zst", b"some words on a line\n"),
    ],
)
def test_a_real_bomb(tmp_path: Path, repo: Path, suffix: str, content: bytes) -> None:
    compression = "." + suffix.rpartition(".")[2]
    path = tmp_path / f"en{suffix}"
    member = COMPRESS[compression](content * (2**26 // len(content)))
    path.write_bytes(member * 40)  # 2.5 GiB
    started = time.monotonic()
    *_, mebibytes, reason = peak(path, repo)
    assert mebibytes < MIB_ALLOWED
    assert time.monotonic() - started < 100
    assert reason
