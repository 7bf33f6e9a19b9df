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

from data_prep.command import ConfigError, RunError
from data_prep.shards import (
    Manifest,
    ShardReader,
    describe_tar,
    id_dtype,
    parse_block,
    publish,
    write_tar,
)


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
    for path in copy.iterdir():
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

    monkeypatch.setattr(shards, "FORMAT_VERSION", 2)
    text = prepared[1].to_json()
    monkeypatch.undo()
    with pytest.raises(RunError, match="format version 2, this reader knows 1"):
        Manifest.from_json(text, where="here")


def test_publish_replaces_nothing_but_the_manifest(copy: Path, digests) -> None:
    before = digests(copy)
    _, manifest = copy, ShardReader(str(copy)).manifest
    publish(copy, dataclasses.replace(manifest, seed=9))
    after = digests(copy)
    assert after.pop("manifest.json") != before.pop("manifest.json")
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
