"""The tokens of a student that knows only those its text uses.

Most of a small multilingual student are embeddings of tokens, and most of these its corpus never
uses. Which are kept is decided by how often the training shards hold them, and by what the trimmed
tokenizer needs (see trimmed_tokenizer.py).
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from data_prep.command import ConfigError
from data_prep.durable import durable_write
from data_prep.shards import ShardReader
from pipeline.collectives import agree, all_sum, copy_from_rank_0, on_rank_0
from pipeline.config import Recipe
from pipeline.models import load_tokenizer
from pipeline.topology import Topology
from pipeline.trimmed_tokenizer import kept_ids

COUNTS = "vocabulary.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens that a student keeps.

    Args:
        kept: [tokens] int64, their ids in the teacher's tokenizer, ascending; a token's place here
            is its id in the student's.
        num_ids: ids of the teacher's tokenizer.
        unk_id: the teacher's id of the unknown token.
        num_counted: tokens of the text that was counted.
        num_covered: those of them that are kept.
    """

    kept: torch.Tensor
    num_ids: int
    unk_id: int
    num_counted: int
    num_covered: int

    def new_ids(self) -> torch.Tensor:
        """[num_ids] int64: each id's new one; the student reads a dropped token as unknown."""
        new = torch.zeros(self.num_ids, dtype=torch.int64)
        new[self.kept] = torch.arange(len(self.kept))
        is_dropped = torch.ones(self.num_ids, dtype=torch.bool)
        is_dropped[self.kept] = False
        new[is_dropped] = new[self.unk_id].clone()
        return new

    def facts(self, num_parameters: int, num_rows: int, width: int) -> dict[str, int | float]:
        """What is kept and saved.

        Args:
            num_parameters: of the whole student with all of the teacher's tokens.
            num_rows: of its embedding.
            width: of its embedding.
        """
        saved = (num_rows - len(self.kept)) * width
        return {
            "tokens": self.num_ids,
            "tokens_kept": len(self.kept),
            "coverage_percent": 100 * self.num_covered / max(1, self.num_counted),
            "parameters": num_parameters - saved,
            "parameters_saved": saved,
            "parameters_saved_percent": 100 * saved / num_parameters,
        }


def in_words(facts: Mapping[str, int | float]) -> str:
    """`Vocabulary.facts` in one line."""
    return (
        f"{facts['tokens_kept']:,} of {facts['tokens']:,} tokens kept, "
        f"{facts['coverage_percent']:.3f}% of those in the text; {facts['parameters']:,} "
        f"parameters, {facts['parameters_saved']:,} ({facts['parameters_saved_percent']:.1f}%) "
        "fewer than with all"
    )


def choose_vocabulary(
    recipe: Recipe,
    reader: ShardReader,
    shards_digest: str,
    topology: Topology,
    device: torch.device,
) -> Vocabulary | None:
    """The student's tokens, the same on every rank; None where it keeps all of the teacher's.

    Args:
        recipe: its `student.vocabulary` keys; occurrences are kept in `output_dir`, so that a
            resumed run need not count again.
        reader: of the training shards.
        shards_digest: of what they hold.
        topology: ranks, which share the counting.
        device: that ranks exchange tensors by.

    Raises:
        ConfigError: the shards do not tell the languages, or the tokenizer cannot be trimmed.
        RunError: a shard is damaged.
    """
    student = recipe.student
    if student.vocabulary == "full":
        return None
    languages = sorted(set(student.vocabulary_languages))
    on_rank_0(lambda: check_languages(reader, languages))
    path, key = Path(recipe.output_dir) / COUNTS, json.dumps([shards_digest, languages])
    counts = torch.zeros(reader.manifest.vocab_size, dtype=torch.int64)
    if on_rank_0(lambda: _read_counts(path, key, counts)):
        copy_from_rank_0([counts], device)
    else:
        blocks = range(topology.rank, len(reader.blocks()), topology.world_size)
        agree(lambda: count_tokens(reader, blocks, languages, counts))
        counts = all_sum(counts.to(device)).cpu()
        on_rank_0(lambda: _write_counts(path, key, counts))
    is_kept = torch.zeros(len(counts), dtype=torch.uint8)
    unk_id = torch.zeros(1, dtype=torch.int64)

    def choose() -> None:
        tokenizer = load_tokenizer(recipe.tokenizer)
        is_seen = counts.numpy() >= student.vocabulary_min_count
        is_kept[torch.from_numpy(kept_ids(tokenizer, is_seen))] = 1
        unk_id.fill_(tokenizer.unk_token_id)

    on_rank_0(choose)
    copy_from_rank_0([is_kept, unk_id], device)
    kept = is_kept.nonzero().squeeze(1)
    return Vocabulary(
        kept=kept,
        num_ids=len(counts),
        unk_id=int(unk_id),
        num_counted=int(counts.sum()),
        num_covered=int(counts[kept].sum()),
    )


def check_languages(reader: ShardReader, languages: Collection[str]) -> None:
    """Refuse languages that cannot be counted.

    Raises:
        ConfigError: the shards have no such language, or do not say where it is.
    """
    known = reader.manifest.tokens
    for language in languages:
        if language not in known:
            raise ConfigError(
                f"student.vocabulary_languages has {language!r}, of which data.shards="
                f"{reader.url} hold nothing; use some of {', '.join(sorted(known))}"
            )
    if languages and "segment_languages" not in reader.read_sample(0)[2]:
        raise ConfigError(
            f"data.shards={reader.url} do not say which language each segment is in, so "
            "student.vocabulary=languages cannot count; prepare them again into another folder, "
            "or use student.vocabulary=corpus"
        )


def count_tokens(
    reader: ShardReader, blocks: Iterable[int], languages: Collection[str], counts: torch.Tensor
) -> None:
    """Add to `counts` how often each id occurs in training blocks; padding is not counted.

    Args:
        reader: of the shards.
        blocks: their numbers.
        languages: whose segments count; empty is all.
        counts: [ids] int64.
    """
    pad_id = reader.manifest.special_ids["pad"]
    for block in blocks:
        input_ids, cu_seqlens, meta = reader.read_sample(block)
        ids = input_ids.reshape(-1)
        if languages:
            is_wanted = [language in languages for language in meta["segment_languages"]]
            ids = ids[np.repeat(is_wanted, np.diff(cu_seqlens))]
        counts += torch.from_numpy(np.bincount(ids, minlength=len(counts)))
    counts[pad_id] = 0


def _read_counts(path: Path, key: str, counts: torch.Tensor) -> bool:
    """Fill `counts` from the file, if it holds what `key` names."""
    try:
        with np.load(path) as saved:
            if str(saved["key"]) != key:
                return False
            counts.copy_(torch.from_numpy(saved["counts"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # none, or damaged: count anew
        return False
    return True


def _write_counts(path: Path, key: str, counts: torch.Tensor) -> None:
    with durable_write(path) as stream:
        np.savez(stream, key=np.array(key), counts=counts.numpy())
