"""The transformers seam: encoders cut at the layer whose Q, K, V matter, and the tokenizer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoTokenizer
from transformers.activations import GELUActivation
from transformers.utils import logging

from data_prep.command import ConfigError, one_line
from pipeline.attention import PACKED, packed_attention
from pipeline.config import Recipe, Student
from pipeline.dropout import replace_dropout
from pipeline.embedding import StepEmbedding
from pipeline.float8 import CAPABILITY, to_float8
from pipeline.initialise import WORDS, copied_layers, projected_layers, start_layers
from pipeline.loader import Batch
from pipeline.objectives import QKV
from pipeline.prepacked import PrepackedLinear, PrepackedOutput, can_prepack, prepack

logging.set_verbosity_error()  # what it warns of (heads that are not loaded) is checked here
logging.disable_progress_bar()
AttentionInterface.register(PACKED, packed_attention)


@dataclasses.dataclass(frozen=True)
class Family:
    """What differs between encoders that are built like BERT (`embeddings`, `encoder.layer[i]`).

    Args:
        first_position: the position id of a segment's first token.
    """

    first_position: Callable[[Any], int]


def _zero(config: Any) -> int:
    return 0


def _after_padding(config: Any) -> int:
    return int(config.pad_token_id) + 1  # fairseq counts positions from the padding id on


FAMILIES = {
    "bert": Family(first_position=_zero),
    "roberta": Family(first_position=_after_padding),
    "camembert": Family(first_position=_after_padding),
    "xlm-roberta": Family(first_position=_after_padding),
}


SHAPE_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


class CutEncoder(nn.Module):
    """An encoder up to the queries, keys and values of its last layer, over packed segments.

    What comes after them is taken out of the module: it would cost time, memory and, in an
    optimizer, weight decay, and no gradient reaches it. Parameter names are the full model's.

    Args:
        model: a transformers encoder of a known family; its last layer is the one that is cut.
        new_ids: [ids] int64, the model's id of each id that it is given; None where they agree.
    """

    new_ids: torch.Tensor | None

    def __init__(self, model: Any, new_ids: torch.Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("new_ids", new_ids, persistent=False)  # follows from the shards
        embeddings = model.embeddings
        embeddings.word_embeddings = StepEmbedding(embeddings.word_embeddings)
        self.first_position = FAMILIES[model.config.model_type].first_position(model.config)
        model.pooler = None
        last = model.encoder.layer[-1]
        last.attention.output = last.intermediate = last.output = None
        replace_dropout(model)
        self.model = model

    @property
    def word_embeddings(self) -> StepEmbedding:
        """The embedding of token ids."""
        embedding: StepEmbedding = self.model.embeddings.word_embeddings
        return embedding

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> QKV:
        """Queries, keys and values of the last layer.

        Args:
            input_ids: [1, T] int64.
            positions: [1, T] int64, from 0 in each segment.
            cu_seqlens: [segments + 1] int32.
            max_seqlen: tokens of the longest segment, or more.

        Returns:
            Three tensors [T, hidden] in the model's dtype.
        """
        if self.new_ids is not None:
            input_ids = self.new_ids[input_ids]
        hidden = self.model.embeddings(
            input_ids=input_ids, position_ids=positions + self.first_position
        )
        *layers, last = self.model.encoder.layer
        for layer in layers:
            hidden = layer(
                hidden, attention_mask=None, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
            )
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        projections = last.attention.self
        hidden = hidden.squeeze(0)
        return QKV(projections.query(hidden), projections.key(hidden), projections.value(hidden))

    def named_weights(self) -> dict[str, torch.Tensor]:
        """Parameters under the names that the full model gives them."""
        return {name.removeprefix("model."): p for name, p in self.named_parameters()}


class TeacherModel:
    """The frozen teacher: not a module, so that no engine, optimizer or checkpoint can hold it."""

    def __init__(self, encoder: CutEncoder) -> None:
        self._encoder = encoder.eval().requires_grad_(False)

    @record_function("teacher")
    @torch.inference_mode()
    def __call__(self, batch: Batch) -> QKV:
        """Queries, keys and values of the teacher's layer, each [T, teacher width]."""
        qkv: QKV = self._encoder(
            batch.input_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen
        )
        return qkv


def read_config(key: str, source: str) -> Any:
    """The transformers configuration of a hub id or folder.

    Args:
        key: recipe key that names it, for the message.
        source: hub id or folder.

    Raises:
        ConfigError: nothing is there, or its architecture is not known here.
    """
    path = Path(source)
    looks_like_path = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if looks_like_path and not path.is_dir():
        raise ConfigError(f"{key}={source!r} is not a folder; correct the path or give a hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(
            f"{key}={source!r} has no config.json, so it is not a model folder; name one that "
            "`save_pretrained` wrote"
        )
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:  # whatever a user's folder may provoke in there
        raise ConfigError(
            f"{key}={source!r} does not load ({one_line(error)}); give a folder that exists or a "
            "hub id that this machine can reach"
        ) from error
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"{key}={source!r} is a {config.model_type!r} model, whose Q, K and V are not known "
            f"here; known architectures: {', '.join(FAMILIES)}"
        )
    return config


def longest_segment(config: Any) -> int:
    """Tokens that the model has positions for."""
    first = FAMILIES[config.model_type].first_position(config)
    return int(config.max_position_embeddings) - first


def load_teacher(recipe: Recipe, device: torch.device) -> TeacherModel:
    """The teacher up to its layer; layers above are not even read into memory.

    Raises:
        ConfigError: the folder lacks weights that the teacher needs.
    """
    config = read_config("teacher.model", recipe.teacher.model)
    config.num_hidden_layers = recipe.teacher.layer or config.num_hidden_layers
    is_float8 = recipe.teacher.dtype == "float8"
    if is_float8 and device.type == "cuda" and torch.cuda.get_device_capability() < CAPABILITY:
        needed = ".".join(map(str, CAPABILITY))
        raise ConfigError(
            f"teacher.dtype=float8 needs a GPU of compute capability {needed} or above, "
            f"{torch.cuda.get_device_name()} is below; use bfloat16"
        )
    dtype = torch.bfloat16 if is_float8 else getattr(torch, recipe.teacher.dtype)
    model = _load("teacher.model", recipe.teacher.model, config, dtype, add_pooling_layer=False)
    encoder = CutEncoder(model).to(device).requires_grad_(False)
    *layers, _ = encoder.model.encoder.layer
    if is_float8:
        for layer in layers:  # the last one's products are the targets themselves
            to_float8(layer)
    elif can_prepack(encoder):
        for layer in layers:
            _fuse_gelu(layer.intermediate)
            for part in (layer.attention, layer):
                part.output = PrepackedOutput(part.output.dense, part.output.LayerNorm)
        prepack(encoder)
    return TeacherModel(encoder)


def _fuse_gelu(intermediate: Any) -> None:
    """Let the linear layer apply the exact GELU behind it."""
    activation = intermediate.intermediate_act_fn
    if isinstance(activation, GELUActivation) and activation.act is nn.functional.gelu:
        intermediate.dense = PrepackedLinear(intermediate.dense, "gelu")
        intermediate.intermediate_act_fn = nn.Identity()


def student_config(student: Student, teacher_config: Any) -> Any:
    """The student's configuration: the teacher's family and vocabulary in the recipe's shape."""
    if student.model:
        config = read_config("student.model", student.model)
    else:
        config = copy.deepcopy(teacher_config)
        for key in SHAPE_KEYS:
            setattr(config, key, getattr(student, key))
    config.hidden_dropout_prob = student.hidden_dropout_prob
    config.attention_probs_dropout_prob = student.attention_probs_dropout_prob
    config.dtype = torch.float32
    return config


def unused_shape_keys(student: Student, config: Any) -> list[str]:
    """What the recipe says of a shape that student.model brings otherwise, in words."""
    return [
        f"student.{key}={getattr(student, key)} (it has {getattr(config, key)})"
        for key in SHAPE_KEYS
        if student.model and getattr(student, key) != getattr(config, key)
    ]


def build_student(student: Student, config: Any, seed: int) -> Any:
    """The whole student in fp32: new, the same for every rank of a seed, or from a folder.

    Raises:
        ConfigError: student.model lacks weights of its encoder.
    """
    torch.manual_seed(seed)  # also for what a folder may lack: the pooler
    if student.model:
        return _load("student.model", student.model, config, torch.float32)
    model = AutoModel.from_config(config, attn_implementation=PACKED)
    replace_dropout(model)
    return model


def keep_tokens(model: Any, kept: torch.Tensor) -> None:
    """Keep some rows of a student's word embedding, and number its tokens by their place there.

    Args:
        model: its embedding and its configuration are replaced.
        kept: [tokens] int64, their ids, ascending; up to the padding's none is missing.
    """
    whole = model.get_input_embeddings()
    part = nn.Embedding.from_pretrained(
        whole.weight.detach()[kept], freeze=False, padding_idx=whole.padding_idx
    )
    model.set_input_embeddings(part)
    model.config = trimmed_config(model.config, kept)


def trimmed_config(config: Any, kept: torch.Tensor) -> Any:
    """A configuration that counts the kept tokens and names special ones by their new ids."""
    config = copy.deepcopy(config)
    new_ids = {old: new for new, old in enumerate(kept.tolist())}
    for key, old in config.to_dict().items():
        if key.endswith("_token_id") and old in new_ids:
            setattr(config, key, new_ids[old])
    config.vocab_size = len(kept)
    return config


def num_parameters(config: Any) -> int:
    """Of the whole model that a configuration describes."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def start_from_teacher(model: Any, recipe: Recipe, kept: torch.Tensor | None) -> None:
    """Give a new student the weights that student.init says, from the teacher's whole layers.

    Args:
        model: the student; what the teacher has no part for, the pooler, stays as it is.
        recipe: names the teacher and the start.
        kept: ids of the tokens that the student knows, ascending; None is all.

    Raises:
        ConfigError: the teacher's folder lacks weights.
    """
    student = recipe.student
    config = read_config("teacher.model", recipe.teacher.model)
    layers = start_layers(student, recipe.teacher.layer or config.num_hidden_layers)
    config.num_hidden_layers = max(layers)  # layers above are not read
    teacher = _load(
        "teacher.model", recipe.teacher.model, config, torch.float32, add_pooling_layer=False
    ).state_dict()
    if kept is not None:
        teacher[WORDS] = teacher[WORDS][kept]
    if student.init == "layers":
        start = copied_layers(teacher, layers)
    else:
        start = projected_layers(teacher, layers, student, config.num_attention_heads)
    model.load_state_dict({**model.state_dict(), **start})


def parameter_shapes(folder: Path) -> dict[str, torch.Size]:
    """The names and shapes of the whole model that a folder's config.json describes."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _load(key: str, source: str, config: Any, dtype: torch.dtype, **options: Any) -> Any:
    try:
        model, loading = AutoModel.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=PACKED,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # whatever a user's folder may provoke in there
        raise ConfigError(
            f"{key}={source!r} does not load ({one_line(error)}); give a whole model folder or a "
            "hub id"
        ) from error
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ConfigError(
            f"{key}={source!r} has no weights for {missing[0]!r} and {len(missing) - 1} more, "
            "which would be random; name a folder with the whole encoder"
        )
    return model


def load_whole(source: str, device: torch.device) -> Any:
    """An ordinary encoder in fp32 with transformers' own attention, for comparison."""
    return AutoModel.from_pretrained(source, dtype=torch.float32).eval().to(device)


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a hub id or folder.

    Raises:
        ConfigError: none loads from there.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # whatever a user's folder may provoke in there
        raise ConfigError(
            f"the tokenizer {source!r} does not load ({one_line(error)}); set prep.tokenizer to "
            "the one that the shards were made with"
        ) from error
