"""Shards over HTTP that fails and from S3, by this project's reader and by those of the docs."""

from __future__ import annotations

import random
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tenacity

from data_prep.block_cache import BlockCache
from data_prep.command import ConfigError, RunError
from data_prep.inspect import inspect_shards
from data_prep.shards import Manifest, ShardReader
from tests.data_prep.flaky_http import flaky_server


def assert_reads_alike(remote: ShardReader, folder: Path) -> None:
    """All blocks, one by one and by several threads at once."""
    local = ShardReader(str(folder))
    assert remote.is_remote
    assert not local.is_remote
    assert (remote.manifest, remote.digest) == (local.manifest, local.digest)
    names = [
        (i, x) for x in (None, *local.manifest.heldout_rows) for i in range(len(local.blocks(x)))
    ]
    with ThreadPoolExecutor(8) as pool:
        got = pool.map(lambda name: remote.read_sample(name[0], language=name[1]), names)
        for (index, language), sample in zip(names, got, strict=True):
            expected = local.read_sample(index, language=language)
            np.testing.assert_array_equal(sample[0], expected[0])
            np.testing.assert_array_equal(sample[1], expected[1])
            assert sample[2] == expected[2]


def test_shards_are_read_over_http_that_fails(
    prepared: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda seconds: None)
    draw = random.Random(3)
    with flaky_server(prepared[0]) as server:
        server.faults = [
            draw.choice(["500", "cut", "short", "drop", *[""] * 8]) for _ in range(150)
        ]
        assert_reads_alike(ShardReader(server.url), prepared[0])


def test_a_block_that_comes_damaged_is_fetched_again(
    prepared: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda seconds: None)
    with flaky_server(prepared[0]) as server:
        reader = ShardReader(server.url)
        server.faults = ["garbled"] * 3
        assert reader.read_sample(0)[2] == ShardReader(str(prepared[0])).read_sample(0)[2]
        server.faults = ["garbled"] * 99
        with pytest.raises(RunError, match="is damaged: its CRC does not match the manifest"):
            reader.read_sample(1)


@pytest.fixture
def s3(prepared: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server with the shards in s3://bucket/shards; gives a client of it."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", url := f"http://{host}:{port}")
    # What earlier servers of this process held is still there.
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    files = pytest.importorskip("s3fs").S3FileSystem(skip_instance_cache=True)
    files.mkdir("bucket")
    files.put(str(prepared[0]), "bucket/shards", recursive=True)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield files
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


def test_shards_are_read_from_s3(s3: Any, prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    assert_reads_alike(ShardReader("s3://bucket/shards"), prepared[0])
    cached = ShardReader("s3://bucket/shards/", cache=BlockCache(tmp_path, 10**9))
    assert_reads_alike(cached, prepared[0])
    s3.rm("bucket/shards/train-000000.tar")
    with pytest.raises(RunError, match="is missing"):  # a listing is not taken from memory
        ShardReader("s3://bucket/shards")
    with pytest.raises(ConfigError, match=r"s3://bucket/nothing has no manifest\.json"):
        ShardReader("s3://bucket/nothing")
    with pytest.raises(ConfigError, match=r"s3://no-bucket/x has no manifest\.json"):
        ShardReader("s3://no-bucket/x")
    assert_reads_alike(cached, prepared[0])  # blocks were kept


EXAMPLES = ["webdataset", "datasets", "data_prep.shards"]  # in the order of the page


@pytest.mark.parametrize("imported", EXAMPLES)
def test_the_examples_read_from_s3(
    s3: Any, prepared: tuple[Path, Manifest], repo: Path, tmp_path: Path, imported: str, capsys: Any
) -> None:
    text = (repo / "docs" / "reading.md").read_text(encoding="utf-8")
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(codes) == 3
    code = codes[EXAMPLES.index(imported)]
    assert re.search(rf"^(from|import) {imported}", code, re.MULTILINE)
    names: dict[str, Any] = {"shards": "s3://bucket/shards", "cache_dir": str(tmp_path)}
    exec(code, names)
    reader = ShardReader(str(prepared[0]))
    last = len(reader.blocks()) - 1
    np.testing.assert_array_equal(names["input_ids"], reader.read_block(last)[0])
    np.testing.assert_array_equal(names["cu_seqlens"], reader.read_block(last)[1])
    if imported != "data_prep.shards":
        assert len(capsys.readouterr().out.splitlines()) == last + 1


def test_inspecting_s3_finds_what_inspecting_the_folder_does(
    s3: Any, prepared: tuple[Path, Manifest]
) -> None:
    near = inspect_shards(ShardReader(str(prepared[0])), blocks=5)
    far = inspect_shards(ShardReader("s3://bucket/shards"), blocks=5)
    assert (near.languages, near.row_tokens) == (far.languages, far.row_tokens)
