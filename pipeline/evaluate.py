r"""Fine-tune an encoder on tasks, score it, and say what it keeps of its teacher.

    python -m pipeline.evaluate --model runs/mine/student --tasks xnli,squad_v2 --data_dir DIR \
        --against FacebookAI/xlm-roberta-base --seeds 1,2,3

docs/evaluation.md lists the tasks, where their files are looked for, and how to describe your own.
Started by srun, torchrun or by hand several times, processes share out the work.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data_prep.command import (
    EXIT_FINISHED,
    ConfigError,
    OptionParser,
    run_command,
    skip_unreachable_hub,
)
from data_prep.durable import write_durably
from pipeline.topology import launched_rank, take_rank

if TYPE_CHECKING:  # they load torch and transformers: a typo is refused before
    from pipeline.evaluation.cells import Cell
    from pipeline.evaluation.data import TaskData
    from pipeline.evaluation.fine_tuning import Source
    from pipeline.evaluation.tasks import Task

T = TypeVar("T")
RESULTS, TABLES, SPEED, TIMES, PLOT = (
    "results.json", "retention.md", "speed.json", "times.json", "score_latency.svg",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left of the cells; where none is, write results and tables."""
    options = parse(argv)
    rank, num_ranks = take_rank()
    skip_unreachable_hub(
        options.model, *options.against, None if options.data_dir else "a data set"
    )
    from pipeline.evaluation import data
    from pipeline.evaluation.user_tasks import find_tasks

    if options.list_tasks:
        list_tasks(options.data_dir)
        return EXIT_FINISHED
    found = find_tasks(options.tasks)
    limits = data.Limits(
        parts=options.languages,
        train_parts=options.train_languages,
        max_train_examples=options.max_train_examples,
        max_eval_examples=options.max_eval_examples,
    )
    loaded = {task: data.load(task, options.data_dir, limits) for task in found}
    from pipeline.evaluation.cells import claimed, run_cells

    models = models_of(options)
    cells = plan(options, models, loaded)
    if rank == 0:
        announce(options, models, loaded, cells)
    left = run_cells(
        cells, rank * len(cells) // num_ranks, say=lambda line: print(line, flush=True)
    )
    if left:
        print(f"{len(left)} cells are other processes'; the last one writes the tables")
        return EXIT_FINISHED
    with claimed(options.output_dir) as is_ours:
        if is_ours:  # else another one, that ended its last cell just now, is writing them
            finish(options, models, loaded, cells)
    return EXIT_FINISHED


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, each of its type.

    Raises:
        ConfigError: one is missing, or is not what it has to be.
    """
    parser = OptionParser(
        prog="python -m pipeline.evaluate",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="hub id or folder of the encoder")
    add("--tasks", "--task", type=_words, default=(), help="names, and .yaml files, with commas")
    add("--data_dir", type=Path, help="folder of the tasks' files; default: the hub's data sets")
    add("--against", type=_words, default=(), help="models to compare with; the first one is the "
        "teacher")  # fmt: skip
    add("--no_floor", action="store_true", help="with --against, do not fine-tune an untrained "
        "encoder of the model's shape, which costs as much as another model")  # fmt: skip
    add("--output_dir", type=Path, default=Path("runs/evaluation"))
    add("--learning_rates", type=_many(float), default=(5e-5,), help="to choose from; default 5e-5")
    add("--epochs", type=_many(float), default=(3.0,), help="to choose from; default 3")
    add("--seeds", "--seed", type=_many(int), default=(1,), help="default 1")
    add("--max_train_examples", type=_positive(int), help="of each task")
    add("--max_eval_examples", type=_positive(int), help="of each language, for a first look")
    add("--languages", type=_words, default=(), help="of those there are, the ones to report")
    add("--train_languages", type=_words, default=(), help="to train on together, or `all`; "
        "default: English alone, and the others without any examples")  # fmt: skip
    add("--bf16", action="store_true", help="products in bfloat16: faster, other last digits")
    add("--speed", action="store_true", help="measure latency, throughput and memory too")
    add("--list_tasks", action="store_true", help="what there is, in --data_dir if given")
    options = parser.parse_args(argv)
    if not options.list_tasks:
        for key in ("model", "tasks"):
            if not getattr(options, key):
                raise ConfigError(f"--{key} is not set, so there is nothing to evaluate; set it")
    return options


def models_of(options: argparse.Namespace) -> dict[str, Source]:
    """The models by the names that tables call them: the student, the others, the floor.

    Raises:
        ConfigError: one is no encoder, or has no tokenizer of its own.
    """
    from pipeline.evaluation.fine_tuning import Source

    sources = [Source(options.model, "--model")]
    sources += [Source(name, "--against") for name in options.against]
    if options.against and not options.no_floor:
        sources.append(Source(options.model, "--model", untrained=True))
    for source in sources:
        source.config()
        source.tokenizer()
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        names = [source.source + ", untrained" * source.untrained for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError("--model and --against name one model twice; name each once")
    return dict(zip(names, sources, strict=True))


def plan(
    options: argparse.Namespace, models: dict[str, Source], loaded: dict[Task, TaskData]
) -> list[Cell]:
    """All cells, those of one model and task side by side."""
    from pipeline.evaluation.cells import Cell
    from pipeline.evaluation.fine_tuning import Training

    digests = {name: source.digest() for name, source in models.items()}
    cells = []
    for task, data in loaded.items():
        grid = [
            Training(learning_rate=rate, epochs=epochs, seed=seed, bf16=options.bf16)
            for rate in options.learning_rates
            for epochs in options.epochs
            for seed in options.seeds
        ]
        if task.kind == "retrieval":  # nothing is trained
            grid = [Training(learning_rate=0, epochs=0, seed=options.seeds[0])]
        cells += [
            Cell(
                source=source,
                name=name,
                digest=digests[name],
                task=task,
                data=data,
                training=training,
                root=options.output_dir / "cells",
            )
            for name, source in models.items()
            for training in grid
        ]
    return cells


def announce(
    options: argparse.Namespace,
    models: dict[str, Source],
    loaded: dict[Task, TaskData],
    cells: Sequence[Cell],
) -> None:
    """Say what is about to be done, defaults included."""
    for task, data in loaded.items():
        of_test = sum(map(len, data.test.values()))
        left_out = ", ".join(f"{number} of {where}" for where, number in data.left_out.items())
        print(
            f"{task.name}: {task.kind}, {task.metric}; {len(data.train)} examples to train on, "
            f"{of_test} of {len(data.test)} {data.reported} sets"
            + (f" ({', '.join(data.test)})" if task.parts else "")
            + (f"; rows left out: {left_out}" if left_out else "")
        )
    print(f"models: {', '.join(models)}")
    print(
        f"learning rates {_listed(options.learning_rates)}, epochs {_listed(options.epochs)}, "
        f"seeds {_listed(options.seeds)}: {len(cells)} cells, {sum(c.is_done for c in cells)} of "
        f"them done, in {options.output_dir}",
        flush=True,
    )


def finish(
    options: argparse.Namespace,
    models: dict[str, Source],
    loaded: dict[Task, TaskData],
    cells: Sequence[Cell],
) -> None:
    """Write and print what all cells together say. Whichever process does it writes the same."""
    from pipeline.evaluation.retention import tables
    from pipeline.evaluation.speed import measure_apart, plot
    from pipeline.evaluation.speed import table as speed_table

    results = summarise(options, models, loaded, cells)
    folder: Path = options.output_dir
    write_durably(folder / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    times = {str(cell.folder.relative_to(folder)): cell.times() for cell in cells}
    write_durably(folder / TIMES, json.dumps(times, indent=1) + "\n")
    text = tables(results)
    if options.speed:
        trained = {name: source for name, source in models.items() if not source.untrained}
        speeds = {name: measure_apart(source) for name, source in trained.items()}
        write_durably(folder / SPEED, json.dumps(speeds, indent=1) + "\n")
        plot({name: results["mean"][name]["score"] for name in models}, speeds, folder / PLOT)
        text += "\n" + speed_table(speeds)
    write_durably(folder / TABLES, text)
    print(f"\n{text}\n{folder / RESULTS}, {folder / TABLES}")


def summarise(
    options: argparse.Namespace,
    models: dict[str, Source],
    loaded: dict[Task, TaskData],
    cells: Sequence[Cell],
) -> dict[str, Any]:
    """The content of results.json; scores are from 0 to 1."""
    from pipeline.evaluation.cells import chosen
    from pipeline.evaluation.fine_tuning import size_of
    from pipeline.evaluation.retention import compare, over_seeds
    from pipeline.evaluation.speed import flops_per_token

    results = {cell: cell.result() for cell in cells}
    names = list(models)
    teacher = names[1] if options.against else None
    floor = next((name for name, source in models.items() if source.untrained), None)
    best = {
        (name, task): chosen([c for c in cells if (c.name, c.task) == (name, task)], results)
        for name in names
        for task in loaded
    }
    scores: dict[str, dict[str, Any]] = {name: {} for name in names}
    for (name, task), group in best.items():
        training = group[0].training
        found = scores[name][task.name] = {
            **over_seeds([results[cell]["score"] for cell in group]),
            "learning_rate": training.learning_rate,
            "epochs": training.epochs,
            "seeds": {cell.training.seed: results[cell]["parts"] for cell in group},
            "parts": {
                part: statistics.fmean(results[c]["parts"][part][task.metric] for c in group)
                for part in loaded[task].test
            },
            "cells": {
                cell.label: {key: results[cell][key] for key in ("dev", "score", "layer", "layers")
                             if key in results[cell]}
                for cell in cells if (cell.name, cell.task) == (name, task)
            },
        }  # fmt: skip
        if teacher is not None and name not in (teacher, floor):
            found["retention"] = compare(
                group, best[teacher, task], best[floor, task] if floor else None, results
            )
    means: dict[str, dict[str, Any]] = {}
    for name in names:
        kept = [scores[name][task.name].get("retention", {}).get("of_teacher") for task in loaded]
        means[name] = {
            "score": statistics.fmean(scores[name][task.name]["mean"] for task in loaded),
            "of_teacher": None if None in kept else statistics.fmean(kept),
        }
    return {
        "format": 1,
        "settings": {
            "learning_rates": options.learning_rates,
            "epochs": options.epochs,
            "seeds": options.seeds,
            "max_train_examples": options.max_train_examples,
            "max_eval_examples": options.max_eval_examples,
            "train_languages": options.train_languages,
            **{key: cells[0].facts[key] for key in ("batch_size", "warmup", "weight_decay",
                                                    "device", "libraries")},
            "bf16": options.bf16,
        },
        "models": {
            name: {
                "source": source.source,
                "untrained": source.untrained,
                **size_of(source),
                "flops_per_token": flops_per_token(source),
            }
            for name, source in models.items()
        },
        "teacher": teacher,
        "tasks": {
            task.name: {
                "kind": task.kind,
                "metrics": task.measured,
                "reported": data.reported,
                "parts": {part: len(examples) for part, examples in data.test.items()},
                "train_examples": len(data.train),
                "sources": data.sources,
                "left_out": data.left_out,
                "digest": data.digest,
            }
            for task, data in loaded.items()
        },
        "scores": scores,
        "mean": means,
    }  # fmt: skip


def list_tasks(data_dir: Path | None) -> None:
    """Print the tasks, and what of them is there."""
    from pipeline.evaluation.data import available
    from pipeline.evaluation.tasks import TASKS

    lacks = available(data_dir) if data_dir else {}
    for task in TASKS.values():
        state = "" if not data_dir else lacks[task.name] or "all there"
        print(f"{task.name:<13} {task.kind:<15} {', '.join(task.measured):<32} {state}".rstrip())


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _positive(kind: Callable[[str], T]) -> Callable[[str], T]:
    def read(text: str) -> T:
        value = kind(text)
        if not 0 < float(text) < math.inf:
            raise ValueError(text)
        return value

    read.__name__ = f"number above 0: {kind.__name__}"  # argparse names it
    return read


def _many(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    def read(text: str) -> tuple[T, ...]:
        values = tuple(dict.fromkeys(_positive(kind)(word) for word in _words(text)))
        if not values:
            raise ValueError(text)
        return values

    read.__name__ = f"list of numbers above 0: {kind.__name__}"
    return read


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    run_command(main, rank=launched_rank())
