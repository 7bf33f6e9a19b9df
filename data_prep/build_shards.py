"""`python -m data_prep.build_shards --config RECIPE`, alone or under `mpirun -n P`.

Three passes, each restartable: every input file is read, cleaned, tokenised and spilled (one unit of
work a file); the plan of rows is computed from the documents' lengths alone; every shard is written
from the spills. Units belong to ranks, bytes do not: the shards are the same for any P.
"""

from __future__ import annotations

import collections
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_prep.command import (
    EXIT_FAILED,
    EXIT_FINISHED,
    ConfigError,
    RunError,
    parse_recipe,
    run_command,
)
from data_prep.config import Prep, PrepRecipe, check_prep
from data_prep.documents import Counts, Document, find_inputs, read_documents
from data_prep.pack import FRAME, Segment
from data_prep.plan import DOCUMENT, Plan, balance, block_slices, make_plan
from data_prep.ranks import Ranks, agree, connect, launched_rank
from data_prep.shards import MANIFEST, Manifest, Shard, describe_tar, publish, write_tar
from data_prep.summary import summary_table
from data_prep.tokenizer import Tokenizer

BATCH_CHARS = 1 << 22  # text tokenised at a time: enough for every core, little memory


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the recipe's text. See the module's docstring."""
    recipe, _ = parse_recipe(
        PrepRecipe,
        argv,
        prog="python -m data_prep.build_shards",
        description="Turn raw text into packed, checksummed shards.",
    )
    check_prep(recipe.prep)
    inputs = find_inputs(recipe.prep.input)
    tokenizer_source = recipe.tokenizer
    ranks = connect()
    os.environ.setdefault("RAYON_NUM_THREADS", str(_threads_per_rank(ranks)))
    try:
        build(recipe, inputs, Tokenizer(tokenizer_source), ranks)
    except BaseException as error:
        if ranks.size > 1 and not isinstance(error, ConfigError | RunError):
            traceback.print_exc()
            ranks.abort(EXIT_FAILED)
        raise
    return EXIT_FINISHED


def _threads_per_rank(ranks: Ranks) -> int:
    hosts = ranks.allgather(os.uname().nodename)
    return max(1, len(os.sched_getaffinity(0)) // hosts.count(os.uname().nodename))


def build(recipe: PrepRecipe, inputs: list[Path], tokenizer: Tokenizer, ranks: Ranks) -> None:
    """Write the shards and the manifest of `inputs`, or say that they are there already.

    Raises:
        ConfigError: the output folder holds other shards, or another preparation is writing to it.
    """
    prep = recipe.prep
    folder = Path(str(prep.output_dir))
    started = time.monotonic()
    share = balance([path.stat().st_size for path in inputs], ranks.size)[ranks.rank]
    digests = agree(ranks, lambda: {unit: _file_sha256(inputs[unit]) for unit in share})
    settings = _settings_digest(recipe, inputs, collections.ChainMap(*digests), tokenizer)
    work = folder / ".work"
    if agree(ranks, lambda: _is_prepared(folder, settings))[0]:
        if ranks.rank == 0:
            print(f"{folder} is already prepared with these settings: nothing to do")
        return
    agree(ranks, lambda: _lock(folder, work, settings) if ranks.rank == 0 else None)
    bar = tqdm(
        share, desc="read and tokenise", unit="file", disable=None if ranks.rank == 0 else True
    )
    agree(ranks, lambda: [_spill(inputs[unit], unit, work, prep, tokenizer) for unit in bar])
    spills = Spills(work, len(inputs), tokenizer.dtype)
    plan = make_plan(spills.documents, prep, recipe.seed)
    if not plan.train:
        raise ConfigError(
            f"prep.input holds no text that could be trained on ({len(spills.documents)} documents "
            f"with text under prep.text_key={prep.text_key!r}); correct the key or the globs"
        )
    shards = _write_shards(plan, spills, folder, prep, tokenizer, ranks)
    if ranks.rank == 0:
        manifest = _manifest(recipe, settings, tokenizer, plan, spills, shards)
        publish(folder, manifest)
        print(summary_table(manifest, time.monotonic() - started))
        if len(manifest.heldout_rows) and min(manifest.heldout_rows.values()) < prep.heldout_rows:
            few = {k: v for k, v in manifest.heldout_rows.items() if v < prep.heldout_rows}
            print(
                f"warning: too little text for prep.heldout_rows={prep.heldout_rows} in "
                f"{few}: at most half of a language's documents are held out",
                file=sys.stderr,
            )
    agree(ranks, lambda: None)
    if ranks.rank == 0:
        shutil.rmtree(work)
        (folder / ".lock").unlink()


def _settings_digest(
    recipe: PrepRecipe, inputs: list[Path], digests: Mapping[int, str], tokenizer: Tokenizer
) -> str:
    """Names the work: restarts go on with equal digests, and refuse others."""
    prep = asdict(recipe.prep)
    for key in ("input", "output_dir", "tokenizer"):
        del prep[key]
    files = [(path.name, digests[unit]) for unit, path in enumerate(inputs)]
    named = {"prep": prep, "seed": recipe.seed, "tokenizer": tokenizer.fingerprint, "files": files}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_prepared(folder: Path, settings: str) -> bool:
    manifest_path = folder / MANIFEST
    if not manifest_path.exists():
        return False
    manifest = Manifest.from_json(manifest_path.read_text(), where=str(manifest_path))
    if manifest.settings != settings:
        raise ConfigError(
            f"prep.output_dir={folder} holds shards of other text or settings, which are not "
            "overwritten; remove that folder or name another one"
        )
    return True


def _lock(folder: Path, work: Path, settings: str) -> None:
    """Claim the folder for this process, and clear what an unlike preparation left unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    # Never closed: the lock lasts as long as the process, however that ends.
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(
            f"another preparation is writing to prep.output_dir={folder}; wait for it, end it, or "
            "name another folder"
        ) from error
    mark = work / "settings"
    if not mark.exists() or mark.read_text() != settings:
        shutil.rmtree(work, ignore_errors=True)
        for stale in itertools.chain(folder.glob("*.tar"), folder.glob("*.partial")):
            stale.unlink()
        work.mkdir()
        mark.write_text(settings)


def _spill(path: Path, unit: int, work: Path, prep: Prep, tokenizer: Tokenizer) -> None:
    """Tokenise one file into `work`; its .json appears last and says that the unit is finished."""
    finished = work / f"unit-{unit:06d}.json"
    if finished.exists():
        return
    counts = Counts()
    records: list[npt.NDArray[np.void]] = []
    offset = 0
    with open(work / f"unit-{unit:06d}.tokens", "wb") as stream:
        for batch in _batches(read_documents(path, prep, counts)):
            encoded = tokenizer.encode([document.text for document in batch])
            table = np.zeros(len(batch), dtype=DOCUMENT)
            for row, (document, ids) in enumerate(zip(batch, encoded, strict=True)):
                key = hashlib.sha256(document.text.encode()).digest()[:16]
                table[row] = (
                    key, document.language, len(ids), len(document.text), unit, offset
                )  # fmt: skip
                offset += len(ids)
                stream.write(ids.tobytes())
            records.append(table)
    np.save(
        work / f"unit-{unit:06d}.npy",
        np.concatenate(records) if records else np.zeros(0, dtype=DOCUMENT),
    )
    partial = finished.with_suffix(".partial")
    partial.write_text(json.dumps([[*key, n] for key, n in sorted(counts.items())]))
    os.replace(partial, finished)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document.text)
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


class Spills:
    """What all units left: every document's record, its tokens by memory map, and the counts."""

    def __init__(self, work: Path, num_units: int, dtype: npt.DTypeLike) -> None:
        stems = [work / f"unit-{unit:06d}" for unit in range(num_units)]
        self.documents = np.concatenate([np.load(f"{stem}.npy") for stem in stems])
        self.counts = Counts()
        for stem in stems:
            for language, what, n in json.loads(Path(f"{stem}.json").read_text()):
                self.counts[language, what] += n
        self._tokens = [
            np.memmap(f"{stem}.tokens", dtype=dtype, mode="r")
            if os.path.getsize(f"{stem}.tokens")
            else np.zeros(0, dtype=dtype)
            for stem in stems
        ]

    def tokens(self, record: np.void, segment: Segment) -> npt.NDArray[Any]:
        """The ids of a segment's content."""
        start = int(record["offset"]) + segment.start
        return self._tokens[int(record["unit"])][start : start + segment.length]


def _write_shards(
    plan: Plan, spills: Spills, folder: Path, prep: Prep, tokenizer: Tokenizer, ranks: Ranks
) -> tuple[Shard, ...]:
    """All shards, training ones first; each rank writes its share of them."""
    work: list[tuple[str, str | None, list[list[Segment]], list[tuple[int, int]]]] = []
    for index, blocks in enumerate(block_slices(len(plan.train), prep)):
        work.append((f"train-{index:06d}", None, plan.train, blocks))
    for language, rows in sorted(plan.heldout.items()):
        for index, blocks in enumerate(block_slices(len(rows), prep)):
            work.append((f"heldout-{language}-{index:06d}", language, rows, blocks))

    def write(name: str, language: str | None, rows: Any, blocks: Any) -> Shard:
        path = folder / f"{name}.tar"
        if not path.exists():  # a rename made it appear, whole
            samples = (
                _sample(f"{name}-{start:08d}", rows[start:stop], plan, spills, prep, tokenizer)
                for start, stop in blocks
            )
            write_tar(path, samples)
        return describe_tar(path, language=language)

    bar = tqdm(
        range(ranks.rank, len(work), ranks.size),
        desc="write shards",
        unit="shard",
        disable=None if ranks.rank == 0 else True,
    )
    gathered = agree(ranks, lambda: {i: write(*work[i]) for i in bar})
    by_index = {index: shard for part in gathered for index, shard in part.items()}
    return tuple(by_index[i] for i in range(len(work)))


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
            tokens[language] = tokens.get(language, 0) + end - position
            position = end
        if position < prep.seq_len:
            boundaries.append((number + 1) * prep.seq_len)
    padding = input_ids.size - sum(tokens.values())
    return {
        "__key__": key,
        "input_ids.npy": input_ids,
        "cu_seqlens.npy": np.array(boundaries, dtype=np.int32),
        "json": {"rows": len(rows), "tokens": tokens, "padding": padding},
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
    for source in (spills.counts, plan.dropped, plan.kept()):
        for (language, what), number in source.items():
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


if __name__ == "__main__":
    run_command(main, rank=launched_rank())
