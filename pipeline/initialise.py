"""A new student's first weights from its teacher's: state dicts in, state dict out.

`copied_layers` takes whole layers and needs equal widths. `projected_layers` makes a narrower
student. Let x be a hidden vector of the teacher, [D]; the student works with Bᵀx, [d], where B
[D, d] are the leading right singular vectors of the word embeddings E. Hence its embeddings are
E B = U_d S_d, the best approximation of rank d (Eckart and Young), and every matrix that reads or
writes hidden vectors is multiplied by B on that side. What lies between the two is made narrower in
the way that its non-linearity allows:

- Attention heads: of each head's queries and keys the directions that hold most of both; of its
  values those that hold most of them. Scores keep their scale.
- The feed-forward's neurons pass through an activation and so can be left out but not mixed: those
  with the largest weights stay.

It is an approximation for two reasons. What B leaves out is lost, and hidden vectors lie in B less
than word embeddings do. And layer norm does not commute with a change of basis, since it scales
coordinates and takes off their mean. Where d = D, B is the identity for that reason, and likewise
wherever nothing is made narrower: such a part is the teacher's to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data_prep.command import ConfigError
from pipeline.architectures import ARCHITECTURES, architecture_of
from pipeline.config import Student

State = Mapping[str, torch.Tensor]

WORDS = "embeddings.word_embeddings.weight"
CHUNK_ROWS = 1 << 14  # of embeddings that are in memory in float64 at a time


def start_layers(student: Student, last: int) -> list[int]:
    """The teacher's layer, from 1, of each layer of the student.

    Args:
        student: its layers, and `init_layers`.
        last: the teacher's layer that is imitated: the student's last layer starts from it, and
            the others from layers at even distances below.
    """
    if student.init_layers is not None:
        return student.init_layers
    num_layers = student.num_hidden_layers
    return [-(-layer * last // num_layers) for layer in range(1, num_layers + 1)]


def check_start(student: Student, config: Any, teacher: Any, last: int) -> None:
    """Refuse a start that the two models do not allow.

    Args:
        student: its shape and its `init`.
        config: transformers configuration of the student.
        teacher: transformers configuration of the teacher.
        last: the teacher's layer that is imitated.

    Raises:
        ConfigError: naming the key, its value, the rule and the remedy.
    """
    if student.init == "random":
        return
    if not architecture_of(teacher).can_start_students:
        known = sorted(t for t, one in ARCHITECTURES.items() if one.can_start_students)
        raise ConfigError(
            f"student.init={student.init} does not know the weights of a {teacher.model_type!r} "
            f"teacher (known: {', '.join(known)}); use student.init=random"
        )
    if config.model_type != teacher.model_type:
        raise ConfigError(
            f"student.architecture={config.model_type} is not the teacher's {teacher.model_type}, "
            f"whose weights student.init={student.init} copies; leave it null, or use "
            "student.init=random"
        )
    for layer in student.init_layers or []:
        if not 1 <= layer <= teacher.num_hidden_layers:
            raise ConfigError(
                f"student.init_layers has {layer}, the teacher has layers 1 to "
                f"{teacher.num_hidden_layers}; use these"
            )
    if student.init_layers is None and student.num_hidden_layers > last:
        raise ConfigError(
            f"student.num_hidden_layers={student.num_hidden_layers} are more than the {last} of "
            "the teacher up to the imitated one, so some would start as copies of others; name "
            "them in student.init_layers, or use fewer"
        )
    keys = ("hidden_size", "num_attention_heads", "intermediate_size")
    for key in keys:
        own, teachers = getattr(student, key), getattr(teacher, key)
        if student.init == "layers" and own != teachers:
            raise ConfigError(
                f"student.{key}={own} is not the teacher's {teachers}, and student.init=layers "
                "copies layers as they are; use student.init=svd"
            )
        if own > teachers:
            raise ConfigError(
                f"student.{key}={own} is more than the teacher's {teachers}, and student.init=svd "
                "only makes narrower; use less, or student.init=random"
            )
    width = student.hidden_size // student.num_attention_heads
    teachers = teacher.hidden_size // teacher.num_attention_heads
    if width > teachers:
        raise ConfigError(
            f"student.hidden_size={student.hidden_size} / student.num_attention_heads="
            f"{student.num_attention_heads} = {width} is wider than the teacher's heads of "
            f"{teachers}, and student.init=svd only makes narrower; use more heads, or "
            "student.init=random"
        )


def copied_layers(teacher: State, layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """The embeddings, and the layers named from 1, as the teacher has them.

    Args:
        teacher: its state, without a pooler.
        layers: the teacher's layer for each layer of the student.
    """
    copied = {name: t for name, t in teacher.items() if name.startswith("embeddings.")}
    for number, layer in enumerate(layers):
        prefix = f"encoder.layer.{layer - 1}."
        for name, tensor in teacher.items():
            if name.startswith(prefix):
                copied[f"encoder.layer.{number}.{name.removeprefix(prefix)}"] = tensor
    return copied


def projected_layers(
    teacher: State, layers: Sequence[int], student: Student, num_teacher_heads: int
) -> dict[str, torch.Tensor]:
    """The embeddings and layers in the student's shape: see the module's docstring.

    Deterministic, float64 inside. An embedding of V rows costs O(V D²) time and, beside itself and
    its projection, O(D²) memory.

    Args:
        teacher: its state, without a pooler; fp32.
        layers: the teacher's layer, from 1, for each layer of the student.
        student: its shape.
        num_teacher_heads: attention heads of the teacher.

    Returns:
        fp32 tensors under the student's names.
    """
    copied = copied_layers(teacher, layers)
    basis = embedding_basis(copied[WORDS], student.hidden_size)
    projected = {
        name: _project(table, basis)
        for name, table in copied.items()
        if name.startswith("embeddings.") and table.ndim == 2
    }
    projected |= _norm(copied, "embeddings.LayerNorm", basis)
    for number in range(len(layers)):
        prefix = f"encoder.layer.{number}."
        layer = {n.removeprefix(prefix): t for n, t in copied.items() if n.startswith(prefix)}
        narrow = {
            **_attention(layer, basis, student.num_attention_heads, num_teacher_heads),
            **_norm(layer, "attention.output.LayerNorm", basis),
            **_feed_forward(layer, basis, student.intermediate_size),
            **_norm(layer, "output.LayerNorm", basis),
        }
        projected |= {prefix + name: tensor for name, tensor in narrow.items()}
    return {name: tensor.float().contiguous() for name, tensor in projected.items()}


def embedding_basis(words: torch.Tensor, width: int) -> torch.Tensor:
    """B [D, d] float64: the leading right singular vectors of E [V, D], from EᵀE [D, D]."""
    gram = torch.zeros(words.shape[1], words.shape[1], dtype=torch.float64)
    for chunk in words.split(CHUNK_ROWS):
        gram += chunk.double().T @ chunk.double()
    return leading_directions(gram, width)


def _project(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """fp32 [n, D] times B: fp32 [n, d]."""
    return torch.cat([(chunk.double() @ basis).float() for chunk in rows.split(CHUNK_ROWS)])


def leading_directions(gram: torch.Tensor, count: int) -> torch.Tensor:
    """Orthonormal directions in which a set of vectors is longest.

    Args:
        gram: X Xᵀ [n, n] float64 of vectors X [n, any].
        count: directions that are wanted.

    Returns:
        [n, count] float64, the leading eigenvectors, each with its largest component positive; the
        identity where all n are wanted, so that nothing is turned without need.
    """
    if count == len(gram):
        return torch.eye(count, dtype=gram.dtype)
    _, vectors = torch.linalg.eigh(gram)  # ascending
    leading: torch.Tensor = vectors.flip(1)[:, :count]
    signs = leading.gather(0, leading.abs().argmax(0, keepdim=True)).sign()
    return leading.mul(signs)


def _norm(state: State, name: str, basis: torch.Tensor) -> dict[str, torch.Tensor]:
    """For y = γ z + β, Bᵀβ and the diagonal of Bᵀ diag(γ) B: coordinates keep their size."""
    weight, bias = state[f"{name}.weight"].double(), state[f"{name}.bias"].double()
    return {
        f"{name}.weight": weight @ basis.square(),
        f"{name}.bias": bias @ basis,
    }


def _attention(
    layer: State, basis: torch.Tensor, num_heads: int, num_teacher_heads: int
) -> dict[str, torch.Tensor]:
    """Heads of fewer dimensions and, where the student has fewer heads, the strongest ones."""

    def heads_of(name: str) -> torch.Tensor:
        """[heads, dimensions, d + 1] of a projection, the bias behind its weights."""
        weight, bias = (layer[f"attention.self.{name}.{part}"] for part in ("weight", "bias"))
        rows = torch.cat([_project(weight, basis), bias[:, None]], dim=1).double()
        heads: torch.Tensor = rows.unflatten(0, (num_teacher_heads, -1))
        return heads

    query, key, value = heads_of("query"), heads_of("key"), heads_of("value")
    output = _project(layer["attention.output.dense.weight"].T, basis).double()  # [D, d]
    output = output.unflatten(0, (num_teacher_heads, -1))
    # The squared norm of each head's map of hidden to hidden vectors, W_o W_v.
    strength = ((value @ value.mT) * (output @ output.mT)).sum((1, 2))
    width = basis.shape[1] // num_heads
    scale = (width / query.shape[1]) ** 0.25  # of both: scores are divided by √width
    parts: dict[str, list[torch.Tensor]] = {"query": [], "key": [], "value": [], "output": []}
    for head in strength.topk(num_heads).indices.sort().values.tolist():
        q, k, v = query[head], key[head], value[head]
        scored = leading_directions(q @ q.T + k @ k.T, width).T
        carried = leading_directions(v @ v.T, width).T
        parts["query"].append(scale * (scored @ q))
        parts["key"].append(scale * (scored @ k))
        parts["value"].append(carried @ v)
        parts["output"].append(carried @ output[head])
    narrow = {name: torch.cat(heads) for name, heads in parts.items()}
    out_bias = layer["attention.output.dense.bias"]
    return {
        **{f"attention.self.{n}.weight": narrow[n][:, :-1] for n in ("query", "key", "value")},
        **{f"attention.self.{n}.bias": narrow[n][:, -1] for n in ("query", "key", "value")},
        "attention.output.dense.weight": narrow["output"].T,
        "attention.output.dense.bias": _project(out_bias[None], basis)[0],
    }


def _feed_forward(layer: State, basis: torch.Tensor, num_neurons: int) -> dict[str, torch.Tensor]:
    """The neurons whose weights, in times out, are the largest."""
    into = _project(layer["intermediate.dense.weight"], basis)  # [F, d]
    out = _project(layer["output.dense.weight"].T, basis)  # [F, d]
    bias = layer["intermediate.dense.bias"]
    strength = (into.square().sum(1) + bias.square()) * out.square().sum(1)
    neurons = strength.topk(num_neurons).indices.sort().values
    return {
        "intermediate.dense.weight": into[neurons],
        "intermediate.dense.bias": bias[neurons],
        "output.dense.weight": out[neurons].T,
        "output.dense.bias": _project(layer["output.dense.bias"][None], basis)[0],
    }
