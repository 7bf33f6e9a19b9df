"""Teacher -> assistant -> student: ordinary runs, each of which learns from the one before.

A student far smaller than its teacher learns more from a model in between (Mirzadeh et al.,
arXiv 1902.03393; MiniLM, arXiv 2002.10957, section 3.3). `python -m pipeline.chain
recipes/chain.yaml` starts every stage as a user would, in OUTPUT_DIR/NAME, with the student of the
stage before as its teacher. Started again, it skips what is complete and resumes the rest.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data_prep.command import (
    EXIT_FINISHED,
    EXIT_STOPPED,
    ConfigError,
    RunError,
    parse_recipe,
    run_command,
)
from pipeline.config import (
    DEFAULT_DS_CONFIG,
    Recipe,
    as_arguments,
    check_names,
    load_recipe,
    public,
    read_ds_config,
)
from pipeline.launching import run_training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of the chain.

    Args:
        name: of the folder below the chain's output_dir.
        config: recipe; from the second stage on its teacher.model is replaced.
        set: recipe keys by their dotted names that differ from the recipe.
    """

    name: str
    config: str
    set: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """Stages in the order in which they run.

    Args:
        output_dir: folder of the stages' folders.
        stages: the first learns from its recipe's teacher, each other from the one before it.
        deepspeed: DeepSpeed JSON of every stage.
        launcher: what starts pipeline/train.py, with its options.
    """

    output_dir: str
    stages: list[Stage]
    deepspeed: str = str(DEFAULT_DS_CONFIG)
    launcher: str = "deepspeed"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left of the chain that the command line names."""
    chain = read_chain(sys.argv[1:] if argv is None else argv)
    check_chain(chain)
    read_ds_config(chain.deepspeed)
    # All recipes are looked at first: a typo in the last one would show days later.
    recipes = [
        load_recipe(stage_arguments(chain, number))[0] for number in range(len(chain.stages))
    ]
    for number, stage in enumerate(chain.stages):
        title = f"[{number + 1}/{len(chain.stages)}] {stage.name}"
        if is_complete(recipes[number]):
            print(f"{title}: complete, skipped", flush=True)
            continue
        print(f"{title}: {recipes[number].teacher.model} -> {student_of(chain, stage)}", flush=True)
        status = run_training(chain.launcher, stage_arguments(chain, number))
        if status == EXIT_STOPPED:
            print(f"{title}: stopped with a checkpoint; the same command goes on from there")
            return EXIT_STOPPED
        if status != EXIT_FINISHED:
            raise RunError(
                f"stage {stage.name!r} ended with status {status}, its message is above; the "
                "stages before it are complete and will be skipped"
            )
    print(f"finished: {student_of(chain, chain.stages[-1])}")
    return EXIT_FINISHED


def read_chain(argv: Sequence[str]) -> Chain:
    """The chain of a command line: its file, and keys that differ from it by dotted names.

    Raises:
        ConfigError: an unknown key, a wrong type or a file that cannot be read.
    """
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--config")
    chain: Chain
    chain, _ = parse_recipe(
        Chain,
        arguments,
        prog="python -m pipeline.chain",
        description="Run a chain of distillations, each the teacher of the next one.",
    )
    return chain


def check_chain(chain: Chain) -> None:
    """Refuse stages that could not follow each other.

    Raises:
        ConfigError: no stage, a name that is no folder's or stands there twice, or a stage that
            sets what the chain decides.
    """
    if not chain.stages:
        raise ConfigError("stages is empty, so nothing would run; name at least one")
    check_names("stages", [stage.name for stage in chain.stages])
    for number, stage in enumerate(chain.stages):
        decided = {"output_dir", *(["teacher.model"] if number else [])}
        if taken := sorted(decided & stage.set.keys()):
            raise ConfigError(
                f"stage {stage.name!r} sets {taken[0]}, which the chain decides (a stage writes to "
                "output_dir/NAME and learns from the stage before); leave it out"
            )


def student_of(chain: Chain, stage: Stage) -> Path:
    """Where a stage leaves its student."""
    return Path(chain.output_dir) / stage.name / "student"


def stage_arguments(chain: Chain, number: int) -> list[str]:
    """What a stage's train.py is called with."""
    stage = chain.stages[number]
    arguments = ["--deepspeed", chain.deepspeed, "--config", stage.config]
    arguments += as_arguments(stage.set)
    arguments.append(f"--output_dir={Path(chain.output_dir) / stage.name}")
    if number:
        arguments.append(f"--teacher.model={student_of(chain, chain.stages[number - 1])}")
    return arguments


def is_complete(recipe: Recipe) -> bool:
    """Whether this very recipe has left its student.

    One that has changed since is for train.py to judge, which knows what a change means.
    """
    output_dir = Path(recipe.output_dir)
    if not (output_dir / "student" / "model.safetensors").exists():
        return False
    written = yaml.safe_load((output_dir / "config.yaml").read_text(encoding="utf-8"))
    return bool(written == public(recipe))


if __name__ == "__main__":
    run_command(main)
