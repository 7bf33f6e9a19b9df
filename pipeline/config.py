"""The recipe: typed sections, strict loading, and the rules between keys."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from data_prep.command import ConfigError, masked, parse_recipe
from data_prep.config import MAX_SEED, Prep

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_RECIPE = ROOT / "recipes" / "demo.yaml"
DEFAULT_DS_CONFIG = ROOT / "ds_configs" / "zero2.json"
HANG_SECONDS = (5.0, 1500.0)  # shortest and longest; COLLECTIVE_TIMEOUT is beyond
PAPER_WEIGHTS = {
    "minilmv2": {"qq": 1.0, "kk": 1.0, "vv": 1.0},
    "minilm": {"at": 1.0, "vr": 1.0},
    "distilbert": {"ce": 5.0, "mlm": 2.0, "cos": 1.0},
}
TERMS = {
    "minilmv2": (*(query + key for query in "qkv" for key in "qkv"), "hh"),
    "minilm": ("at", "vr", "hh"),
    "distilbert": ("ce", "mlm", "cos"),
}

RELATIONS = (*TERMS["minilmv2"], *TERMS["minilm"][:2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """The frozen model that is imitated.

    Args:
        model: hub id or folder.
        layer: 1-based layer whose queries, keys and values (and output, for the relation hh) are
            the target; null is the last, and must be for distilbert.
        dtype: that the teacher computes in; float8 is bfloat16 with 8-bit products in all layers
            but the last one's, on GPUs from Hopper on (a CPU computes the same, slowly).
    """

    model: str
    layer: int | None = None
    dtype: Literal["bfloat16", "float16", "float32", "float8"] = "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Student:
    """The model that trains: new, in this architecture and shape, or one to start from.

    Args:
        model: hub id or folder to start from, which then brings its own shape; null starts anew.
        architecture: of a new student; null is the teacher's own where that is bert, roberta,
            camembert or xlm-roberta, xlm-roberta for XLM-R XL, and bert for all others.
        num_hidden_layers: layers.
        hidden_size: width.
        num_attention_heads: attention heads; independent of the relation heads.
        intermediate_size: width of the feed-forward layers.
        hidden_dropout_prob: dropout after embeddings, attention and feed-forward, while training.
        attention_probs_dropout_prob: dropout of attention weights, while training.
        init: first weights of a new student: random, layers (copies of teacher layers, of the same
            widths) or svd (projections of teacher layers, for a narrower student).
        init_layers: teacher layers, 1-based, one for each student layer; null spreads them evenly
            up to teacher.layer. For init layers and svd.
        vocabulary: tokens that the student knows: full (the teacher's), corpus (those of the
            training shards) or languages (those of some languages' segments there).
        vocabulary_min_count: occurrences that a token needs there.
        vocabulary_languages: the languages, where vocabulary is languages.
    """

    model: str | None = None
    architecture: Literal["bert", "roberta", "xlm-roberta", "modernbert"] | None = None
    num_hidden_layers: int = 6
    hidden_size: int = 384
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    init: Literal["random", "layers", "svd"] = "random"
    init_layers: list[int] | None = None
    vocabulary: Literal["full", "corpus", "languages"] = "full"
    vocabulary_min_count: int = 1
    vocabulary_languages: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What of the teacher is imitated; docs/objectives.md has the equations.

    Args:
        name: minilmv2, self-attention relations (arXiv 2012.15828); minilm, attention distributions
            and value relations (arXiv 2002.10957); distilbert, predictions and hidden states (arXiv
            1910.01108).
        num_relation_heads: of minilmv2: heads that queries, keys and values are split into for the
            relations; divides both models' widths. The paper takes 48 for base and 64 for large
            teachers. minilm has the models' attention heads.
        relations: of minilmv2: weight of each relation's loss, query side and key side: qq qk qv kq
            kk kv vq vk vv. Of minilm, which takes its paper's where minilmv2's stand here: at and
            vr. Of both: hh, of hidden states, so that the student's last layer trains whole.
        losses: of distilbert: weights of soft targets (ce), masked language modelling (mlm) and
            the cosine of hidden states (cos).
        temperature: of distilbert: that both models' logits are divided by in ce.
        mlm_probability: of distilbert: share of the tokens that are masked.
        relation_kl: implementation: auto (triton on a GPU, else chunked), triton, chunked (any
            device, little memory) or reference (dense, the oracle).
    """

    name: Literal["minilmv2", "minilm", "distilbert"] = "minilmv2"
    num_relation_heads: int = 64
    relations: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict(PAPER_WEIGHTS["minilmv2"])
    )
    losses: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict(PAPER_WEIGHTS["distilbert"])
    )
    temperature: float = 2.0
    mlm_probability: float = 0.15
    relation_kl: Literal["auto", "triton", "chunked", "reference"] = "auto"

    def __post_init__(self) -> None:
        if self.name == "minilm" and self.relations == PAPER_WEIGHTS["minilmv2"]:
            object.__setattr__(self, "relations", dict(PAPER_WEIGHTS["minilm"]))

    @property
    def masks(self) -> float:
        """Share of the tokens that are masked."""
        return self.mlm_probability if self.name == "distilbert" else 0.0

    @property
    def weights_key(self) -> str:
        """The recipe key that holds the weights of this objective's terms."""
        return "losses" if self.name == "distilbert" else "relations"

    @property
    def weights(self) -> dict[str, float]:
        """The weights above 0 of this objective's terms, in a fixed order."""
        weights: dict[str, float] = getattr(self, self.weights_key)
        return {term: weights[term] for term in sorted(weights) if weights[term] > 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What the student is trained on.

    Args:
        shards: folder or fsspec URL of prepared shards; null is prep.output_dir.
        prepare: prepare the shards from prep.input first where there are none yet; meant for small
            corpora, since one process does it while the other ranks wait.
        row_log: write the ids of the rows that each rank trains on to OUTPUT_DIR/rows/.
        verify: when the checksum of a block is compared: the first time that a process reads it,
            always, or never.
        cache_dir: folder on a local disk that keeps blocks which were read from the shards, for all
            ranks of the host; null keeps none.
        cache_gb: what they may take there, in GB (10^9 bytes); what was used longest ago goes.
    """

    shards: str | None = None
    prepare: bool = False
    row_log: bool = False
    verify: Literal["first_read", "always", "never"] = "first_read"
    cache_dir: str | None = None
    cache_gb: float = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Schedule and optimizer (AdamW, linear warm-up, linear decay to 0 at max_steps).

    Args:
        max_steps: optimizer steps.
        batch_size: rows of one optimizer step, over all ranks.
        micro_batch_size: rows of one rank and forward pass.
        learning_rate: peak.
        warmup_steps: steps of linear warm-up.
        weight_decay: of matrices and embeddings; biases and layer norms do not decay.
        adam_betas: of AdamW.
        adam_eps: of AdamW.
        max_grad_norm: global gradient norm that gradients are clipped to.
        save_every: steps between checkpoints.
        keep_checkpoints: complete checkpoints that are kept, the newest.
        keep_every: checkpoints of steps that are its multiples are kept besides; 0 is none.
        max_failed_saves: checkpoints in a row that cannot be written before the run ends.
        log_every: steps between lines of metrics.jsonl.
        eval_every: steps between held-out losses; 0 is never.
        compile: let torch.compile fuse the layers of both models, over batches of one shape; for
            GPUs, where it has not been measured yet. Not with ZeRO 3.
    """

    max_steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float = 6e-4
    warmup_steps: int = 4000
    weight_decay: float = 0.01
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-6
    max_grad_norm: float = 1.0
    save_every: int = 1000
    keep_checkpoints: int = 3
    keep_every: int = 0
    max_failed_saves: int = 3
    log_every: int = 10
    eval_every: int = 1000
    compile: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """What is looked for while a run goes on; docs/detection.md.

    Args:
        hang_seconds: without any rank going on, after which all are ended and the one that is
            behind is named; null waits on.
        straggler_percent: that a rank's own work may take longer than the median of the others'
            before a line says so.
        on_loss_spike: what follows a loss far over those of the steps before: warn, a line that
            names step and rows, or skip, the line and no update of the weights.
        loss_spike_mads: median absolute deviations over the median that are far.
        loss_spike_window: steps before, of which these are taken.
        check_corruption_every: steps between two checks that all ranks compute the same from the
            same rows and hold the same weights; null is never.
    """

    hang_seconds: float | None = 1200.0
    straggler_percent: float = 50.0
    on_loss_spike: Literal["warn", "skip"] = "warn"
    loss_spike_mads: float = 10.0
    loss_spike_window: int = 64
    check_corruption_every: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One of several students that learn from the same pass of the teacher.

    Args:
        name: of its folder below output_dir, which is an ordinary run's.
        set: recipe keys by their dotted names in which it differs: student.*, objective.*,
            teacher.layer, and of train what belongs to its optimizer.
    """

    name: str
    set: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, or several that share the teacher's pass.

    Args:
        output_dir: folder that the run writes to, and resumes from.
        teacher: the frozen model that is imitated.
        train: schedule and optimizer.
        seed: of initialisation, dropout and data order.
        student: the model that trains.
        objective: what of the teacher is imitated.
        prep: how raw text becomes shards.
        data: what the student is trained on.
        watch: what is looked for while a run goes on.
        students: several students, each trained as if it were alone; empty is the one that the
            recipe describes.
    """

    output_dir: str
    teacher: Teacher
    train: Train
    seed: int = 1
    student: Student = dataclasses.field(default_factory=Student)
    objective: Objective = dataclasses.field(default_factory=Objective)
    prep: Prep = dataclasses.field(default_factory=Prep)
    data: Data = dataclasses.field(default_factory=Data)
    watch: Watch = dataclasses.field(default_factory=Watch)
    students: list[Variant] = dataclasses.field(default_factory=list)

    @property
    def shards(self) -> str:
        """Folder or URL of the shards."""
        shards = self.data.shards or self.prep.output_dir
        if not shards:
            raise ConfigError(
                "data.shards and prep.output_dir are both null, so there is nothing to train on; "
                "set data.shards to a folder of prepared shards"
            )
        return shards

    @property
    def tokenizer(self) -> str:
        """Hub id or folder of the tokenizer that teacher, student and shards share."""
        return self.prep.tokenizer or self.teacher.model

    def accumulation_steps(self, world_size: int) -> int:
        """Forward passes of each rank in an optimizer step."""
        return self.train.batch_size // (self.train.micro_batch_size * world_size)


def load_recipe(argv: Sequence[str] | None) -> tuple[Recipe, Namespace]:
    """The recipe of a `train.py` command line, and its options `deepspeed` and `allow_change`.

    Raises:
        ConfigError: anything in it that can be refused without looking at models or data.
    """

    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--deepspeed", type=str, default=str(DEFAULT_DS_CONFIG), help="DeepSpeed JSON"
        )
        parser.add_argument(
            "--allow_change",
            type=str,
            action="append",
            default=[],
            metavar="KEY",
            help="recipe keys that may differ from the checkpoint's, although they change the run",
        )
        parser.add_argument(
            "--profile",
            action="store_true",
            help="write a trace of steps 4 to 6, and where they go, to OUTPUT_DIR/profile/",
        )
        parser.add_argument(
            "--local_rank", type=int, default=-1, help="set by the launcher; unused"
        )

    recipe, options = parse_recipe(
        Recipe,
        argv,
        prog="deepspeed pipeline/train.py",
        description="Distil a large encoder into a small one.",
        default_config=str(DEFAULT_RECIPE),
        add_options=add_options,
    )
    check_recipe(recipe)
    return recipe, options


# What students of one pass may differ in: all else belongs to the teacher's pass or to the data.
VARIANT_KEYS = (
    "student. objective. teacher.layer train.learning_rate train.warmup_steps train.weight_decay "
    "train.adam_betas train.adam_eps train.max_grad_norm"
).split()


def load_recipes(argv: Sequence[str] | None) -> tuple[list[Recipe], Namespace]:
    """The recipes of the students that a command line trains, each as if it were alone.

    Raises:
        ConfigError: as `load_recipe`, or a variant that is not one.
    """
    recipe, options = load_recipe(argv)
    _ = recipe.shards  # raises where there are none
    arguments = list(sys.argv[1:] if argv is None else argv)
    _check_warmup(recipe.train, arguments)
    if not recipe.students:
        return [recipe], options
    check_names("students", [variant.name for variant in recipe.students])
    recipes = []
    for variant in recipe.students:
        if foreign := [key for key in variant.set if not key.startswith(tuple(VARIANT_KEYS))]:
            raise ConfigError(
                f"students: {variant.name!r} sets {foreign[0]}, which students of one teacher pass "
                f"have in common; set it outside, or one of {', '.join(VARIANT_KEYS)}"
            )
        own = [*as_arguments(variant.set), f"--output_dir={recipe.output_dir}/{variant.name}"]
        recipes.append(load_recipe([*arguments, *own, "--students=[]"])[0])
        _check_warmup(recipes[-1].train, [*arguments, *own])
    if len({recipe.objective.masks for recipe in recipes}) > 1:
        raise ConfigError(
            "students: some objectives mask the text and others do not, or another share of it, "
            "but one teacher pass reads one text; train them in runs of their own"
        )
    if recipe.teacher.dtype == "float8" and len({recipe.teacher.layer for recipe in recipes}) > 1:
        raise ConfigError(
            "teacher.dtype=float8 leaves out the layer that a student learns from, and students "
            "learn from different ones; use bfloat16, or one teacher.layer"
        )
    return recipes, options


def _check_warmup(train: Train, arguments: Sequence[str]) -> None:
    """Refuse a warm-up that outlasts the run, which would never reach its learning rate.

    The default goes with any length, and a command line may cut a recipe's run short.
    """
    if train.warmup_steps <= train.max_steps or train.warmup_steps == Train.warmup_steps:
        return
    given = {argument.partition("=")[0] for argument in arguments}
    if "--train.max_steps" in given and "--train.warmup_steps" not in given:
        return
    raise ConfigError(
        f"train.warmup_steps={train.warmup_steps} is more than train.max_steps={train.max_steps}, "
        "so the learning rate would never reach its peak; use fewer, a hundredth or a tenth"
    )


def check_names(key: str, names: Sequence[str]) -> None:
    """Refuse names that are not those of folders of their own."""
    for name in names:
        if name in ("", ".", "..") or "/" in name or not name.isprintable():
            raise ConfigError(f"{key} has the name {name!r}, which is no folder's; use letters")
        if names.count(name) > 1:
            raise ConfigError(
                f"{key} has {name!r} twice, and two runs would write to one folder; rename one"
            )


def as_arguments(keys: Mapping[str, Any]) -> list[str]:
    """Dotted keys as a command line's overrides."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in keys.items()
    ]


AT_MOST = {
    "seed": MAX_SEED - 1,
    "train.max_steps": 10**8 - 1,  # eight digits name a checkpoint
    "train.batch_size": 2**31 - 1,
    "student.num_hidden_layers": 2**10,
    "student.hidden_size": 2**16,
    "student.intermediate_size": 2**20,
}


def check_recipe(recipe: Recipe) -> None:
    """Refuse what cannot work, by rules that need neither models nor data.

    Raises:
        ConfigError: naming the key, its value, the rule and the remedy.
    """
    train, student, objective = recipe.train, recipe.student, recipe.objective
    flat = flatten(recipe)
    if not recipe.output_dir.strip():
        raise ConfigError("output_dir is empty, so there is nowhere to write; name a folder")
    for folder in (Path(recipe.output_dir), *Path(recipe.output_dir).parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(
                f"output_dir={recipe.output_dir} cannot be a folder, since {folder} is a file; "
                "name another one"
            )
    if not recipe.teacher.model.strip():
        raise ConfigError("teacher.model is empty, so nobody teaches; name a hub id or a folder")
    at_least_one: dict[str, int] = {
        "train.max_steps": train.max_steps,
        "train.batch_size": train.batch_size,
        "train.micro_batch_size": train.micro_batch_size,
        "train.save_every": train.save_every,
        "train.keep_checkpoints": train.keep_checkpoints,
        "train.max_failed_saves": train.max_failed_saves,
        "train.log_every": train.log_every,
        "student.num_hidden_layers": student.num_hidden_layers,
        "student.hidden_size": student.hidden_size,
        "student.num_attention_heads": student.num_attention_heads,
        "student.intermediate_size": student.intermediate_size,
        "student.vocabulary_min_count": student.vocabulary_min_count,
        "objective.num_relation_heads": objective.num_relation_heads,
        "watch.loss_spike_window": recipe.watch.loss_spike_window,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise ConfigError(f"{key}={value} is below 1, so nothing would train; use 1 or more")
    for key, most in AT_MOST.items():
        if flat[key] > most:
            raise ConfigError(
                f"{key}={flat[key]} is above {most}, beyond what names, numbers or memory hold; "
                "use less"
            )
    not_negative: dict[str, float] = {
        "train.warmup_steps": train.warmup_steps,
        "train.eval_every": train.eval_every,
        "train.keep_every": train.keep_every,
        "train.weight_decay": train.weight_decay,
        "seed": recipe.seed,
    }
    for key, number in not_negative.items():
        if not (number >= 0 and math.isfinite(number)):
            raise ConfigError(f"{key}={number} is not a number from 0 on; use 0 or more")
    positive = {
        "train.learning_rate": train.learning_rate,
        "train.max_grad_norm": train.max_grad_norm,
        "train.adam_eps": train.adam_eps,
        "objective.temperature": objective.temperature,
        "objective.mlm_probability": objective.mlm_probability,
        "data.cache_gb": recipe.data.cache_gb,
        "watch.straggler_percent": recipe.watch.straggler_percent,
        "watch.loss_spike_mads": recipe.watch.loss_spike_mads,
    }
    for key, number in positive.items():
        if not (number > 0 and math.isfinite(number)):
            raise ConfigError(f"{key}={number} is not a positive number; use one above 0")
    if train.learning_rate > 1:
        raise ConfigError(
            f"train.learning_rate={train.learning_rate} is above 1, and AdamW moves every weight "
            "by about as much in each step; use 1e-5 to 1e-2"
        )
    if train.learning_rate * train.weight_decay >= 1:
        raise ConfigError(
            f"train.weight_decay={train.weight_decay} times train.learning_rate="
            f"{train.learning_rate} is 1 or more, so that every step would wipe the weights out; "
            "use 0.01 (usual)"
        )
    shares = {
        "train.adam_betas[0]": train.adam_betas[0],
        "train.adam_betas[1]": train.adam_betas[1],
        "student.hidden_dropout_prob": student.hidden_dropout_prob,
        "student.attention_probs_dropout_prob": student.attention_probs_dropout_prob,
        "objective.mlm_probability": objective.mlm_probability,
    }
    for key, number in shares.items():
        if not 0 <= number < 1:
            raise ConfigError(f"{key}={number} is outside 0 <= x < 1; use a value in that range")
    _check_weights(objective)
    _check_watch(recipe.watch)
    _check_init(student)
    _check_vocabulary(student)
    if not student.model and student.hidden_size % student.num_attention_heads:
        raise ConfigError(
            f"student.num_attention_heads={student.num_attention_heads} does not divide "
            f"student.hidden_size={student.hidden_size}, so heads would have unequal widths; use "
            f"one of {divisors(student.hidden_size)}"
        )
    if train.batch_size % train.micro_batch_size:
        raise ConfigError(
            f"train.micro_batch_size={train.micro_batch_size} does not divide "
            f"train.batch_size={train.batch_size}, so a step would miss rows; use one of "
            f"{divisors(train.batch_size)}"
        )


def _check_watch(watch: Watch) -> None:
    every = watch.check_corruption_every
    if every is not None and every < 1:
        raise ConfigError(
            f"watch.check_corruption_every={every} is below 1, so nothing would be checked; use 1 "
            "or more, or null to say so"
        )
    shortest, longest = HANG_SECONDS
    if watch.hang_seconds is not None and not shortest <= watch.hang_seconds <= longest:
        raise ConfigError(
            f"watch.hang_seconds={watch.hang_seconds} is outside {shortest:g} <= x <= {longest:g}: "
            "in less, a busy host may not answer, and after more, the ranks' connections give up "
            "by themselves; use a value in that range, or null to have only the latter"
        )


def _check_init(student: Student) -> None:
    if student.model and student.init != "random":
        raise ConfigError(
            f"student.init={student.init} and student.model={student.model!r} both say what the "
            "student starts from; remove one of them"
        )
    if student.init_layers is None:
        return
    if student.init == "random":
        raise ConfigError(
            f"student.init_layers={student.init_layers} is not used by student.init=random; set "
            "student.init to layers or svd, or remove it"
        )
    if len(student.init_layers) != student.num_hidden_layers:
        raise ConfigError(
            f"student.init_layers={student.init_layers} names {len(student.init_layers)} teacher "
            f"layers for student.num_hidden_layers={student.num_hidden_layers}; name one for each"
        )


def _check_vocabulary(student: Student) -> None:
    if student.vocabulary == "full" and student.vocabulary_min_count > 1:
        raise ConfigError(
            f"student.vocabulary_min_count={student.vocabulary_min_count} is not used by "
            "student.vocabulary=full; set that to corpus or languages, or remove it"
        )
    if (student.vocabulary == "languages") != bool(student.vocabulary_languages):
        raise ConfigError(
            f"student.vocabulary_languages={student.vocabulary_languages} does not fit "
            f"student.vocabulary={student.vocabulary}; give languages and the list of them together"
        )


def _check_weights(objective: Objective) -> None:
    for unused, terms in (("relations", RELATIONS), ("losses", TERMS["distilbert"])):
        if unused != objective.weights_key:  # but nothing else may stand there
            _check_terms(f"objective.{unused}", getattr(objective, unused), terms, "any objective")
    key, stated = f"objective.{objective.weights_key}", getattr(objective, objective.weights_key)
    _check_terms(key, stated, TERMS[objective.name], objective.name)
    if not all(math.isfinite(w) and w >= 0 for w in stated.values()) or not objective.weights:
        paper = ", ".join(f"{t}: {w:g}" for t, w in PAPER_WEIGHTS[objective.name].items())
        raise ConfigError(
            f"{key}={stated} needs weights >= 0 and one above 0, otherwise there is nothing to "
            f"imitate; the paper's are {{{paper}}}"
        )
    if objective.name == "distilbert" and objective.weights.keys() == {"cos"}:
        raise ConfigError(
            f"{key}={stated} leaves predictions out, so the student's prediction head would not "
            "train; give ce or mlm a weight above 0"
        )


def _check_terms(key: str, stated: Mapping[str, float], terms: Sequence[str], of: str) -> None:
    if unknown := sorted(stated.keys() - set(terms)):
        raise ConfigError(
            f"{key} has {unknown[0]!r}, which is not a term of {of}; use {', '.join(terms)}"
        )


def check_world(recipe: Recipe, world_size: int) -> None:
    """Refuse a batch that these ranks cannot share evenly.

    Raises:
        ConfigError: train.batch_size is not a multiple of micro_batch_size times the ranks.
    """
    train = recipe.train
    step = train.micro_batch_size * world_size
    if train.batch_size % step:
        raise ConfigError(
            f"train.batch_size={train.batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} x {world_size} ranks = {step}, so ranks would get unequal "
            f"shares; use a multiple of {step}, or fewer ranks"
        )


def check_layer(recipe: Recipe, teacher_layers: int) -> None:
    """Refuse a layer that the teacher has not.

    Raises:
        ConfigError: teacher.layer does not exist.
    """
    layer = recipe.teacher.layer
    if layer is not None and not 1 <= layer <= teacher_layers:
        raise ConfigError(
            f"teacher.layer={layer} does not exist: {recipe.teacher.model} has layers 1 to "
            f"{teacher_layers}; use one of these, or null for the last"
        )


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping or dataclass as dotted keys."""
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        section = dataclasses.asdict(section)
    if not isinstance(section, dict) or not section:
        return {prefix: section}
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as YAML can hold it."""
    content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return content


def public(recipe: Recipe) -> dict[str, Any]:
    """`plain`, without the secrets that URLs may hold: what a run's folder says of it."""
    content: dict[str, Any] = _masked(plain(recipe))
    return content


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_masked(part) for part in value]
    return masked(value) if isinstance(value, str) else value


def read_ds_config(path: str) -> dict[str, Any]:
    """The DeepSpeed JSON that the command line names.

    Raises:
        ConfigError: it cannot be read or is not a JSON object.
    """
    try:
        config = json.loads(
            Path(path).read_text(encoding="utf-8"),
            object_pairs_hook=_object,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except OSError as error:
        raise ConfigError(
            f"--deepspeed {path} cannot be read ({error.strerror}); name one of ds_configs/*.json"
        ) from error
    except ValueError as error:
        raise ConfigError(f"--deepspeed {path} is not JSON ({error}); correct it") from error
    except RecursionError as error:
        raise ConfigError(
            f"--deepspeed {path} is not JSON that can be read (it nests too deeply); correct it"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"--deepspeed {path} holds {type(config).__name__}, not a JSON object; see "
            "ds_configs/zero2.json"
        )
    return config


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys stand there once: the last of several would silently win."""
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"key {twice[0]!r} stands there twice")
    return dict(pairs)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number that JSON has, or no finite one")
    return number
