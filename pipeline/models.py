"""The transformers seam: encoders cut at the layer whose Q, K, V matter, and the tokenizer."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.utils import logging

from data_prep.command import ConfigError, one_line
from pipeline.architectures import ARCHITECTURES, architecture_of, refusal
from pipeline.attention import PACKED, packed_attention
from pipeline.config import Recipe, Student
from pipeline.dropout import replace_dropout
from pipeline.embedding import StepEmbedding
from pipeline.float8 import CAPABILITY, to_float8
from pipeline.initialise import WORDS, copied_layers, projected_layers, start_layers
from pipeline.loader import Batch
from pipeline.objectives import QKV, Compared, Outputs, Predictions, of_text
from pipeline.prepacked import can_prepack, prepack
from pipeline.progress import part

logging.set_verbosity_error()  # what it warns of (heads that are not loaded) is checked here
logging.disable_progress_bar()
AttentionInterface.register(PACKED, packed_attention)

# What a model gives, and the class that loads it, by the end of its architecture's name.
HEADS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "ForSequenceClassification": (AutoModelForSequenceClassification, ("logits",)),
    "ForTokenClassification": (AutoModelForTokenClassification, ("logits",)),
    "ForQuestionAnswering": (AutoModelForQuestionAnswering, ("start_logits", "end_logits")),
}
HIDDEN = ("last_hidden_state",)

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


class Encoder(nn.Module):
    """An encoder over packed segments, run layer by layer; parameters keep the full model's names.

    Args:
        model: a transformers encoder of a known architecture, with or without a head; its pooler is
            taken out.
        new_ids: [ids] int64, the model's id of each id that it is given; None where they agree.
    """

    new_ids: torch.Tensor | None

    def __init__(self, model: Any, new_ids: torch.Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("new_ids", new_ids, persistent=False)  # follows from the shards
        self.architecture = architecture_of(model.config)
        self.architecture.drop_pooler(model.base_model)
        model.set_input_embeddings(StepEmbedding(model.get_input_embeddings()))
        replace_dropout(model)
        self.model = model

    @property
    def word_embeddings(self) -> StepEmbedding | None:
        """The embedding of token ids, where nothing but the ids' lookup reads it."""
        embedding: StepEmbedding = self.model.get_input_embeddings()
        return embedding

    @property
    def layers(self) -> Any:
        """The layers, in order."""
        return self.architecture.layers(self.model.base_model)

    def outputs_of_layers(
        self,
        targets: Sequence[Target],
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> dict[Target, Compared]:
        """Vectors and outputs of several layers in one pass.

        Args:
            targets: QKV or Outputs of layers that the model has.
            input_ids: [1, T] int64.
            positions: [1, T] int64, from 0 in each segment.
            cu_seqlens: [segments + 1] int32.
            max_seqlen: tokens of the longest segment, or more.

        Returns:
            For each target what an encoder of that many layers would give.
        """
        body, wanted = self.model.base_model, {target.layer for target in targets}
        qkv: dict[int, QKV] = {}
        found: dict[Target, Compared] = {}
        last = max(wanted) - 1
        states = self._states(input_ids, positions, cu_seqlens, max_seqlen)
        for index, (hidden, rotations) in enumerate(states):
            if (whole := Target(Outputs, index)) in targets:
                output = self.architecture.finish(body, hidden).squeeze(0)
                found[whole] = Outputs(output, qkv[index])
            if index + 1 in wanted:
                qkv[index + 1] = self.architecture.project(body, index, hidden, rotations)
            if index == last and Target(Outputs, index + 1) not in targets:
                break  # a cut layer could not be run
        return {target: found.get(target, qkv[target.layer]) for target in targets}

    def _states(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> Iterator[tuple[torch.Tensor, Any]]:
        """Each layer's input and the last one's output, [1, T, hidden], with the rotations."""
        body = self.model.base_model
        if self.new_ids is not None:
            input_ids = self.new_ids[input_ids]
        hidden = self.architecture.embed(body, input_ids, positions)
        rotations = self.architecture.rotations(body, hidden, positions)
        yield hidden, rotations
        for index in range(len(self.layers)):
            hidden = self.architecture.run_layer(
                body, index, hidden, rotations, cu_seqlens, max_seqlen
            )
            yield hidden, rotations

    def compile_layers(self) -> None:
        """Let torch.compile fuse what stands between the products of each whole layer.

        Attention is not part of it, so batches of one shape compile once. Layers made for a CPU by
        hand (prepacked.py, fused_layers.py) are not for a compiler to look into.
        """
        for layer in self.layers[:-1]:
            layer.compile()

    def named_weights(self) -> dict[str, torch.Tensor]:
        """Parameters under the names that the full model gives them."""
        return {name.removeprefix("model."): p for name, p in self.named_parameters()}


class CutEncoder(Encoder):
    """An encoder up to the queries, keys and values of its last layer.

    What comes after them is taken out of the module: it would cost time, memory and, in an
    optimizer, weight decay, and no gradient reaches it.

    Args:
        model: a transformers encoder of a known architecture; its last layer is the one cut.
        projections: letters of the last layer's projections that are kept, where the architecture
            has them apart; the others give None.
        new_ids: see Encoder.
    """

    def __init__(
        self, model: Any, projections: str = "qkv", new_ids: torch.Tensor | None = None
    ) -> None:
        super().__init__(model, new_ids)
        self.architecture.cut(model, projections)

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
        last = len(self.layers) - 1
        states = self._states(input_ids, positions, cu_seqlens, max_seqlen)
        hidden, rotations = next(itertools.islice(states, last, None))
        return self.architecture.project(self.model.base_model, last, hidden, rotations)


class WholeEncoder(Encoder):
    """An encoder up to its last hidden state, for objectives that read more than Q, K and V."""

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> Outputs:
        """The last hidden state, and queries, keys and values of the last layer.

        These are projected once more than the layer itself does, which costs 3 of the model's
        about 12 x layers products of a token's width squared.

        Args:
            input_ids: [1, T] int64.
            positions: [1, T] int64, from 0 in each segment.
            cu_seqlens: [segments + 1] int32.
            max_seqlen: tokens of the longest segment, or more.
        """
        body = self.model.base_model
        states = self._states(input_ids, positions, cu_seqlens, max_seqlen)
        (last, rotations), (hidden, _) = deque(states, maxlen=2)
        qkv = self.architecture.project(body, len(self.layers) - 1, last, rotations)
        return Outputs(self.architecture.finish(body, hidden).squeeze(0), qkv)


class MaskedLM(Encoder):
    """An encoder with its head of masked language modelling.

    Args:
        model: a transformers model `...ForMaskedLM`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        for name in self.architecture.mlm_head:
            # Behind the encoder, so that a weight that both share goes by the embedding's name.
            part = getattr(model, name)
            delattr(model, name)
            setattr(model, name, part)

    @property
    def word_embeddings(self) -> None:
        """None: the head reads it too, and its gradient is of all rows in every pass."""

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        places: torch.Tensor,
    ) -> Predictions:
        """The last hidden states, and the logits where a prediction is asked for.

        Args:
            input_ids: [1, T] int64.
            positions: [1, T] int64, from 0 in each segment.
            cu_seqlens: [segments + 1] int32.
            max_seqlen: tokens of the longest segment, or more.
            places: [M] int64, which of the T tokens.
        """
        *_, (hidden, _) = self._states(input_ids, positions, cu_seqlens, max_seqlen)
        hidden = self.architecture.finish(self.model.base_model, hidden).squeeze(0)
        return Predictions(hidden, self.architecture.predict(self.model, hidden[places]))


def pack_encoder(
    model: Any,
    needs: type[Compared],
    projections: str = "qkv",
    new_ids: torch.Tensor | None = None,
) -> Encoder:
    """A transformers model made ready for packed segments, as far as an objective needs it.

    Args:
        model: as `build_student` and `load_teacher` read it for the same `needs`.
        needs: of the objective.
        projections: of the objective, for a student: what its gradient does not reach goes.
        new_ids: of a student with a vocabulary of its own, see Encoder.
    """
    if needs is QKV:
        return CutEncoder(model, projections, new_ids)
    return WholeEncoder(model, new_ids) if needs is Outputs else MaskedLM(model)


class Target(NamedTuple):
    """What a student is compared with: the kind of outputs, and the 1-based layer they are of."""

    needs: type[Compared]
    layer: int


class TeacherModel:
    """The frozen teacher: not a module, so that no engine, optimizer or checkpoint can hold it.

    Args:
        encoder: up to the highest layer of the targets.
        targets: what `of` is asked for; all come from one pass.
    """

    def __init__(self, encoder: Encoder, targets: Sequence[Target]) -> None:
        self._encoder = encoder.eval().requires_grad_(False)
        self._targets = list(dict.fromkeys(targets))
        self._last: tuple[Batch, dict[Target, Compared]] | None = None

    def replicas(self) -> list[torch.Tensor]:
        """The weights, of which every rank has a whole copy; without those laid out for oneDNN."""
        tensors = [*self._encoder.parameters(), *self._encoder.buffers()]
        return [tensor.detach() for tensor in tensors if tensor.layout == torch.strided]

    def __call__(self, batch: Batch) -> Compared:
        """What the teacher gives of the batch, where there is one target; nothing is kept."""
        (target,) = self._targets
        return self._run(batch, batch.inputs)[target]

    def of(self, target: Target, batch: Batch) -> Compared:
        """What the teacher gives of the batch; the pass is made once for all targets."""
        if self._last is None or self._last[0] is not batch:
            self._last = None  # frees the memory of the batch before
            self._last = batch, self._run(batch, batch.inputs)
        return self._last[1][target]

    @part("teacher")
    @torch.inference_mode()
    def _run(self, batch: Batch, inputs: tuple[Any, ...]) -> dict[Target, Compared]:
        # `inputs` are made before: torch.compile tells tensors of inference mode from others.
        if isinstance(self._encoder, MaskedLM):
            # All learn from the last layer; who asks for no predictions finds its hidden states.
            found = dict.fromkeys(self._targets, self._encoder(*inputs))
        else:
            found = self._encoder.outputs_of_layers(self._targets, *inputs[:4])
        return {target: of_text(outputs, batch.num_tokens) for target, outputs in found.items()}


def read_config(key: str, source: str, *, with_weights: bool = True) -> Any:
    """The transformers configuration of a hub id or folder.

    Args:
        key: recipe key that names it, for the message.
        source: hub id or folder.
        with_weights: a folder has to have weights too, which will be read later.

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
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a user's folder may provoke in there
        raise ConfigError(
            f"{key}={source!r} does not load ({one_line(error)}); give a folder that exists or a "
            "hub id that this machine can reach"
        ) from error
    if reason := refusal(config.model_type):
        raise ConfigError(f"{key}={source!r} is a {config.model_type!r} model, {reason}")
    if getattr(config, "is_decoder", False):
        raise ConfigError(
            f"{key}={source!r} has is_decoder=true in its config.json, so its tokens attend to "
            "earlier ones only, and it would be run as an encoder; name an encoder"
        )
    for name, value in architecture_of(config).shape(config).items():
        if value < 1:
            raise ConfigError(
                f"{key}={source!r} has {name}={value} in its config.json, which is no model; name "
                "another folder, or mend it"
            )
    if with_weights and path.is_dir() and not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"{key}={source!r} has no *.safetensors, the only weights that are read (others can "
            "hold programs); convert them with transformers' save_pretrained"
        )
    return config


def longest_segment(config: Any) -> int:
    """Tokens that the model has positions for."""
    return architecture_of(config).longest_segment(config)


def load_teacher(
    recipe: Recipe, device: torch.device, targets: Sequence[Target] | None = None
) -> TeacherModel:
    """The teacher up to its layer; layers above are not even read into memory.

    Args:
        recipe: names the teacher, its layer and its dtype.
        device: that it runs on.
        targets: what its students are compared with; None is the QKV of the recipe's layer.

    Raises:
        ConfigError: the folder lacks weights that the teacher needs.
    """
    config = read_config("teacher.model", recipe.teacher.model)
    architecture = architecture_of(config)
    if targets is None:
        targets = [Target(QKV, recipe.teacher.layer or config.num_hidden_layers)]
    needs = next((n for n in (Predictions, Outputs) if n in {t.needs for t in targets}), QKV)
    architecture.set_num_layers(config, max(target.layer for target in targets))
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
    if is_float8:
        for layer in encoder.layers[:-1]:  # the last one's products are the targets
            to_float8(layer)
    if recipe.train.compile:
        encoder.compile_layers()
    elif not is_float8 and can_prepack(encoder):
        architecture.prepack(model.base_model)
        prepack(model)
    return TeacherModel(encoder, targets)


def student_config(student: Student, teacher_config: Any) -> Any:
    """The student's configuration: the teacher's vocabulary in the recipe's architecture and shape.

    Raises:
        ConfigError: the architecture cannot have this shape or vocabulary.
    """
    if student.model:
        config = read_config("student.model", student.model)
    else:
        config = _new_config(student, teacher_config)
    architecture_of(config).set_dropout(
        config, student.hidden_dropout_prob, student.attention_probs_dropout_prob
    )
    config.dtype = torch.float32
    return config


def _new_config(student: Student, teacher_config: Any) -> Any:
    model_type = student.architecture or architecture_of(teacher_config).student
    if model_type == teacher_config.model_type:
        config = copy.deepcopy(teacher_config)
    else:
        config = _translated_config(model_type, teacher_config)
    architecture_of(config).set_num_layers(config, student.num_hidden_layers)
    for key in ("hidden_size", "num_attention_heads", "intermediate_size"):
        setattr(config, key, getattr(student, key))
    architecture_of(config).check_student(config)
    return config


def _translated_config(model_type: str, teacher_config: Any) -> Any:
    """A configuration of another architecture for the teacher's vocabulary and segments."""
    teacher, own = architecture_of(teacher_config), ARCHITECTURES[model_type]
    config = AutoConfig.for_model(model_type)
    config.vocab_size = teacher_config.vocab_size
    for key in SPECIAL_IDS:
        if hasattr(config, key):
            setattr(config, key, getattr(teacher_config, key, None))
    setattr(config, own.norm_eps_key, teacher.norm_eps(teacher_config))
    longest = teacher.longest_segment(teacher_config)
    config.max_position_embeddings = longest + own.first_position(config)
    return config


def unused_shape_keys(student: Student, config: Any) -> list[str]:
    """What the recipe says of a shape that student.model brings otherwise, in words."""
    own = {"architecture": config.model_type, **architecture_of(config).shape(config)}
    asked = {key: getattr(student, key) for key in own}
    return [
        f"student.{key}={asked[key]} (it has {own[key]})"
        for key in own
        if student.model and asked[key] not in (None, own[key])
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
        new = ("pooler.", *(f"{part}." for part in architecture_of(config).mlm_head))
        model = _load("student.model", student.model, config, torch.float32, needs, may_lack=new)
    else:
        model = _auto_class(needs).from_config(config, attn_implementation=PACKED)
        replace_dropout(model)
    config.architectures = [type(model).__name__]
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


def start_from_teacher(
    model: Any, recipe: Recipe, needs: type[Compared], kept: torch.Tensor | None
) -> None:
    """Give a new student the weights that student.init says, from the teacher's whole layers.

    Args:
        model: the student; what the teacher has no part for, the pooler, stays as it is.
        recipe: names the teacher and the start.
        needs: of the teacher: where it predicts and layers are copied, the head is copied too.
        kept: ids of the tokens that the student knows, ascending; None is all.

    Raises:
        ConfigError: the teacher's folder lacks weights.
    """
    student = recipe.student
    config = read_config("teacher.model", recipe.teacher.model)
    architecture = architecture_of(config)
    layers = start_layers(student, recipe.teacher.layer or config.num_hidden_layers)
    architecture.set_num_layers(config, max(layers))  # layers above are not read
    teacher = _load("teacher.model", recipe.teacher.model, config, torch.float32, needs)
    state = teacher.base_model.state_dict()
    if kept is not None:
        state[WORDS] = state[WORDS][kept]
    if student.init == "layers":
        start = copied_layers(state, layers)
        if needs is Predictions:
            for name in architecture.mlm_head:
                getattr(model, name).load_state_dict(getattr(teacher, name).state_dict())
    else:
        start = projected_layers(state, layers, student, config.num_attention_heads)
    body = model.base_model
    body.load_state_dict({**body.state_dict(), **start})


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


def num_word_embeddings(folder: Path) -> int:
    """Numbers in the word embeddings of the model that a folder's config.json describes."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    return int(model.get_input_embeddings().weight.numel())


def meta_encoder(config: Any, needs: type[Compared], projections: str = "qkv") -> Encoder:
    """An encoder as a run has it, on the meta device: for counting, without memory.

    Args:
        config: of the student, or of the teacher up to its last layer that is used.
        needs: of the objective.
        projections: of the objective, for a student.
    """
    with torch.device("meta"):
        model = _auto_class(needs).from_config(config, attn_implementation=PACKED)
        return pack_encoder(model, needs, projections)


def cut_config(config: Any, layer: int) -> Any:
    """A copy of a configuration whose last layer is the 1-based `layer`."""
    config = copy.deepcopy(config)
    architecture_of(config).set_num_layers(config, layer)
    return config


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
            trust_remote_code=False,
            use_safetensors=True,  # others are pickles, which can hold programs
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
    model = AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    return model.eval().to(device)


class NamedOutputs(nn.Module):
    """A model that takes a padded batch and returns some of its outputs as a tuple.

    Args:
        model: a transformers model in eval mode.
        names: of the outputs.
    """

    def __init__(self, model: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The outputs; inputs are [batch, length] int64, types only where the model knows them."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if architecture_of(self.model.config).rotates:
            # By itself the model gives all rows one row of angles, which onnxruntime refuses.
            inputs["position_ids"] = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        output = self.model(**inputs)
        return tuple(output[name] for name in self.names)


class LastLayer(nn.Module):
    """What objectives compare, from a whole model that runs one segment as transformers does.

    Args:
        model: a transformers encoder of a known architecture, without a head, in eval mode.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.architecture = model, architecture_of(model.config)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The last hidden state, and Q, K, V of the last layer, each [T, hidden].

        Args:
            input_ids: [1, T] int64.
        """
        output = self.model(input_ids=input_ids, output_hidden_states=True)
        last = len(self.architecture.layers(self.model)) - 1
        before = output.hidden_states[last]
        positions = torch.arange(input_ids.shape[1])[None]
        rotations = self.architecture.rotations(self.model, before, positions)
        q, k, v = self.architecture.project(self.model, last, before, rotations)
        return output.last_hidden_state.squeeze(0), q, k, v


def input_names(model: Any, tokenizer: Any) -> tuple[str, ...]:
    """What a tokenizer gives that the model takes, in the model's order."""
    given = set(tokenizer.model_input_names)
    return tuple(name for name in inspect.signature(model.forward).parameters if name in given)


def load_with_head(source: str) -> tuple[Any, tuple[str, ...]]:
    """A model of a folder or hub id in fp32 with the head that its configuration names.

    Returns:
        The model, and the names of its outputs: those of its head, or of an encoder, which one
        that predicts tokens counts as.

    Raises:
        ConfigError: it is no encoder known here, or has another head.
    """
    model, _ = _load_with_head(source)
    return model, HEADS.get(_head_of(model.config), (None, HIDDEN))[1]


def _load_with_head(source: str) -> tuple[Any, set[str]]:
    """See `load_with_head`: the model, and the names of the weights that the source lacks."""
    config = read_config("--model", source)
    head = _head_of(config)
    known = {"": AutoModel, "ForPreTraining": AutoModel, "ForMaskedLM": AutoModelForMaskedLM}
    known |= {name: load for name, (load, _) in HEADS.items()}
    if head not in known:
        raise ConfigError(
            f"--model {source} is a {config.architectures[0]}, whose outputs are not known here; "
            f"give an encoder, or one with a head of {', '.join(HEADS)}"
        )
    try:
        model, loading = known[head].from_pretrained(
            source,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:  # whatever a user's folder may provoke in there
        raise ConfigError(
            f"--model {source} does not load ({one_line(error)}); give a whole model folder or a "
            "hub id"
        ) from error
    missing = set(loading["missing_keys"])
    if lost := sorted(name for name in missing if "pooler." not in name):
        raise ConfigError(
            f"--model {source} has no weights for {lost[0]!r} and {len(lost) - 1} more, which "
            "would be random; give a folder with all of them"
        )
    return model.eval(), missing


def _head_of(config: Any) -> str:
    """The end of the architecture's name that says what the model has above its encoder."""
    name: str = (config.architectures or [""])[0]
    return "For" + name.rpartition("For")[2] if "For" in name else ""


def save_whole(source: str, folder: Path) -> None:
    """Write a model of a folder or hub id in fp32, its head included, with its tokenizer.

    Raises:
        ConfigError: they do not load, or the model is none that is known here.
    """
    model, missing = _load_with_head(source)
    tokenizer = load_tokenizer(source)
    found = {name: weight for name, weight in model.state_dict().items() if name not in missing}
    model.save_pretrained(folder, state_dict=found)  # without a pooler that the source lacks
    tokenizer.save_pretrained(folder)


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a hub id or folder.

    Raises:
        ConfigError: none loads from there.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a user's folder may provoke in there
        raise ConfigError(
            f"the tokenizer {source!r} does not load ({one_line(error)}); set prep.tokenizer to "
            "the one that the shards were made with"
        ) from error
