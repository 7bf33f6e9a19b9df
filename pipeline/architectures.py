"""What differs between families of encoders: one small adapter each, by `config.model_type`.

docs/adding_a_teacher.md says what Q, K and V are in each family and how to add one. Models and
configurations are transformers' own and come as arguments. T tokens, width d.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from data_prep.command import ConfigError
from pipeline.objectives import QKV
from pipeline.prepacked import PrepackedLinear, PrepackedOutput, prepack

SHAPE_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


class Architecture(ABC):
    """How a family's embeddings, layers and projections are run one by one over packed segments.

    Args:
        student: `model_type` of a new student of such a teacher.
    """

    norm_eps_key = "layer_norm_eps"
    rotates = False  # whether Q and K are rotated by their position
    hidden_dropout_keys: tuple[str, ...] = ("hidden_dropout_prob",)
    attention_dropout_keys: tuple[str, ...] = ("attention_probs_dropout_prob",)

    def __init__(self, student: str = "bert") -> None:
        self.student = student

    # The configuration

    def first_position(self, config: Any) -> int:
        """The position id of a segment's first token."""
        return 0

    def longest_segment(self, config: Any) -> int:
        """Tokens that the model has positions for."""
        return int(config.max_position_embeddings) - self.first_position(config)

    def norm_eps(self, config: Any) -> float:
        """What the layer norms add to a variance."""
        return float(getattr(config, self.norm_eps_key))

    def shape(self, config: Any) -> dict[str, int]:
        """The values of SHAPE_KEYS."""
        return {key: getattr(config, key) for key in SHAPE_KEYS}

    def set_num_layers(self, config: Any, number: int) -> None:
        """Let the first `number` layers be all there are."""
        config.num_hidden_layers = number

    def set_dropout(self, config: Any, hidden: float, attention: float) -> None:
        """Set dropout after embeddings and layers' parts, and of attention weights."""
        for keys, value in (
            (self.hidden_dropout_keys, hidden),
            (self.attention_dropout_keys, attention),
        ):
            for key in keys:
                setattr(config, key, value)

    def check_student(self, config: Any) -> None:  # noqa: B027 (most families take any shape)
        """Refuse a new student's configuration that the family makes no sense of.

        Raises:
            ConfigError: naming the recipe's key.
        """

    # The model

    @abstractmethod
    def embed(self, model: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The first layer's input.

        Args:
            model: of this family.
            input_ids: [1, T] int64; all of token type 0.
            positions: [1, T] int64, from 0 in each segment.

        Returns:
            [1, T, d].
        """

    def rotations(self, model: Any, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        """What layers are told of positions, made once a pass; None if the embeddings hold them."""
        return None

    @abstractmethod
    def layers(self, model: Any) -> Any:
        """The layers, in order: an nn.ModuleList."""

    def run_layer(
        self,
        model: Any,
        index: int,
        hidden: torch.Tensor,
        rotations: Any,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> torch.Tensor:
        """A layer's output, [1, T, d], from its input, [1, T, d]; layers count from 0."""
        output: torch.Tensor = self.layers(model)[index](
            hidden, attention_mask=None, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
        )
        return output

    @abstractmethod
    def project(self, model: Any, index: int, hidden: torch.Tensor, rotations: Any) -> QKV:
        """What a layer attends with, each [T, d], heads side by side, from its input [1, T, d]."""

    def finish(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        """`last_hidden_state`, [1, T, d], from the last layer's output, [1, T, d]."""
        return hidden

    # What is taken out of it

    def drop_pooler(self, model: Any) -> None:  # noqa: B027 (most families have none)
        """Take out what follows the last hidden state."""

    @abstractmethod
    def cut(self, model: Any, projections: str = "qkv") -> None:
        """Take out everything that follows the last layer's projections.

        Args:
            model: of this family.
            projections: letters of those that are kept, where they are layers of their own; the
                others are then None in what `project` returns.
        """

    # What predicts tokens from the last hidden state, in a model `...ForMaskedLM`

    mlm_head: tuple[str, ...] = ()
    can_start_students = False  # whether weights have BERT's names, see pipeline/initialise.py

    def predict(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, [M, vocabulary], from last hidden states, [M, d]: the head's parts in turn."""
        for name in self.mlm_head:
            hidden = getattr(model, name)(hidden)
        return hidden

    def prepack(self, model: Any) -> None:
        """Lay out a frozen bf16 model for the CPU, see pipeline/prepacked.py."""
        prepack(model)


class Bert(Architecture):
    """BERT, and MiniLM itself: `embeddings`, `encoder.layer[i]`, layer norms behind each sum."""

    mlm_head: tuple[str, ...] = ("cls",)
    can_start_students = True

    def embed(self, model: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See Architecture."""
        position_ids = positions + self.first_position(model.config)
        hidden: torch.Tensor = model.embeddings(input_ids=input_ids, position_ids=position_ids)
        return hidden

    def layers(self, model: Any) -> Any:
        """See Architecture."""
        return model.encoder.layer

    def project(self, model: Any, index: int, hidden: torch.Tensor, rotations: Any) -> QKV:
        """The outputs of the linear layers `query`, `key`, `value`."""
        attention = self.layers(model)[index].attention
        return _each(hidden, attention.self.query, attention.self.key, attention.self.value)

    def drop_pooler(self, model: Any) -> None:
        """See Architecture."""
        model.pooler = None

    def cut(self, model: Any, projections: str = "qkv") -> None:
        """See Architecture."""
        self.drop_pooler(model)
        last = self.layers(model)[-1]
        last.attention.output = last.intermediate = last.output = None
        _keep(projections, last.attention.self, q="query", k="key", v="value")

    def prepack(self, model: Any) -> None:
        """With the GELU and the residual sums taken into the products in front of them."""
        for layer in self.layers(model):
            if layer.output is None:  # it is cut
                continue
            _fuse_gelu(layer.intermediate)
            for part in (layer.attention, layer):
                part.output = PrepackedOutput(part.output.dense, part.output.LayerNorm)
        prepack(model)


class Roberta(Bert):
    """RoBERTa, CamemBERT, XLM-R and what is built on them: positions from the padding id on."""

    mlm_head = ("lm_head",)

    def first_position(self, config: Any) -> int:
        """As fairseq counts."""
        return int(config.pad_token_id) + 1

    def check_student(self, config: Any) -> None:
        """Refuse a vocabulary whose padding stands so late that most positions are never used."""
        first, longest = self.first_position(config), self.longest_segment(config)
        if first > longest:
            raise ConfigError(
                f"student.architecture={config.model_type} counts positions from the padding id "
                f"on, which in the teacher's vocabulary is {first - 1}, so {first} of "
                f"{first + longest} position vectors would never be used; use bert or modernbert"
            )


class XlmRobertaXl(Roberta):
    """XLM-R XL and XXL: layer norms in front of attention and feed-forward, and one at the end."""

    can_start_students = False

    def project(self, model: Any, index: int, hidden: torch.Tensor, rotations: Any) -> QKV:
        """The outputs of `query`, `key`, `value`, which read the layer's normed input."""
        norm = self.layers(model)[index].attention.self_attn_layer_norm
        return super().project(model, index, norm(hidden), rotations)

    def finish(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        """See Architecture."""
        output: torch.Tensor = model.encoder.LayerNorm(hidden)
        return output

    def cut(self, model: Any, projections: str = "qkv") -> None:
        """See Architecture."""
        super().cut(model, projections)
        self.layers(model)[-1].LayerNorm = model.encoder.LayerNorm = None

    def prepack(self, model: Any) -> None:
        """No layer norm follows its sums, so each product stands alone."""
        prepack(model)


class Electra(Bert):
    """ELECTRA: BERT whose embeddings may be narrower than its layers."""

    can_start_students = False

    mlm_head = ("generator_predictions", "generator_lm_head")

    def embed(self, model: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See Architecture."""
        hidden = super().embed(model, input_ids, positions)
        project = getattr(model, "embeddings_project", None)
        return hidden if project is None else project(hidden)


class DistilBert(Architecture):
    """DistilBERT: BERT under other names, without token types and pooler."""

    mlm_head = ("vocab_transform", "vocab_layer_norm", "vocab_projector")
    hidden_dropout_keys = ("dropout",)
    attention_dropout_keys = ("attention_dropout",)

    def norm_eps(self, config: Any) -> float:
        """Written into the model's code."""
        return 1e-12

    def shape(self, config: Any) -> dict[str, int]:
        """See Architecture; transformers maps the other three names itself."""
        mapped = {key: getattr(config, key) for key in SHAPE_KEYS if key != "intermediate_size"}
        return {**mapped, "intermediate_size": config.hidden_dim}

    def embed(self, model: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See Architecture."""
        hidden: torch.Tensor = model.embeddings(input_ids, position_ids=positions)
        return hidden

    def layers(self, model: Any) -> Any:
        """See Architecture."""
        return model.transformer.layer

    def project(self, model: Any, index: int, hidden: torch.Tensor, rotations: Any) -> QKV:
        """The outputs of the linear layers `q_lin`, `k_lin`, `v_lin`."""
        attention = self.layers(model)[index].attention
        return _each(hidden, attention.q_lin, attention.k_lin, attention.v_lin)

    def cut(self, model: Any, projections: str = "qkv") -> None:
        """See Architecture."""
        last = self.layers(model)[-1]
        last.attention.out_lin = last.sa_layer_norm = last.ffn = last.output_layer_norm = None
        _keep(projections, last.attention, q="q_lin", k="k_lin", v="v_lin")

    def predict(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        """See Architecture; here the activation is the model's, not the head's."""
        hidden = model.activation(model.vocab_transform(hidden))
        logits: torch.Tensor = model.vocab_projector(model.vocab_layer_norm(hidden))
        return logits


class ModernBert(Architecture):
    """ModernBERT and mmBERT: rotary positions, local and global attention, norms in front.

    Q and K are taken after their rotation. Only then is q·k what the model attends by, so that
    MiniLM's attention distributions are the model's own (those of a local layer without its
    window); and only then do Q-Q and K-K relations say where tokens stand, as they do in a model
    with position embeddings, whose Q and K hold the positions. Before it they would be blind to
    order but for what earlier layers mixed in.

    A rotation turns pairs of a head's features that lie half a head apart. MiniLMv2 splits the
    width anew into relation heads, and half a pair of two tokens gives a product that depends on
    where the segment begins, not only on how far apart they are. So partners are put side by
    side: a product over a whole head stays what it is, and a relation head of any even width
    holds whole pairs.

    The frequencies are buffers, which transformers and DeepSpeed leave in fp32.
    """

    mlm_head = ("head", "decoder")
    norm_eps_key = "norm_eps"
    rotates = True
    hidden_dropout_keys = ("embedding_dropout", "mlp_dropout")
    attention_dropout_keys = ("attention_dropout",)  # here also of what attention puts out

    def set_num_layers(self, config: Any, number: int) -> None:
        """Local and global layers alternate as before, from the first on."""
        kinds = config.layer_types
        config.layer_types = [kinds[index % len(kinds)] for index in range(number)]
        config.num_hidden_layers = number

    def check_student(self, config: Any) -> None:
        """Refuse heads of odd width, which have no pairs to rotate."""
        width = config.hidden_size // config.num_attention_heads
        if width % 2:
            raise ConfigError(
                f"student.num_attention_heads={config.num_attention_heads} leaves heads of "
                f"{width} of student.hidden_size={config.hidden_size}, and modernbert rotates "
                "pairs of a head's features; choose a number that leaves an even width"
            )

    def embed(self, model: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """See Architecture; positions come in with the rotations."""
        hidden: torch.Tensor = model.embeddings(input_ids)
        return hidden

    def rotations(self, model: Any, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        """Cosines and sines, each [1, T, d of a head], of local and of global layers."""
        return {
            kind: model.rotary_emb(hidden, positions, kind)
            for kind in sorted({layer.attention_type for layer in model.layers})
        }

    def layers(self, model: Any) -> Any:
        """See Architecture."""
        return model.layers

    def run_layer(
        self,
        model: Any,
        index: int,
        hidden: torch.Tensor,
        rotations: Any,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
    ) -> torch.Tensor:
        """See Architecture."""
        layer = model.layers[index]
        output: torch.Tensor = layer(
            hidden,
            attention_mask=None,
            position_embeddings=rotations[layer.attention_type],
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
        return output

    def project(self, model: Any, index: int, hidden: torch.Tensor, rotations: Any) -> QKV:
        """Thirds of the output of `Wqkv`, which reads the layer's normed input; Q, K rotated."""
        layer = model.layers[index]
        heads = layer.attn.Wqkv(layer.attn_norm(hidden)).squeeze(0)
        q, k, v = heads.unflatten(-1, (3, -1, layer.attn.head_dim)).unbind(-3)
        cos, sin = (part.squeeze(0) for part in rotations[layer.attention_type])
        return QKV(_rotate(q, cos, sin), _rotate(k, cos, sin), v.flatten(1))

    def finish(self, model: Any, hidden: torch.Tensor) -> torch.Tensor:
        """See Architecture."""
        output: torch.Tensor = model.final_norm(hidden)
        return output

    def cut(self, model: Any, projections: str = "qkv") -> None:
        """See Architecture; Q, K and V are one layer, so all of it stays."""
        last = model.layers[-1]
        last.attn.Wo = last.mlp_norm = last.mlp = model.final_norm = None


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Bert(),
    "roberta": Roberta(student="roberta"),
    "camembert": Roberta(student="camembert"),
    "xlm-roberta": Roberta(student="xlm-roberta"),
    "xlm-roberta-xl": XlmRobertaXl(student="xlm-roberta"),
    "electra": Electra(),
    "distilbert": DistilBert(),
    "modernbert": ModernBert(),
}

_NO_DOT_PRODUCT = (
    "which adds terms of relative positions to its attention scores, so these are no products of "
    "its Q and K and relations of the two are not what it attends by; choose another teacher"
)
REFUSED = {"deberta": _NO_DOT_PRODUCT, "deberta-v2": _NO_DOT_PRODUCT}


def architecture_of(config: Any) -> Architecture:
    """The adapter of a configuration that `refusal` has nothing against."""
    return ARCHITECTURES[config.model_type]


def refusal(model_type: str) -> str | None:
    """Why models of a type cannot be used, to follow their name; None if they can."""
    if model_type in ARCHITECTURES:
        return None
    return REFUSED.get(
        model_type,
        "whose Q, K and V are not known here; known architectures: "
        f"{', '.join(ARCHITECTURES)}; docs/adding_a_teacher.md says how to add one",
    )


def _each(hidden: torch.Tensor, *projections: Any) -> QKV:
    hidden = hidden.squeeze(0)
    return QKV(*(projection and projection(hidden) for projection in projections))


def _keep(letters: str, attention: nn.Module, **names: str) -> None:
    for letter, name in names.items():
        if letter not in letters:
            setattr(attention, name, None)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[T, heads, d] rotated as transformers does, partners side by side, to [T, heads * d]."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = (part.chunk(2, dim=-1)[0].unsqueeze(1) for part in (cos, sin))  # both halves alike
    pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return pairs.to(x.dtype).flatten(1)


def _fuse_gelu(intermediate: Any) -> None:
    """Let the linear layer apply the exact GELU behind it."""
    activation = intermediate.intermediate_act_fn
    if getattr(activation, "act", None) is nn.functional.gelu:
        intermediate.dense = PrepackedLinear(intermediate.dense, "gelu")
        intermediate.intermediate_act_fn = nn.Identity()
