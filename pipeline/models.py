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
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
)
from transformers.activations import GELUActivation
from transformers.utils import logging

from data_prep.command import ConfigError, one_line
from pipeline.attention import PACKED, packed_attention
from pipeline.config import Recipe, Student
from pipeline.dropout import replace_dropout
from pipeline.embedding import StepEmbedding
from pipeline.float8 import CAPABILITY, to_float8
from pipeline.loader import Batch
from pipeline.mlm import HEADS, MaskedLM, WholeEncoder
from pipeline.objectives import QKV, Compared, Outputs, Predictions
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
        projections: letters of the last layer's projections that are kept; the others give None.
    """

    def __init__(self, model: Any, projections: str = "qkv") -> None:
        super().__init__()
        embeddings = model.embeddings
        embeddings.word_embeddings = StepEmbedding(embeddings.word_embeddings)
        self.first_position = FAMILIES[model.config.model_type].first_position(model.config)
        model.pooler = None
        last = model.encoder.layer[-1]
        last.attention.output = last.intermediate = last.output = None
        for name in ("query", "key", "value"):
            if name[0] not in projections:
                setattr(last.attention.self, name, None)
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
        hidden = self.model.embeddings(
            input_ids=input_ids, position_ids=positions + self.first_position
        )
        *layers, last = self.model.encoder.layer
        for layer in layers:
            hidden = layer(
                hidden, attention_mask=None, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
            )
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        attention = last.attention.self
        hidden = hidden.squeeze(0)
        projections = (attention.query, attention.key, attention.value)
        return QKV(*(projection and projection(hidden) for projection in projections))

    @property
    def whole_layers(self) -> list[Any]:
        """The layers below the last one."""
        return list(self.model.encoder.layer[:-1])

    def named_weights(self) -> dict[str, torch.Tensor]:
        """Parameters under the names that the full model gives them."""
        return {name.removeprefix("model."): p for name, p in self.named_parameters()}


Encoder = CutEncoder | WholeEncoder | MaskedLM


def pack_encoder(model: Any, needs: type[Compared], projections: str = "qkv") -> Encoder:
    """A transformers model made ready for packed segments, as far as an objective needs it.

    Args:
        model: as `build_student` and `load_teacher` read it for the same `needs`.
        needs: of the objective.
        projections: of the objective, for a student: what its gradient does not reach goes.
    """
    if needs is QKV:
        return CutEncoder(model, projections)
    first_position = FAMILIES[model.config.model_type].first_position(model.config)
    return (WholeEncoder if needs is Outputs else MaskedLM)(model, first_position)


class TeacherModel:
    """The frozen teacher: not a module, so that no engine, optimizer or checkpoint can hold it."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder.eval().requires_grad_(False)

    @record_function("teacher")
    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Compared:
        """What the teacher's layer gives of the batch."""
        outputs: Compared = self._encoder(*batch.inputs)
        return outputs


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


def load_teacher(recipe: Recipe, device: torch.device, needs: type[Compared] = QKV) -> TeacherModel:
    """The teacher up to its layer; layers above are not even read into memory.

    Args:
        recipe: names the teacher, its layer and its dtype.
        device: that it runs on.
        needs: of the objective.

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
    model = _load("teacher.model", recipe.teacher.model, config, dtype, needs)
    encoder = pack_encoder(model, needs).to(device).requires_grad_(False)
    layers = encoder.whole_layers
    if is_float8:
        # The last one's products are the targets themselves.
        for layer in layers[: config.num_hidden_layers - 1]:
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


def build_student(student: Student, config: Any, seed: int, needs: type[Compared] = QKV) -> Any:
    """The whole student in fp32: new, the same for every rank of a seed, or from a folder.

    Args:
        student: of the recipe.
        config: of `student_config`; is told the model's class, by which it is exported.
        seed: of the weights that are new.
        needs: of the objective: a model that predicts has a head, new where a folder has none.

    Raises:
        ConfigError: student.model lacks weights of its encoder.
    """
    torch.manual_seed(seed)  # also for what a folder may lack: the pooler, the head
    if student.model:
        new = ("pooler.", *(f"{head}." for head in HEADS))
        model = _load("student.model", student.model, config, torch.float32, needs, may_lack=new)
    else:
        model = _auto_class(needs).from_config(config, attn_implementation=PACKED)
        replace_dropout(model)
    config.architectures = [type(model).__name__]
    return model


def own_weights(model: Any) -> dict[str, torch.Tensor]:
    """A model's weights by name, without those that share another's: as it is saved."""
    shared = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in shared}


def parameter_shapes(folder: Path) -> dict[str, torch.Size]:
    """The names and shapes of the whole model that a folder's config.json describes."""
    config = AutoConfig.from_pretrained(folder)
    predicts = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
    with torch.device("meta"):
        model = _auto_class(Predictions if predicts else Outputs).from_config(config)
    return {name: tensor.shape for name, tensor in own_weights(model).items()}


def _auto_class(needs: type[Compared]) -> Any:
    return AutoModelForMaskedLM if needs is Predictions else AutoModel


def _load(
    key: str,
    source: str,
    config: Any,
    dtype: torch.dtype,
    needs: type[Compared],
    may_lack: tuple[str, ...] = ("pooler.",),
) -> Any:
    try:
        model, loading = _auto_class(needs).from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=PACKED,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a user's folder may provoke in there
        raise ConfigError(
            f"{key}={source!r} does not load ({one_line(error)}); give a whole model folder or a "
            "hub id"
        ) from error
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith(may_lack))
    if missing:
        whole = "the whole encoder"
        if needs is Predictions:
            whole += " and its head of masked language modelling"
        raise ConfigError(
            f"{key}={source!r} has no weights for {missing[0]!r} and {len(missing) - 1} more, "
            f"which would be random; name a folder with {whole}"
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
