"""Objectives at equal tokens and equal student shape: accuracy after fine-tuning, over seeds.

    python benchmarks/quality.py --corpus DIR --eval DIR [--teacher FOLDER] [--languages en de ...]

Distils a student of half the teacher's layers and all of its width, so that every objective can be
used, with each of CASES and each seed, on the same rows in the same order; objectives that read the
same text share the teacher's pass. Then fine-tunes on each of TASKS, with one set of
hyper-parameters, every student, the teacher, the teacher's alternate layers without distillation,
and a student of random weights. "determined" is the share of the teacher's last hidden states that
a student's vectors determine on held-out rows. DIR/LANG.jsonl.gz has the text; the other folder has
SST-2 and SNLI as `glue/SST-2/{train,dev}.tsv` and `snli/{validation,test}.tsv`. What is done is
kept in --work and not done again.
"""

from __future__ import annotations

import concurrent.futures
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.harness import arguments, report
from pipeline.config import ROOT, Data, Recipe, Teacher, Train
from pipeline.readout import rank

SEQ_LEN, BATCH_ROWS = 128, 64
MASKED = ("distilbert",)
CASES: dict[str, dict[str, Any]] = {
    "minilmv2": {"student.init": "layers"},
    "minilm": {"student.init": "layers", "objective.name": "minilm"},
    "distilbert": {"student.init": "layers", "objective.name": "distilbert"},
    "minilmv2, random start": {},
    "minilm, random start": {"objective.name": "minilm"},
}
UNTRAINED = ("layers alone", "random weights")
TASKS = {  # file to train on, file to judge by, columns of text, whether there is a header
    "SST-2": ("glue/SST-2/train.tsv", "glue/SST-2/dev.tsv", ("sentence",)),
    "SNLI": ("snli/validation.tsv", "snli/test.tsv", ("premise", "hypothesis")),
}
FINE_TUNING = {"examples": 10000, "epochs": 1, "batch": 32, "rate": 2e-4, "tokens": 64}


def main(argv: Sequence[str] | None = None) -> None:
    """Distil, fine-tune, report."""
    parser = arguments(__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, default=ROOT / "models" / "pocket-teacher")
    parser.add_argument(
        "--name", help="of the teacher, in the result's file; default: its folder's"
    )
    parser.add_argument("--languages", nargs="+", default=["en"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=250, help="of 64 rows of 128 tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="of one thread each")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--score", nargs=4, metavar=("MODEL", "TASK", "SEED", "FILE"))
    options = parser.parse_args(argv)
    if options.score:
        model, task, seed, path = options.score
        torch.set_num_threads(1)
        accuracy = fine_tune(model, TASKS[task], options.eval, int(seed))
        Path(path).write_text(json.dumps(accuracy))
        return
    name = options.name or options.teacher.name
    folder = options.work / name
    shards = prepare(options, folder)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(distil, options, shards, folder, seed, masked)
            for seed in options.seeds
            for masked in (False, True)
        ]
        for job in jobs:
            job.result()
        models = {"teacher": [options.teacher] * len(options.seeds)}
        models |= {
            case: [folder / f"{seed}" / _slug(case) / "student" for seed in options.seeds]
            for case in options.cases
        }
        models |= {case: [folder / _slug(case)] * len(options.seeds) for case in UNTRAINED}
        save_untrained(options.teacher, *(folder / _slug(case) for case in UNTRAINED))
        scores = {
            (case, task): [
                pool.submit(score, options, path, task, seed)
                for path, seed in zip(paths, options.seeds, strict=False)
            ]
            for case, paths in models.items()
            for task in options.tasks
        }
        values = {key: [job.result() for job in found] for key, found in scores.items()}
    determined = determined_by(options, shards, {case: models[case] for case in options.cases})
    rows = []
    for case in models:
        row: dict[str, Any] = {"student": case}
        shares = [100 * share for share in determined.get(case, [])]
        row["determined"] = statistics.mean(shares) if shares else "-"
        row["determined sd"] = statistics.stdev(shares) if len(shares) > 1 else "-"
        for task in options.tasks:
            of_task = [100 * value for value in values[case, task]]
            row[task] = statistics.mean(of_task)
            row[f"{task} sd"] = statistics.stdev(of_task) if len(of_task) > 1 else "-"
        rows.append(row)
    means = {row["student"]: statistics.mean(row[task] for task in options.tasks) for row in rows}
    ratio = means["minilmv2"] / max(means[case] for case in options.cases if case != "minilmv2")
    report(
        f"quality_{name}",
        rows,
        ("minilmv2's mean accuracy / the best of the others", ratio),
        options,
        tokens=options.steps * BATCH_ROWS * SEQ_LEN,
        languages=options.languages,
        seeds=options.seeds,
        fine_tuning=FINE_TUNING,
        determined=determined,
        accuracies={f"{case}, {task}": found for (case, task), found in values.items()},
    )


def prepare(options: Any, folder: Path) -> Path:
    """Shards of the languages with the teacher's tokenizer."""
    shards = folder / "shards"
    texts = [str(options.corpus / f"{language}.jsonl.gz") for language in options.languages]
    keys = {
        "input": json.dumps(texts),
        "output_dir": str(shards),
        "tokenizer": str(options.teacher),
        "seq_len": SEQ_LEN,
        "heldout_rows": 64,
    }
    command = [sys.executable, "-m", "data_prep.build_shards"]
    command += [f"--prep.{key}={value}" for key, value in keys.items()]
    subprocess.run(command, cwd=ROOT, check=True)
    return shards


def distil(options: Any, shards: Path, folder: Path, seed: int, masked: bool) -> None:
    """Train the students that read the same text, from one pass of the teacher."""
    config = AutoConfig.from_pretrained(options.teacher)
    cases = {case: CASES[case] for case in options.cases if (case in MASKED) == masked}
    if masked and not any("ForMaskedLM" in name for name in config.architectures or ()):
        # A teacher without a prediction head gives no soft targets: what is left of the objective.
        cases = {c: {**k, "objective.losses": {"mlm": 2, "cos": 1}} for c, k in cases.items()}
    students = [{"name": _slug(case), "set": keys} for case, keys in cases.items()]
    keys = {
        "output_dir": str(folder / str(seed)),
        "teacher.model": str(options.teacher),
        "data.shards": str(shards),
        "seed": seed,
        "student.num_hidden_layers": config.num_hidden_layers // 2,
        "student.hidden_size": config.hidden_size,
        "student.num_attention_heads": config.num_attention_heads,
        "student.intermediate_size": config.intermediate_size,
        "objective.num_relation_heads": config.hidden_size // 16,
        "train.max_steps": options.steps,
        "train.batch_size": BATCH_ROWS,
        "train.micro_batch_size": 16,
        "train.learning_rate": 6e-4,
        "train.warmup_steps": options.steps // 10,
        "train.save_every": options.steps,
        "train.eval_every": options.steps,
        "students": json.dumps(students),
    }
    command = [sys.executable, str(ROOT / "pipeline" / "train.py")]
    command += ["--deepspeed", str(ROOT / "ds_configs" / "zero1.json")]
    command += [f"--{key}={value}" for key, value in keys.items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        env.pop(variable, None)
    env["MASTER_PORT"] = str(29600 + 2 * seed + masked)
    subprocess.run(command, env=env, check=True, capture_output=True)


def determined_by(
    options: Any, shards: Path, students: dict[str, list[Path]]
) -> dict[str, list[float]]:
    """The share of the teacher's last hidden states on held-out rows, see pipeline/readout.py."""
    names = [(case, path) for case, paths in students.items() for path in paths]
    recipe = Recipe(
        output_dir=str(options.work),
        teacher=Teacher(model=str(options.teacher)),
        train=Train(max_steps=1, batch_size=1, micro_batch_size=1),
        data=Data(shards=str(shards)),
    )
    ranking = rank(recipe, {number: str(path) for number, (_, path) in enumerate(names)})
    shares = {entry["layer"]: entry["explained"] for entry in ranking}
    found: dict[str, list[float]] = {case: [] for case in students}
    for number, (case, _) in enumerate(names):
        found[case].append(shares[number])
    return found


def save_untrained(teacher: Path, layers_alone: Path, random_weights: Path) -> None:
    """Two folders: every other layer of the teacher, and a configuration without weights."""
    model = AutoModel.from_pretrained(teacher, dtype=torch.float32)
    model.encoder.layer = model.encoder.layer[1::2]
    model.config.num_hidden_layers = len(model.encoder.layer)
    model.save_pretrained(layers_alone)
    model.config.save_pretrained(random_weights)
    for path in (layers_alone, random_weights):
        AutoTokenizer.from_pretrained(teacher).save_pretrained(path)


def score(options: Any, model: Path, task: str, seed: int) -> float:
    """Accuracy after fine-tuning, in a process of its own, unless it is known."""
    folder = options.work / (options.name or options.teacher.name) / "scores"
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{_slug(str(model.resolve()))}.{task}.{seed}.json"
    if not path.exists():
        command = [sys.executable, __file__, "--corpus", str(options.corpus)]
        command += ["--eval", str(options.eval), "--score", str(model), task, str(seed), str(path)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=env, capture_output=True)
    return float(json.loads(path.read_text()))


def fine_tune(folder: str, task: tuple[str, str, tuple[str, ...]], data: Path, seed: int) -> float:
    """Accuracy on the task's test file after fine-tuning on the head of its shuffled other one."""
    train_file, test_file, columns = task
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = _read(data / train_file, columns), _read(data / test_file, columns)
    generator = torch.Generator().manual_seed(seed)

    def shuffled(items: Sequence[Any]) -> list[Any]:
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    train = shuffled(train)[: int(FINE_TUNING["examples"])]
    labels = sorted({label for _, label in train})
    torch.manual_seed(seed)
    options = {"num_labels": len(labels), "hidden_dropout_prob": 0.1}
    if (Path(folder) / "model.safetensors").exists():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, **options
        )
    else:
        config = AutoConfig.from_pretrained(folder, dtype=torch.float32, **options)
        model = AutoModelForSequenceClassification.from_config(config)

    def batches(examples: Sequence[Any], size: int) -> list[Any]:
        """Of nearly one length each: padding is most of the work otherwise."""
        examples = sorted(examples, key=lambda example: sum(map(len, example[0])))
        return [examples[start : start + size] for start in range(0, len(examples), size)]

    def forward(batch: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        texts, targets = zip(*batch, strict=True)
        encoded = tokenizer(
            *map(list, zip(*texts, strict=True)),
            truncation=True,
            max_length=FINE_TUNING["tokens"],
            padding=True,
            return_tensors="pt",
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**encoded).logits
        return logits.float(), torch.tensor([labels.index(target) for target in targets])

    size, epochs = int(FINE_TUNING["batch"]), int(FINE_TUNING["epochs"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=FINE_TUNING["rate"], fused=True)
    steps = epochs * -(-len(train) // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    model.train()
    for _epoch in range(epochs):
        for batch in shuffled(batches(train, size)):
            logits, targets = forward(batch)
            torch.nn.functional.cross_entropy(logits, targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    right = 0
    with torch.inference_mode():
        for batch in batches(test, 64):
            logits, targets = forward(batch)
            right += int((logits.argmax(1) == targets).sum())
    return right / len(test)


def _read(path: Path, columns: Sequence[str]) -> list[tuple[tuple[str, ...], str]]:
    with open(path, encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(tuple(line[column] for column in columns), line["label"]) for line in lines]


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text).strip("-")


if __name__ == "__main__":
    main()
