"""The recipe as preparation reads it: its own section, the seed and the teacher's name."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, Literal

from data_prep.command import ConfigError

MAX_BLOCK_TOKENS = 2**31 - 1
MAX_SEED = 2**64  # and beyond


@dataclasses.dataclass(frozen=True)
class Pool:
    """Inputs that one weight holds for.

    Args:
        glob: of `prep.source_weights`; "" stands for the inputs that none names.
        weight: factor on their share of each language.
    """

    glob: str
    weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prep:
    """How raw text becomes shards.

    Args:
        input: paths, globs and URLs of text; docs/inputs.md says of which kinds.
        output_dir: folder that the shards and manifest.json are written to.
        tokenizer: hub id or folder of the tokenizer; null is the teacher's own.
        seq_len: token ids in a row.
        text_key: JSON key of a document's text.
        lang_key: JSON key of its language; the file name's stem where it is absent.
        smoothing: languages are mixed by p ~ tokens ** smoothing; 1 keeps the natural shares.
        heldout_rows: rows of each language set apart for the held-out loss; 0 is none.
        rows_per_block: rows in one WebDataset sample, the unit that training shuffles.
        blocks_per_shard: samples in one tar file.
        on_error: `report` counts and lists what cannot be read and goes on; `stop` stops there.
        min_chars: shorter documents are dropped; 1 drops none.
        max_repetition: documents that repeat themselves more are dropped, see
            `data_prep.clean.repetition`; 1 drops none.
        check_language: drop documents that are in another language than their label says.
        dedup_lines: drop lines that stand in the corpus before.
        near_duplicates: Jaccard similarity from which documents count as the same; null is none.
        exclude: globs of evaluation files, whose text must not be trained on.
        exclude_ngram: words in a row that mark a document as overlapping with such a file.
        weights: language -> factor on its share; 0 leaves it out.
        source_weights: glob of inputs -> factor on their share of each language; 0 leaves them out.
        max_repeats: a document is in the rows this many times at most.
        max_tokens: tokens to train on, frames included; null is as many as the text has.
    """

    input: list[str] = dataclasses.field(default_factory=list)
    output_dir: str | None = None
    tokenizer: str | None = None
    seq_len: int = 512
    text_key: str = "text"
    lang_key: str = "lang"
    smoothing: float = 0.3
    heldout_rows: int = 0
    rows_per_block: int = 256
    blocks_per_shard: int = 256
    on_error: Literal["report", "stop"] = "report"
    min_chars: int = 1
    max_repetition: float = 1.0
    check_language: bool = False
    dedup_lines: bool = False
    near_duplicates: float | None = None
    exclude: list[str] = dataclasses.field(default_factory=list)
    exclude_ngram: int = 13
    weights: dict[str, float] | None = None
    source_weights: dict[str, float] | None = None
    max_repeats: float = 10.0
    max_tokens: int | None = None

    @property
    def pools(self) -> list[Pool]:
        """The inputs by their weights, the largest first; at least the one of all others."""
        found = [Pool(glob, weight) for glob, weight in (self.source_weights or {}).items()]
        return sorted([*found, Pool("", 1.0)], key=lambda pool: (-pool.weight, pool.glob))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepRecipe:
    """A training recipe read for preparation: sections that it does not use stay unread.

    Args:
        seed: decides the order of rows and which documents are held out.
        prep: how raw text becomes shards.
        teacher: only `model` matters here, where prep.tokenizer is null.
        output_dir: of the training run; unused.
        student: unused.
        objective: unused.
        data: unused.
        train: unused.
        watch: unused.
        students: unused.
    """

    seed: int = 1
    prep: Prep = dataclasses.field(default_factory=Prep)
    teacher: dict[str, Any] | None = None
    output_dir: str | None = None
    student: dict[str, Any] | None = None
    objective: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    watch: dict[str, Any] | None = None
    students: list[Any] | None = None

    @property
    def tokenizer(self) -> str:
        """Hub id or folder that the tokenizer is loaded from."""
        source = self.prep.tokenizer or (self.teacher or {}).get("model")
        if not source:
            raise ConfigError(
                "prep.tokenizer and teacher.model are both null, so there is nothing to tokenise "
                "with; set one of them to a hub id or a folder"
            )
        return str(source)


def check_prep(prep: Prep) -> None:
    """Refuse settings that cannot work before anything is read.

    Raises:
        ConfigError: naming the key, its value, the rule and the remedy.
    """
    if not prep.input:
        raise ConfigError(
            "prep.input is empty, so there is no text to prepare; give one or more globs, "
            "for example --prep.input '[data/*.jsonl.gz]'"
        )
    if not prep.output_dir:
        raise ConfigError(
            "prep.output_dir is null, so there is nowhere to write shards; set it to a folder"
        )
    if os.path.exists(prep.output_dir) and not os.path.isdir(prep.output_dir):
        raise ConfigError(
            f"prep.output_dir={prep.output_dir} is a file, and shards need a folder; name another"
        )
    for key, least in (
        ("seq_len", 8),
        ("rows_per_block", 1),
        ("blocks_per_shard", 1),
        ("heldout_rows", 0),
        ("max_repeats", 1),
        ("min_chars", 1),
        ("exclude_ngram", 5),
    ):
        if not getattr(prep, key) >= least:  # nor is what is no number
            raise ConfigError(
                f"prep.{key}={getattr(prep, key)} is below {least}; use {least} or more"
            )
    if prep.rows_per_block * prep.seq_len > MAX_BLOCK_TOKENS:
        raise ConfigError(
            f"prep.rows_per_block={prep.rows_per_block} rows of prep.seq_len={prep.seq_len} are "
            f"more tokens than int32 boundaries can count ({MAX_BLOCK_TOKENS}); use fewer rows"
        )
    if not 0.0 <= prep.smoothing <= 1.0:
        raise ConfigError(
            f"prep.smoothing={prep.smoothing} is outside 0..1, so rare languages would get less "
            "than their natural share or common ones none; use 0.3 (usual) to 1 (as found)"
        )
    for key in ("weights", "source_weights"):
        for name, weight in (getattr(prep, key) or {}).items():
            if not 0.0 <= weight < math.inf:
                raise ConfigError(
                    f"prep.{key}.{name}={weight} is no factor on a share; use 0 (none of it) or "
                    "more"
                )
    if prep.max_tokens is not None and prep.max_tokens < prep.seq_len:
        raise ConfigError(
            f"prep.max_tokens={prep.max_tokens} does not fill a row of prep.seq_len="
            f"{prep.seq_len}; use more, or null for as many as the text has"
        )
    if not 0.0 <= prep.max_repetition <= 1.0:
        raise ConfigError(
            f"prep.max_repetition={prep.max_repetition} is outside 0..1, the range of what it "
            "limits; use 0.3 (usual) or 1 (drops nothing)"
        )
    if prep.near_duplicates is not None and not 0.0 < prep.near_duplicates <= 1.0:
        raise ConfigError(
            f"prep.near_duplicates={prep.near_duplicates} is no similarity above 0 and up to 1; "
            "use 0.8 (usual) or null (drops nothing)"
        )


def check_prep_recipe(recipe: PrepRecipe) -> None:
    """As `check_prep`, and what preparation needs of the rest of the recipe.

    Raises:
        ConfigError: naming the key, its value, the rule and the remedy.
    """
    check_prep(recipe.prep)
    if not 0 <= recipe.seed < MAX_SEED:
        raise ConfigError(
            f"seed={recipe.seed} is outside 0..2**64 - 1, so it is no key for the digests that the "
            "order of documents follows; use one within"
        )
    _ = recipe.tokenizer  # raises where there is none
