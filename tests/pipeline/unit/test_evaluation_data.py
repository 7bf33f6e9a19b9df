"""Every layout of the data sets, real ones where they lie and small ones otherwise."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest

from data_prep.command import ConfigError, RunError
from pipeline.evaluation.data import Limits, TaskData, available, load
from pipeline.evaluation.layouts import Answer, Example
from pipeline.evaluation.tasks import TASKS
from pipeline.evaluation.user_tasks import find_tasks

REPO = Path(__file__).parents[3]
RECIPES = REPO / "recipes" / "tasks"


@pytest.fixture(scope="session")
def real() -> Path:
    """Evaluation sets; they lie beside the repository where there are any."""
    folder = REPO.parent / "shared" / "data" / "eval"
    if not folder.is_dir():
        pytest.skip(f"no evaluation sets at {folder}")
    return folder


def rows_of(folder: Path) -> dict[str, int]:
    """What the folder's own list says of each file."""
    with open(folder / "MANIFEST.tsv", encoding="utf-8") as stream:
        return {row["file"]: int(row["rows"]) for row in csv.DictReader(stream, delimiter="\t")}


@pytest.mark.parametrize(
    ("name", "train", "dev", "test"),
    [
        ("cola", "glue/CoLA/train.tsv", "glue/CoLA/dev.tsv", None),
        ("sst2", "glue/SST-2/train.tsv", "glue/SST-2/dev.tsv", None),
        ("mrpc", "glue/MRPC/train.tsv", "glue/MRPC/validation.tsv", None),
        ("rte", "glue/RTE/train.tsv", "glue/RTE/validation.tsv", None),
        ("wnli", "glue/WNLI/train.tsv", "glue/WNLI/dev.tsv", None),
        ("squad_v2", "squad_v2/train-10articles-v2.0.json", "squad_v2/dev-half-v2.0.json", None),
        ("stsb_multi", "stsb_multi/stsb-en-train.csv", "stsb_multi/stsb-en-dev.csv",
         "stsb_multi/stsb-{}-test.csv"),
        ("xnli_from_snli", "snli/validation.tsv", "xnli/dev-en.tsv", "xnli/test-{}.tsv"),
        ("xquad_from_squad_v2", None, "xquad/xquad.en.json", "xquad/xquad.{}.json"),
    ],
)  # fmt: skip
def test_real_files_are_read_whole(
    real: Path, name: str, train: str | None, dev: str, test: str | None
) -> None:
    listed = rows_of(real)
    (task,) = find_tasks([name if name in TASKS else str(RECIPES / f"{name}.yaml")])
    data = load(task, real, Limits())
    # SQuAD 1.1's scorer has no use for the 348 questions without an answer.
    assert len(data.train) == (listed[train] if train else 4719 - 348)
    assert [*map(len, data.dev.values())] == [listed[dev]]
    for part, examples in data.test.items():
        assert len(examples) == listed[test.format(part) if test else dev]
    parts = [part for part in task.parts if test and test.format(part) in listed]
    assert list(data.test) == (parts or [""])
    assert data.reported == ("test" if "test" in (test or "") else "dev")


def test_mlqa_and_qnli_and_snli_are_there_as_far_as_they_are(real: Path, tmp_path: Path) -> None:
    listed, lacks = rows_of(real), available(real)
    assert "train" in lacks["qnli"]
    assert "snli_1.0_train" in lacks["snli"]
    (tmp_path / "mlqa_from.yaml").write_text("base: mlqa\ntrain: squad_v2/train-*.json\n")
    (task,) = find_tasks([str(tmp_path / "mlqa_from.yaml")])
    data = load(task, real, Limits())
    assert {part: len(rows) for part, rows in data.test.items()} == {
        part: listed[f"mlqa/dev-context-{part}-question-{part}.json"] for part in task.parts
    }
    (tmp_path / "qnli_dev.yaml").write_text(
        "base: qnli\ntrain: glue/QNLI/dev.tsv\ntexts: [question, sentence]\nlabel: label\n"
    )
    (task,) = find_tasks([str(tmp_path / "qnli_dev.yaml")])
    assert len(load(task, real, Limits()).train) == listed["glue/QNLI/dev.tsv"]


def test_quotes_and_labels_of_real_files_mean_what_they_should(real: Path) -> None:
    mrpc = load(TASKS["mrpc"], real, Limits())
    assert mrpc.train[0] == Example("0", (
        'Amrozi accused his brother , whom he called " the witness " , of deliberately distorting '
        "his evidence .",
        'Referring to him as only " the witness " , Amrozi accused his brother of deliberately '
        "distorting his evidence ."), 1)  # fmt: skip
    rte = load(TASKS["rte"], real, Limits())
    pope = next(row for row in rte.train if row.texts[1].startswith("Pope Benedict XVI is the new"))
    assert rte.labels[pope.label] == "entailment"
    (task,) = find_tasks([str(RECIPES / "xnli_from_snli.yaml")])
    xnli = load(task, real, Limits())
    first = xnli.dev["en"][2]
    assert (first.texts[1], xnli.labels[first.label]) == (
        "He told his mom he had gotten home.", "entailment"
    )  # fmt: skip
    assert {xnli.labels[row.label] for row in xnli.train if "singing at a baseball" in row.texts[1]
            } <= {"contradiction"}  # fmt: skip


# The official archives, made small.


def write(folder: Path, path: str, lines: Iterable[object]) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / path).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def squad(*questions: tuple[str, str, int | None]) -> list[dict[str, Any]]:
    """One line of SQuAD's JSON: of each question its id, and an answer with its place or none."""
    return [{"version": "1.1", "data": [{"title": "t", "paragraphs": [{
        "context": "Rome is old.",
        "qas": [{"id": id_, "question": "Where?", "answers": [
            {"text": text, "answer_start": start}] if start is not None else []}
            for id_, text, start in questions],
    }]}]}]  # fmt: skip


GLUE = {
    "cola": ("CoLA", ['gj04\t0\t*\tNo "quotes here.'], ('No "quotes here.',), 0),
    "sst2": ("SST-2", ["sentence\tlabel", "fine film \t1"], ("fine film ",), 1),
    "mrpc": ("MRPC", ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t7\t8\tA "b\tC'],
             ('A "b', "C"), 1),
    "stsb": ("STS-B", ["index\tgenre\tsentence1\tsentence2\tscore", "0\tx\tA\tB\t2.5"],
             ("A", "B"), 2.5),
    "qqp": ("QQP", ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\ttorn",
                    "1\t2\t3\tA?\tB?\t1"], ("A?", "B?"), 1),
    "mnli": ("MNLI", ["index\tsentence1\tsentence2\tgold_label", "0\tA\tB\tcontradiction"],
             ("A", "B"), 2),
    "qnli": ("QNLI", ["index\tquestion\tsentence\tlabel", "0\tA\tB\tnot_entailment"],
             ("A", "B"), 1),
    "rte": ("RTE", ["index\tsentence1\tsentence2\tlabel", '0\t"A" b\tB\tentailment'],
            ('"A" b', "B"), 0),
    "wnli": ("WNLI", ["index\tsentence1\tsentence2\tlabel", "0\tA\tB\t0"], ("A", "B"), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE)
def test_glue_as_it_is_downloaded(name: str, tmp_path: Path) -> None:
    folder, lines, texts, label = GLUE[name]
    splits = ["train", "dev"] if name != "mnli" else ["train", "dev_matched", "dev_mismatched"]
    for split in splits:
        write(tmp_path, f"{folder}/{split}.tsv", lines)
    data = load(TASKS[name], tmp_path, Limits())
    assert [(row.texts, row.label) for row in data.train] == [(texts, label)]
    assert list(data.test) == (["matched", "mismatched"] if name == "mnli" else [""])
    assert data.left_out == ({"train": 1, "dev": 1} if name == "qqp" else {})


def xnli_1(folder: Path) -> None:
    head = "language\tgold_label\tsentence1_binary_parse\tsentence1\tsentence2"
    rows = [
        head,
        "ar\tneutral\t( )\tA\tB",
        "de\tentailment\t( )\tC\tD",
        "de\tneutral\t( )\tE\tF",
        "en\tneutral\t( )\tG\tH",
    ]
    for split in ("dev", "test"):
        write(folder, f"XNLI-1.0/xnli.{split}.tsv", rows)
    for part in ("en", "de"):
        rows = ["premise\thypo\tlabel", f"P {part}\tH\tcontradictory"]
        write(folder, f"XNLI-MT-1.0/multinli/multinli.train.{part}.tsv", rows)


def snli_1(folder: Path) -> None:
    for split in ("train", "dev", "test"):
        rows = [{"gold_label": label, "sentence1": "A", "sentence2": "B"}
                for label in ("-", "neutral")]  # fmt: skip
        write(folder, f"snli_1.0/snli_1.0_{split}.jsonl", rows)


def paws_x(folder: Path) -> None:
    for part, train in (("en", "train"), ("de", "translated_train")):
        for split in (train, "dev_2k", "test_2k"):
            write(folder, f"x-final/{part}/{split}.tsv",
                  ["id\tsentence1\tsentence2\tlabel", f"1\tA {part}\tB\t1"])  # fmt: skip


def xcopa(folder: Path) -> None:
    row = {"premise": "It rained.", "choice1": "A", "choice2": "B", "question": "effect",
           "label": 1}  # fmt: skip
    write(folder, "COPA/train.jsonl", [row, row])
    for split in ("val", "test"):
        write(folder, f"xcopa/data/it/{split}.it.jsonl", [row])


def xquad(folder: Path) -> None:
    write(folder, "squad/train-v1.1.json", squad(("1", "Rome", 0), ("2", "Rome", 3)))
    write(folder, "xquad.zh.json", squad(("3", "Rome", 0)))
    write(folder, "xquad.en.json", squad(("3", "Rome", 0)))


def mlqa(folder: Path) -> None:
    write(folder, "squad/train-v1.1.json", squad(("1", "Rome", 0)))
    for split in ("dev", "test"):
        for names in ("de-question-de", "de-question-en", "en-question-en"):
            write(folder, f"MLQA_V1/{split}/{split}-context-{names}.json", squad(("1", "Rome", 0)))


def tydiqa(folder: Path) -> None:
    questions = [(f"{name}-1", "Rome", 0) for name in ("english", "swahili", "finnish", "finnish")]
    for split in ("train", "dev"):
        write(folder, f"tydiqa-goldp-v1.1-{split}.json", squad(*questions))


def wikiann(folder: Path) -> None:
    for part in ("en", "sw"):
        for split in ("train", "dev", "test"):
            write(folder, f"wikiann/{part}/{split}",
                  [f"{part}:Rome\tB-LOC", f"{part}:is\tO", "", f"{part}:a:b\tO", ""])  # fmt: skip


def universal_dependencies(folder: Path) -> None:
    lines = ["# text = du", "1-2\tdu\t_\t_", "1\tde\tde\tADP\t_", "2\tle\tle\tDET\t_",
             "2.1\tx\t_\tVERB", "", "1\tRome\t_\tPROPN", ""]  # fmt: skip
    for bank, part in (("French-GSD", "fr"), ("English-EWT", "en"), ("English-GUM", "en")):
        for split in ("train", "dev", "test"):
            name = bank.split("-")[1].lower()
            write(folder, f"UD_{bank}/{part}_{name}-ud-{split}.conllu", lines)


def tatoeba(folder: Path) -> None:
    write(folder, "tatoeba/tatoeba.deu-eng.deu", ["Hallo.", "Ja."])
    write(folder, "tatoeba/tatoeba.deu-eng.eng", ["Hello.", "Yes."])


Row = tuple[tuple[str, ...], Any]
ARCHIVES: dict[str, tuple[Callable[[Path], None], dict[str, int], int, Row]] = {
    "xnli": (xnli_1, {"ar": 1, "de": 2, "en": 1}, 1, (("A", "B"), 1)),
    "snli": (snli_1, {"": 1}, 1, (("A", "B"), 1)),
    "paws_x": (paws_x, {"de": 1, "en": 1}, 1, (("A de", "B"), 1)),
    "xcopa": (xcopa, {"it": 1}, 2, (("It rained. What happened as a result?", "A", "B"), 1)),
    "xquad": (xquad, {"en": 1, "zh": 1}, 1, (("Where?", "Rome is old."), (Answer("Rome", 0),))),
    "mlqa": (mlqa, {"de": 1, "en": 1}, 1, (("Where?", "Rome is old."), (Answer("Rome", 0),))),
    "tydiqa_goldp": (tydiqa, {"en": 1, "fi": 2, "sw": 1}, 1,
                     (("Where?", "Rome is old."), (Answer("Rome", 0),))),
    "wikiann": (wikiann, {"en": 2, "sw": 2}, 2, (("Rome", "is"), ("B-LOC", "O"))),
    "udpos": (universal_dependencies, {"en": 4, "fr": 2}, 4, (("de", "le"), ("ADP", "DET"))),
    "tatoeba": (tatoeba, {"deu": 2}, 0, (("Hallo.", "Hello."), None)),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_official_archives(name: str, tmp_path: Path) -> None:
    make, counts, train, (texts, label) = ARCHIVES[name]
    make(tmp_path)
    data = load(TASKS[name], tmp_path, Limits())
    assert {part: len(rows) for part, rows in data.test.items()} == counts
    assert len(data.train) == train
    first = next(iter(data.test.values()))[0]
    assert (first.texts, first.label) == (texts, label)
    assert available(tmp_path)[name] == ""


def test_answers_that_do_not_stand_where_they_should_are_not_learnt(tmp_path: Path) -> None:
    xquad(tmp_path)
    assert load(TASKS["xquad"], tmp_path, Limits()).left_out == {"train en": 1}


def test_what_is_trained_on_and_how_much(tmp_path: Path) -> None:
    xnli_1(tmp_path)

    def train(**limits: Any) -> set[str]:
        return {row.texts[0] for row in load(TASKS["xnli"], tmp_path, Limits(**limits)).train}

    assert train() == {"P en"}
    assert train(train_parts=("de",)) == {"P de"}
    assert train(train_parts=("all",)) == {"P de", "P en"}
    assert len(train(train_parts=("all",), max_train_examples=1)) == 1
    assert list(load(TASKS["xnli"], tmp_path, Limits(parts=("de",))).test) == ["de"]
    with pytest.raises(ConfigError, match=r"--languages=xx.*choose of ar, bg"):
        load(TASKS["xnli"], tmp_path, Limits(parts=("xx",)))
    xquad(tmp_path)
    with pytest.raises(ConfigError, match="training files here are of one language"):
        load(TASKS["xquad"], tmp_path, Limits(train_parts=("all",)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sst2 needs dev files.*/glue/SST-2/dev\.tsv, "):
        load(TASKS["sst2"], tmp_path, Limits())
    write(tmp_path, "SST-2/dev.tsv", ["text\tstars", "a\t1"])
    with pytest.raises(ConfigError, match=r"SST-2/dev\.tsv has other columns"):
        load(TASKS["sst2"], tmp_path, Limits())
    with pytest.raises(ConfigError, match="is not a folder"):
        load(TASKS["sst2"], tmp_path / "none", Limits())


@pytest.mark.parametrize(
    ("name", "path", "lines", "message"),
    [
        ("sst2", "SST-2/dev.tsv", ["sentence\tlabel", "a"], r"dev\.tsv, row 0 has no column"),
        ("sst2", "SST-2/dev.tsv", ["sentence\tlabel", "a\t7"], r"label '7', which is none of 0, 1"),
        ("stsb", "STS-B/dev.tsv", ["sentence1\tsentence2\tscore", "a\tb\tx"], "is no number"),
        ("squad_v2", "dev-v2.0.json", ["{"], "is not SQuAD's JSON"),
        ("squad_v2", "dev-v2.0.json", [{"data": [{}]}], "is not SQuAD's JSON"),
        ("snli", "snli_1.0_dev.jsonl", ["{]"], "line 1 is not JSON"),
        ("wikiann", "wikiann/en/dev", ["alone"], "line 1 has a word and no tag"),
        ("wikiann", "wikiann/en/dev", ["en:a\tB-CAR"], "tag 'B-CAR', which is none of"),
    ],
)
def test_damaged_files_are_named(
    name: str, path: str, lines: list[object], message: str, tmp_path: Path
) -> None:
    write(tmp_path, path, lines)
    good = {"SST-2": ["sentence\tlabel", "a\t1"], "STS-B": ["sentence1\tsentence2\tscore",
            "a\tb\t1"], "wikiann": ["en:a\tO"]}.get(path.split("/")[0])  # fmt: skip
    write(tmp_path, path.replace("dev", "train"), good or squad(("1", "Rome", 0)))
    if name == "snli":
        row = {"gold_label": "neutral", "sentence1": "A", "sentence2": "B"}
        write(tmp_path, "snli_1.0_train.jsonl", [row])
    with pytest.raises(RunError, match=message):
        load(TASKS[name], tmp_path, Limits())


def test_the_hub_gives_the_same_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets in the hub's form, by the ids and names that are asked for."""
    nli = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    pairs = datasets.Dataset.from_dict(
        {"premise": ["A", "x"], "hypothesis": ["B", "y"], "label": [1, -1]},
        features=datasets.Features(
            {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string"),
             "label": nli}),
    )  # fmt: skip
    tags = datasets.Dataset.from_dict(
        {"tokens": [["Rome", "is"]], "ner_tags": [[1, 0]]},
        features=datasets.Features(
            {"tokens": datasets.List(datasets.Value("string")),
             "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-LOC"]))}),
    )  # fmt: skip
    questions = datasets.Dataset.from_list([
        {"id": f"{language}-1", "question": "Where?", "context": "Rome is old.",
         "answers": {"text": ["Rome"], "answer_start": [0]}} for language in ("english", "finnish")
    ])  # fmt: skip
    there = {
        "stanfordnlp/snli": pairs, "unimelb-nlp/wikiann": tags, "google/xtreme": questions
    }  # fmt: skip
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(path: str, config: str | None, split: str) -> Any:
        asked.append((path, config, split))
        return there[path]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    snli = load(TASKS["snli"], None, Limits())
    assert [(row.texts, row.label) for row in snli.train] == [(("A", "B"), 1)]
    assert snli.left_out == {"train": 1, "dev": 1, "test": 1}
    assert asked[0] == ("stanfordnlp/snli", None, "train")
    wikiann_ = load(TASKS["wikiann"], None, Limits(parts=("sw",)))
    assert wikiann_.test["sw"][0].label == ("B-LOC", "O")
    assert asked[-1] == ("unimelb-nlp/wikiann", "sw", "test")
    tydiqa_ = load(TASKS["tydiqa_goldp"], None, Limits(parts=("fi",)))
    assert [row.id for row in tydiqa_.train] == ["english-1"]
    assert [row.id for row in tydiqa_.test["fi"]] == ["finnish-1"]
    there.clear()
    with pytest.raises(ConfigError, match=r"cannot be had from the hub.*--data_dir"):
        load(TASKS["snli"], None, Limits())
    with pytest.raises(ConfigError, match=r"xcopa needs train files.*give --data_dir"):
        load(TASKS["xcopa"], None, Limits())


# Tasks of one's own


def own(tmp_path: Path, text: str) -> TaskData:
    (tmp_path / "mine.yaml").write_text(text)
    (task,) = find_tasks([str(tmp_path / "mine.yaml")])
    return load(task, tmp_path, Limits())


def test_tables_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", ["stars,title", '"good, very","Say ""hi"""', "bad,x"])
    data = own(tmp_path, "kind: classification\ntrain: a.csv\ndev: a.csv\ntexts: [title]\n"
               "label: stars\nquoted: true\nmetrics: [f1]")  # fmt: skip
    assert data.labels == ("bad", "good, very")
    assert data.train[0][1:] == (('Say "hi"',), 1)
    write(tmp_path, "b-de.jsonl", [{"a": "x", "b": "y", "score": 0.5}])
    data = own(tmp_path, "kind: regression\ntrain: b-{part}.jsonl\ndev: b-{part}.jsonl\n"
               "texts: [a, b]\nlabel: score\nparts: [de]\ntrain_part: de")  # fmt: skip
    assert data.test["de"][0][1:] == (("x", "y"), 0.5)


def test_tags_answers_and_translations_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path, "c.txt", ["Rome NNP B-LOC", "", "is VBZ O"])
    data = own(tmp_path, "kind: tagging\ntrain: c.txt\ndev: c.txt\nlabel: 1")
    assert data.labels == ("NNP", "VBZ")
    write(tmp_path, "d.json", squad(("1", "Rome", 0), ("2", "", None)))
    data = own(tmp_path, "kind: span\ntrain: d.json\ndev: d.json\nscorer: squad2")
    assert [row.label for row in data.train] == [(Answer("Rome", 0),), ()]
    write(tmp_path, "e-de.tsv", ["1\tJa", "2\tNein"])
    write(tmp_path, "e-en.tsv", ["1\tYes", "2\tNo"])
    data = own(tmp_path, "kind: retrieval\ndev: e-{part}.tsv\ntarget: e-en.tsv\ntexts: [1]\n"
               "parts: [de]")  # fmt: skip
    assert [row.texts for row in data.test["de"]] == [("Ja", "Yes"), ("Nein", "No")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: clasification", "mine.yaml"),
        ("kinds: span", "unknown key 'kinds'"),
        ("train: a", "neither kind nor base is set"),
        ("kind: span\ntrain: a", "needs 'dev'"),
        ("kind: classification\ntrain: a\ndev: b", "needs 'texts'"),
        ("base: xnli\ntrain: a", "needs 'texts'"),
        ("base: xnlli", "did you mean 'xnli'"),
        ("base: xnli\nkind: span", "is not that of base=xnli"),
        ("kind: retrieval\ndev: a", "needs 'target'"),
        ("kind: classification\ntrain: a\ndev: b\ntexts: [a, 1]\nlabel: c", "mixes names"),
        ("kind: classification\ntrain: a\ndev: b\ntexts: [a, b, c]\nlabel: c", "name one column"),
        ("kind: tagging\ntrain: a\ndev: b\ntexts: [word]", "has to be a number"),
        ("kind: span\ntrain: a\ndev: b\nmetrics: [bleu]", "metrics has 'bleu'"),
        ("kind: span\ntrain: a\ndev: b\nmetrics: [best_f1]", "metrics has 'best_f1'"),
        ("kind: span\ntrain: 'a-{part}'\ndev: b", "train_part does not say"),
        ("kind: choice", "base: xcopa"),
        ("kind: span\nkind: span", "stands there twice"),
        ("[1, 2]", "mine.yaml"),
    ],
)
def test_files_that_make_no_task_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as refused:
        find_tasks([str(tmp_path / "mine.yaml")])
    assert "\n" not in str(refused.value)


def test_tasks_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="did you mean 'squad_v2'"):
        find_tasks(["squadv2"])
    with pytest.raises(ConfigError, match=r"known tasks: cola, .*tatoeba"):
        find_tasks(["zzz"])
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        find_tasks(["none.yaml"])
    with pytest.raises(ConfigError, match="names 'cola' twice"):
        find_tasks(["cola", "cola"])
    assert [task.name for task in find_tasks(sorted(TASKS))] == sorted(TASKS)
