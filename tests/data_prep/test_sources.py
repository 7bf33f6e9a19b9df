from __future__ import annotations

import dataclasses
import gzip
import http.server
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tenacity

from data_prep import streams
from data_prep.command import ConfigError, RunError
from data_prep.config import Prep
from data_prep.documents import Raw, read_raw
from data_prep.sources import Source, Unit, find_sources, reading_digest, split, with_pools


def names(patterns: list[str]) -> list[str]:
    return [source.name for source in find_sources(patterns)]


def texts(source: Source, unit_bytes: int = 1000, **prep: str) -> list[str | None]:
    return [
        raw.text for unit in split(source, unit_bytes) for raw in read_raw(unit, Prep(**prep), [])
    ]


# Which files


def test_sources_are_sorted_by_name_and_named_once(tmp_path: Path) -> None:
    for name in ("b/en.txt", "a/en.txt", "a/de.jsonl.gz", "a/.hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    patterns = [f"{tmp_path}/**/*.txt", f"{tmp_path}/a/*", f"file://{tmp_path}/a/../b/en.txt"]
    assert [source.url for source in find_sources(patterns)] == [
        f"{tmp_path}/a/de.jsonl.gz",
        f"{tmp_path}/a/en.txt",
        f"{tmp_path}/b/en.txt",
    ]


def test_what_is_read_is_named_by_bytes_and_keys(tmp_path: Path) -> None:
    for name in ("en.jsonl", "de.json", "en.txt"):
        (tmp_path / name).write_text('{"text": "a", "lang": "b"}')
    german, lines, blank = find_sources([f"{tmp_path}/*"])
    preps = [Prep(), Prep(text_key="lang"), Prep(lang_key="text"), Prep(min_chars=9)]
    named = [[reading_digest(source, prep) for prep in preps] for source in (german, lines, blank)]
    assert named[0] == named[1]  # whatever the name is
    assert len(set(named[0])) == 3
    assert named[0][3] == named[0][0]
    assert len(set(named[2])) == 1  # plain text has no keys
    assert not set(named[2]) & set(named[1])


def test_weights_are_given_to_sources_by_globs(tmp_path: Path, monkeypatch) -> None:
    for name in ("wiki/en.txt", "web/en.txt", "web/a/de.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    sources = find_sources(["**/*.txt"])

    def weights(**globs: float) -> dict[str, float]:
        prep = Prep(source_weights=globs)
        return {
            source.url.removeprefix(f"{tmp_path}/"): prep.pools[source.pool].weight
            for source in with_pools(sources, prep)
        }

    assert weights() == dict.fromkeys(("web/a/de.txt", "web/en.txt", "wiki/en.txt"), 1.0)
    assert weights(**{"web/**": 0.5, f"file://{tmp_path}/wiki/*": 2}) == {
        "web/a/de.txt": 0.5,
        "web/en.txt": 0.5,
        "wiki/en.txt": 2.0,
    }
    with pytest.raises(ConfigError, match=r"prep\.source_weights names 'web', which is none"):
        weights(web=2.0)
    with pytest.raises(ConfigError, match=r"web/en\.txt two weights, by '\*/en.*' and 'web/\*\*'"):
        weights(**{"web/**": 1.0, "*/en.txt": 3.0})


def test_formats_are_told_by_suffixes(tmp_path: Path) -> None:
    expected = {"x.parquet": ("parquet", None), "x.arrow": ("arrow", None)}
    for suffix, kind in (
        ("jsonl", "jsonl"),
        ("json", "jsonl"),
        ("txt", "txt"),
        ("csv", "csv"),
        ("tsv", "tsv"),
    ):
        for compression in (None, "gz", "xz", "zst", "bz2"):
            name = f"x.jsonl.{suffix}" + (f".{compression}" if compression else "")
            expected[name] = (kind, compression)
    for name in expected:
        (tmp_path / name).touch()
    found = {s.name: (s.format, s.compression) for s in find_sources([f"{tmp_path}/*"])}
    assert found == expected


@pytest.mark.parametrize("name", ["en.md", "en", "en.gz", "en.parquet.gz", "en.txt.zip", "en.TXT"])
def test_other_kinds_are_refused_and_the_known_ones_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=rf"{name}.* is not one of .*\.jsonl.*\.zst.*\.parquet"):
        find_sources([f"{tmp_path}/*"])


@pytest.mark.parametrize("pattern", ["*.jsonl", "nothing.txt", "folder", "no/**/*.txt"])
def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "en.txt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=rf"{re.escape(pattern)}.* matches no file"):
        find_sources([f"{tmp_path}/*.txt", f"{tmp_path}/{pattern}"])


def test_circles_of_symbolic_links_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "en.txt").touch()
    for name in ("x", "y", "z"):  # with three, going round forks at each step
        (tmp_path / "a" / "b" / name).symlink_to(tmp_path / "a")
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"for ever, a symbolic link"):
        find_sources([f"{tmp_path}/**/*.txt"])
    assert names([f"{tmp_path}/*/*.txt"]) == ["en.txt"]
    assert time.monotonic() - started < 5


def test_a_folder_linked_to_twice_is_no_circle(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "en.txt").touch()
    (tmp_path / "one").symlink_to("real")
    (tmp_path / "two").symlink_to("real")
    assert names([f"{tmp_path}/**/*.txt"]) == ["en.txt"] * 3


@pytest.mark.parametrize("target", ["en.txt", "gone"])
def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "en.txt").symlink_to(target)
    with pytest.raises(ConfigError, match="symbolic link that leads nowhere"):
        find_sources([f"{tmp_path}/*"])


# Digests


def test_a_digest_follows_the_content_and_not_the_file(tmp_path: Path) -> None:
    for size in (0, 10, 2**20, 2**20 + 1, 5_000_000):
        content = bytearray(i * 7919 % 251 for i in range(size))
        seen = set()
        changes = {0, size // 2, size - 1} if size <= 2**20 else {0, size - 1}
        for at in [None, *sorted(changes & set(range(size)))]:
            if at is not None:
                content[at] ^= 1
            (tmp_path / "a.txt").write_bytes(content)
            (tmp_path / "b.txt").write_bytes(content)
            os.utime(tmp_path / "b.txt", (1, 1))
            a, b = find_sources([f"{tmp_path}/*.txt"])
            assert a.digest == b.digest
            seen.add(a.digest)
        assert len(seen) == 1 + len(changes & set(range(size)))
        (tmp_path / "a.txt").write_bytes(content + b"\0")
        assert find_sources([f"{tmp_path}/a.txt"])[0].digest not in seen


def test_a_digest_tells_sizes_of_the_same_samples(tmp_path: Path) -> None:
    for name, size in (("a.txt", 2**21), ("b.txt", 2**21 + 1)):
        (tmp_path / name).write_bytes(bytes(size))
    a, b = find_sources([f"{tmp_path}/*.txt"])
    assert a.digest != b.digest


def test_a_large_file_is_not_read_for_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "en.txt"
    with path.open("wb") as stream:
        stream.truncate(10**12)  # a hole
    started = time.process_time()
    (source,) = find_sources([str(path)])
    assert source.bytes == 10**12
    assert time.process_time() - started < 1
    assert len(split(source, 10**9)) == 1000


# Units


def test_units_of_text_are_byte_ranges(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_bytes(b"x" * 25)
    (source,) = find_sources([f"{tmp_path}/en.txt"])
    assert split(source, 10) == [
        Unit(source, 0, 10, 10),
        Unit(source, 10, 20, 10),
        Unit(source, 20, 25, 5),
    ]
    assert split(dataclasses.replace(source, bytes=0), 10) == []
    compressed = dataclasses.replace(source, compression="gz")
    assert split(compressed, 10) == [Unit(compressed, 0, 25, 25)]
    assert split(dataclasses.replace(source, format="csv"), 10)[0].stop == 25


def test_units_of_parquet_gather_row_groups(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{i:05}" * 20 for i in range(100)]})
    pq.write_table(table, tmp_path / "en.parquet", row_group_size=10, use_dictionary=False)
    (source,) = find_sources([f"{tmp_path}/en.parquet"])
    assert [(u.start, u.stop) for u in split(source, 1)] == [(i, i + 1) for i in range(10)]
    units = split(source, 2100)
    assert [(u.start, u.stop) for u in units] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert all(2100 <= unit.bytes < 3000 for unit in units)


# Hugging Face datasets


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rows = datasets.Dataset.from_dict(
        {"text": [f"text {i}" for i in range(2500)], "lang": ["sw"] * 2500}
    )
    rows.save_to_disk(str(tmp_path / "saved" / "de"), num_shards=3)
    return tmp_path / "saved" / "de"


@pytest.mark.parametrize("pattern", ["", "/../*", "/../**", "/../**/*"])
def test_a_folder_of_save_to_disk_is_one_source(saved: Path, pattern: str) -> None:
    (source,) = find_sources([f"{saved}{pattern}"])
    assert (source.name, source.format) == ("de", "folder")
    assert len(split(source, 1)) == 3
    raws = [raw for unit in split(source, 1) for raw in read_raw(unit, Prep(), [])]
    assert raws == [Raw("sw", f"text {i}", len(f"text {i}")) for i in range(2500)]


def test_files_of_such_a_folder_can_be_named_alone(saved: Path) -> None:
    found = find_sources([f"{saved}/*.arrow"])
    assert [source.format for source in found] == ["arrow"] * 3
    read = [text for source in found for text in texts(source)]
    assert read == [f"text {i}" for i in range(2500)]


def test_a_damaged_file_of_such_a_folder_leaves_the_others(saved: Path) -> None:
    before = find_sources([str(saved)])[0].digest
    file = sorted(saved.glob("*.arrow"))[1]
    file.write_bytes(b"\x01" * 100)
    (source,) = find_sources([str(saved)])
    assert source.digest != before
    found = texts(source, 2**40)
    assert found == [
        *(f"text {i}" for i in range(834)),
        None,
        *(f"text {i}" for i in range(1667, 2500)),
    ]
    file.unlink()
    with pytest.raises(RunError, match="cannot be found any more"):
        find_sources([str(saved)])
    (saved / "state.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"state\.json is not that of a dataset"):
        find_sources([str(saved)])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset as it lies on the hub: files, and no script."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "wiki"
    for split_name, count in (("train", 3), ("test", 1)):
        for index in range(count):
            path = folder / "data" / f"{split_name}-{index}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [{"body": f"{split_name} {index} {i}", "meta": {"a": i}} for i in range(600)]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_dataset_streams_shard_by_shard(hub: Path) -> None:
    url = f"datasets://{hub}?split=train&lang=sw"
    (source,) = find_sources([url])
    assert (source.format, source.name, source.url) == ("hub", "sw", url)
    units = split(source, 1)
    assert [(unit.start, unit.stop) for unit in units] == [(0, 1), (1, 2), (2, 3)]
    raws = [raw for unit in units for raw in read_raw(unit, Prep(text_key="body"), [])]
    expected = [f"train {index} {i}" for index in range(3) for i in range(600)]
    assert raws == [Raw("sw", text, len(text)) for text in expected]
    other = find_sources([f"datasets://{hub}?split=test"])[0]
    assert other.name == "wiki"
    assert other.digest != source.digest
    assert len(texts(other, text_key="body")) == 600
    with pytest.raises(ConfigError, match=r"text_key='text' is no column .* body, meta"):
        texts(source)


def test_a_dataset_that_is_not_there_is_refused(hub: Path) -> None:
    for url, message in (
        (f"datasets://{hub}?split=nope", "opens no dataset .*nope"),
        (f"datasets://{hub}-not?split=train", "opens no dataset"),
        (f"datasets://{hub}?spilt=train", "unknown parameter 'spilt'"),
        ("datasets://", "no dataset in it"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_sources([url])
    with pytest.raises(RunError, match="cannot be reached"):
        find_sources(["datasets://nobody/nothing"])


# Elsewhere


def some_jsonl(count: int = 30_000) -> tuple[list[str], bytes]:
    expected = [f"text {i} é" for i in range(count)]
    return expected, b"".join(json.dumps({"text": t}).encode() + b"\n" for t in expected)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda seconds: None)


def test_a_file_system_of_fsspec(tmp_path: Path) -> None:
    expected, data = some_jsonl()
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a/sw.jsonl", data)
    memory.pipe("/corpus/b/hi.jsonl.gz", gzip.compress(data))
    try:
        sw, hi = sorted(find_sources(["memory://corpus/**/*.jsonl*"]), key=lambda s: -s.bytes)
        assert (sw.name, hi.name) == ("sw.jsonl", "hi.jsonl.gz")
        assert texts(sw, 99_991) == texts(hi) == expected
        (tmp_path / "sw.jsonl").write_bytes(data)
        assert sw.digest == find_sources([f"{tmp_path}/sw.jsonl"])[0].digest
        with pytest.raises(ConfigError, match="matches no file"):
            find_sources(["memory://corpus/*.txt"])
        memory.pipe("/corpus/a/sw.jsonl", data[:1000])
        with pytest.raises(RunError, match=r"sw\.jsonl .*only 1000 of \d+ bytes came"):
            texts(sw)
    finally:
        memory.rm("/corpus", recursive=True)


def test_what_cannot_be_looked_up_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nonsense://x/en\.txt' cannot be looked up"):
        find_sources(["nonsense://x/en.txt"])
    with pytest.raises(RunError, match=r"http://127\.0\.0\.1:9/en\.txt cannot be looked up"):
        find_sources(["http://127.0.0.1:9/en.txt"])  # nobody listens


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves byte ranges of what `server.files` holds, after the failures it is told to have."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        content = self.server.files.get(self.path.partition("?")[0])
        if with_body:
            self.server.requests += 1
            if self.server.failures:
                kind = self.server.failures.pop(0)
                if kind == "hang up":
                    self.close_connection = True
                    return
                self.send_error(kind)
                return
        if content is None:
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            content = content[start:stop]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    server.files, server.failures, server.requests, server.ranges = {}, [], 0, True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def address(web: http.server.ThreadingHTTPServer, name: str) -> str:
    return f"http://127.0.0.1:{web.server_port}/{name}"


def test_files_of_a_web_server(web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_REMOTE_BLOCK", 100_000)
    expected, data = some_jsonl(60_000)
    pq.write_table(pa.table({"text": expected}), tmp_path / "x.parquet", row_group_size=9000)
    web.files = {
        "/sw.jsonl": data,
        "/hi.txt.gz": gzip.compress("\n\n".join(expected).encode()),
        "/th.parquet": (tmp_path / "x.parquet").read_bytes(),
    }
    urls = [
        address(web, "sw.jsonl?token=a-b"),
        address(web, "hi.txt.gz"),
        address(web, "th.parquet"),
    ]
    hi, sw, th = find_sources(urls)
    assert [source.name for source in (hi, sw, th)] == ["hi.txt.gz", "sw.jsonl", "th.parquet"]
    assert texts(sw, 400_000) == texts(th, 1) == expected
    assert [text.strip() for text in texts(hi)] == expected


@pytest.mark.parametrize("failure", [500, 503, 429, "hang up"])
def test_a_failure_that_passes_is_asked_again(web, failure: int | str) -> None:
    expected, data = some_jsonl()
    web.files = {"/sw.jsonl": data}
    (source,) = find_sources([address(web, "sw.jsonl")])
    (unit,) = split(source, 2**40)
    web.failures = [failure] * 4
    assert [raw.text for raw in read_raw(unit, Prep(), [])] == expected
    assert web.failures == []


def test_a_failure_that_lasts_names_the_url(web) -> None:
    with pytest.raises(ConfigError, match="matches no file"):
        find_sources([address(web, "sw.jsonl")])
    _, data = some_jsonl()
    web.files = {"/sw.jsonl": data}
    (source,) = find_sources([address(web, "sw.jsonl")])
    (unit,) = split(source, 2**40)
    web.failures, web.requests = [500] * 100, 0
    with pytest.raises(RunError, match=rf"{re.escape(source.url)} cannot be read at byte 0 "):
        list(read_raw(unit, Prep(), []))
    assert web.requests == 5
    web.failures, web.requests, web.files = [], 0, {}
    with pytest.raises(RunError, match=r"sw\.jsonl cannot be read at byte 0"):
        list(read_raw(unit, Prep(), []))
    assert web.requests <= 1  # what is not there is not asked for again


def test_a_failure_within_parquet_is_no_damage(web, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a" * 100] * 9000}), tmp_path / "x.parquet")
    web.files = {"/th.parquet": (tmp_path / "x.parquet").read_bytes()}
    (source,) = find_sources([address(web, "th.parquet")])
    (unit,) = split(source, 2**40)
    web.failures = [500] * 100
    with pytest.raises(RunError, match=r"th\.parquet cannot be read at byte"):
        list(read_raw(unit, Prep(), []))


def test_a_web_server_without_ranges_is_refused(web) -> None:
    web.files, web.ranges = {"/sw.jsonl": some_jsonl(100_000)[1]}, False
    with pytest.raises(RunError, match="range"):
        find_sources([address(web, "sw.jsonl")])


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch):
    """A store that speaks S3, in this process; `s3://corpus` is its bucket."""
    server_module = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    s3fs = pytest.importorskip("s3fs", reason="pip install s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("corpus")
    yield system
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_bucket_of_s3(bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_REMOTE_BLOCK", 100_000)
    expected, data = some_jsonl()
    pq.write_table(pa.table({"text": expected}), tmp_path / "x.parquet", row_group_size=9000)
    bucket.pipe("corpus/a/sw.jsonl", data)
    bucket.pipe("corpus/a/hi.jsonl.gz", gzip.compress(data))
    bucket.pipe("corpus/b/th.parquet", (tmp_path / "x.parquet").read_bytes())
    hi, sw, th = find_sources(["s3://corpus/**"])
    assert [source.url for source in (hi, sw, th)] == [
        "s3://corpus/a/hi.jsonl.gz",
        "s3://corpus/a/sw.jsonl",
        "s3://corpus/b/th.parquet",
    ]
    assert texts(sw, 99_991) == texts(hi) == texts(th, 1) == expected
    (tmp_path / "sw.jsonl").write_bytes(data)
    assert sw.digest == find_sources([f"{tmp_path}/sw.jsonl"])[0].digest
    with pytest.raises(ConfigError, match="matches no file"):
        find_sources(["s3://corpus/*.txt"])
    bucket.rm("corpus/a/sw.jsonl")
    with pytest.raises(RunError, match=r"s3://corpus/a/sw\.jsonl cannot be read at byte 0"):
        texts(sw)
