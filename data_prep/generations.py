"""Adding to finished shards: what a new generation takes over from the one before.

A generation is a manifest. A later one lists the earlier shards and its own; the earlier manifest
stays as manifests/DIGEST.json, so that a training that began with it goes on with it. Two things
are taken over: the digests of all documents, so that none comes in twice, and the rows of the last
short block, so that all blocks but the last are whole.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.command import ConfigError
from data_prep.config import PrepRecipe
from data_prep.container import Container, write_container
from data_prep.exchange import KEY
from data_prep.pack import FRAME
from data_prep.plan import Rows
from data_prep.shards import MANIFEST, Manifest, Shard, ShardReader
from data_prep.tokenizer import Tokenizer
from data_prep.tokens import TokenFiles

INDEX = "index"  # folder of all documents' digests, a file a generation


@dataclasses.dataclass(frozen=True)
class Base:
    """The generation that is added to.

    Args:
        manifest: its manifest.
        digest: that the manifest has of itself.
        short: its last training shard, where that is a short block: its rows are taken over.
    """

    manifest: Manifest
    digest: str
    short: Shard | None

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Those that stay."""
        return tuple(shard for shard in self.manifest.shards if shard is not self.short)

    @property
    def next_shard(self) -> int:
        """Number of the first new training shard."""
        return 1 + max(_number(shard) for shard in self.manifest.of_language(None))


def _number(shard: Shard) -> int:
    return int(shard.name.removesuffix(".tar").rpartition("-")[2])


def load_base(folder: Path, recipe: PrepRecipe, tokenizer: Tokenizer) -> Base:
    """The generation in the folder, which the recipe's text is to be added to.

    Raises:
        ConfigError: there is none, or the recipe's rows would not go with its rows.
        RunError: its manifest is damaged, or a shard is missing or cut.
    """
    if not (folder / MANIFEST).exists():
        raise ConfigError(
            f"prep.output_dir={folder} has no {MANIFEST}, so there is nothing to append to; "
            "prepare it without --append first"
        )
    manifest = ShardReader(str(folder)).manifest
    if not (folder / INDEX).is_dir():
        raise ConfigError(
            f"prep.output_dir={folder} has no folder {INDEX!r} with its documents' digests, so "
            "texts could come in twice; prepare all text anew in another folder"
        )
    blocks = [block for shard in manifest.of_language(None) for block in shard.blocks]
    for key, here, wanted in (
        ("prep.seq_len", manifest.seq_len, recipe.prep.seq_len),
        ("seed", manifest.seed, recipe.seed),
        ("prep.tokenizer's fingerprint", manifest.tokenizer_fingerprint, tokenizer.fingerprint),
        ("prep.rows_per_block", blocks[0].rows if len(blocks) > 1 else None,
         recipe.prep.rows_per_block),
    ):  # fmt: skip
        if here is not None and here != wanted:
            raise ConfigError(
                f"{key} is {here} in {folder} and {wanted} now, so new rows would not go with the "
                "old ones; use the same, or another folder"
            )
    last = manifest.of_language(None)[-1]
    is_short = last.blocks[-1].rows < recipe.prep.rows_per_block
    return Base(manifest, manifest.digest, last if is_short else None)


def known_documents(
    folder: Path, base: Base | None, partition: int, of: int
) -> npt.NDArray[np.void]:
    """Sorted KEY records of a partition's documents that are in earlier generations."""
    found = [np.zeros(0, KEY)]
    for generation in range(1, base.manifest.generation + 1 if base else 1):
        file = Container(_index_path(folder, generation))
        keys = file.map("keys")
        step = (1 << 64) // of
        edges = np.array([partition * step, (partition + 1) * step - 1], dtype="<u8")
        start = int(np.searchsorted(keys["hi"], edges[0], side="left"))
        stop = int(np.searchsorted(keys["hi"], edges[1], side="right"))
        found.append(file.read("keys", start, stop))
    return np.sort(np.concatenate(found))


def _index_path(folder: Path, generation: int) -> Path:
    return folder / INDEX / f"documents-{generation:06d}"


def finish_index(folder: Path, generation: int, files: TokenFiles) -> None:
    """Write the digests of all documents of a generation, sorted."""
    path = _index_path(folder, generation)
    path.parent.mkdir(exist_ok=True)
    with write_container(path) as writer:
        writer.append("keys", np.zeros(0, KEY))
        for partition in range(len(files)):
            table = files.documents(partition)
            writer.append("keys", np.sort(table[["hi", "lo"]].astype(KEY)))


def carry_rows(
    folder: Path, base: Base, tokens_file: Path, rows_file: Path, languages: Sequence[str], at: int
) -> None:
    """The rows of the base's short block as files like those of new rows.

    Args:
        folder: of the shards.
        base: with a short shard.
        tokens_file: gets the ids.
        rows_file: gets the rows.
        languages: all of them, sorted.
        at: number of the partition that the ids are in.
    """
    reader = ShardReader(str(folder))
    index = len(reader.blocks()) - 1
    input_ids, cu_seqlens, meta = reader.read_sample(index)
    rows: list[list[tuple[int, int, int, int]]] = [[] for _ in input_ids]
    for (start, stop), language in zip(
        itertools.pairwise(cu_seqlens.tolist()), meta["segment_languages"], strict=True
    ):
        if language is not None:
            row = rows[start // input_ids.shape[1]]
            row.append((at, languages.index(language), stop - start - FRAME, start + 1))
    with write_container(tokens_file) as writer:
        writer.append("tokens", input_ids.reshape(-1))
    with write_container(rows_file) as writer:
        Rows.of(rows).write(writer)
