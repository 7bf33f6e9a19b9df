"""`python -m data_prep.build_shards --config RECIPE`, alone or under `mpirun -n P`.

Four stages, each of units of work that ranks share out as they go, each restartable: text is read,
cleaned and spilled by the digest of each document; every partition of the digests is tokenised,
each text once; documents are mixed, cut and packed into rows; rows are written to shards. Between
stages lie files, so memory is bounded by a unit, not by the corpus. Units belong to ranks, bytes do
not: the shards are the same for any P.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep import deduplicate
from data_prep.blocks import RowFiles, block_sample
from data_prep.claim import WORK, close_work, is_prepared, locked, open_work
from data_prep.clean import Cleaner
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
from data_prep.container import Container, write_container
from data_prep.durable import write_durably
from data_prep.estimate import check_disk, estimate_table
from data_prep.generations import Base, carry_rows, finish_index, known_documents, load_base
from data_prep.mixing import Dose, check_mix, doses, mix_table, pool_quotas
from data_prep.overlap import find_files
from data_prep.plan import Groups, block_slices, heldout_path, plan_group, rows_path, take_heldout
from data_prep.ranks import Ranks, connect, each, launched_rank, on_rank_0
from data_prep.shards import FORMAT_VERSION, Manifest, Shard, describe_tar, publish, write_tar
from data_prep.sharing import share
from data_prep.similar import load_rensa
from data_prep.sources import Source, Unit, find_sources, reading_digest, split, with_pools
from data_prep.spill import (
    FEW_SPILLS,
    MERGED_BYTES,
    Counts,
    Spills,
    merge_groups,
    merge_spills,
    merged_path,
    spill,
    spill_path,
)
from data_prep.summary import heldout_warning, report_losses, summary_table
from data_prep.tokenizer import Tokenizer
from data_prep.tokens import Removals, TokenFiles, tokenise, tokens_path

MIB = 1 << 20
EXPANSION = 4  # text of a compressed or columnar file, over its size: only sizes work by it
PARTITION_BYTES, FEWEST_FULL_PARTITIONS, MOST_PARTITIONS = 64 * MIB, 16, 1 << 16
UNITS_AT_LEAST, LARGEST_UNIT = 256, 64 * MIB
ANNOUNCED_BYTES = 1 << 30  # of text, from which its mix is estimated beforehand
NEW_OBJECTS = 1 << 17  # between the collector's looks at all that libraries loaded


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the recipe's text. See the module's docstring."""
    recipe, options = parse_recipe(
        PrepRecipe,
        argv,
        prog="python -m data_prep.build_shards",
        description="Turn raw text into packed, checksummed shards.",
        add_options=_add_options,
    )
    check_prep_recipe(recipe)
    gc.set_threshold(NEW_OBJECTS)  # records are many, and in no cycle
    ranks = connect()
    os.environ.setdefault("RAYON_NUM_THREADS", str(_threads_per_rank(ranks)))
    try:
        if options.dry_run:
            on_rank_0(ranks, lambda: print(_dry_run(recipe, append=options.append)))
        else:
            build(recipe, ranks, append=options.append)
    except (ConfigError, RunError, ElsewhereError):
        raise  # all ranks know, and leave together
    except BaseException as error:
        if ranks.size > 1:  # the others are waiting for this rank
            if not isinstance(error, KeyboardInterrupt):
                print_traceback()
            ranks.abort(EXIT_FAILED)
        raise
    return EXIT_FINISHED


def _add_options(parser: Any) -> None:
    parser.add_argument(
        "--append", action="store_true", help="add text to finished shards as a new generation"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="estimate tokens, the language mix and the disk space from samples, and stop",
    )


def _threads_per_rank(ranks: Ranks) -> int:
    hosts = ranks.allgather(os.uname().nodename)
    return max(1, len(os.sched_getaffinity(0)) // hosts.count(os.uname().nodename))


@dataclasses.dataclass(frozen=True)
class _Job:
    """One preparation: what every stage needs to know, the same on every rank."""

    recipe: PrepRecipe
    ranks: Ranks
    folder: Path
    sources: list[Source]
    tokenizer: Tokenizer
    settings: str
    base: Base | None

    @property
    def prep(self) -> Prep:
        return self.recipe.prep

    @property
    def work(self) -> Path:
        return self.folder / WORK

    @property
    def generation(self) -> int:
        return self.base.manifest.generation + 1 if self.base else 1

    @property
    def earlier(self) -> set[str]:
        """Languages of the generations that are added to."""
        return set(self.base.manifest.accounting) if self.base else set()

    @property
    def text_bytes(self) -> int:
        """About how much text there is."""
        return sum(s.bytes * (EXPANSION if s.compression else 1) for s in self.sources)

    @property
    def num_partitions(self) -> int:
        number = 1
        while number < MOST_PARTITIONS and number * self._partition_bytes(number) < self.text_bytes:
            number *= 2
        return number

    @staticmethod
    def _partition_bytes(number: int) -> int:
        """Few partitions may be small, so that ranks have some to share out."""
        return MIB if number < FEWEST_FULL_PARTITIONS else PARTITION_BYTES

    def units(self) -> list[Unit]:
        """What the first stage reads at a time: small enough to share out evenly."""
        size = sum(source.bytes for source in self.sources) // UNITS_AT_LEAST
        size = min(max(size, MIB), LARGEST_UNIT)
        return [unit for source in self.sources for unit in split(source, size)]

    def stage(
        self,
        name: str,
        sizes: Sequence[int],
        work: Callable[[int], None],
        summarise: Callable[[], Any] = lambda: None,
    ) -> Any:
        """Do a stage that no earlier start has finished; returns its summary on every rank."""
        done = self.work / f"{name}.done"
        if not on_rank_0(self.ranks, done.exists):
            share(self.ranks, self.work / "claims" / name, sizes, work, name)
            on_rank_0(self.ranks, lambda: write_durably(done, json.dumps(summarise())))
        return on_rank_0(self.ranks, lambda: json.loads(done.read_text()))


def build(recipe: PrepRecipe, ranks: Ranks, *, append: bool = False) -> None:
    """Write the shards and the manifest of the recipe's text, or say that they are there already.

    Args:
        recipe: what to prepare.
        ranks: all of them call this.
        append: add the text to what the folder holds, as a new generation.

    Raises:
        ConfigError: there is no such text or tokenizer, the output folder holds something else, or
            another preparation is writing to it.
        RunError: a file cannot be read or written.
    """
    started = time.monotonic()
    folder = Path(str(recipe.prep.output_dir))
    sources = on_rank_0(ranks, lambda: _sources(recipe))
    tokenizer = each(ranks, lambda: Tokenizer(recipe.tokenizer))
    _check_same_tokenizer(recipe, tokenizer, ranks)
    base = on_rank_0(ranks, lambda: load_base(folder, recipe, tokenizer)) if append else None
    sources = _new(sources, recipe, base)
    settings = on_rank_0(ranks, lambda: _settings_digest(recipe, sources, tokenizer, base))

    def is_finished() -> bool:
        return not sources if base is not None else is_prepared(folder, settings)

    if on_rank_0(ranks, lambda: is_finished() and not (folder / WORK).exists()):
        if ranks.rank == 0:
            print(f"{folder} is already prepared with this text and these settings: nothing to do")
        return
    if recipe.prep.near_duplicates is not None:
        each(ranks, load_rensa)  # hours before it is needed
    with locked(folder, ranks):
        if not on_rank_0(ranks, is_finished):
            on_rank_0(ranks, lambda: open_work(folder, settings))
            job = _Job(recipe, ranks, folder, sources, tokenizer, settings, base)
            make_manifest = _prepare(job)
            on_rank_0(ranks, lambda: _finish(job, make_manifest, started))
        on_rank_0(ranks, lambda: close_work(folder))


def _sources(recipe: PrepRecipe) -> list[Source]:
    return with_pools(find_sources(recipe.prep.input), recipe.prep)


def _new(sources: list[Source], recipe: PrepRecipe, base: Base | None) -> list[Source]:
    """Those that no earlier generation read as they would be read now."""
    read = base.manifest.sources if base else {}
    return [source for source in sources if reading_digest(source, recipe.prep) not in read]


def _dry_run(recipe: PrepRecipe, *, append: bool) -> str:
    tokenizer = Tokenizer(recipe.tokenizer)
    base = load_base(Path(str(recipe.prep.output_dir)), recipe, tokenizer) if append else None
    sources = _new(_sources(recipe), recipe, base)
    earlier = base.manifest.accounting if base else {}
    return estimate_table(sources, recipe.prep, tokenizer, recipe.seed, earlier=earlier)


def _check_same_tokenizer(recipe: PrepRecipe, tokenizer: Tokenizer, ranks: Ranks) -> None:
    if len(set(ranks.allgather(tokenizer.fingerprint))) > 1:
        raise ConfigError(
            f"the tokenizer {recipe.tokenizer!r} is not the same on every rank, so rows would "
            "mix vocabularies; name a folder that all ranks share"
        )


def _settings_digest(
    recipe: PrepRecipe, sources: list[Source], tokenizer: Tokenizer, base: Base | None
) -> str:
    """Names the work: a restart goes on with an equal digest."""
    prep = dataclasses.asdict(recipe.prep)
    for key in ("input", "output_dir", "tokenizer", "on_error", "exclude", "source_weights"):
        del prep[key]
    excluded = [hashlib.sha256(p.read_bytes()).hexdigest() for p in find_files(recipe.prep.exclude)]
    named = {
        "format_version": FORMAT_VERSION,
        "prep": prep,
        "seed": recipe.seed,
        "tokenizer": tokenizer.fingerprint,
        "sources": sorted((source.name, source.digest) for source in sources),
        "exclude": sorted(excluded),
        "base": base and base.digest,
    }
    if recipe.prep.source_weights:
        pools = [(pool.weight, place) for place, pool in enumerate(recipe.prep.pools)]
        named["source_weights"] = sorted(
            (source.name, source.digest, *pools[source.pool]) for source in sources
        )
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _prepare(job: _Job) -> Callable[[], Manifest]:
    """The stages. Returns what makes the manifest, once they are all done."""
    units: list[Unit] = on_rank_0(job.ranks, job.units)
    on_rank_0(job.ranks, lambda: _announce(job, len(units)))
    read = _read(job, units)
    before = set(job.base.manifest.tokens) if job.base else set()
    languages = [*read["languages"], *sorted(before - set(read["languages"]))]
    _tokenise(job, _merge(job, read["spilled"]))
    paths = [tokens_path(job.work, partition) for partition in range(job.num_partitions)]
    files = each(job.ranks, lambda: TokenFiles(paths, languages))
    mix = _mix(job, files)
    groups = Groups.of(len(files), mix["tokens"])
    packed = _pack(job, files, groups, mix)
    rows = [rows_path(job.work, group) for group in range(len(groups))]
    ids, base = files, job.base
    if base is not None and base.short is not None:
        carried = (job.work / "carried-tokens", job.work / "carried-rows")
        on_rank_0(job.ranks, lambda: carry_rows(job.folder, base, *carried, languages, len(paths)))
        ids = each(job.ranks, lambda: TokenFiles([*paths, carried[0]], languages))
        rows = [carried[1], *rows]
    tasks = _write(job, ids, each(job.ranks, lambda: RowFiles(rows)), mix["heldout_rows"])
    on_rank_0(job.ranks, lambda: report_losses(job.folder, job.generation, read))

    def make_manifest() -> Manifest:
        parts = [read, {"counts": files.counts().to_json()}, mix, *packed]
        return _manifest(job, parts, [task.description(job.work) for task in tasks])

    return make_manifest


def _announce(job: _Job, num_units: int) -> None:
    """Before the long work starts: is there room, and what will there be of each language?"""
    merged = MERGED_BYTES * job.ranks.size if num_units > FEW_SPILLS else 0
    check_disk(job.folder, job.text_bytes, job.tokenizer, merged)
    if job.text_bytes >= ANNOUNCED_BYTES and not (job.work / "read.done").exists():
        text = estimate_table(
            job.sources, job.prep, job.tokenizer, job.recipe.seed, samples=4, earlier=job.earlier
        )
        print(text, flush=True)


def _read(job: _Job, units: Sequence[Unit]) -> Any:
    """Read and clean all text; gives its languages, what was counted and what cannot be read."""
    cleaner = each(job.ranks, lambda: Cleaner(job.prep))

    def read(index: int) -> None:
        path = spill_path(job.work, index)
        spill(units[index], path, job.prep, cleaner, job.num_partitions, job.recipe.seed)

    def summarise() -> Any:
        paths = [spill_path(job.work, index) for index in range(len(units))]
        spills = Spills(paths, job.prep)
        faults = [dataclasses.astuple(fault) for fault in spills.faults]
        return {
            "counts": spills.counts.to_json(),
            "languages": spills.languages,
            "faults": faults,
            "spilled": [path.stat().st_size for path in paths],
            "excluded_by": spills.excluded_by,
        }

    return job.stage("read", [unit.bytes for unit in units], read, summarise)


def _merge(job: _Job, sizes: Sequence[int]) -> list[Path]:
    """Merge spills where there are many; gives the files that tokenising reads."""
    units = [spill_path(job.work, index) for index in range(len(sizes))]
    groups = merge_groups(sizes)
    merged = [
        merged_path(job.work, number) if len(group) > 1 else units[group.start]
        for number, group in enumerate(groups)
    ]

    def merge(number: int) -> None:
        group = groups[number]
        if len(group) > 1:
            merge_spills(units[group.start : group.stop], merged[number], job.prep)

    if len(groups) < len(units):
        job.stage("merge", [sum(sizes[unit] for unit in group) for group in groups], merge)
    return merged


def _tokenise(job: _Job, paths: Sequence[Path]) -> None:
    """Drop duplicates and tokenise the rest, then remove the spills."""
    number = job.num_partitions
    if not on_rank_0(job.ranks, (job.work / "tokenise.done").exists):
        spills = each(job.ranks, lambda: Spills(paths, job.prep))

        def for_each_partition(name: str, work: Callable[[int], None]) -> None:
            job.stage(name, [1] * number, work)

        similar, lines = [], []
        if job.prep.near_duplicates is not None:
            threshold = job.prep.near_duplicates
            similar = deduplicate.similar_documents(
                spills, job.work, number, threshold, for_each_partition
            )
        if job.prep.dedup_lines:
            lines = deduplicate.repeated_lines(spills, job.work, number, for_each_partition)

        def tokenise_partition(partition: int) -> None:
            known = known_documents(job.folder, job.base, partition, number)
            path = tokens_path(job.work, partition)
            removals = Removals(known, similar, lines)
            tokenise(spills, partition, path, job.prep, job.tokenizer, removals)

        for_each_partition("tokenise", tokenise_partition)
    _remove(job, "read-*[0-9]", "similar-*", "lines-*")


def _remove(job: _Job, *patterns: str) -> None:
    """Remove working files, each rank some, as much of a file takes a file system its time."""
    paths: list[Path] = on_rank_0(
        job.ranks, lambda: [path for pattern in patterns for path in job.work.glob(pattern)]
    )

    def remove_share() -> None:
        for path in paths[job.ranks.rank :: job.ranks.size]:
            path.unlink()

    each(job.ranks, remove_share)


def _mix(job: _Job, files: TokenFiles) -> Any:
    """Set held-out rows apart and decide how much of each language there will be."""

    def decide() -> Any:
        before = job.base.manifest.heldout_rows if job.base else {}
        there = files.num_documents()
        new = [name for name in there if there[name] and name not in before]
        held = take_heldout(files, job.prep, new if job.prep.heldout_rows else [])
        for language, rows in held.rows.items():
            with write_container(heldout_path(job.work, language)) as writer:
                rows.write(writer)
        draws = files.draws()
        for language, of_heldout in held.draws.items():
            draws[language] -= of_heldout
        draws = {name: of_pools for name, of_pools in draws.items() if of_pools.any()}
        tokens = {name: of_pools.sum(1) for name, of_pools in draws.items()}
        if not tokens:
            raise ConfigError(
                f"prep.input holds no text that could be trained on ({sum(there.values())} "
                f"documents with text under prep.text_key={job.prep.text_key!r}); correct the key "
                "or the globs"
            )
        check_mix(tokens, job.prep, job.earlier)
        taken = pool_quotas(tokens, job.prep)
        print(mix_table(tokens, job.prep, None), flush=True)
        return {
            "counts": held.counts.to_json(),
            "heldout_rows": {language: len(rows) for language, rows in held.rows.items()},
            "until": held.until,
            "doses": {
                language: [dataclasses.astuple(dose) for dose in of_pools]
                for language, of_pools in doses(draws, job.prep).items()
            },
            "tokens": int(sum(of_pools.sum() for of_pools in taken.values())),
        }

    return job.stage("mix", [], lambda _: None, decide)


def _pack(job: _Job, files: TokenFiles, groups: Groups, mix: Any) -> list[Any]:
    """Pack every group's documents into rows; gives what was counted, group by group."""
    until = {language: tuple(key) for language, key in mix["until"].items()}
    of_language = {
        language: [Dose(*dose) for dose in of_pools] for language, of_pools in mix["doses"].items()
    }

    def pack_group(group: int) -> None:
        path = rows_path(job.work, group)
        plan_group(files, groups[group], path, of_language, until, job.prep, job.tokenizer,
                   job.recipe.seed)  # fmt: skip

    def summarise() -> list[Any]:
        return [Container(rows_path(job.work, group)).facts for group in range(len(groups))]

    found: list[Any] = job.stage("pack", [1] * len(groups), pack_group, summarise)
    return found


@dataclasses.dataclass(frozen=True)
class _Task:
    """One shard to write: the blocks [start, stop) of `rows`."""

    name: str
    language: str | None
    rows: RowFiles
    blocks: list[tuple[int, int]]

    def _facts(self, work: Path) -> Path:
        return work / f"{self.name}.json"

    def description(self, work: Path) -> Shard:
        """Of the finished shard."""
        return Shard.from_json(json.loads(self._facts(work).read_text()))

    def write(self, job: _Job, files: TokenFiles) -> None:
        """Write the shard and its description, unless they are there."""
        path = job.folder / f"{self.name}.tar"
        if not path.exists():  # a rename made it appear, whole
            samples = (
                block_sample(f"{self.name}-{start:08d}", self.rows.slice(start, stop), files,
                             job.tokenizer, job.prep.seq_len)
                for start, stop in self.blocks
            )  # fmt: skip
            write_tar(path, samples)
        if not self._facts(job.work).exists():
            shard = describe_tar(path, language=self.language)
            write_durably(self._facts(job.work), json.dumps(dataclasses.asdict(shard)))


def _write(
    job: _Job, files: TokenFiles, rows: RowFiles, heldout_rows: dict[str, int]
) -> list[_Task]:
    """Write all shards, training ones first."""
    first = job.base.next_shard if job.base else 0
    tasks = [
        _Task(f"train-{first + index:06d}", None, rows, blocks)
        for index, blocks in enumerate(block_slices(len(rows), job.prep))
    ]
    for language, number in sorted(heldout_rows.items()):
        heldout = each(job.ranks, functools.partial(RowFiles, [heldout_path(job.work, language)]))
        tasks += [
            _Task(f"heldout-{language}-{index:06d}", language, heldout, blocks)
            for index, blocks in enumerate(block_slices(number, job.prep))
        ]
    sizes = [task.blocks[-1][1] - task.blocks[0][0] for task in tasks]
    job.stage("write", sizes, lambda index: tasks[index].write(job, files))
    return tasks


def _manifest(job: _Job, parts: list[Any], shards: list[Shard]) -> Manifest:
    """Add up what the stages counted, on top of the generation before."""
    before = job.base.manifest if job.base else None
    total = Counts()
    if before is not None:
        for language, counted in before.accounting.items():
            total.update({(language, what): number for what, number in counted.items()})
    tokens: Counter[str] = Counter(before.tokens if before else {})
    lengths = {k: Counter(v) for k, v in (before.segment_lengths if before else {}).items()}
    for part in parts:
        total.update(Counts.from_json(part["counts"]))
    for part in parts:
        if "lengths" in part:
            tokens.update(part["tokens"])
            for language, of_language in part["lengths"].items():
                lengths.setdefault(language, Counter()).update(of_language)
    accounting: dict[str, dict[str, int]] = {}
    for (language, what), number in total.items():
        accounting.setdefault(language, {})[what] = number
    kept = job.base.shards if job.base else ()
    train = [shard for shard in (*kept, *shards) if shard.language is None]
    heldout = [shard for shard in (*kept, *shards) if shard.language is not None]
    heldout_rows = dict(before.heldout_rows if before else {})
    heldout_rows |= next(part["heldout_rows"] for part in parts if "heldout_rows" in part)
    return Manifest(
        settings=job.settings,
        seq_len=job.prep.seq_len,
        vocab_size=job.tokenizer.vocab_size,
        tokenizer=job.recipe.tokenizer,
        tokenizer_fingerprint=job.tokenizer.fingerprint,
        special_ids={
            "cls": job.tokenizer.cls_id, "sep": job.tokenizer.sep_id, "pad": job.tokenizer.pad_id
        },
        seed=job.recipe.seed,
        generation=job.generation,
        rows=sum(shard.rows for shard in train),
        heldout_rows=dict(sorted(heldout_rows.items())),
        tokens=dict(tokens),
        segment_lengths={language: dict(counts) for language, counts in lengths.items()},
        accounting=accounting,
        sources={
            **(before.sources if before else {}),
            **{reading_digest(source, job.prep): source.name for source in job.sources},
        },
        shards=(*train, *heldout),
    )  # fmt: skip


def _finish(job: _Job, make_manifest: Callable[[], Manifest], started: float) -> None:
    manifest = make_manifest()
    paths = [tokens_path(job.work, partition) for partition in range(job.num_partitions)]
    finish_index(job.folder, manifest.generation, TokenFiles(paths, ()))
    publish(job.folder, manifest)
    print(summary_table(manifest, time.monotonic() - started), flush=True)
    if warning := heldout_warning(manifest, job.prep.heldout_rows):
        print(warning, file=sys.stderr)


if __name__ == "__main__":
    # sys.exit goes through MPI_Finalize, where the ranks wait for each other: a launcher that sees
    # one of them fail would end the others before they have said why.
    run_command(main, rank=launched_rank(), leave=sys.exit)
