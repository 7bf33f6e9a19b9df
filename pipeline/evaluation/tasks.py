"""The tasks: one table that says where data lie, what their fields mean and what is measured.

Each task's metrics are those of its paper, and the first that MiniLM's authors report (arXiv
2002.10957); languages are scored apart and averaged, as XTREME does (arXiv 2003.11080).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pipeline.evaluation.layouts import (
    PART,
    Copa,
    Hub,
    Layout,
    Parallel,
    Squad,
    Table,
    Words,
)

KindName = Literal["classification", "regression", "choice", "span", "tagging", "retrieval"]
METRICS = {  # of each kind; the first is the one that models are compared by
    "classification": ("accuracy", "f1_macro", "matthews"),
    "regression": ("spearman", "pearson"),
    "choice": ("accuracy",),
    "span": ("f1", "exact"),
    "tagging": ("f1", "accuracy"),
    "retrieval": ("accuracy",),
}
NLI = ("entailment", "neutral", "contradiction")
RTE = ("entailment", "not_entailment")
UPOS = tuple(
    "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X".split()
)
BIO = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What is fine-tuned on, judged by and measured.

    Args:
        name: as the command line calls it.
        kind: what examples are, see layouts.Example.
        train: layouts of the training files, the first one that is there counts; none for
            retrieval, which has no training.
        dev: of the files by which hyper-parameters are chosen.
        test: of the files that are reported; none, or none there, is that dev is.
        folder: of the data folder, in which files are looked for first.
        hub: the same from the hub: the splits that it names.
        train_hub: the training split's own place there.
        labels: classes or tags in the order of their numbers; () is those in the training files.
        renamed: labels that files call otherwise.
        unlabelled: labels of rows that have none, which are left out.
        metrics: the first is the one that models are compared by.
        scorer: of answers: squad (1.1's), squad2, mlqa.
        parts: languages, or sets that are scored apart; the score is their mean. () is those that
            are there.
        train_part: the part that is trained on and by whose dev set hyper-parameters are chosen.
        max_length: tokens of an input at most, the model's positions permitting.
    """

    name: str
    kind: KindName
    train: tuple[Layout, ...] = ()
    dev: tuple[Layout, ...]
    test: tuple[Layout, ...] = ()
    folder: str = ""
    hub: Hub | None = None
    train_hub: Hub | None = None
    labels: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unlabelled: tuple[str, ...] = ("-", "-1", "None")
    metrics: tuple[str, ...] = ()
    scorer: Literal["squad", "squad2", "mlqa"] = "squad"
    parts: tuple[str, ...] = ()
    train_part: str | None = None
    max_length: int = 128

    @property
    def metric(self) -> str:
        """The one that models are compared by."""
        return self.measured[0]

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of all that is measured."""
        return self.metrics or METRICS[self.kind]


def _glue(
    name: str,
    config: str,
    columns: tuple[str, ...],
    tables: Sequence[Mapping[str, Any]],
    **more: Any,
) -> Task:
    """A task of GLUE. tables: where train and dev differ in nothing but the name in {split}."""

    def layouts(names: Sequence[str]) -> tuple[Layout, ...]:
        return tuple(
            Table(**{**table, "path": str(table["path"]).replace("{split}", split)})
            for table in tables for split in names
        )  # fmt: skip

    return Task(**{
        "name": name, "kind": "classification", "folder": "glue",
        "train": layouts(["train"]), "dev": layouts(["dev", "validation"]),
        "hub": Hub(path="nyu-mll/glue", config=config, texts=columns,
                   splits={"train": "train", "dev": "validation"}),
        **more,
    })  # fmt: skip


def _splits(
    layouts: Callable[[str, str], tuple[Layout, ...]], dev: str = "dev", test: str | None = "test"
) -> dict[str, Any]:
    """The three splits of one scheme; `layouts` gets their common name and the task's own."""
    own = {"train": "train", "dev": dev, "test": test}
    return {split: layouts(split, name) for split, name in own.items() if name}


def _xnli(split: str) -> tuple[Layout, ...]:
    row: dict[str, Any] = {**_NLI_PAIR, "where": (("language", PART),)}
    return (
        Table(path=f"{split}-{PART}.tsv", texts=(0, 1), label=2),
        *(Table(path=f"{folder}xnli.{split}.{kind}", **row)
          for folder in ("XNLI-1.0/", "") for kind in ("tsv", "jsonl")),
    )  # fmt: skip


def _paws(split: str) -> tuple[Layout, ...]:
    return (
        Table(path=f"{split}-{PART}.tsv", texts=(0, 1), label=2),
        Table(path=f"x-final/{PART}/{split}_2k.tsv", texts=_PAIR, label="label"),
    )


def _xcopa(split: str) -> tuple[Layout, ...]:
    names = (f"data/{PART}/{split}.{PART}.jsonl", f"{PART}/{split}.{PART}.jsonl")
    return tuple(Copa(path=path) for path in names)


def _mlqa(split: str) -> tuple[Layout, ...]:
    name = f"{split}-context-{PART}-question-{PART}.json"
    return tuple(Squad(path=f"{folder}{name}") for folder in ("", f"MLQA_V1/{split}/", f"{split}/"))


_NLI_PAIR: dict[str, Any] = {"texts": ("sentence1", "sentence2"), "label": "gold_label"}
_PAIR = ("sentence1", "sentence2")
_SQUAD = (Squad(path="squad/train-v1.1.json"), Squad(path="train-v1.1.json"))
_SQUAD_HUB = Hub(path="rajpurkar/squad", config=None, splits={"train": "train"})
_UD_NAMES = dict(
    zip(
        "af ar bg de el en es et eu fa fi fr he hi hu id it ja kk ko mr nl pt ru ta te th tl tr ur "
        "vi yo zh".split(),
        "Afrikaans Arabic Bulgarian German Greek English Spanish Estonian Basque Persian Finnish "
        "French Hebrew Hindi Hungarian Indonesian Italian Japanese Kazakh Korean Marathi Dutch "
        "Portuguese Russian Tamil Telugu Thai Tagalog Turkish Urdu Vietnamese Yoruba Chinese"
        .split(),
        strict=True,
    )
)  # fmt: skip
_XNLI = tuple("ar bg de el en es fr hi ru sw th tr ur vi zh".split())
XTREME_LANGUAGES = tuple(
    "af ar bg bn de el en es et eu fa fi fr he hi hu id it ja jv ka kk ko ml mr ms my nl pt ru sw "
    "ta te th tl tr ur vi yo zh".split()
)
_BECEL = {"texts": _PAIR, "label": "label", "quoted": True, "header": ("index", "label")}
_TASKS = (
    _glue("cola", "cola", ("sentence",),
          [{"path": "CoLA/{split}.tsv", "texts": (3,), "label": 1}],
          labels=("0", "1"), metrics=("matthews", "accuracy")),
    _glue("sst2", "sst2", ("sentence",),
          [{"path": "SST-2/{split}.tsv", "texts": ("sentence",), "label": "label"}],
          labels=("0", "1"), metrics=("accuracy",)),
    _glue("mrpc", "mrpc", _PAIR,
          [{"path": "MRPC/{split}.tsv", "texts": ("#1 String", "#2 String"), "label": "Quality"},
           {"path": "MRPC/{split}.tsv", **_BECEL}],
          labels=("0", "1"), metrics=("accuracy", "f1")),
    _glue("stsb", "stsb", _PAIR,
          [{"path": "STS-B/{split}.tsv", "texts": _PAIR, "label": "score"}],
          kind="regression"),
    _glue("qqp", "qqp", ("question1", "question2"),
          [{"path": "QQP/{split}.tsv", "texts": ("question1", "question2"),
            "label": "is_duplicate", "torn": True}],
          labels=("0", "1"), metrics=("accuracy", "f1")),
    _glue("mnli", "mnli", ("premise", "hypothesis"),
          [{"path": "MNLI/{split}.tsv", **_NLI_PAIR}],
          dev=(Table(path="MNLI/dev_{part}.tsv", **_NLI_PAIR),), parts=("matched", "mismatched"),
          hub=Hub(path="nyu-mll/glue", config="mnli", texts=("premise", "hypothesis"),
                  splits={"train": "train", "dev": "validation_{part}"}),
          train_part="matched", labels=NLI, metrics=("accuracy",)),
    _glue("qnli", "qnli", ("question", "sentence"),
          [{"path": "QNLI/{split}.tsv", "texts": ("question", "sentence"), "label": "label"}],
          labels=RTE, metrics=("accuracy",)),
    _glue("rte", "rte", _PAIR,
          [{"path": "RTE/{split}.tsv", **_BECEL},
           {"path": "RTE/{split}.tsv", "texts": _PAIR, "label": "label"}],
          labels=RTE, metrics=("accuracy",)),
    _glue("wnli", "wnli", _PAIR,
          [{"path": "WNLI/{split}.tsv", "texts": _PAIR, "label": "label"}],
          labels=("0", "1"), metrics=("accuracy",)),
    Task(name="snli", kind="classification", folder="snli", labels=NLI, metrics=("accuracy",),
         **_splits(lambda split, other: (
             Table(path=f"snli_1.0_{split}.jsonl", **_NLI_PAIR),
             Table(path=f"snli_1.0/snli_1.0_{split}.jsonl", **_NLI_PAIR),
             Table(path=f"snli_1.0/snli_1.0_{split}.txt", **_NLI_PAIR),
             Table(path=f"{other}.tsv", texts=("premise", "hypothesis"), label="label",
                   quoted=True)), dev="validation"),
         hub=Hub(path="stanfordnlp/snli", config=None, texts=("premise", "hypothesis"),
                 splits={"train": "train", "dev": "validation", "test": "test"})),
    Task(name="xnli", kind="classification", folder="xnli", labels=NLI, metrics=("accuracy",),
         renamed={"contradictory": "contradiction"}, parts=_XNLI, train_part="en",
         train=(
             Table(path="train-{part}.tsv", texts=(0, 1), label=2),
             Table(path="XNLI-MT-1.0/multinli/multinli.train.{part}.tsv",
                   texts=("premise", "hypo"), label="label"),
         ),
         dev=_xnli("dev"), test=_xnli("test"),
         hub=Hub(path="facebook/xnli", config="{part}", texts=("premise", "hypothesis"),
                 splits={"train": "train", "dev": "validation", "test": "test"})),
    Task(name="paws_x", kind="classification", folder="pawsx", labels=("0", "1"),
         metrics=("accuracy",), parts=tuple("de en es fr ja ko zh".split()), train_part="en",
         train=(
             Table(path="train-{part}.tsv", texts=(0, 1), label=2),
             Table(path="x-final/{part}/train.tsv", texts=_PAIR, label="label"),
             Table(path="x-final/{part}/translated_train.tsv", texts=_PAIR, label="label"),
         ),
         dev=_paws("dev"), test=_paws("test"),
         hub=Hub(path="google-research-datasets/paws-x", config="{part}", texts=_PAIR,
                 splits={"train": "train", "dev": "validation", "test": "test"})),
    Task(name="stsb_multi", kind="regression", folder="stsb_multi", train_part="en",
         parts=tuple("de en es fr it ja nl pl pt ru zh".split()),
         **_splits(lambda split, _: tuple(
             Table(path=f"{folder}stsb-{PART}-{split}.csv", texts=(0, 1), label=2, quoted=True)
             for folder in ("", "data/"))),
         hub=Hub(path="PhilipMay/stsb_multi_mt", config="{part}", texts=_PAIR,
                 label="similarity_score",
                 splits={"train": "train", "dev": "dev", "test": "test"})),
    Task(name="xcopa", kind="choice", folder="xcopa", labels=("0", "1"),
         parts=tuple("et ht id it qu sw ta th tr vi zh".split()),
         train=(Copa(path="COPA/train.jsonl"), Copa(path="train.jsonl")),
         dev=_xcopa("val"), test=_xcopa("test"),
         hub=Hub(path="cambridgeltl/xcopa", config="{part}",
                 splits={"dev": "validation", "test": "test"})),
    Task(name="squad", kind="span", folder="squad", max_length=384,
         **_splits(lambda split, _: (Squad(path=f"{split}-v1.1.json"),), test=None),
         hub=Hub(path="rajpurkar/squad", config=None,
                 splits={"train": "train", "dev": "validation"})),
    Task(name="squad_v2", kind="span", folder="squad_v2", scorer="squad2", max_length=384,
         metrics=("best_f1", "best_exact", "f1", "exact"),
         **_splits(lambda split, _: (Squad(path=f"{split}-v2.0.json"),
                                     Squad(path=f"{split}-*v2.0.json")), test=None),
         hub=Hub(path="rajpurkar/squad_v2", config=None,
                 splits={"train": "train", "dev": "validation"})),
    Task(name="xquad", kind="span", folder="xquad", max_length=384, train=_SQUAD, train_part="en",
         parts=tuple("ar de el en es hi ro ru th tr vi zh".split()),
         dev=(Squad(path="xquad.{part}.json"),), train_hub=_SQUAD_HUB,
         hub=Hub(path="google/xquad", config="xquad.{part}", splits={"dev": "validation"})),
    Task(name="mlqa", kind="span", folder="mlqa", scorer="mlqa", max_length=384, train=_SQUAD,
         parts=tuple("ar de en es hi vi zh".split()), train_part="en",
         dev=_mlqa("dev"), test=_mlqa("test"), train_hub=_SQUAD_HUB,
         hub=Hub(path="google/xtreme", config="MLQA.{part}.{part}",
                 splits={"dev": "validation", "test": "test"})),
    Task(name="tydiqa_goldp", kind="span", folder="tydiqa", max_length=384, train_part="en",
         parts=tuple("ar bn en fi id ko ru sw te".split()),
         train=(Squad(path="tydiqa-goldp-v1.1-train/tydiqa.goldp.{part}.train.json"),
                Squad(path="tydiqa-goldp-v1.1-train.json", id_prefix="{part}-")),
         dev=(Squad(path="tydiqa-goldp-v1.1-dev/tydiqa.goldp.{part}.dev.json"),
              Squad(path="tydiqa-goldp-v1.1-dev.json", id_prefix="{part}-")),
         hub=Hub(path="google/xtreme", config="tydiqa", id_prefix="{part}-",
                 splits={"train": "train", "dev": "validation"})),
    Task(name="wikiann", kind="tagging", folder="wikiann", labels=BIO, train_part="en",
         **_splits(lambda split, _: (
             Words(path=f"{PART}/{split}", prefix="{part}:"),
             Words(path=f"{split}-{PART}.tsv"),
             Words(path=f"panx/{split}-{PART}.tsv"))),
         hub=Hub(path="unimelb-nlp/wikiann", config="{part}", label="ner_tags",
                 splits={"train": "train", "dev": "validation", "test": "test"})),
    Task(name="udpos", kind="tagging", folder="udpos", labels=UPOS, train_part="en",
         metrics=("accuracy",),
         **_splits(lambda split, _: (
             Words(path=f"{split}-{PART}.tsv"),
             Words(path=f"UD_*/{PART}_*-ud-{split}.conllu", word=1, tag=3, conllu=True))),
         hub=Hub(path="google/xtreme", config="udpos.{part}", label="pos_tags", config_of=_UD_NAMES,
                 splits={"train": "train", "dev": "validation", "test": "test"})),
    Task(name="tatoeba", kind="retrieval", folder="tatoeba",
         dev=(Parallel(path="{part}-en.{part}", target="{part}-en.en"),
              Parallel(path="tatoeba.{part}-eng.{part}", target="tatoeba.{part}-eng.eng")),
         hub=Hub(path="google/xtreme", config="tatoeba.{part}",
                 texts=("source_sentence", "target_sentence"), label="",
                 splits={"dev": "validation"})),
)  # fmt: skip
TASKS = {task.name: task for task in _TASKS}
HUB_PARTS = {  # XTREME's, for tasks whose languages are those that are there
    "wikiann": XTREME_LANGUAGES, "udpos": tuple(_UD_NAMES),
    "tatoeba": tuple(
        "afr ara ben bul cmn deu ell est eus fin fra heb hin hun ind ita jav jpn kat kaz kor mal "
        "mar nld pes por rus spa swh tam tel tgl tha tur urd vie".split()),
}  # fmt: skip
