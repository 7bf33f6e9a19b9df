from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.command import ConfigError
from data_prep.shards import Manifest, ShardReader, describe_tar, parse_block, publish, write_tar
from data_prep.verify import find_faults, main


@pytest.fixture
def copy(prepared: tuple[Path, Manifest], tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared[0], tmp_path / "copy"))


def test_what_was_prepared_has_no_fault(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(copy)]) == 0
    assert "everything is as it was written" in capsys.readouterr().out


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no manifest\.json"):
        main([str(tmp_path)])


def flip(path: Path, index: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[index] ^= 1 << bit
    path.write_bytes(data)


def test_any_flipped_bit_of_the_manifest_is_found(copy: Path) -> None:
    path = copy / "manifest.json"
    data = path.read_bytes()
    random_ = random.Random(1)
    for _ in range(200):
        index, bit = random_.randrange(len(data)), random_.randrange(8)
        flip(path, index, bit)
        assert list(find_faults(copy)), f"bit {bit} of byte {index}"
        path.write_bytes(data)


def test_any_flipped_bit_of_a_shard_is_found(copy: Path) -> None:
    path = copy / "train-000001.tar"
    data = path.read_bytes()
    random_ = random.Random(1)
    for _ in range(10):
        index, bit = random_.randrange(len(data)), random_.randrange(8)
        flip(path, index, bit)
        faults = list(find_faults(copy))
        assert any("train-000001.tar" in fault for fault in faults), f"bit {bit} of byte {index}"
        path.write_bytes(data)


def test_a_flipped_bit_is_found_in_its_block(copy: Path) -> None:
    reader = ShardReader(str(copy))
    block = reader.blocks()[3]
    flip(copy / "train-000000.tar", block.offset + block.bytes // 2)
    faults = list(find_faults(copy))
    assert any(f"block 3 at byte {block.offset}: its CRC is not" in fault for fault in faults)
    assert not any("block 2" in fault or "train-000001" in fault for fault in faults)


def truncate(folder: Path) -> None:
    path = folder / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-1])


def remove(folder: Path) -> None:
    (folder / "heldout-sw-000000.tar").unlink()


def add(folder: Path) -> None:
    shutil.copy(folder / "train-000000.tar", folder / "train-000009.tar")


def leave_a_partial(folder: Path) -> None:
    (folder / "train-000009.tar.partial").touch()


def swap(folder: Path) -> None:
    one, other = folder / "heldout-sw-000000.tar", folder / "heldout-en-000000.tar"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, ["train-000000.tar: ", "bytes, the manifest says"]),
        (remove, ["heldout-sw-000000.tar: cannot be read (No such file or directory)"]),
        (add, ["train-000009.tar: not in the manifest"]),
        (leave_a_partial, ["train-000009.tar.partial: not in the manifest"]),
        (swap, ["heldout-sw-000000.tar: its sha256", "heldout-en-000000.tar: its sha256"]),
    ],
)
def test_damage_is_named_and_the_status_is_1(
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    named: list[str],
) -> None:
    damage(copy)
    assert main([str(copy)]) == 1
    said = capsys.readouterr().err
    assert all(part in said for part in named)


def rewrite_first_shard(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Shards that agree with their checksums but break the format: a faulty writer's."""
    reader = ShardReader(str(folder))
    path = folder / "train-000000.tar"
    data = path.read_bytes()
    samples = []
    for number, block in enumerate(reader.manifest.shards[0].blocks):
        raw = data[block.offset : block.offset + block.bytes]
        input_ids, cu_seqlens, meta = parse_block(raw, where="here")
        sample = {
            "__key__": f"train-000000-{number}",
            "input_ids.npy": input_ids,
            "cu_seqlens.npy": cu_seqlens,
            "json": meta,
        }
        if number == 1:
            change(sample)
        samples.append(sample)
    write_tar(path, samples)
    shards = (describe_tar(path), *reader.manifest.shards[1:])
    publish(folder, dataclasses.replace(reader.manifest, shards=shards))


def outside_vocabulary(sample: dict[str, Any]) -> None:
    sample["input_ids.npy"][0, 1] = 16_000


def without_frame(sample: dict[str, Any]) -> None:
    sample["input_ids.npy"][0, 0] = 77


def wide_ids(sample: dict[str, Any]) -> None:
    sample["input_ids.npy"] = sample["input_ids.npy"].astype(np.uint32)


def shorter_rows(sample: dict[str, Any]) -> None:
    sample["input_ids.npy"] = sample["input_ids.npy"].reshape(-1, 32)


def repeated_boundary(sample: dict[str, Any]) -> None:
    bounds = sample["cu_seqlens.npy"]
    sample["cu_seqlens.npy"] = np.insert(bounds, 2, bounds[2])


def late_start(sample: dict[str, Any]) -> None:
    sample["cu_seqlens.npy"] = sample["cu_seqlens.npy"][1:]


def no_boundaries(sample: dict[str, Any]) -> None:
    sample["cu_seqlens.npy"] = sample["cu_seqlens.npy"][:0]


def across_rows(sample: dict[str, Any]) -> None:
    bounds = sample["cu_seqlens.npy"]
    sample["cu_seqlens.npy"] = bounds[bounds != 64]


def miscounted(sample: dict[str, Any]) -> None:
    sample["json"]["tokens"]["en"] = sample["json"]["tokens"].get("en", 0) + 1


def wrong_rows(sample: dict[str, Any]) -> None:
    sample["json"]["rows"] += 1


def wrong_language(sample: dict[str, Any]) -> None:
    languages = sample["json"]["segment_languages"]
    languages[0] = next(name for name in languages if name not in (None, languages[0]))


def missing_language(sample: dict[str, Any]) -> None:
    sample["json"]["segment_languages"].pop()


def more_languages(sample: dict[str, Any]) -> None:
    sample["json"]["segment_languages"].append(None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (outside_vocabulary, "id 16000 is outside the vocabulary"),
        (without_frame, "neither framed"),
        (wide_ids, "ids are uint32"),
        (shorter_rows, "shape (16, 32), not (16, 64)"),
        (repeated_boundary, "not strictly increasing"),
        (late_start, "not int32 from 0"),
        (no_boundaries, "not int32 from 0"),
        (across_rows, "crosses the end of a row"),
        (miscounted, "miscounts tokens"),
        (wrong_rows, "its JSON says 9 rows, not 8"),
        (wrong_language, "languages of segments do not add up"),
        (missing_language, "languages of segments do not add up"),
        (more_languages, "languages of segments do not add up"),
    ],
)
def test_what_a_faulty_writer_wrote_is_found(
    copy: Path, change: Callable[[dict[str, Any]], None], named: str
) -> None:
    rewrite_first_shard(copy, lambda sample: None)
    assert not list(find_faults(copy))
    rewrite_first_shard(copy, change)
    faults = list(find_faults(copy))
    assert any(named in fault and "train-000000.tar, block 1" in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: {"rows": m.rows + 1}, "rows do not add up"),
        (lambda m: {"heldout_rows": {**m.heldout_rows, "en": 1}}, "rows do not add up"),
        (lambda m: {"tokens": {**m.tokens, "en": 1}}, "tokens do not add up"),
        (lambda m: {"shards": m.shards[1:]}, "train-000000.tar: not in the manifest"),
        (lambda m: {"seq_len": 32}, "shape"),
    ],
)
def test_a_manifest_that_does_not_add_up_is_found(
    copy: Path, change: Callable[[Manifest], dict[str, Any]], named: str
) -> None:
    manifest = ShardReader(str(copy)).manifest
    (copy / "manifest.json").unlink()  # no earlier generation
    publish(copy, dataclasses.replace(manifest, **change(manifest)))
    assert any(named in fault for fault in find_faults(copy))


def test_blocks_that_do_not_lie_end_to_end_are_found(copy: Path) -> None:
    manifest = ShardReader(str(copy)).manifest
    first = manifest.shards[0]
    blocks = (first.blocks[1], first.blocks[0], *first.blocks[2:])
    shards = (dataclasses.replace(first, blocks=blocks), *manifest.shards[1:])
    publish(copy, dataclasses.replace(manifest, shards=shards))
    assert any("end to end" in fault for fault in find_faults(copy))


def test_exit_statuses_through_the_command_line(command, copy: Path, tmp_path: Path) -> None:
    assert command("data_prep.verify", str(copy)).returncode == 0
    truncate(copy)
    damaged = command("data_prep.verify", str(copy))
    assert damaged.returncode == 1
    assert "train-000000.tar" in damaged.stderr
    assert "Traceback" not in damaged.stderr
    refused = command("data_prep.verify", str(tmp_path / "nowhere"))
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
