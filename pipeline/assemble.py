"""Runs, checked and assembled in the order in which things can be refused most cheaply."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from data_prep.command import ConfigError, RunError
from data_prep.config import check_prep
from data_prep.durable import write_durably
from data_prep.shards import MANIFEST, Manifest, ShardReader, tokenizer_fingerprint
from pipeline.checkpoint import (
    Checkpoints,
    State,
    check_identity,
    identity,
    is_foreign,
    shards_digest_of,
    tag_of,
)
from pipeline.collectives import copy_from_rank_0, gather, on_rank_0
from pipeline.config import (
    ROOT,
    Recipe,
    check_layer,
    check_world,
    plain,
    public,
    read_ds_config,
)
from pipeline.engine import Engine, init_distributed, merge_ds_config
from pipeline.export import CONFIG, save_start
from pipeline.initialise import check_start
from pipeline.loader import Loader, open_shards
from pipeline.masking import Masking
from pipeline.metrics import JsonLines, Metrics
from pipeline.models import (
    Target,
    build_student,
    keep_tokens,
    load_teacher,
    load_tokenizer,
    longest_segment,
    num_parameters,
    own_weights,
    pack_encoder,
    read_config,
    start_from_teacher,
    student_config,
    trimmed_config,
    unused_shape_keys,
)
from pipeline.objectives import DistillationObjective, build_objective
from pipeline.provenance import provenance
from pipeline.run import Run, finish
from pipeline.stopping import StopRequest
from pipeline.topology import Topology
from pipeline.trimmed_tokenizer import trimmed_tokenizer
from pipeline.vocabulary import Vocabulary, choose_vocabulary, in_words
from pipeline.watchdog import Watchdog

LOCK_PATIENCE = 120.0  # seconds: ranks of a launcher that died still finish and save their step


def assemble(
    recipes: Sequence[Recipe],
    stop: StopRequest,
    watchdog: Watchdog,
    *,
    deepspeed: str,
    allow_change: list[str],
) -> list[Run]:
    """Check everything, connect the ranks, and start or restore the runs.

    Args:
        recipes: checked by themselves, of students that share the teacher's pass: one or several.
        stop: installed when the process began.
        watchdog: is started when the ranks are connected and the shards are there.
        deepspeed: path of the DeepSpeed JSON.
        allow_change: keys that may differ from the checkpoint's.

    Returns:
        The runs, or none where all are finished and nothing is left to do.

    Raises:
        ConfigError: something in recipe, models, shards and checkpoint does not fit together.
        RunError: damaged shards.
    """
    topology, first = Topology.from_environment(), recipes[0]
    check_world(first, topology.world_size)
    ds_policy = read_ds_config(deepspeed)
    teacher_config = read_config("teacher.model", first.teacher.model)
    students = [_check_student(recipe, ds_policy, teacher_config, topology) for recipe in recipes]
    if topology.rank == 0:
        for recipe in recipes:
            # Before the ranks connect: a dying run still holds the port.
            _claim(Path(recipe.output_dir))
    device = init_distributed(topology)
    for recipe in recipes:
        _check_implementation(recipe, device)
    on_rank_0(lambda: _prepare_if_missing(first))
    watchdog.start(topology)
    for student in students:
        student.saved = student.checkpoints.newest()
    saved = next((student.saved for student in students if student.saved is not None), None)
    # Shards may have been added to the folder since: a run goes on with those that it began with.
    began_with = None if saved is None else shards_digest_of(saved, allow_change)
    on_rank_0(lambda: _check_shards(students, teacher_config, began_with))
    reader = open_shards(first, began_with)
    shards_digest = reader.digest
    for student in students:
        student.identity = identity(student.recipe, ds_policy, shards_digest)
        if student.saved is not None:
            check_identity(student.saved.identity, student.identity, allow_change)
    ends = [(s.recipe, s.saved) for s in students if s.saved is not None and s.is_finished]
    if len(ends) == len(students):
        for recipe, state in ends:
            on_rank_0(functools.partial(_already_finished, recipe, state))
        return []
    for student in students:
        student.vocabulary = choose_vocabulary(
            student.recipe, reader, shards_digest, topology, device
        )
        on_rank_0(functools.partial(_write_start, student, topology, shards_digest))
    return _build(students, reader, topology, device, stop)


def _check_implementation(recipe: Recipe, device: torch.device) -> None:
    interpreted = "TRITON_INTERPRET" in os.environ
    if recipe.objective.relation_kl == "triton" and device.type != "cuda" and not interpreted:
        raise ConfigError(
            "objective.relation_kl=triton needs a GPU, and there is none here; use auto, which "
            "chooses it where there is one"
        )


@dataclasses.dataclass(kw_only=True)
class _Student:
    """What fits together, before anything large is built of it.

    `config` is of all the teacher's tokens; `vocabulary` is None where the student keeps them;
    `saved` is None in a new run.
    """

    recipe: Recipe
    ds_config: dict[str, Any]
    config: Any
    objective: DistillationObjective
    target: Target
    checkpoints: Checkpoints
    vocabulary: Vocabulary | None = None
    saved: State | None = None
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def vocabulary_facts(self) -> dict[str, int | float] | None:
        """What a trimmed vocabulary keeps and saves; None where it is the teacher's."""
        if self.vocabulary is None:
            return None
        config = self.config
        return self.vocabulary.facts(num_parameters(config), config.vocab_size, config.hidden_size)

    @property
    def is_finished(self) -> bool:
        """Whether its last step is saved."""
        return self.saved is not None and self.saved.step >= self.recipe.train.max_steps


def _check_student(
    recipe: Recipe, ds_policy: Mapping[str, Any], teacher_config: Any, topology: Topology
) -> _Student:
    """Refuse a student that this teacher cannot teach, or DeepSpeed not train."""
    ds_config = merge_ds_config(ds_policy, recipe, topology.world_size)
    config = student_config(recipe.student, teacher_config)
    check_layer(recipe, teacher_config.num_hidden_layers)
    objective = build_objective(recipe, teacher_config, config)
    layer = recipe.teacher.layer or teacher_config.num_hidden_layers
    check_start(recipe.student, config, teacher_config, layer)
    unused = unused_shape_keys(recipe.student, config)
    if unused and topology.rank == 0:
        print(f"note: student.model brings its own shape, unused are {', '.join(unused)}")
    return _Student(
        recipe=recipe,
        ds_config=ds_config,
        config=config,
        objective=objective,
        target=Target(objective.teacher_needs, layer),
        checkpoints=Checkpoints(
            Path(recipe.output_dir),
            topology,
            keep=recipe.train.keep_checkpoints,
            keep_every=recipe.train.keep_every,
            max_failed_saves=recipe.train.max_failed_saves,
        ),
    )


def _build(
    students: Sequence[_Student],
    reader: ShardReader,
    topology: Topology,
    device: torch.device,
    stop: StopRequest,
) -> list[Run]:
    recipe, train = students[0].recipe, students[0].recipe.train
    loader = Loader(
        reader,
        topology,
        batch_size=train.batch_size,
        micro=train.micro_batch_size,
        seed=recipe.seed,
        masking=_masking(recipe, students[0].objective),
        one_shape=train.compile,
    )
    rows = reader.manifest.heldout_rows  # 0 of a language with a single document
    heldout = {language: loader.heldout(language) for language, n in rows.items() if n}
    teacher = load_teacher(recipe, device, [student.target for student in students])
    is_first, hosts = topology.rank == 0, gather(platform.node())
    runs: list[Run] = []
    for student in students:
        engine, state = _engine(student, topology, device)
        engine.train(True)
        output_dir = Path(student.recipe.output_dir)
        on_rank_0(functools.partial(_cut_row_logs, output_dir, state.step))
        has_row_log = student.recipe.data.row_log
        runs.append(
            Run(
                recipe=student.recipe,
                topology=topology,
                device=device,
                stop=stop,
                loader=loader,
                heldout=heldout,
                objective=student.objective,
                teacher=functools.partial(teacher.of, student.target),
                teacher_weights=teacher.replicas,
                engine=engine,
                checkpoints=student.checkpoints,
                metrics=_metrics(student, state) if is_first else None,
                row_log=_row_log(output_dir, topology, state.step) if has_row_log else None,
                state=state,
                bar=tqdm(
                    total=train.max_steps,
                    initial=state.step,
                    desc="distil" if len(students) == 1 else output_dir.name,
                    unit="step",
                    position=len(runs),
                    disable=None if is_first else True,
                ),
                hosts=hosts,
                tokens_logged=state.tokens,
                steps_logged=state.step,
            )
        )
    return runs


def _metrics(student: _Student, state: State) -> Metrics:
    # A start that was killed before its first checkpoint leaves a line of step 0.
    is_new = student.saved is None
    metrics = Metrics(Path(student.recipe.output_dir), resume_step=-1 if is_new else state.step)
    if is_new and student.vocabulary_facts is not None:
        facts = student.vocabulary_facts
        metrics.write(0, {f"vocabulary_{name}": value for name, value in facts.items()})
    return metrics


def _masking(recipe: Recipe, objective: DistillationObjective) -> Masking | None:
    if not objective.mask_probability:
        return None
    tokenizer = load_tokenizer(recipe.tokenizer)
    return Masking(tokenizer, objective.mask_probability, recipe.seed)


def _engine(student: _Student, topology: Topology, device: torch.device) -> tuple[Engine, State]:
    """The student in its engine: as it starts, or as the checkpoint has it."""
    recipe, saved, checkpoints = student.recipe, student.saved, student.checkpoints
    objective = student.objective
    config, vocabulary = student.config, student.vocabulary
    kept = vocabulary.kept if vocabulary else None
    model = build_student(recipe.student, config, recipe.seed, objective.needs)
    if kept is not None:
        keep_tokens(model, kept)
        config = trimmed_config(config, kept)
    if saved is None and recipe.student.init != "random":
        on_rank_0(lambda: start_from_teacher(model, recipe, objective.teacher_needs, kept))
        copy_from_rank_0(model.state_dict().values(), device)
    whole = own_weights(model)
    new_ids = vocabulary.new_ids() if vocabulary else None
    encoder = pack_encoder(model, objective.needs, objective.projections, new_ids)
    if recipe.train.compile:
        encoder.compile_layers()
    if saved is None:
        untrained = {name: whole[name] for name in whole.keys() - encoder.named_weights().keys()}
        on_rank_0(
            lambda: save_start(
                config, _student_tokenizer(recipe, kept), untrained, Path(recipe.output_dir)
            )
        )
        state = State(step=0, tokens=0, world_size=topology.world_size, identity=student.identity)
        return Engine(encoder, recipe, student.ds_config, load_universal=False), state
    state = dataclasses.replace(saved, world_size=topology.world_size, identity=student.identity)
    foreign = is_foreign(saved, state)
    engine = Engine(encoder, recipe, student.ds_config, load_universal=foreign)
    checkpoints.restore(engine, saved, foreign=foreign)
    if topology.rank == 0:
        print(f"resuming from {checkpoints.folder / tag_of(saved.step)}", flush=True)
    return engine, state


def _student_tokenizer(recipe: Recipe, kept: torch.Tensor | None) -> Any:
    tokenizer = load_tokenizer(recipe.tokenizer)
    return tokenizer if kept is None else trimmed_tokenizer(tokenizer, kept.numpy())


def _claim(output_dir: Path) -> None:
    """Make this process the only one that trains in a folder, until it ends however it ends.

    Raises:
        ConfigError: another process keeps the folder.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        # Never closed: the lock lasts as long as the process.
        descriptor = os.open(output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"output_dir={output_dir} cannot be written ({error.strerror}), so the run would leave "
            "nothing; name a folder that can be"
        ) from error
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() > deadline:
            raise ConfigError(
                f"another process is training in output_dir={output_dir}, and two would damage "
                "each other's checkpoints; end it, or use another output_dir"
            )
        time.sleep(0.5)


def _prepare_if_missing(recipe: Recipe) -> None:
    """Prepare a small corpus in a process of its own, where data.prepare allows it."""
    shards = Path(recipe.shards)
    if not recipe.data.prepare or "://" in recipe.shards or (shards / MANIFEST).exists():
        return
    check_prep(recipe.prep)
    print(f"{shards} has no shards yet: preparing them from prep.input", flush=True)
    # MPI and SLURM variables of the training job would make it take part in that job's launch.
    foreign = ("PMI", "OMPI_", "MPI_", "SLURM_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as resolved:
        yaml.safe_dump(plain(recipe), resolved)
        resolved.flush()
        command = [sys.executable, "-m", "data_prep.build_shards", "--config", resolved.name]
        done = subprocess.run([*command, f"--prep.output_dir={shards}"], env=env)
    if done.returncode:
        raise RunError(f"the preparation of {shards} failed with status {done.returncode}")


def _check_shards(students: Sequence[_Student], teacher_config: Any, digest: str | None) -> None:
    """Refuse shards that these models cannot read, or that are not there as the manifest says."""
    manifest = open_shards(students[0].recipe, digest).manifest
    for student in students:
        _check_models(student.recipe, manifest, teacher_config, student.config)


def _check_models(recipe: Recipe, manifest: Manifest, teacher_config: Any, config: Any) -> None:
    """Refuse shards that a student or its teacher cannot read.

    Raises:
        ConfigError: another tokenizer made them, or a row is longer than a model's positions.
    """
    fingerprint = tokenizer_fingerprint(load_tokenizer(recipe.tokenizer))
    if fingerprint != manifest.tokenizer_fingerprint:
        raise ConfigError(
            f"data.shards={recipe.shards} were made with another tokenizer than "
            f"{recipe.tokenizer!r} (fingerprint {manifest.tokenizer_fingerprint[:12]}, not "
            f"{fingerprint[:12]}), so the ids would mean other words; prepare the shards again "
            "with this teacher's tokenizer"
        )
    for key, model in (("teacher.model", teacher_config), ("student.model", config)):
        if model.vocab_size < manifest.vocab_size:
            raise ConfigError(
                f"{key} has embeddings for {model.vocab_size} ids, the shards' tokenizer has "
                f"{manifest.vocab_size}; use the model that the tokenizer belongs to"
            )
        if longest_segment(model) < manifest.seq_len:
            raise ConfigError(
                f"data.shards={recipe.shards} has rows of {manifest.seq_len} tokens, {key} has "
                f"positions for {longest_segment(model)}; prepare with prep.seq_len="
                f"{longest_segment(model)} or less"
            )
    if recipe.student.model and (Path(recipe.student.model) / "tokenizer.json").exists():
        own = tokenizer_fingerprint(load_tokenizer(recipe.student.model))
        if own != fingerprint:
            raise ConfigError(
                f"student.model={recipe.student.model!r} has another tokenizer than "
                f"{recipe.tokenizer!r}, so its embeddings mean other words; start from a student "
                "of the teacher's vocabulary"
            )


def _already_finished(recipe: Recipe, state: State) -> None:
    if not (Path(recipe.output_dir) / "student" / "model.safetensors").exists():
        finish(recipe, state)  # it was killed between its last checkpoint and its export
    print(
        f"{recipe.output_dir} is finished: {state.step} of {recipe.train.max_steps} steps are "
        "done, nothing left to do"
    )


def _write_start(student: _Student, topology: Topology, shards_digest: str) -> None:
    recipe, vocabulary = student.recipe, student.vocabulary_facts
    output_dir, ds_config = Path(recipe.output_dir), student.ds_config
    write_durably(output_dir / CONFIG, yaml.safe_dump(public(recipe), sort_keys=False))
    write_durably(output_dir / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
    facts = {**provenance(recipe, topology, shards_digest), "vocabulary": vocabulary}
    if vocabulary is not None:
        print("vocabulary: " + in_words(vocabulary), flush=True)
    path = output_dir / "provenance.json"
    if path.exists():
        first = json.loads(path.read_text(encoding="utf-8"))
        facts = {**first, "resumed": [*first["resumed"], facts]}
    else:
        facts["resumed"] = []
    write_durably(path, json.dumps(facts, indent=2) + "\n")


def _row_log_path(output_dir: Path, rank: int) -> Path:
    return output_dir / "rows" / f"rank-{rank:05d}.jsonl"


def _row_log(output_dir: Path, topology: Topology, step: int) -> JsonLines:
    return JsonLines(_row_log_path(output_dir, topology.rank), resume_step=step)


def _cut_row_logs(output_dir: Path, step: int) -> None:
    """Also of ranks that are no longer there."""
    for path in sorted((output_dir / "rows").glob("rank-*.jsonl")):
        JsonLines(path, resume_step=step).close()
