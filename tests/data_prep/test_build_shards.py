from __future__ import annotations

import collections
import contextlib
import dataclasses
import gzip
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import build_shards, spill
from data_prep.build_shards import build
from data_prep.claim import locked
from data_prep.clean import normalise
from data_prep.command import ConfigError
from data_prep.config import Prep, PrepRecipe
from data_prep.ranks import OneRank
from data_prep.shards import Manifest, ShardReader
from data_prep.verify import find_faults


def arguments(prep: Prep, **changes: Any) -> list[str]:
    """The command line that asks for these settings."""
    prep = dataclasses.replace(prep, **changes)
    given = {k: v for k, v in dataclasses.asdict(prep).items() if v is not None}
    words = [
        w
        for k, v in given.items()
        for w in (f"--prep.{k}", json.dumps(v) if k == "input" else str(v))
    ]
    return ["data_prep.build_shards", *words]


def rows_of(folder: Path, language: str | None = None) -> Iterator[list[list[int]]]:
    """Each row's segments, padding left out, by the format's description alone."""
    reader = ShardReader(str(folder))
    special = reader.manifest.special_ids
    for index in range(len(reader.blocks(language))):
        input_ids, cu_seqlens = reader.read_block(index, language=language)
        flat, seq_len = input_ids.reshape(-1).tolist(), input_ids.shape[1]
        rows: list[list[list[int]]] = [[] for _ in input_ids]
        for start, stop in itertools.pairwise(cu_seqlens.tolist()):
            segment = flat[start:stop]
            if segment[0] == special["pad"]:
                assert set(segment) == {special["pad"]}
                assert stop % seq_len == 0
            else:
                rows[start // seq_len].append(segment)
        yield from rows


def test_segments_are_pieces_of_the_normalised_documents_ids(
    prepared: tuple[Path, Manifest], repo: Path, teacher_dir: Path
) -> None:
    """Files, cleaning and ids are read here without any of the code under test."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    texts: dict[str, str] = {}
    for path in sorted((repo / "recipes" / "demo_text").glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        ids = tokenizer(
            [" ".join(unicodedata.normalize("NFC", json.loads(line)["text"]).split())
             for line in lines],
            add_special_tokens=False,
        )["input_ids"]  # fmt: skip
        texts[path.stem] = "|".join("," + ",".join(map(str, of)) + "," for of in ids)
    folder, manifest = prepared
    languages = iter(segment_languages(folder))
    tokens: collections.Counter[str] = collections.Counter()
    for row in rows_of(folder):
        for segment in row:
            language = next(languages)
            assert (segment[0], segment[-1]) == (0, 2)
            assert "," + ",".join(map(str, segment[1:-1])) + "," in texts[language]
            tokens[language] += len(segment)
    assert tokens == collections.Counter(manifest.tokens)
    assert manifest.rows > 100


def segment_languages(folder: Path) -> Iterator[str]:
    """The language of each segment to train on, by the blocks' JSON."""
    reader = ShardReader(str(folder))
    for index in range(len(reader.blocks())):
        names = reader.read_sample(index)[2]["segment_languages"]
        yield from (name for name in names if name is not None)


def test_each_segment_has_its_documents_language(prepare, repo: Path, teacher_dir: Path) -> None:
    """By the letters that they decode to, as Thai text has few Latin ones and English no Thai."""
    from transformers import AutoTokenizer

    texts = {name: repo / "recipes" / "demo_text" / f"{name}.jsonl" for name in ("en", "th")}
    folder, _ = prepare(input=[str(path) for path in texts.values()])
    tokenizer, reader = AutoTokenizer.from_pretrained(teacher_dir), ShardReader(str(folder))
    alphabets = {"en": re.compile("[a-zA-Z]"), "th": re.compile("[\u0e01-\u0e3a]")}
    seen: collections.Counter[str] = collections.Counter()
    for index in range(len(reader.blocks())):
        input_ids, cu_seqlens, meta = reader.read_sample(index)
        assert len(meta["segment_languages"]) == len(cu_seqlens) - 1
        bounds = itertools.pairwise(cu_seqlens.tolist())
        for (start, stop), language in zip(bounds, meta["segment_languages"], strict=True):
            ids = input_ids.reshape(-1)[start:stop].tolist()
            text = tokenizer.decode(ids, skip_special_tokens=True)
            letters = {name: len(of.findall(text)) for name, of in alphabets.items()}
            if language is None:
                assert set(ids) == {tokenizer.pad_token_id}
            elif sum(letters.values()) > 5:
                assert max(letters, key=lambda name: letters[name]) == language
                seen[language] += 1
    assert min(seen["en"], seen["th"]) > 20


def test_smoothing_1_gives_back_each_document_once(prepare, small_prep, teacher_dir, repo) -> None:
    """Without the plan: the segments' contents, joined in any order, are the corpus."""
    from transformers import AutoTokenizer

    folder, manifest = prepare(smoothing=1.0, heldout_rows=0)
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    expected: collections.Counter[int] = collections.Counter()
    for path in sorted((repo / "recipes" / "demo_text").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            text = normalise(json.loads(line)["text"])
            expected.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    found = [token for row in rows_of(folder) for segment in row for token in segment[1:-1]]
    assert collections.Counter(found) == expected
    assert not any("mixing" in what for counts in manifest.accounting.values() for what in counts)


def test_no_held_out_text_is_trained_on(prepared: tuple[Path, Manifest]) -> None:
    folder, manifest = prepared
    trained = {tuple(segment) for row in rows_of(folder) for segment in row if len(segment) > 8}
    for language, num_rows in manifest.heldout_rows.items():
        rows = list(rows_of(folder, language))
        assert len(rows) == num_rows == 2
        heldout = {tuple(segment) for row in rows for segment in row if len(segment) > 8}
        assert heldout
        assert not heldout & trained


def test_what_was_prepared_verifies(prepared: tuple[Path, Manifest]) -> None:
    folder, manifest = prepared
    assert not list(find_faults(folder))
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        "index",
        *(shard.name for shard in manifest.shards),
    }


RULES = ("broken", "empty", "normalised_away", "duplicate", "no_tokens", "mixing",
         "heldout_remainder", "train", "heldout")  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.3, 1.0])
def test_every_character_is_accounted_for(
    prepare, tmp_path: Path, write_jsonl, smoothing: float
) -> None:
    random_ = random.Random(7)

    def text(language: str, i: int) -> str:
        return f"{language} {i}: " + " ".join(random_.choices(["one", "two  ", "ü", "3"], k=30))

    records: list[Any] = [{"text": text("en", i), "lang": "en"} for i in range(150)]
    records += [{"text": text("sw", i), "lang": "sw"} for i in range(20)]
    records += [records[3], {**records[4], "lang": "sw"}, {"text": "only", "lang": "fr"}]
    records += [{"text": " \x00 ", "lang": "sw"}, {"text": "no language"}, {"text": "\u200b\u200b"}]
    records += [b"not json", b'{"text": "\xff"}', b'{"text": 1}', {"text": "odd", "lang": "/"}]
    write_jsonl(tmp_path / "in" / "de.jsonl.gz", records)
    (tmp_path / "in" / "und.txt").write_bytes(b"one\r\n\r\ntwo\n\n\xff\n\nthree")
    (tmp_path / "in" / "xx.txt").write_bytes(b"\n\n")
    _, manifest = prepare(
        input=[f"{tmp_path}/in/*"], smoothing=smoothing, heldout_rows=3, seq_len=32
    )
    accounting = manifest.accounting
    for language, counts in accounting.items():
        assert counts["chars_in"] == sum(counts.get(f"chars_{rule}", 0) for rule in RULES), language
        split = [counts.get(f"documents_{rule}", 0) for rule in RULES]
        assert counts["documents_in"] == sum(split), language
        assert set(counts) <= {"chars_in", "documents_in"} | {
            f"{what}_{rule}" for what in ("chars", "documents") for rule in RULES
        }
    assert accounting.keys() == {"en", "sw", "fr", "de", "und"}
    readable = [r for r in records if isinstance(r, dict)]
    in_english = sum(len(r["text"]) for r in readable if r.get("lang") == "en")
    assert accounting["en"]["chars_in"] == in_english
    assert accounting["de"]["documents_broken"] == 3
    assert accounting["de"]["chars_broken"] == sum(
        len(r) + 1 for r in records if isinstance(r, bytes)
    )
    assert accounting["und"]["chars_in"] == len("odd" + "one\r\n" + "two\n" + "x\n" + "three")
    for counts, rule in ((accounting["en"], "duplicate"), (accounting["sw"], "duplicate"),
                         (accounting["sw"], "empty"), (accounting["de"], "no_tokens"),
                         (accounting["en"], "normalised_away"),
                         (accounting["en"], "heldout_remainder")):  # fmt: skip
        assert counts[f"chars_{rule}"] > 0
    assert ("chars_mixing" in accounting["en"]) == (smoothing < 1)


@pytest.mark.parametrize("seq_len", [128, 512])
def test_real_text_fills_rows(
    prepare, corpus: Path, tmp_path: Path, write_jsonl, seq_len: int
) -> None:
    for language in ("sw", "th"):
        with gzip.open(corpus / f"{language}.jsonl.gz") as lines:
            some = [json.loads(line) for line in itertools.islice(lines, 250)]
        write_jsonl(tmp_path / "in" / f"{language}.jsonl", some)
    folder, manifest = prepare(
        input=[f"{tmp_path}/in/*"],
        seq_len=seq_len,
        smoothing=1.0,
        heldout_rows=5,
    )
    assert set(manifest.heldout_rows.values()) == {5}
    assert sum(manifest.tokens.values()) / (manifest.rows * manifest.seq_len) >= 0.99
    for counts in manifest.accounting.values():
        assert counts["chars_in"] == sum(counts.get(f"chars_{rule}", 0) for rule in RULES)
    assert not list(find_faults(folder))


def test_one_long_document_is_enough(prepare, tmp_path: Path, write_jsonl) -> None:
    path = write_jsonl(tmp_path / "en.jsonl", [{"text": "word " * 1000}])
    folder, manifest = prepare(input=[str(path)], heldout_rows=2)
    assert manifest.heldout_rows == {"en": 0}
    assert manifest.rows > 1
    assert not list(find_faults(folder))


def test_no_text_at_all_is_refused(prepare, tmp_path: Path, write_jsonl) -> None:
    path = write_jsonl(tmp_path / "en.jsonl", [{"body": "text"}])
    with pytest.raises(ConfigError, match=r"no text .* prep\.text_key='text'"):
        prepare(input=[str(path)])
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_the_same_again_does_nothing(prepare, digests, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = prepare()
    before, times = digests(folder), [path.stat().st_mtime_ns for path in folder.iterdir()]
    prepare()
    assert "already prepared" in capsys.readouterr().out
    assert digests(folder) == before
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == times


def test_what_was_finished_is_not_done_again(
    prepare, prepared, tmp_path: Path, digests, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_shards, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    out = tmp_path / "shards"
    shards = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    (again := out / "train-000001.tar").unlink()
    (out / ".work" / "train-000001.json").unlink()
    (out / ".work" / "write.done").unlink()
    prepare()
    assert digests(out) == digests(prepared[0])
    kept = {path.name: path.stat().st_ino for path in out.glob("*.tar") if path != again}
    assert kept.items() <= shards.items()


def test_a_kill_after_the_manifest_leaves_nothing_behind(
    prepare, prepared, tmp_path: Path, digests
) -> None:
    out = Path(shutil.copytree(prepared[0], tmp_path / "out"))
    (out / ".work").mkdir()
    (out / ".work" / "read-000000").touch()
    (out / ".lock").touch()
    prepare(output_dir=str(out))
    assert digests(out) == digests(prepared[0])
    assert not (out / ".work").exists()


@pytest.mark.parametrize(
    "changes", [{"seed": 2}, {"seq_len": 32}, {"smoothing": 1.0}, {"heldout_rows": 1}]
)
def test_other_settings_overwrite_nothing(
    prepare, prepared, digests, changes: dict[str, Any]
) -> None:
    folder = prepared[0]
    before = digests(folder)
    with pytest.raises(ConfigError, match="other text or settings"):
        prepare(output_dir=str(folder), **changes)
    assert digests(folder) == before


def test_other_text_overwrites_nothing(prepare, tmp_path: Path, write_jsonl, digests) -> None:
    path = write_jsonl(tmp_path / "en.jsonl", [{"text": f"text {i}"} for i in range(20)])
    folder, _ = prepare(input=[str(path)])
    before = digests(folder)
    write_jsonl(path, [{"text": f"other text {i}"} for i in range(20)])
    with pytest.raises(ConfigError, match="other text or settings"):
        prepare(input=[str(path)])
    assert digests(folder) == before


def test_a_copy_of_the_text_elsewhere_gives_the_same_bytes(
    prepare, prepared: tuple[Path, Manifest], repo: Path, tmp_path: Path, digests
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for path in (repo / "recipes" / "demo_text").glob("*.jsonl"):
        (tmp_path / "elsewhere" / path.name).write_bytes(path.read_bytes())
    folder, _ = prepare(input=[f"{tmp_path}/elsewhere/{x}*.jsonl" for x in ("[n-z]", "[a-m]")])
    assert digests(folder) == digests(prepared[0])


def test_rows_do_not_depend_on_how_text_is_spread_over_files(
    prepare, tmp_path: Path, write_jsonl, digests
) -> None:
    records = [{"text": f"text {i} {i * 7919 % 101}", "lang": "en"} for i in range(200)]
    write_jsonl(tmp_path / "one" / "a.jsonl", records)
    for part in range(3):
        write_jsonl(tmp_path / "many" / f"{part}.jsonl", records[::-1][part::3])
    one, many = (
        digests(
            prepare(input=[f"{tmp_path}/{name}/*"], output_dir=str(tmp_path / f"{name}-out"))[0]
        )
        for name in ("one", "many")
    )
    del one["manifest.json"], many["manifest.json"]  # names the files
    assert one == many


@pytest.mark.parametrize("size", [2, 5])
def test_any_number_of_ranks_gives_the_same_bytes(
    on_ranks, prepared, small_prep: Prep, tmp_path: Path, digests, size: int
) -> None:
    recipe = PrepRecipe(prep=dataclasses.replace(small_prep, output_dir=str(tmp_path / "out")))
    assert on_ranks(size, lambda ranks: build(recipe, ranks)) == [None] * size
    assert digests(tmp_path / "out") == digests(prepared[0])


def test_merging_spills_changes_no_byte(
    on_ranks, prepared, small_prep: Prep, tmp_path: Path, digests, monkeypatch
) -> None:
    monkeypatch.setattr(spill, "FEW_SPILLS", 4)
    monkeypatch.setattr(spill, "MERGED_UNITS", 4)
    out = tmp_path / "shards"
    recipe = PrepRecipe(prep=dataclasses.replace(small_prep, output_dir=str(out)))
    merge_spills, merged = spill.merge_spills, []

    def ends_between(paths, path, prep) -> None:
        merged.append(path.name)
        merge_spills(paths, path, prep)
        if len(merged) == 2:  # the second file is there, as one of the units that it is made of is
            paths[0].write_bytes(b"of an earlier start")
            raise KeyboardInterrupt

    monkeypatch.setattr(build_shards, "merge_spills", ends_between)
    with pytest.raises(KeyboardInterrupt):
        build(recipe, OneRank())
    assert on_ranks(2, lambda ranks: build(recipe, ranks)) == [None] * 2
    assert set(merged) == {f"read-merged-{group:06d}" for group in range(4)}
    assert digests(out) == digests(prepared[0])


def test_ranks_with_different_tokenizers_are_refused(
    on_ranks, small_prep: Prep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(build_shards.Tokenizer):
        number = 0

        def __init__(self, source: str) -> None:
            super().__init__(source)
            Odd.number += 1
            self.fingerprint = f"{Odd.number}"

    monkeypatch.setattr(build_shards, "Tokenizer", Odd)
    recipe = PrepRecipe(prep=dataclasses.replace(small_prep, output_dir=str(tmp_path / "out")))
    outcomes = on_ranks(2, lambda ranks: build(recipe, ranks))
    assert all(
        isinstance(o, ConfigError) and "not the same on every rank" in str(o) for o in outcomes
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_mpirun_gives_the_same_bytes(
    command, prepared, small_prep: Prep, tmp_path: Path, digests, ranks: int
) -> None:
    out = tmp_path / "out"
    done = command(*arguments(small_prep, output_dir=str(out)), ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows of 64 tokens") == 1
    assert digests(out) == digests(prepared[0])


def test_killed_at_any_moment_and_started_again(
    repo: Path, small_prep: Prep, tmp_path: Path
) -> None:
    settings = dataclasses.asdict(dataclasses.replace(small_prep, blocks_per_shard=4))
    del settings["output_dir"]
    settings["input"] = [str(repo / "recipes" / "demo_text" / "[es]*.jsonl")]
    program = str(Path(__file__).with_name("killed.py"))
    done = subprocess.run(
        [sys.executable, program, "10", "1", json.dumps(settings), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(repo), "RAYON_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, waiting = [], [pid]
    while waiting:
        waiting += (more := children.get(waiting.pop(), []))
        found += more
    return found


def test_killed_ranks_are_gone_on_from_by_another_number_of_them(
    prepare, mpirun: Path, repo: Path, small_prep: Prep, tmp_path: Path, digests
) -> None:
    changes = {"rows_per_block": 2, "blocks_per_shard": 1}  # many files: time to be killed in
    whole, _ = prepare(output_dir=str(tmp_path / "whole"), **changes)
    num_files = len(list(whole.iterdir()))
    out = tmp_path / "out"
    words = arguments(small_prep, output_dir=str(out), **changes)
    random_ = random.Random(3)
    for num_ranks in (2, 3):
        enough = random_.randrange(num_files // 2)
        process = subprocess.Popen(
            [mpirun, "-n", str(num_ranks), sys.executable, "-m", *words],
            cwd=repo,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and len(list(out.glob("*.tar"))) <= enough:
            time.sleep(0.001)
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        assert not (out / "manifest.json").exists(), "killed too late to test anything"
    deadline = time.monotonic() + 20
    while True:  # the dead hold the lock until the kernel has buried them
        try:
            prepare(output_dir=str(out), **changes)
            break
        except ConfigError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert digests(out) == digests(whole)


def truncated(tmp_path: Path) -> Path:
    lines = "".join(json.dumps({"text": f"{i} {i * 7919 % 1013}"}) + "\n" for i in range(2000))
    path = tmp_path / "en.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode())[:-100])
    return path


@pytest.mark.parametrize("ranks", [None, 2])
@pytest.mark.parametrize(
    ("changes", "more", "status", "said"),
    [
        ({}, ["--prep.seqlen", "3"], 2, "unknown key 'prep.seqlen'"),
        ({"seq_len": "wide"}, [], 2, "prep.seq_len: expected int"),
        ({"input": ["none/*.jsonl"]}, [], 2, "prep.input='none/*.jsonl' matches no file"),
        (
            {"input": [truncated], "on_error": "stop"},
            [],
            1,
            "en.jsonl.gz has a fault at 8742: a gz file that was cut off",
        ),
    ],
)
def test_refusals_and_failures_are_one_line_and_a_status(
    command,
    small_prep: Prep,
    tmp_path: Path,
    ranks: int | None,
    changes: dict[str, Any],
    more: list[str],
    status: int,
    said: str,
) -> None:
    if changes.get("input") == [truncated]:
        changes = {**changes, "input": [str(truncated(tmp_path))]}
    words = arguments(small_prep, output_dir=str(tmp_path / "out"), **changes)
    done = command(*words, *more, ranks=ranks)
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert done.stdout == ""
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("kib", "what"), [(4, ".work/read-"), (150, ".work/tokens-"), (300, "train-000000.tar")]
)
def test_a_full_disk_is_one_line_and_what_was_done_is_gone_on_from(
    command, prepare, small_prep: Prep, tmp_path: Path, digests, kib: int, what: str
) -> None:
    out, one_shard = tmp_path / "out", {"blocks_per_shard": 1000}
    limit = ["bash", "-c", f'ulimit -f {kib}; exec "$0" "$@"']
    done = command(*arguments(small_prep, output_dir=str(out), **one_shard), prefix=limit)
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()  # before it: no room for compiled code either
    assert f"{out}/{what}" in line
    assert "cannot be written (File too large)" in line
    assert not list(out.rglob("*.partial"))
    whole, _ = prepare(**one_shard)
    prepare(output_dir=str(out), **one_shard)
    assert digests(out) == digests(whole)


def test_two_preparations_at_once(command, prepare, small_prep: Prep, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out, OneRank()):
        done = command(*arguments(small_prep, output_dir=str(out)))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"another preparation is writing to prep.output_dir={out}" in line
    assert os.listdir(out) == [".lock"]
    prepare(output_dir=str(out))
    assert not list(find_faults(out))


def test_the_rank_that_knows_why_is_heard_before_the_launcher_ends_it(
    mpirun: Path, repo: Path, small_prep, tmp_path: Path
) -> None:
    program = (
        "import runpy, time\n"
        "from data_prep import command\n"
        "one_line = command.one_line\n"
        "command.one_line = lambda error: (time.sleep(3), one_line(error))[1]\n"
        "runpy.run_module('data_prep.build_shards', run_name='__main__')\n"
    )
    changes = {
        "input": [str(truncated(tmp_path))],
        "output_dir": str(tmp_path / "out"),
        "on_error": "stop",
    }
    done = subprocess.run(
        [mpirun, "-n", "2", sys.executable, "-c", program, *arguments(small_prep, **changes)[1:]],
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "en.jsonl.gz has a fault at 8742" in done.stderr


def test_a_bug_on_one_rank_ends_all_of_them(mpirun: Path, repo: Path, small_prep, tmp_path) -> None:
    program = (
        "import sys\n"
        "from data_prep import build_shards, ranks\n"
        "from data_prep.command import run_command\n"
        "rank = ranks.launched_rank()\n"
        "if rank == 1:\n"
        "    build_shards.spill = lambda *_: 1 // 0\n"
        "run_command(build_shards.main, rank=rank, leave=sys.exit)\n"
    )
    words = arguments(small_prep, output_dir=str(tmp_path / "out"))[1:]
    done = subprocess.run(
        [mpirun, "-n", "2", sys.executable, "-c", program, *words],
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
