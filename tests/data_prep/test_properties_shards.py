"""Manifests and blocks by whoever: read as they stand, or refused by what is wrong with them.

Digests and checksums are right in all of these, since whoever makes shards makes them too.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.command import RunError
from data_prep.shards import Manifest, ShardReader, describe_tar, parse_block, write_tar

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 70),
    st.floats(allow_nan=False),
    st.sampled_from(["", "en", "../x.tar", "/etc/passwd", "a\0b", "train-000000.tar", "5"]),
    st.lists(st.integers(-1, 3), max_size=2),
    st.dictionaries(st.sampled_from(["en", "cls", "sep", "pad"]), st.integers(-1, 5)),
)


def signed(body: dict[str, Any]) -> str:
    """A manifest of this body with a digest that fits."""
    body = {key: value for key, value in body.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "digest": digest})


def test_a_manifest_that_is_signed_anew_is_itself(prepared: tuple[Path, Manifest]) -> None:
    manifest = prepared[1]
    assert Manifest.from_json(signed(json.loads(manifest.to_json())), where="here") == manifest


@settings(derandomize=True, deadline=None, max_examples=400)
@given(data=st.data())
def test_a_mutated_manifest_is_read_as_it_stands_or_refused_by_its_key(
    data: st.DataObject, prepared: tuple[Path, Manifest]
) -> None:
    body = copy.deepcopy(json.loads(prepared[1].to_json()))
    place = data.draw(st.sampled_from(["", "shard", "block", "special_ids", "tokens"]))
    target = {
        "": body,
        "shard": body["shards"][0],
        "block": body["shards"][0]["blocks"][1],
        "special_ids": body["special_ids"],
        "tokens": body["tokens"],
    }[place]
    key = data.draw(
        st.one_of(
            st.sampled_from(sorted(target.keys() - {"digest"})), st.sampled_from(["x", "own"])
        )
    )
    if key in target and data.draw(st.integers(0, 3)) == 0:
        del target[key]
    else:
        target[key] = data.draw(VALUES)
    refusal = ""
    try:
        manifest = Manifest.from_json(signed(body), where="here/manifest.json")
    except RunError as error:
        refusal = str(error)
    if refusal:
        named = key.replace("_", " ") in refusal or key in refusal
        assert named or place in refusal or "shards" in refusal, refusal
    else:
        read = json.loads(manifest.to_json())
        defaults = {"tokenizer", "generation", "segment_lengths", "sources"}
        for name, value in body.items():
            assert name in ("digest", "format_version") or read[name] == value, name
        assert read.keys() - body.keys() <= defaults
        assert all("/" not in shard.name for shard in manifest.shards)


def member(name: str, data: bytes, **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    return info, data


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def npy(array: Any, **header: Any) -> bytes:
    stream = io.BytesIO()
    if header:
        np.lib.format.write_array_header_1_0(stream, header)
        return stream.getvalue() + np.asarray(array).tobytes()
    np.lib.format.write_array(stream, np.asarray(array), version=(1, 0), allow_pickle=True)
    return stream.getvalue()


IDS, BOUNDS = npy(np.zeros((2, 4), np.uint16)), npy(np.array([0, 4, 8], np.int32))
HUGE = npy([0], descr="<u2", fortran_order=False, shape=(2**31, 2**31))


@pytest.mark.parametrize(
    "raw",
    [
        tar_of(member("k.input_ids.npy", IDS), member("k.cu_seqlens.npy", BOUNDS)),
        tar_of(
            member("k.input_ids.npy", HUGE),
            member("k.cu_seqlens.npy", BOUNDS),
            member("k.json", b"{}"),
        ),
        tar_of(
            member("k.input_ids.npy", npy(np.array([print], object))),
            member("k.cu_seqlens.npy", BOUNDS),
            member("k.json", b"{}"),
        ),
        tar_of(
            member("k.input_ids.npy", IDS),
            member("k.cu_seqlens.npy", b"\x93NUMPY\x01\x00\xff\xff"),
            member("k.json", b"{}"),
        ),
        tar_of(
            member("k.input_ids.npy", IDS),
            member("k.cu_seqlens.npy", BOUNDS),
            member("k.json", b"[" * 100_000),
        ),
        tar_of(
            member("k.input_ids.npy", IDS),
            member("k.cu_seqlens.npy", BOUNDS),
            member("k.json", b"[]"),
        ),
        tar_of(
            member("k.input_ids.npy", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            member("k.cu_seqlens.npy", BOUNDS),
            member("k.json", b"{}"),
        ),
        tar_of(
            member("k.input_ids.npy", b"", type=tarfile.LNKTYPE, linkname="k.cu_seqlens.npy"),
            member("k.cu_seqlens.npy", BOUNDS),
            member("k.json", b"{}"),
        ),
        tar_of(
            member(
                "k.input_ids.npy",
                IDS,
                pax_headers={
                    "GNU.sparse.major": "0",
                    "GNU.sparse.minor": "1",
                    "GNU.sparse.size": str(2**40),
                    "GNU.sparse.map": f"0,{len(IDS)}",
                },
            ),
            member("k.cu_seqlens.npy", BOUNDS),
            member("k.json", b"{}"),
        ),
        b"",
        b"\x1f\x8b" + bytes(2000),
    ],
    ids=["no-json", "huge", "pickle", "no-header", "deep", "list", "symlink", "hardlink",
         "sparse", "empty", "gzip"],
)  # fmt: skip
def test_a_block_that_is_none_is_refused_and_takes_no_memory(raw: bytes) -> None:
    with pytest.raises(RunError, match=r"here is damaged"):
        parse_block(raw, where="here")


def bounds(*edges: int) -> Callable[[dict[str, Any]], None]:
    return lambda sample: sample.update({"cu_seqlens.npy": np.array(edges, np.int32)})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (bounds(0, 10**6, 128), "increase"),
        (bounds(0, -5, 128), "increase"),
        (bounds(0, 64), "increase"),
        (bounds(-64, 64, 128), "increase"),
        (bounds(0, 0, 128), "increase"),
        (bounds(0), "cu_seqlens are"),
        (lambda s: s.update({"cu_seqlens.npy": np.array([0, 64, 128])}), "cu_seqlens are int64"),
        (lambda s: s["input_ids.npy"].fill(65_000), "id 65000 is outside"),
        (lambda s: s.update({"input_ids.npy": np.zeros((2, 64), np.int16)}), "ids are int16"),
        (lambda s: s.update({"input_ids.npy": np.zeros((4, 32), np.uint16)}), r"\(4, 32\)"),
        (lambda s: s.update({"json": {"segment_languages": ["en"]}}), "languages"),
    ],
)
def test_a_block_whose_checksums_fit_but_not_its_layout_is_never_trained_on(
    change: Callable[[dict[str, Any]], object],
    named: str,
    prepared: tuple[Path, Manifest],
    tmp_path: Path,
) -> None:
    """Kernels would read beyond their arrays by such boundaries and ids."""
    sample: dict[str, Any] = {
        "__key__": "k",
        "input_ids.npy": np.zeros((2, 64), np.uint16),
        "cu_seqlens.npy": np.array([0, 64, 128], np.int32),
        "json": {},
    }
    for attempt in ("as it was", "changed"):
        write_tar(tmp_path / "train-000000.tar", [sample])
        shard = describe_tar(tmp_path / "train-000000.tar")
        body = json.loads(prepared[1].to_json())
        blocks = [{"offset": 0, "bytes": shard.blocks[0].bytes, "rows": 2,
                   "crc32": shard.blocks[0].crc32}]  # fmt: skip
        body["shards"] = [{"name": shard.name, "bytes": shard.bytes, "sha256": shard.sha256,
                           "rows": 2, "language": None, "blocks": blocks}]  # fmt: skip
        (tmp_path / "manifest.json").write_text(signed(body))
        if attempt == "as it was":
            assert ShardReader(str(tmp_path)).read_block(0)[0].shape == (2, 64)
            change(sample)
            continue
        with pytest.raises(RunError, match=rf"train-000000\.tar, block at byte 0.*{named}"):
            ShardReader(str(tmp_path)).read_block(0)
