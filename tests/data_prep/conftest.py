from __future__ import annotations

import collections
import dataclasses
import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings

from data_prep import spill as spill_module
from data_prep.build_shards import build
from data_prep.config import Prep, PrepRecipe
from data_prep.ranks import OneRank
from data_prep.shards import Manifest
from data_prep.spill import Spills, spill, spill_path
from data_prep.tokenizer import Tokenizer
from tests.data_prep.pieces import Encode, encoder

settings.register_profile("patient", deadline=None)  # a busy machine is not a failure
settings.load_profile("patient")
REPO = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def teacher_dir() -> Path:
    return REPO / "models" / "pocket-teacher"


@pytest.fixture(scope="session")
def demo_text() -> str:
    """A glob of fifteen small files."""
    return str(REPO / "recipes" / "demo_text" / "*.jsonl")


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Real text; lies beside the repository where there is any."""
    folder = REPO.parent / "shared" / "data" / "corpus"
    if not folder.is_dir():
        pytest.skip(f"no real text at {folder}")
    return folder


@pytest.fixture(scope="session")
def tokenizer(teacher_dir: Path) -> Tokenizer:
    return Tokenizer(str(teacher_dir))


@pytest.fixture(scope="session")
def encode(teacher_dir: Path) -> Encode:
    return encoder(teacher_dir)


@pytest.fixture(scope="session")
def small_prep(demo_text: str, teacher_dir: Path) -> Prep:
    """Settings under which the demo text gives several shards of several blocks."""
    return Prep(
        input=[demo_text],
        tokenizer=str(teacher_dir),
        seq_len=64,
        heldout_rows=2,
        rows_per_block=8,
        blocks_per_shard=16,
    )


@pytest.fixture
def prepare(small_prep: Prep, tmp_path: Path) -> Callable[..., tuple[Path, Manifest]]:
    """Prepares in this process, as one rank; returns the folder and its manifest."""

    def run(*, seed: int = 1, append: bool = False, **changes: Any) -> tuple[Path, Manifest]:
        changes.setdefault("output_dir", str(tmp_path / "shards"))
        recipe = PrepRecipe(seed=seed, prep=dataclasses.replace(small_prep, **changes))
        build(recipe, OneRank(), append=append)
        return read_manifest(Path(changes["output_dir"]))

    return run


@pytest.fixture(scope="session")
def prepared(small_prep: Prep, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The demo text, prepared once; do not write into the folder."""
    folder = tmp_path_factory.mktemp("prepared") / "shards"
    build(PrepRecipe(prep=dataclasses.replace(small_prep, output_dir=str(folder))), OneRank())
    return read_manifest(folder)


def read_manifest(folder: Path) -> tuple[Path, Manifest]:
    path = folder / "manifest.json"
    return folder, Manifest.from_json(path.read_text(), where=str(path))


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """File name -> sha256 of everything that lies in a folder."""

    def of(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return of


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Iterable[Any]], Path]:
    """Writes records (bytes are written as they are) a line each, gzipped for a name in .gz."""

    def write(path: Path, records: Iterable[Any]) -> Path:
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
        data = b"".join(line + b"\n" for line in lines)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path

    return write


class _ThreadRank:
    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.size, self._barrier, self._slots = rank, size, barrier, slots

    def allgather(self, item: Any) -> list[Any]:
        self._slots[self.rank] = item
        self._barrier.wait(timeout=60)
        gathered = list(self._slots)
        self._barrier.wait(timeout=60)
        return gathered

    def abort(self, status: int) -> None:
        self._barrier.abort()


@pytest.fixture(scope="session")
def on_ranks() -> Callable[[int, Callable[[Any], Any]], list[Any]]:
    """Calls a function on ranks that are threads; returns what each returned or raised."""

    def run(size: int, function: Callable[[Any], Any]) -> list[Any]:
        barrier, slots, outcomes = threading.Barrier(size), [None] * size, [None] * size

        def call(rank: int) -> None:
            try:
                outcomes[rank] = function(_ThreadRank(rank, size, barrier, slots))
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    return run


@pytest.fixture(scope="session")
def command(repo: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m MODULE ...` as a user would, under mpirun where `ranks` is given."""

    def run(
        *arguments: str, ranks: int | None = None, prefix: Sequence[str] = (), **options: Any
    ) -> subprocess.CompletedProcess[str]:
        mpirun = [] if ranks is None else [str(mpirun_path()), "-n", str(ranks)]
        return subprocess.run(
            [*prefix, *mpirun, sys.executable, "-m", *arguments],
            cwd=repo,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **options,
        )

    return run


def mpirun_path() -> Path:
    path = Path(sys.executable).parent / "mpirun"
    if not path.exists():
        pytest.skip(f"no MPI launcher at {path}; `pip install mpich` brings one")
    return path


@pytest.fixture(scope="session")
def mpirun() -> Path:
    return mpirun_path()


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    # tests run beside each other: a pool as wide as the machine for each only gets in the way
    os.environ.setdefault("RAYON_NUM_THREADS", "1")


class Letters:
    """A tokenizer whose ids are characters, so that a test can read what became of a text.

    A word starts with the space before it, a sentence ends with its full stop. Tildes give no id.
    """

    cls_id, sep_id, pad_id = 1, 2, 0
    vocab_size = 1 << 16
    dtype = np.dtype(np.uint16)
    starts_word = np.arange(vocab_size) == ord(" ")
    ends_sentence = np.arange(vocab_size) == ord(".")

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        ids = [np.array([ord(c) for c in text if c != "~"], dtype=self.dtype) for text in texts]
        return np.concatenate([np.zeros(0, self.dtype), *ids]), np.array([*map(len, ids)], np.int64)

    def decode(self, ids: npt.NDArray[Any]) -> str:
        return "".join(map(chr, ids.tolist()))


@pytest.fixture(scope="session")
def letters() -> Any:
    return Letters()


class Strip:
    """A cleaner that takes white space from the ends, and excludes what an evaluation file says."""

    def __init__(self) -> None:
        self.excluded_by: collections.Counter[str] = collections.Counter()

    def __call__(self, language: str, text: str) -> tuple[str | None, str | None]:
        if text.startswith("evaluation"):
            self.excluded_by[f"{text}.jsonl"] += 1
            return None, "excluded"
        return (text.strip(), None) if text.strip() else (None, "empty")


@pytest.fixture(scope="session")
def strip() -> Any:
    return Strip()


@pytest.fixture(scope="session")
def spill_units(strip: Any) -> Callable[..., Spills]:
    """Spills units that are lists of (language, text) in place of files; None is broken."""

    def spill_all(
        work: Path,
        units: Sequence[Any],
        *,
        of: int = 4,
        seed: int = 1,
        prep: Prep | None = None,
        pools: Sequence[int] | None = None,
    ) -> Spills:
        def read_raw(unit: Any, prep: Prep, faults: list[Any]) -> Any:
            for language, text in unit.documents:
                yield language, text, 9 if text is None else len(text)

        work.mkdir(parents=True, exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spill_module, "read_raw", read_raw)
            for number, documents in enumerate(units):
                pool = 0 if pools is None else pools[number]
                source = types.SimpleNamespace(pool=pool)
                unit: Any = types.SimpleNamespace(source=source, documents=documents)
                spill(unit, spill_path(work, number), prep or Prep(), strip, of, seed)
        return Spills([spill_path(work, i) for i in range(len(units))], prep or Prep())

    return spill_all
