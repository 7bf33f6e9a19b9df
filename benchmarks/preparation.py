"""CPU seconds of a whole preparation, against those of `tokenizers` on the same text alone.

    python benchmarks/preparation.py [--corpus ../shared/data/corpus] [--megabytes 100]
        [--parallel 400] [--large 2000] [--repeats 3] [--tokenizer models/pocket-teacher] [--json]

The corpus is made of the documents of a folder of LANG.jsonl.gz, the same bytes of text in each
language, repeated where they do not suffice. Each has its file and a number in front, so that none
is a duplicate; what is repeated is yet kinder to a cache of words than new text is. It is prepared
into rows of 512 tokens that hold all of it once, by one process on one core. Every measurement is a
process of its own, all in turn.

What ranks bring is measured on a corpus of `--parallel` MB, large enough that start-up, which every
rank has, is not most of it: `mpirun -n 1` against `mpirun -n 2`, in wall seconds, neither tied to
cores.

`tokenizers` is its encode_batch_fast, and `Tokenizer.encode` what preparation calls, each on all
the texts with one thread, without start-up and reading. Start-up is the preparation of a few
documents. CPU seconds are those of all processes with what they started, user and system; the
compiler that start-up calls is among them. MB are 10^6 bytes of text as UTF-8, without the JSON
around it. `--large` prepares that many MB once, to show whether peak memory grows: up to about a
gigabyte of text the partitions do, to 64 MiB of it, which from there on are more instead.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gzip
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import orjson

from benchmarks.harness import arguments, cpu_seconds, report, set_threads
from data_prep.shards import MANIFEST, Manifest

REPOSITORY = Path(__file__).resolve().parents[1]
BATCH_BYTES = 4 << 20  # as the second stage of preparation tokenises
RANKS = 2
TINY = 0.02  # MB, of the corpus whose preparation is start-up
ENCODERS = ("tokenizers", "Tokenizer.encode")
TINY_CASE, WHOLE, LARGE = "start-up", "preparation", "preparation, large"
ALONE, PARALLEL = "preparation, 1 rank", f"preparation, {RANKS} ranks"


@dataclasses.dataclass(frozen=True)
class Spent:
    """What a measured process took.

    Args:
        cpu: seconds, user and system.
        wall: seconds.
        peak: bytes of resident memory; of several processes, the largest one's.
    """

    cpu: float
    wall: float
    peak: int


def main(argv: Sequence[str] | None = None) -> None:
    """Make the corpora, measure, report."""
    parser = arguments(__doc__)
    parser.add_argument("--tokenizer", default=str(REPOSITORY / "models" / "pocket-teacher"))
    parser.add_argument("--corpus", default=str(REPOSITORY.parent / "shared" / "data" / "corpus"))
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--parallel", type=float, default=400, help="MB of the corpus for ranks")
    parser.add_argument("--large", type=float, default=0, help="MB of the larger corpus; 0 is none")
    parser.add_argument("--repeats", type=int, default=3, help="of all but the larger corpus")
    options = parser.parse_args(argv)
    set_threads(1)
    core = min(os.sched_getaffinity(0))
    if len(os.sched_getaffinity(0)) < RANKS:
        options.parallel = 0  # ranks would take turns
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        megabytes = {
            case: synthesise(Path(options.corpus), folder / case, size)
            for case, size in ((TINY_CASE, TINY), (WHOLE, options.megabytes),
                               (ALONE, options.parallel), (LARGE, options.large)) if size
        }  # fmt: skip
        megabytes |= dict.fromkeys(ENCODERS, megabytes[WHOLE])
        if options.parallel:
            megabytes[PARALLEL] = megabytes[ALONE]
        recipes = {case: write_recipe(folder, case, options.tokenizer) for case in megabytes}
        launcher = [str(Path(sys.executable).parent / "mpirun"), "-n"]
        cases: dict[str, Callable[[], Spent]] = {
            TINY_CASE: lambda: prepare(recipes[TINY_CASE], core),
            ENCODERS[0]: lambda: alone(encode, folder / WHOLE, options.tokenizer, False),
            ENCODERS[1]: lambda: alone(encode, folder / WHOLE, options.tokenizer, True),
            WHOLE: lambda: prepare(recipes[WHOLE], core),
        }
        if options.parallel:
            cases[ALONE] = lambda: prepare(recipes[ALONE], None, [*launcher, "1"])
            cases[PARALLEL] = lambda: prepare(recipes[PARALLEL], None, [*launcher, str(RANKS)])
        runs: dict[str, list[Spent]] = {case: [] for case in cases}
        for _ in range(options.repeats):
            for case, measure in cases.items():
                runs[case].append(measure())
        if options.large:
            runs[LARGE] = [prepare(recipes[LARGE], core)]
        manifest = load_manifest(output_dir(recipes[WHOLE]))
    spent = {case: middle(of_case) for case, of_case in runs.items()}
    rows = [row(case, megabytes[case], of_case) for case, of_case in spent.items()]
    whole, startup = spent[WHOLE].cpu, spent[TINY_CASE].cpu
    raw, ours = (spent[case].cpu for case in ENCODERS)
    ratios = {
        "tokenizers / preparation": raw / whole,
        "tokenizers / preparation without start-up": raw / (whole - startup),
        "Tokenizer.encode / preparation": ours / whole,
        "Tokenizer.encode / preparation without start-up": ours / (whole - startup),
        "MB per CPU second": megabytes[WHOLE] / whole,
        "MB per CPU second without start-up": megabytes[WHOLE] / (whole - startup),
        "fill of rows": sum(manifest.tokens.values()) / (manifest.rows * manifest.seq_len),
    }
    if PARALLEL in spent:
        ratios[f"wall seconds of 1 rank / {RANKS} ranks"] = spent[ALONE].wall / spent[PARALLEL].wall
    if LARGE in spent:
        ratios["peak memory, large / not"] = spent[LARGE].peak / spent[WHOLE].peak
    main_ratio = "tokenizers / preparation"
    report(
        "preparation",
        rows,
        (main_ratio, ratios[main_ratio]),
        options,
        tokenizer=Path(options.tokenizer).name,
        repeats=options.repeats,
        cpu_seconds={case: [run.cpu for run in of_case] for case, of_case in runs.items()},
        ratios=ratios,
    )
    if not options.json:
        for what, ratio in list(ratios.items())[1:]:
            print(f"{what}: {ratio:.3g}")


def row(case: str, megabytes: float, spent: Spent) -> dict[str, Any]:
    """Of the table."""
    return {
        "what": case,
        "MB": megabytes,
        "CPU s": spent.cpu,
        "wall s": spent.wall,
        "MB / CPU s": megabytes / spent.cpu,
        "peak MB": spent.peak / 1e6,
    }


def middle(runs: Sequence[Spent]) -> Spent:
    """Medians."""
    columns = zip(*map(dataclasses.astuple, runs), strict=True)
    cpu, wall, peak = map(statistics.median, columns)
    return Spent(cpu, wall, int(peak))


def synthesise(corpus: Path, folder: Path, megabytes: float) -> float:
    """Write a file of each language, the same bytes of text in each; returns MB in all."""
    files = sorted(corpus.glob("*.jsonl.gz"))
    if not files:
        raise SystemExit(f"{corpus} has no LANG.jsonl.gz; name a folder of them with --corpus")
    folder.mkdir()
    total = 0
    for path in files:
        with gzip.open(path) as stream:
            texts = [orjson.loads(line)["text"] for line in stream]
        wanted = megabytes * 1e6 / len(files)
        number = written = 0
        with open(folder / path.name.removesuffix(".gz"), "wb") as stream:
            while written < wanted:
                text = f"{path.stem} {number} {texts[number % len(texts)]}"
                stream.write(orjson.dumps({"text": text}) + b"\n")
                number += 1
                written += len(text.encode())
        total += written
    return total / 1e6


def write_recipe(folder: Path, case: str, tokenizer: str) -> Path:
    """The recipe of a case; those that share a corpus have folders of their own."""
    corpus = folder / (ALONE if case == PARALLEL else case if (folder / case).exists() else WHOLE)
    prep = {
        "input": [f"{corpus}/*.jsonl"],
        "output_dir": f"{folder}/shards of {case}",
        "tokenizer": tokenizer,
        "smoothing": 1.0,
        "heldout_rows": 0,
    }
    path = folder / f"{case}.yaml"  # JSON is YAML
    path.write_text(json.dumps({"prep": prep}))
    return path


def output_dir(recipe: Path) -> Path:
    """Where a recipe's shards go."""
    return Path(json.loads(recipe.read_text())["prep"]["output_dir"])


def load_manifest(folder: Path) -> Manifest:
    """Of finished shards."""
    path = folder / MANIFEST
    return Manifest.from_json(path.read_text("utf-8"), where=str(path))


def prepare(recipe: Path, core: int | None, launcher: Sequence[str] = ()) -> Spent:
    """A whole preparation, on one core if it is given.

    Args:
        recipe: of `write_recipe`.
        core: to run on; None is any.
        launcher: of several ranks.
    """
    shutil.rmtree(output_dir(recipe), ignore_errors=True)
    command = [*launcher, sys.executable, "-m", "data_prep.build_shards", "--config", str(recipe)]
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=said,
            stderr=said,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )
        # Of this process and what it waited for; `subprocess` would not say.
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{command} left with {process.returncode}:\n{said.read()}")
    return Spent(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * 1024)


def alone(function: Callable[..., Spent], *arguments: object) -> Spent:
    """What a function of this module returns in a process of its own."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # before tokenizers is imported there
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn")
    ) as processes:
        return processes.submit(function, *arguments).result()


def encode(corpus: Path, source: str, is_ours: bool) -> Spent:
    """Encode all texts of a corpus, by `Tokenizer` or by `tokenizers`; only that is measured."""
    from data_prep.tokenizer import Tokenizer

    tokenizer = Tokenizer(source)
    cpu = wall = 0.0
    for batch in batches(corpus):
        started = cpu_seconds(), time.perf_counter()
        if is_ours:
            tokenizer.encode(batch)
        else:
            tokenizer._backend.encode_batch_fast(batch, add_special_tokens=False)
        cpu += cpu_seconds() - started[0]
        wall += time.perf_counter() - started[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Spent(cpu, wall, peak)


def batches(corpus: Path) -> Iterator[list[str]]:
    """All texts of the corpus's files, language after language."""
    batch: list[str] = []
    filled = 0
    for path in sorted(corpus.iterdir()):
        with open(path, "rb") as stream:
            for line in stream:
                batch.append(orjson.loads(line)["text"])
                filled += len(line)
                if filled > BATCH_BYTES:
                    yield batch
                    batch, filled = [], 0
    yield batch


if __name__ == "__main__":
    main()
