from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import pytest

from data_prep.block_cache import ROOM, SUFFIX, BlockCache
from data_prep.command import ConfigError

NAMES = [f"sha-{number}" for number in range(40)]


def blocks_in(folder: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_size for path in folder.glob(f"*{SUFFIX}")}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each use of a block is a second later than the one before, however coarse file times are."""
    plain, now = os.utime, [0]

    def tick(path: Path) -> None:
        now[0] += 1
        plain(path, (now[0], now[0]))

    monkeypatch.setattr(os, "utime", tick)


def test_what_was_put_is_got_also_by_another_process(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "new" / "cache", 1000)
    assert cache.get("a") is None
    cache.put("a", b"one")
    assert cache.get("a") == b"one"
    cache.put("a", b"three")
    assert BlockCache(tmp_path / "new" / "cache", 1000).get("a") == b"three"


def test_the_least_recently_used_goes_first(tmp_path: Path, clock: None) -> None:
    """Against a plain model of the rule, for random uses."""
    cache, bound, draw = BlockCache(tmp_path, 1000), 1000, random.Random(1)
    model: OrderedDict[str, int] = OrderedDict()
    for _ in range(400):
        name = draw.choice(NAMES)
        if cache.get(name) is not None:
            assert name in model
            model.move_to_end(name)
            continue
        assert name not in model
        size = draw.randrange(1, 200)
        if sum(model.values()) + size > bound:
            target = bound - max(size, int(bound * ROOM))
            while sum(model.values()) > target:
                model.popitem(last=False)
        cache.put(name, b"x" * size)
        os.utime(tmp_path / (name + SUFFIX))
        model[name] = size
        assert blocks_in(tmp_path) == dict(model)
        assert sum(model.values()) <= bound


def test_what_does_not_fit_is_not_kept(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 10)
    cache.put("small", b"x" * 10)
    cache.put("large", b"x" * 11)
    assert blocks_in(tmp_path) == {"small": 10}


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_bytes(b"x" * 5000)
    cache = BlockCache(tmp_path, 100)
    for number in range(50):
        cache.put(str(number), b"x" * 30)
    assert (tmp_path / "thesis.tex").stat().st_size == 5000
    assert sum(blocks_in(tmp_path).values()) <= 100


@pytest.mark.parametrize("damage", ["", "7", "nonsense", "0" * 20])
def test_a_torn_count_is_made_anew(tmp_path: Path, damage: str) -> None:
    cache = BlockCache(tmp_path, 100)
    for number in range(3):
        cache.put(str(number), b"x" * 30)
    (tmp_path / ".total").write_text(damage)
    if damage == "0" * 20:  # no count can tell: a new process counts
        cache = BlockCache(tmp_path, 100)
    for number in range(3, 20):
        cache.put(str(number), b"x" * 30)
        assert sum(blocks_in(tmp_path).values()) <= 100


def test_a_smaller_bound_is_kept_from_the_start(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 100)
    for number in range(3):
        cache.put(str(number), b"x" * 30)
    BlockCache(tmp_path, 50)
    assert list(blocks_in(tmp_path).values()) == [30]


SCRIPT = """
import random, sys
from pathlib import Path
from data_prep.block_cache import BlockCache

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
cache, draw = BlockCache(folder, 20_000), random.Random(seed)
for _ in range(600):
    name = draw.randrange(60)
    expected = bytes([name]) * (400 + 10 * name)
    found = cache.get(str(name))
    assert found is None or found == expected, name
    if found is None:
        cache.put(str(name), expected)
"""


def test_processes_share_it_and_never_see_half_a_block(tmp_path: Path, repo: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(repo)}
    running = [subprocess.Popen([*command, str(seed)], env=env) for seed in range(3)]
    largest = 0
    while any(process.poll() is None for process in running):
        sizes = []
        for path in tmp_path.glob(f"*{SUFFIX}"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        largest = max(largest, len(sizes))
    assert [process.returncode for process in running] == [0, 0, 0]
    assert largest > 10
    kept = sum(blocks_in(tmp_path).values())
    assert 10_000 < kept <= 20_000
    assert int((tmp_path / ".total").read_text()) == kept


def test_threads_share_it(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 5000)

    def use(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(200):
            cache.put(str(draw.randrange(50)), b"x" * 200)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = sum(blocks_in(tmp_path).values())
    assert 0 < kept <= 5000
    assert int((tmp_path / ".total").read_text()) == kept


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.cache_dir=.*file.*cannot be written"):
        BlockCache(tmp_path / "file", 10)


def test_a_folder_that_stops_taking_blocks_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = BlockCache(tmp_path, 1000)
    cache.put("a", b"one")

    def write_bytes(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    cache.put("b", b"two")
    cache.put("c", b"three")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: data.cache_dir={tmp_path} cannot be written (No space left")
    assert (cache.get("a"), cache.get("b")) == (b"one", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".total", "a.block"]
