"""`python -m data_prep.build_shards --config RECIPE`, alone or under `mpirun -n P`.

Three passes, each restartable: every input file is read, cleaned, tokenised and spilled (one unit
of work a file); the plan of rows is computed from the documents' lengths alone; every shard is
written from the spills. Units belong to ranks, bytes do not: the shards are the same for any P.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data_prep.claim import WORK, close_work, is_prepared, locked, open_work
from data_prep.command import (
    EXIT_FAILED,
    EXIT_FINISHED,
    ConfigError,
    ElsewhereError,
    RunError,
    parse_recipe,
    print_traceback,
    run_command,
)
from data_prep.config import Prep, PrepRecipe, check_prep_recipe
from data_prep.documents import find_inputs
from data_prep.pack import FRAME, Segment
from data_prep.plan import Plan, balance, block_slices, make_plan
from data_prep.ranks import Ranks, agree, connect, each, launched_rank, on_rank_0
from data_prep.shards import FORMAT_VERSION, Manifest, Shard, describe_tar, publish, write_tar
from data_prep.spill import Spills, spill
from data_prep.summary import heldout_warning, summary_table
from data_prep.tokenizer import Tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the recipe's text. See the module's docstring."""
    recipe, _ = parse_recipe(
        PrepRecipe,
        argv,
        prog="python -m data_prep.build_shards",
        description="Turn raw text into packed, checksummed shards.",
    )
    check_prep_recipe(recipe)
    ranks = connect()
    os.environ.setdefault("RAYON_NUM_THREADS", str(_threads_per_rank(ranks)))
    try:
        build(recipe, ranks)
    except (ConfigError, RunError, ElsewhereError):
        raise  # all ranks know, and leave together
    except BaseException as error:
        if ranks.size > 1:  # the others are waiting for this rank
            if not isinstance(error, KeyboardInterrupt):
                print_traceback()
            ranks.abort(EXIT_FAILED)
        raise
    return EXIT_FINISHED


def _threads_per_rank(ranks: Ranks) -> int:
    hosts = ranks.allgather(os.uname().nodename)
    return max(1, len(os.sched_getaffinity(0)) // hosts.count(os.uname().nodename))


def build(recipe: PrepRecipe, ranks: Ranks) -> None:
    """Write the shards and the manifest of the recipe's text, or say that they are there already.

    Raises:
        ConfigError: there is no such text or tokenizer, the output folder holds something else, or
            another preparation is writing to it.
        RunError: a file cannot be read or written.
    """
    started = time.monotonic()
    folder = Path(str(recipe.prep.output_dir))
    inputs = on_rank_0(ranks, lambda: find_inputs(recipe.prep.input))
    tokenizer = each(ranks, lambda: Tokenizer(recipe.tokenizer))
    share = _share_of_files(inputs, ranks)
    settings = _settings_digest(recipe, inputs, share, tokenizer, ranks)
    if on_rank_0(ranks, lambda: is_prepared(folder, settings) and not (folder / WORK).exists()):
        if ranks.rank == 0:
            print(f"{folder} is already prepared with these settings: nothing to do")
        return
    with locked(folder, ranks):
        if not on_rank_0(ranks, lambda: is_prepared(folder, settings)):
            on_rank_0(ranks, lambda: open_work(folder, settings))
            manifest = _prepare(recipe, inputs, share, tokenizer, settings, ranks)
            on_rank_0(ranks, lambda: _finish(folder, manifest, recipe.prep, started))
        on_rank_0(ranks, lambda: close_work(folder))


def _share_of_files(inputs: list[Path], ranks: Ranks) -> list[int]:
    sizes = on_rank_0(ranks, lambda: [path.stat().st_size for path in inputs])
    return balance(sizes, ranks.size)[ranks.rank]


def _settings_digest(
    recipe: PrepRecipe, inputs: list[Path], share: list[int], tokenizer: Tokenizer, ranks: Ranks
) -> str:
    """Names the work: a restart goes on with an equal digest.

    Raises:
        ConfigError: the ranks have loaded different tokenizers.
    """
    digests = collections.ChainMap(
        *agree(ranks, lambda: {unit: _file_sha256(inputs[unit]) for unit in share})
    )
    prep = asdict(recipe.prep)
    for key in ("input", "output_dir", "tokenizer"):
        del prep[key]
    named = {
        "format_version": FORMAT_VERSION,
        "prep": prep,
        "seed": recipe.seed,
        "tokenizer": tokenizer.fingerprint,
        "files": [(path.name, digests[unit]) for unit, path in enumerate(inputs)],
    }
    settings = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    if len(set(ranks.allgather(settings))) > 1:
        raise ConfigError(
            f"the tokenizer {recipe.tokenizer!r} is not the same on every rank, so rows would "
            "mix vocabularies; name a folder that all ranks share"
        )
    return settings


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _prepare(
    recipe: PrepRecipe,
    inputs: list[Path],
    share: list[int],
    tokenizer: Tokenizer,
    settings: str,
    ranks: Ranks,
) -> Manifest:
    """The three passes. Every rank returns the whole manifest."""
    prep = recipe.prep
    work = Path(str(prep.output_dir)) / WORK

    def spill_share() -> None:
        for unit in _progress(share, "read and tokenise", "file", ranks):
            spill(inputs[unit], unit, work, prep, tokenizer)

    each(ranks, spill_share)
    spills = each(ranks, lambda: Spills(work, len(inputs), tokenizer.dtype))
    plan = make_plan(spills.documents, prep, recipe.seed)
    if not plan.train:
        raise ConfigError(
            f"prep.input holds no text that could be trained on ({len(spills.documents)} documents "
            f"with text under prep.text_key={prep.text_key!r}); correct the key or the globs"
        )
    shards = _write_shards(plan, spills, prep, tokenizer, ranks)
    return _manifest(recipe, settings, tokenizer, plan, spills, shards)


def _progress(items: Sequence[int], what: str, unit: str, ranks: Ranks) -> tqdm[int]:
    hidden = None if ranks.rank == 0 else True  # None: shown on a terminal
    return tqdm(items, desc=what, unit=unit, disable=hidden)


class _Task(NamedTuple):
    """One shard to write: the blocks [start, stop) of `rows`."""

    name: str
    language: str | None
    rows: list[list[Segment]]
    blocks: list[tuple[int, int]]


def _shard_tasks(plan: Plan, prep: Prep) -> list[_Task]:
    """All shards, training ones first."""
    tasks = [
        _Task(f"train-{index:06d}", None, plan.train, blocks)
        for index, blocks in enumerate(block_slices(len(plan.train), prep))
    ]
    for language, rows in sorted(plan.heldout.items()):
        tasks += [
            _Task(f"heldout-{language}-{index:06d}", language, rows, blocks)
            for index, blocks in enumerate(block_slices(len(rows), prep))
        ]
    return tasks


def _write_shards(
    plan: Plan, spills: Spills, prep: Prep, tokenizer: Tokenizer, ranks: Ranks
) -> tuple[Shard, ...]:
    """Write this rank's part of the shards; returns the description of all."""
    tasks = _shard_tasks(plan, prep)

    def write(task: _Task) -> Shard:
        path = Path(str(prep.output_dir)) / f"{task.name}.tar"
        if not path.exists():  # a rename made it appear, whole
            samples = (
                _sample(f"{task.name}-{start:08d}", task.rows[start:stop], plan, spills, prep,
                        tokenizer)
                for start, stop in task.blocks
            )  # fmt: skip
            write_tar(path, samples)
        return describe_tar(path, language=task.language)

    share = range(ranks.rank, len(tasks), ranks.size)
    parts = agree(
        ranks, lambda: {i: write(tasks[i]) for i in _progress(share, "write", "shard", ranks)}
    )
    shards = collections.ChainMap(*parts)
    return tuple(shards[i] for i in range(len(tasks)))


def _sample(
    key: str,
    rows: list[list[Segment]],
    plan: Plan,
    spills: Spills,
    prep: Prep,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """One block, as WebDataset's writer takes it."""
    input_ids = np.full((len(rows), prep.seq_len), tokenizer.pad_id, dtype=tokenizer.dtype)
    boundaries = [0]
    languages: list[str | None] = []  # of each segment; padding has none
    tokens: dict[str, int] = {}
    for number, row in enumerate(rows):
        position = 0
        for segment in row:
            record = plan.documents[segment.document]
            end = position + segment.length + FRAME
            input_ids[number, position] = tokenizer.cls_id
            input_ids[number, position + 1 : end - 1] = spills.tokens(record, segment)
            input_ids[number, end - 1] = tokenizer.sep_id
            boundaries.append(number * prep.seq_len + end)
            language = record["language"].decode()
            languages.append(language)
            tokens[language] = tokens.get(language, 0) + end - position
            position = end
        if position < prep.seq_len:
            boundaries.append((number + 1) * prep.seq_len)
            languages.append(None)
    padding = input_ids.size - sum(tokens.values())
    return {
        "__key__": key,
        "input_ids.npy": input_ids,
        "cu_seqlens.npy": np.array(boundaries, dtype=np.int32),
        "json": {
            "rows": len(rows),
            "tokens": tokens,
            "padding": padding,
            "segment_languages": languages,
        },
    }


def _manifest(
    recipe: PrepRecipe,
    settings: str,
    tokenizer: Tokenizer,
    plan: Plan,
    spills: Spills,
    shards: tuple[Shard, ...],
) -> Manifest:
    accounting: dict[str, dict[str, int]] = {}
    counted: list[Mapping[tuple[str, str], int]] = [spills.counts, plan.dropped, plan.kept()]
    for counts in counted:
        for (language, what), number in counts.items():
            accounting.setdefault(language, {})[what] = number
    return Manifest(
        settings=settings,
        seq_len=recipe.prep.seq_len,
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        special_ids={"cls": tokenizer.cls_id, "sep": tokenizer.sep_id, "pad": tokenizer.pad_id},
        seed=recipe.seed,
        rows=len(plan.train),
        heldout_rows={language: len(rows) for language, rows in sorted(plan.heldout.items())},
        tokens=plan.tokens(),
        accounting=accounting,
        shards=shards,
    )


def _finish(folder: Path, manifest: Manifest, prep: Prep, started: float) -> None:
    publish(folder, manifest)
    print(summary_table(manifest, time.monotonic() - started), flush=True)
    if warning := heldout_warning(manifest, prep.heldout_rows):
        print(warning, file=sys.stderr)


if __name__ == "__main__":
    # sys.exit goes through MPI_Finalize, where the ranks wait for each other: a launcher that sees
    # one of them fail would end the others before they have said why.
    run_command(main, rank=launched_rank(), leave=sys.exit)
