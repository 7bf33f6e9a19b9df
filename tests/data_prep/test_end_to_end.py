from __future__ import annotations

import collections
import csv
import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tenacity

from data_prep import build_shards
from data_prep.build_shards import build, main
from data_prep.command import run_command
from data_prep.config import Prep, PrepRecipe
from data_prep.ranks import OneRank
from data_prep.shards import Manifest, ShardReader
from data_prep.verify import find_faults
from tests.data_prep.flaky_http import flaky_server
from tests.data_prep.hostile import normal
from tests.data_prep.pieces import Encode, Pieces, assert_is_made_of, segments_of
from tests.data_prep.test_sources import bucket  # noqa: F401  (a fixture)

Prepare = Callable[..., tuple[Path, Manifest]]
NATURAL: dict[str, Any] = {"smoothing": 1.0, "heldout_rows": 0}


def documents(folder: Path) -> dict[str, list[str]]:
    """File's stem -> its clean documents."""
    return {
        path.stem: [
            normal(json.loads(line)["text"])
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        for path in sorted(folder.glob("*.jsonl"))
    }


@pytest.fixture(scope="module")
def demo(repo: Path) -> dict[str, list[str]]:
    return documents(repo / "recipes" / "demo_text")


def assert_holds(folder: Path, expected: dict[str, Iterable[str]], encode: Encode) -> None:
    """The rows hold these documents of each language, as often as they are named, and no other."""
    wholes = {name: [*map(encode, texts)] for name, texts in expected.items() if texts}
    assert_is_made_of(wholes, segments_of(folder))


def invented(random_: random.Random, count: int, words: int = 40) -> list[str]:
    """Different documents without two runs of words in common."""
    letters = "aeghiklmnoprstu"
    return [
        " ".join("".join(random_.choices(letters, k=random_.randrange(2, 9))) for _ in range(words))
        for _ in range(count)
    ]


# One setting each, with an expectation of its own


def test_short_documents_go(prepare: Prepare, demo, encode: Encode) -> None:
    lengths = sorted(len(text) for texts in demo.values() for text in texts)
    least = lengths[len(lengths) // 2]
    folder, manifest = prepare(**NATURAL, min_chars=least)
    kept = {name: [text for text in texts if len(text) >= least] for name, texts in demo.items()}
    assert_holds(folder, kept, encode)
    for name, texts in demo.items():
        gone = len(texts) - len(kept[name])
        assert manifest.accounting[name].get("documents_short", 0) == gone
    assert sum(map(len, kept.values())) > 200


def test_repetitive_documents_go(
    prepare: Prepare, tmp_path: Path, write_jsonl, encode: Encode
) -> None:
    random_ = random.Random(1)
    texts = invented(random_, 30)
    texts += [f"{text} " + f"{text[:60]} " * random_.randrange(1, 9) for text in texts]
    write_jsonl(tmp_path / "xx.jsonl", [{"text": text} for text in texts])
    folder, _ = prepare(**NATURAL, input=[f"{tmp_path}/xx.jsonl"], max_repetition=0.3)
    kept = [text for text in map(normal, texts) if repeated(text) <= 0.3]
    assert 30 < len(kept) < 50
    assert_holds(folder, {"xx": kept}, encode)


def repeated(text: str) -> float:
    runs = [text[i : i + 32] for i in range(len(text) - 31)]
    return 1 - len(set(runs)) / len(runs)


def test_documents_under_a_wrong_label_go(
    prepare: Prepare, demo, tmp_path: Path, write_jsonl, encode: Encode
) -> None:
    pytest.importorskip("pycld2")
    pytest.importorskip("langcodes")
    names = ("en", "ru", "th", "fr")
    right = {name: [text for text in demo[name] if len(text) >= 200][:8] for name in names}
    wrong = {name: [text for text in demo[name] if len(text) >= 200][8:12] for name in names}
    label = dict(zip(names, ("ru", "th_TH", "fr", "eng_Latn"), strict=True))
    records = [{"text": text, "lang": name} for name in names for text in right[name]]
    records += [{"text": text, "lang": label[name]} for name in names for text in wrong[name]]
    records += [{"text": text[:150], "lang": label[name]} for name in names for text in wrong[name]]
    write_jsonl(tmp_path / "in.jsonl", records)
    folder, _ = prepare(**NATURAL, input=[f"{tmp_path}/in.jsonl"], check_language=True)
    kept: dict[str, list[str]] = {**right}
    for name in names:  # too short to be judged
        kept[label[name]] = [
            *kept.get(label[name], []),
            *(normal(text[:150]) for text in wrong[name]),
        ]
    assert_holds(folder, kept, encode)


def test_evaluation_text_goes(prepare: Prepare, tmp_path: Path, write_jsonl, encode) -> None:
    random_ = random.Random(2)
    evaluation, kept, texts = invented(random_, 20), list[str](), list[str]()
    for number, text in enumerate(invented(random_, 60)):
        words, size = text.split(), 6 + number % 5  # of 8 and more words in a row it knows
        question = evaluation[number % 20].split()
        start = random_.randrange(len(question) - size)
        words[number % 30 : number % 30] = [w.upper() for w in question[start : start + size]]
        texts.append(" ".join(words))
        if size < 8:
            kept.append(texts[-1])
    with (tmp_path / "evaluation.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([[number, text] for number, text in enumerate(evaluation)])
    write_jsonl(tmp_path / "xx.jsonl", [{"text": text} for text in texts])
    changes = {**NATURAL, "input": [f"{tmp_path}/xx.jsonl"], "exclude_ngram": 8}
    folder, manifest = prepare(**changes, exclude=[f"{tmp_path}/*.csv"])
    assert len(kept) == 24
    assert_holds(folder, {"xx": kept}, encode)
    assert manifest.accounting["xx"]["documents_excluded"] == 36
    moved = tmp_path / "moved" / "exam.csv"  # the same text elsewhere is the same setting
    moved.parent.mkdir()
    shutil.move(tmp_path / "evaluation.csv", moved)
    assert prepare(**changes, exclude=[str(moved)])[1] == manifest
    moved.write_text(moved.read_text() + "another,text of eight words or more than these are\n")
    with pytest.raises(build_shards.ConfigError, match="other text or settings"):
        prepare(**changes, exclude=[str(moved)])


def test_weights_and_what_they_leave_out(prepare: Prepare, tmp_path, write_jsonl, encode) -> None:
    texts = dict(zip("abc", (invented(random.Random(i), 400) for i in range(3)), strict=True))
    for name, of_language in texts.items():
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", [{"text": text} for text in of_language])
    folder, manifest = prepare(**NATURAL, input=[f"{tmp_path}/in/*"], weights={"a": 3.0, "c": 0.0})
    segments = segments_of(folder)
    assert segments.keys() == {"a", "b"}
    assert manifest.tokens["a"] / manifest.tokens["b"] == pytest.approx(3, rel=0.02)
    assert manifest.accounting["c"]["documents_mixing"] == 400
    # a: each document once, about half of them twice; b: about half of them, once
    for name, (once, more) in {"a": (400, 200), "b": (0, 200)}.items():
        pieces, wholes = Pieces(segments[name]), [*map(encode, texts[name])]
        if once:
            assert all(pieces.take(whole) for whole in wholes)
        assert sum(pieces.take(whole) for whole in wholes) == pytest.approx(more, abs=20)
        assert not pieces.number


def test_sources_have_weights_within_their_language(
    prepare: Prepare, tmp_path, write_jsonl, encode: Encode, capsys
) -> None:
    good, plain, bad = (invented(random.Random(i), 300) for i in range(3))
    both = invented(random.Random(3), 50)  # a text in two sources is there for the larger weight
    for name, texts in (("good/en", good + both), ("en", plain + both), ("bad/en", bad + both)):
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", [{"text": text} for text in texts])
    write_jsonl(tmp_path / "in" / "sw.jsonl", [{"text": text} for text in plain[:9] + good[:9]])
    weights = {f"{tmp_path}/in/good/*": 3.0, f"{tmp_path}/in/**/bad/*": 0.0}
    folder, manifest = prepare(
        **NATURAL, input=[f"{tmp_path}/in/**/*.jsonl"], source_weights=weights
    )
    table = capsys.readouterr().out
    segments = segments_of(folder)
    assert manifest.accounting["en"]["documents_mixing"] > 300
    assert segments.keys() == {"en"}  # which keeps what stands under both
    # 350 documents thrice as often as 300, as many in all as the two have: 1.44 and 0.48 times
    pieces = Pieces(segments["en"])
    assert all(pieces.take(encode(text)) for text in good + both)
    again = sum(pieces.take(encode(text)) for text in good + both)
    assert again == pytest.approx(0.444 * 350, abs=25)
    assert sum(pieces.take(encode(text)) for text in plain) == pytest.approx(0.481 * 300, abs=25)
    assert not pieces.number  # nothing of what weighs 0
    for label, times in (("good/*", "1.4."), ("other files", "0.48"), ("bad/*", "0.00")):
        assert re.search(rf"{re.escape(label)} .* {times}$", table, re.MULTILINE), table


def test_a_poor_language_is_repeated_so_often_at_most(
    prepare: Prepare, tmp_path: Path, write_jsonl, encode: Encode
) -> None:
    rich, poor = invented(random.Random(1), 300), invented(random.Random(2), 10)
    write_jsonl(tmp_path / "in" / "rich.jsonl", [{"text": text} for text in rich])
    write_jsonl(tmp_path / "in" / "poor.jsonl", [{"text": text} for text in poor])
    folder, _ = prepare(smoothing=0.0, heldout_rows=0, input=[f"{tmp_path}/in/*"], max_repeats=3.0)
    segments = segments_of(folder)
    assert_is_made_of({"poor": [encode(t) for t in poor] * 3}, {"poor": segments["poor"]})
    pieces = Pieces(segments["rich"])
    taken = sum(pieces.take(encode(text)) for text in rich)
    assert not pieces.number
    assert taken == pytest.approx(300 - 20, abs=5)  # gives up what poor has beyond its ten


def test_max_tokens_takes_whole_documents(
    prepare: Prepare, tmp_path: Path, write_jsonl, encode: Encode
) -> None:
    texts = invented(random.Random(3), 2000)
    write_jsonl(tmp_path / "xx.jsonl", [{"text": text} for text in texts])
    folder, manifest = prepare(**NATURAL, input=[f"{tmp_path}/xx.jsonl"], max_tokens=50_000)
    assert 49_000 < manifest.tokens["xx"] < 51_000  # cuts that fill rows have frames as well
    pieces = Pieces(segments_of(folder)["xx"])
    taken = sum(pieces.take(encode(text)) for text in texts)
    assert not pieces.number
    assert taken == manifest.accounting["xx"]["documents_train"]
    assert 2000 - taken == manifest.accounting["xx"]["documents_mixing"]


def test_appending_keeps_every_document_whole(
    prepare: Prepare, demo: dict[str, list[str]], repo: Path, encode: Encode
) -> None:
    """Those, too, of the short last block, whose rows are taken over."""
    for number, names in enumerate((("en", "th"), ("th", "sw"), ("ar", "sw"))):
        files = [f"{repo}/recipes/demo_text/{name}.jsonl" for name in names]
        folder, manifest = prepare(**NATURAL, input=files, append=number > 0)
    assert manifest.generation == 3
    assert_holds(folder, {name: demo[name] for name in ("en", "th", "sw", "ar")}, encode)
    assert not list(find_faults(folder))


# The same bytes, whatever happens


@pytest.fixture(scope="module")
def everything(demo: dict[str, list[str]], tmp_path_factory, teacher_dir: Path) -> Prep:
    """All settings at once, and text that each of them finds something in."""
    folder, random_ = tmp_path_factory.mktemp("everything"), random.Random(9)
    (folder / "in").mkdir()
    taken = {name: demo[name] for name in ("en", "sw", "ru")}
    for number in range(4):
        lines = []
        for name, texts in taken.items():
            for text in random_.sample(texts, 30):
                words = text.split()
                words[random_.randrange(len(words))] = "changed"
                lines.append({"text": " ".join(words), "lang": name})
            whole = random_.choice(texts)
            lines.append({"text": f"{whole}\nA line that stands in many documents.\n{number}"})
            lines.append({"text": whole * 3, "lang": random_.choice([*taken])})
        path = folder / "in" / f"{number}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no JSON\n")
    (folder / "exam.txt").write_text("\n\n".join(taken["en"][:3]))
    return Prep(
        input=[f"{folder}/in/*"],
        tokenizer=str(teacher_dir),
        seq_len=64,
        heldout_rows=2,
        rows_per_block=8,
        blocks_per_shard=4,
        min_chars=20,
        max_repetition=0.3,
        check_language=True,
        dedup_lines=True,
        near_duplicates=0.8,
        exclude=[str(folder / "exam.txt")],
        weights={"ru": 2.0},
        source_weights={f"{folder}/in/[02].jsonl": 2.5},
        max_tokens=12_000,
        max_repeats=3.0,
    )


@pytest.fixture(scope="module")
def one_rank(everything: Prep, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "out"
    build(PrepRecipe(prep=dataclasses.replace(everything, output_dir=str(folder))), OneRank())
    return folder


def test_everything_at_once_finds_something_and_verifies(one_rank: Path) -> None:
    manifest = ShardReader(str(one_rank)).manifest
    total: collections.Counter[str] = collections.Counter()
    for counts in manifest.accounting.values():
        total.update(counts)
        for what in ("chars", "documents"):
            split = sum(n for key, n in counts.items() if key.startswith(f"{what}_"))
            assert split == 2 * counts[f"{what}_in"]
    for rule in ("broken", "repetitive", "excluded", "near_duplicate", "duplicate_line",
                 "heldout", "mixing", "train"):  # fmt: skip
        assert total[f"chars_{rule}"] > 0, rule
    assert not list(find_faults(one_rank))


def test_mpirun_with_four_ranks_gives_the_same_bytes(
    command, everything: Prep, one_rank: Path, tmp_path: Path, digests
) -> None:
    settings = dataclasses.replace(everything, output_dir=str(tmp_path / "out"))
    recipe = tmp_path / "recipe.json"  # which is YAML as well
    recipe.write_text(json.dumps({"prep": dataclasses.asdict(settings)}))
    done = command("data_prep.build_shards", "--config", str(recipe), ranks=4)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == digests(one_rank)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_give_the_same_bytes_when_they_append(
    on_ranks, everything: Prep, tmp_path: Path, digests, size: int
) -> None:
    first, *rest = sorted(map(str, Path(everything.input[0]).parent.iterdir()))
    folders = [tmp_path / "one", tmp_path / "many"]
    for folder, number in zip(folders, (1, size), strict=True):
        for files, append in (([first], False), (rest, True)):
            prep = dataclasses.replace(everything, input=files, output_dir=str(folder))

            def work(ranks: Any, prep: Prep = prep, append: bool = append) -> None:
                build(PrepRecipe(prep=prep), ranks, append=append)

            assert on_ranks(number, work) == [None] * number
    assert digests(folders[0]) == digests(folders[1])
    assert ShardReader(str(folders[0])).manifest.generation == 2
    assert {path.name for path in folders[0].glob("faults*")} == {
        "faults.jsonl",
        "faults-000002.jsonl",
    }
    assert not list(find_faults(folders[0]))


@pytest.mark.parametrize(("appended", "num_rounds"), [(False, 5), (True, 3)])
def test_killed_at_any_moment_with_everything_on(
    everything: Prep, repo: Path, tmp_path: Path, appended: bool, num_rounds: int
) -> None:
    # without what takes long to load, and with few files: every round prepares three times
    quick = dataclasses.replace(
        everything, check_language=False, exclude=[], rows_per_block=32, blocks_per_shard=1
    )
    settings = dataclasses.asdict(quick)
    del settings["output_dir"]
    first, *rest = sorted(map(str, Path(everything.input[0]).parent.iterdir()))
    base = []
    if appended:
        settings["input"], base = rest, [json.dumps([first])]
    program = str(Path(__file__).with_name("killed.py"))
    done = subprocess.run(
        [sys.executable, program, str(num_rounds), "7", json.dumps(settings), str(tmp_path), *base],
        env={**os.environ, "PYTHONPATH": str(repo), "RAYON_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_faults_of_text_that_was_given_up_are_forgotten(
    prepare: Prepare, tmp_path: Path, write_jsonl, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "en.jsonl", [{"text": "one"}, b"no JSON"])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_shards, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(input=[str(path)])
    assert (tmp_path / "shards" / "faults.jsonl").exists()
    write_jsonl(path, [{"text": "one"}, {"text": "mended"}])
    prepare(input=[str(path)])
    assert not (tmp_path / "shards" / "faults.jsonl").exists()


# Text that lies elsewhere


def local_and_remote(prepare: Prepare, repo: Path, tmp_path: Path, remote: list[str]) -> None:
    names = [f"{repo}/recipes/demo_text/{name}.jsonl" for name in ("en", "sw")]
    near, expected = prepare(input=names, output_dir=str(tmp_path / "near"))
    far, found = prepare(input=remote, output_dir=str(tmp_path / "far"))
    assert found == expected
    one, other = ShardReader(str(near)), ShardReader(str(far))
    assert len(one.blocks()) > 1
    for index in range(len(one.blocks())):
        for a, b in zip(one.read_block(index), other.read_block(index), strict=True):
            assert (a == b).all()


def test_text_from_s3(prepare: Prepare, repo: Path, tmp_path: Path, bucket) -> None:  # noqa: F811
    for name in ("en", "sw"):
        path = repo / "recipes" / "demo_text" / f"{name}.jsonl"
        bucket.pipe(f"corpus/{name}/{name}.jsonl", path.read_bytes())
    local_and_remote(prepare, repo, tmp_path, ["s3://corpus/**"])


def test_text_from_a_web_server(prepare: Prepare, repo: Path, tmp_path: Path) -> None:
    with flaky_server(repo / "recipes" / "demo_text") as server:
        urls = [f"{server.url}/{name}.jsonl" for name in ("en", "sw")]
        local_and_remote(prepare, repo, tmp_path, urls)


# What a user does wrong


@pytest.fixture
def refusal(
    demo_text: str, teacher_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs the command as far as it gets; gives its status and the one line that it says."""

    def refused(*words: str) -> tuple[int, str]:
        usual = ("--prep.input", json.dumps([demo_text]), "--prep.tokenizer", str(teacher_dir))
        out = ("--prep.output_dir", str(tmp_path / "out"))
        with pytest.raises(SystemExit) as left:
            run_command(lambda: main([*usual, *out, *words]), leave=sys.exit)
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert line.startswith("error: ")
        assert not (tmp_path / "out" / "manifest.json").exists()
        return int(left.value.code or 0), line

    return refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prep.seq_leng", "3"], "unknown key 'prep.seq_leng'.* did you mean 'prep.seq_len'"),
        (["--append"], "no manifest.json, so there is nothing to append to"),
        (["--prep.weights", "{xx: 2}"], "prep.weights names 'xx', of which there is no text"),
        (["--prep.source_weights", "{x*.txt: 2}"], r"prep.source_weights names 'x\*\.txt', which"),
        (["--prep.max_tokens", "511"], "prep.max_tokens=511 does not fill a row"),
        (["--prep.max_repeats", ".nan"], "prep.max_repeats=nan is below 1"),
        (["--prep.tokenizer", "no/such/folder"], "the tokenizer 'no/such/folder' does not load"),
        (["--seed", str(2**64)], r"seed=18446744073709551616 is outside 0\.\.2\*\*64 - 1"),
        (["--seed", "-1"], r"seed=-1 is outside"),
        (["--prep.output_dir", __file__], "is a file, and shards need a folder"),
        (["--prep.output_dir", f"{__file__}/out"], r"cannot be made \(Not a directory\)"),
        (["--prep.exclude", "[no/*.csv]"], "prep.exclude='no/.*' matches no file"),
        (["--prep.text_key", "body"], "prep.text_key='body'"),
    ],
)
def test_what_a_user_does_wrong_is_a_line_and_status_2(
    refusal, words: Sequence[str], said: str
) -> None:
    status, line = refusal(*words)
    assert status == 2
    assert re.search(said, line), line


def test_weights_that_leave_nothing_are_refused(refusal, demo: dict[str, list[str]]) -> None:
    status, line = refusal("--prep.weights", json.dumps(dict.fromkeys(demo, 0)))
    assert status == 2
    assert "prep.weights and prep.source_weights are 0 for all" in line


def test_a_wrong_column_is_refused_and_the_right_ones_named(refusal, tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["text"], "lang": ["en"]}), tmp_path / "en.parquet")
    status, line = refusal("--prep.input", f"[{tmp_path}/en.parquet]")
    assert status == 2
    assert "prep.text_key='text' is no column" in line
    assert "body, lang" in line


def test_a_missing_package_is_named_before_anything_is_read(
    refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    status, line = refusal("--prep.near_duplicates", "0.8")
    assert status == 2
    assert "prep.near_duplicates needs the package rensa" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("host", ["127.0.0.1:9", "nowhere.invalid"])
def test_a_server_that_does_not_answer_is_soon_said(
    refusal, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(tenacity.nap.time, "sleep", pauses.append)
    status, line = refusal("--prep.input", f"[http://{host}/en.txt]")
    assert status == 1
    assert f"http://{host}/en.txt cannot be looked up" in line
    assert sum(pauses) < 10
