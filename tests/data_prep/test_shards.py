from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from data_prep.block_cache import BlockCache
from data_prep.command import ConfigError, RunError
from data_prep.shards import (
    Manifest,
    ShardReader,
    describe_tar,
    generation,
    id_dtype,
    parse_block,
    publish,
    write_tar,
)
from data_prep.storage import Storage


@pytest.fixture
def copy(prepared: tuple[Path, Manifest], tmp_path: Path) -> Path:
    """A copy of prepared shards, to be damaged."""
    return Path(shutil.copytree(prepared[0], tmp_path / "copy"))


def samples(num_blocks: int = 3, dtype: Any = np.uint32) -> list[dict[str, Any]]:
    return [
        {
            "__key__": f"train-000000-{i:08d}",
            "input_ids.npy": np.full((2, 8), 70_000 + i).astype(dtype),
            "cu_seqlens.npy": np.array([0, 5, 8, 16], dtype=np.int32),
            "json": {"rows": 2, "tokens": {"en": 13, "de": 3}, "padding": 0},
        }
        for i in range(num_blocks)
    ]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1, np.uint16), (65_536, np.uint16), (65_537, np.uint32)]
)
def test_ids_take_two_bytes_where_the_vocabulary_fits(vocab_size: int, dtype: type) -> None:
    assert id_dtype(vocab_size) is dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


def test_the_same_samples_are_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, samples())
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    reordered = [dict(reversed(sample.items())) for sample in samples()]
    reordered[0]["json"] = dict(reversed(reordered[0]["json"].items()))
    write_tar(tmp_path / "c.tar", reordered)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "c.tar").read_bytes()


def test_a_description_leads_to_every_block(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, samples())
    shard = describe_tar(path, language="en")
    data = path.read_bytes()
    assert (shard.name, shard.bytes, shard.rows, shard.language) == ("a.tar", len(data), 6, "en")
    for block, sample in zip(shard.blocks, samples(), strict=True):
        raw = data[block.offset : block.offset + block.bytes]
        input_ids, cu_seqlens, meta = parse_block(raw, where="here")
        np.testing.assert_array_equal(input_ids, sample["input_ids.npy"])
        np.testing.assert_array_equal(cu_seqlens, sample["cu_seqlens.npy"])
        assert (input_ids.dtype, cu_seqlens.dtype) == (np.uint32, np.int32)
        assert meta == sample["json"]


def test_a_tar_that_is_no_tar_of_blocks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, samples())
    data = path.read_bytes()
    for damaged in (data[:700], b"x" * 2048, data[512:]):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"a\.tar.* is damaged"):
            describe_tar(path)


def test_webdataset_alone_reads_what_the_reader_reads(prepared: tuple[Path, Manifest]) -> None:
    import webdataset

    folder, manifest = prepared
    reader = ShardReader(str(folder))
    assert len(manifest.of_language(None)) > 1
    for language in (None, *manifest.heldout_rows):
        urls = [str(folder / shard.name) for shard in manifest.of_language(language)]
        decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        assert len(decoded) == len(reader.blocks(language)) > 0
        for index, sample in enumerate(decoded):
            input_ids, cu_seqlens = reader.read_block(index, language=language)
            np.testing.assert_array_equal(sample["input_ids.npy"], input_ids)
            np.testing.assert_array_equal(sample["cu_seqlens.npy"], cu_seqlens)
            assert sample["input_ids.npy"].dtype == input_ids.dtype == np.uint16
            assert sample["cu_seqlens.npy"].dtype == cu_seqlens.dtype == np.int32
            assert sample["json"]["rows"] == len(input_ids) == reader.blocks(language)[index].rows
            assert sample["__key__"].startswith("heldout" if language else "train")


def test_only_held_out_shards_are_called_so(prepared: tuple[Path, Manifest]) -> None:
    for shard in prepared[1].shards:
        assert ("heldout" in shard.name) == (shard.language is not None)
        assert shard.language is None or f"-{shard.language}-" in shard.name


def test_a_url_is_read_like_a_folder(copy: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in filter(Path.is_file, copy.iterdir()):
        memory.pipe_file(f"/{copy.name}-in-memory/{path.name}", path.read_bytes())
    local, remote = ShardReader(str(copy)), ShardReader(f"memory://{copy.name}-in-memory")
    assert remote.manifest == local.manifest
    for index in range(len(local.blocks())):
        for one, other in zip(local.read_block(index), remote.read_block(index), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("where", ["missing", "file"])
def test_a_place_without_a_manifest_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.shards=.* has no manifest\.json"):
        ShardReader(str(tmp_path / where))


def test_a_url_that_nothing_opens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.shards=nonsense://x is on no file system"):
        ShardReader("nonsense://x")


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [remove, truncate])
def test_a_shard_that_is_missing_or_cut_is_named_before_training(
    copy: Path, damage: Callable[[Path], None]
) -> None:
    damage(copy / "train-000001.tar")
    with pytest.raises(RunError, match=r"train-000001\.tar"):
        ShardReader(str(copy))


def test_damage_in_a_block_is_named_when_it_is_read(copy: Path) -> None:
    reader = ShardReader(str(copy))
    block = reader.blocks()[2]
    path = copy / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[block.offset + block.bytes // 2] ^= 1
    path.write_bytes(data)
    reader.read_block(1)
    with pytest.raises(RunError, match=rf"train-000000\.tar, block at byte {block.offset}"):
        reader.read_block(2)
    path.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        reader.read_block(0)


# Which manifest


@pytest.fixture
def generations(copy: Path) -> tuple[Path, Manifest, Manifest]:
    """A folder whose manifest was replaced by one of fewer shards, and the older and newer one."""
    older = ShardReader(str(copy))
    newer = dataclasses.replace(older.manifest, shards=older.manifest.shards[1:], rows=7)
    kept = copy / generation(older.digest)
    kept.parent.mkdir()
    kept.write_bytes((copy / "manifest.json").read_bytes())
    publish(copy, newer)
    return copy, older.manifest, newer


def test_a_reader_keeps_to_the_manifest_of_its_digest(
    generations: tuple[Path, Manifest, Manifest],
) -> None:
    folder, older, newer = generations
    digests = {name: json.loads(m.to_json())["digest"] for name, m in (("o", older), ("n", newer))}
    assert generation(digests["o"]) == f"manifests/{digests['o'][:16]}.json"
    for digest, manifest in ((None, newer), (digests["n"], newer), (digests["o"], older)):
        reader = ShardReader(str(folder), digest)
        assert reader.manifest == manifest
        assert reader.digest == json.loads(manifest.to_json())["digest"]


def test_a_digest_that_the_folder_does_not_have_is_refused(
    generations: tuple[Path, Manifest, Manifest],
) -> None:
    with pytest.raises(ConfigError, match=r"holds other shards.*\(abababababababab\).*--allow_ch"):
        ShardReader(str(generations[0]), "ab" * 32)


def test_an_older_manifest_is_checked_like_the_newest(
    generations: tuple[Path, Manifest, Manifest],
) -> None:
    folder, older, newer = generations
    digest = json.loads(older.to_json())["digest"]
    (folder / generation(digest)).write_text(newer.to_json())
    with pytest.raises(RunError, match=r"manifests/.* is the manifest of "):
        ShardReader(str(folder), digest)
    (folder / generation(digest)).write_text(older.to_json().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(RunError, match=r"manifests/.* is damaged: its digest"):
        ShardReader(str(folder), digest)


# When blocks are checked, and which are kept


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("verify", "fails"), [("first_read", [1]), ("always", [0, 1]), ("never", [])]
)
def test_blocks_are_checked_when_they_should_be(copy: Path, verify: Any, fails: list[int]) -> None:
    """Block 0 was read before it was damaged, block 1 was not."""
    reader = ShardReader(str(copy), verify=verify)
    whole = [reader.read_block(0), ShardReader(str(copy)).read_block(1)]
    for index in (0, 1):
        ids, block = whole[index][0], reader.blocks()[index]
        data = (copy / "train-000000.tar").read_bytes()
        flip(copy / "train-000000.tar", data.index(ids.tobytes(), block.offset) + 10)
    for index in (0, 1):
        if index in fails:
            for _ in range(2):  # damage that was found does not count as checked
                with pytest.raises(RunError, match="its CRC does not match"):
                    reader.read_block(index)
        else:
            assert (reader.read_block(index)[0] != whole[index][0]).sum() == 1


def test_a_block_that_ends_early_is_never_taken(copy: Path) -> None:
    reader = ShardReader(str(copy), verify="never")
    path = copy / reader.manifest.shards[0].name
    path.write_bytes(path.read_bytes()[: reader.blocks()[0].bytes - 1])
    with pytest.raises(RunError, match=r"block at byte 0 is damaged: it has \d+ bytes"):
        reader.read_block(0)


class Reads:
    """Counts the ranged reads of a reader's storage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = Storage.read
        self.ranges: list[tuple[str, int | None]] = []

        def read(storage: Storage, name: str, start: int | None = None, *rest: Any) -> bytes:
            if start is not None:
                self.ranges.append((name, start))
            return plain(storage, name, start, *rest)

        monkeypatch.setattr(Storage, "read", read)


@pytest.mark.parametrize("verify", ["first_read", "always", "never"])
def test_a_block_is_fetched_once_by_all_who_share_a_cache(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: Any
) -> None:
    reads, cache = Reads(monkeypatch), BlockCache(tmp_path / "cache", 10**9)
    plain = ShardReader(str(copy))
    expected = [plain.read_sample(index) for index in range(len(plain.blocks()))]
    reads.ranges.clear()
    for number in range(3):
        moved = Path(shutil.copytree(copy, tmp_path / f"moved-{number}"))  # the content counts
        reader = ShardReader(str(moved), verify=verify, cache=cache)
        for index, sample in enumerate(expected):
            got = reader.read_sample(index)
            np.testing.assert_array_equal(got[0], sample[0])
            np.testing.assert_array_equal(got[1], sample[1])
            assert got[2] == sample[2]
    assert len(reads.ranges) == len(set(reads.ranges)) == len(expected)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def alter(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [shorten, alter, empty, remove])
def test_a_damaged_cached_block_is_fetched_again(
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:
    cache = BlockCache(tmp_path / "cache", 10**9)
    expected = ShardReader(str(copy), cache=cache).read_block(0)[0]
    (kept,) = (tmp_path / "cache").glob("*.block")
    whole = kept.read_bytes()
    damage(kept)
    reads = Reads(monkeypatch)
    np.testing.assert_array_equal(ShardReader(str(copy), cache=cache).read_block(0)[0], expected)
    assert len(reads.ranges) == 1
    assert kept.read_bytes() == whole


def test_a_damaged_block_is_not_kept(copy: Path, tmp_path: Path) -> None:
    reader = ShardReader(str(copy), cache=BlockCache(tmp_path / "cache", 10**9))
    flip(copy / "train-000000.tar", reader.blocks()[0].bytes // 2)
    with pytest.raises(RunError, match="its CRC does not match"):
        reader.read_block(0)
    assert not list((tmp_path / "cache").glob("*.block"))


def test_a_manifest_survives_its_json(prepared: tuple[Path, Manifest]) -> None:
    manifest = prepared[1]
    assert Manifest.from_json(manifest.to_json(), where="here") == manifest


@pytest.mark.parametrize("text", ["", "[]", "5", "{}", '{"digest": "0"}', '{"digest": 5, "a": 1}'])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(RunError, match="here is damaged"):
        Manifest.from_json(text, where="here")


def test_a_changed_manifest_is_refused(prepared: tuple[Path, Manifest]) -> None:
    body = json.loads(prepared[1].to_json())
    body["seed"] += 1
    with pytest.raises(RunError, match="digest"):
        Manifest.from_json(json.dumps(body), where="here")


def test_a_manifest_of_another_version_is_refused(
    prepared: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep import shards

    monkeypatch.setattr(shards, "FORMAT_VERSION", 3)
    text = prepared[1].to_json()
    monkeypatch.undo()
    with pytest.raises(RunError, match="format version 3, this reader knows 1 to 2"):
        Manifest.from_json(text, where="here")


def test_publish_replaces_nothing_but_the_manifest_and_keeps_that(copy: Path, digests) -> None:
    before = digests(copy)
    manifest = ShardReader(str(copy)).manifest
    publish(copy, dataclasses.replace(manifest, seed=9))
    after = digests(copy)
    assert after.pop("manifest.json") != before["manifest.json"]
    assert after.pop(generation(manifest.digest)) == before.pop("manifest.json")
    assert after == before


def test_reading_shards_needs_no_writer_and_no_tokenizer() -> None:
    """The reader runs in every training rank: what preparation needs must not come with it."""
    program = (
        "import sys, data_prep.shards\n"
        "print([m for m in ('torch', 'transformers', 'webdataset', 'mpi4py') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=True, cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.stdout.strip() == "[]"
