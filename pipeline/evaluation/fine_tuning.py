"""The transformers seam of the evaluation: a whole model with a head, its training, its logits."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import AutoConfig, PrinterCallback, Trainer, TrainingArguments, set_seed

from data_prep.command import ConfigError, RunError, one_line
from pipeline.evaluation.kinds import IGNORED, Input, Kind
from pipeline.models import load_tokenizer, longest_segment, read_config

BATCH_SIZE = 32
WARMUP = 0.1  # share of the steps
WEIGHT_DECAY = 0.01
WEIGHTS = ("*.safetensors", "*.bin", "config.json", "tokenizer.json")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Args:
        source: hub id or folder.
        key: option that names it, for messages.
        untrained: whether only its shape is taken, with random weights: what fine-tuning alone is
            worth, without any pretraining.
    """

    source: str
    key: str
    untrained: bool = False

    @property
    def name(self) -> str:
        """As tables call it."""
        name = self.source.rstrip("/")
        path = Path(name)
        if path.is_dir():
            name = path.parent.name if path.name == "student" and path.parent.name else path.name
        return f"{name}, untrained" if self.untrained else name

    def config(self) -> Any:
        """Its configuration.

        Raises:
            ConfigError: it is no encoder.
        """
        return read_config(self.key, self.source)

    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            ConfigError: there is none, or it is another model's.
        """
        try:
            tokenizer = load_tokenizer(self.source)
        except ConfigError as error:
            raise ConfigError(
                f"{self.key}={self.source!r} has no tokenizer that loads "
                f"({one_line(error.__cause__ or error)}); save its tokenizer beside it"
            ) from error
        words = len(tokenizer) - len(tokenizer.all_special_ids)
        if words <= 0:  # transformers makes up an empty one where a folder has none
            raise ConfigError(
                f"{self.key}={self.source!r} has no tokenizer, so every word would be unknown; "
                "save its tokenizer beside it"
            )
        if len(tokenizer) > self.config().vocab_size:
            raise ConfigError(
                f"{self.key}={self.source!r} has a tokenizer of {len(tokenizer)} tokens and "
                f"embeddings for {self.config().vocab_size}, so it is another model's; save its "
                "own beside it"
            )
        return tokenizer

    def digest(self) -> str:
        """Of the folder's weights, shape and tokenizer, or the revision of a hub id."""
        folder = Path(self.source)
        if not folder.is_dir():
            return str(getattr(self.config(), "_commit_hash", None))
        digest = hashlib.sha256()
        for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
            with open(path, "rb") as stream:
                digest.update(path.name.encode() + hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def max_length(self, wanted: int) -> int:
        """Tokens of an input: as many as wanted, or as the model has positions for."""
        return min(wanted, longest_segment(self.config()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is fine-tuned: AdamW, linear decay after a warm-up, batches of 32.

    Args:
        learning_rate: the highest.
        epochs: passes over the training examples.
        seed: of the head, of dropout and of the order of examples.
        bf16: whether products are computed in bfloat16.
    """

    learning_rate: float
    epochs: float
    seed: int
    bf16: bool = False


def fine_tune(source: Source, kind: Kind, inputs: Sequence[Input], training: Training) -> Any:
    """A model with the kind's head, trained on the inputs.

    Raises:
        ConfigError: the folder lacks weights, or transformers has no such head for it.
        RunError: the loss is not finite.
    """
    set_seed(training.seed)  # of the head's first weights
    model = _with_head(source, kind)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                learning_rate=training.learning_rate,
                num_train_epochs=training.epochs,
                seed=training.seed,
                full_determinism=True,
                bf16=training.bf16,
                per_device_train_batch_size=BATCH_SIZE,
                train_sampling_strategy="group_by_length",
                warmup_steps=WARMUP,
                weight_decay=WEIGHT_DECAY,
                use_cpu=not torch.cuda.is_available(),
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=_with_length(inputs),
            data_collator=lambda rows: _batch(kind.tokenizer, rows),
        )
        trainer.remove_callback(PrinterCallback)
        loss = trainer.train().training_loss
    if not math.isfinite(loss) or not all(p.isfinite().all() for p in model.parameters()):
        raise RunError(
            f"{source.name} on {kind.task.name}, learning rate {training.learning_rate:g}, seed "
            f"{training.seed}: the loss is not finite, so nothing was learnt; lower the rate"
        )
    return model.eval()


def logits_of(
    model: Any, tokenizer: Any, inputs: Sequence[Input], *, bf16: bool = False
) -> list[list[npt.NDArray[np.float32]]]:
    """A model's outputs for each input, without those of padding.

    Args:
        model: of `fine_tune`.
        tokenizer: pads the inputs.
        inputs: as `fine_tune` takes them.
        bf16: whether products are computed in bfloat16.

    Returns:
        For each input its outputs, in order: [labels], [tokens, labels] or two of [tokens].
    """
    found: list[list[npt.NDArray[np.float32]]] = [[] for _ in inputs]
    for places, batch in _batches(model, tokenizer, inputs):
        with torch.inference_mode(), _autocast(model.device, bf16):
            outputs = model(**batch)
        kept = [outputs[name] for name in ("logits", "start_logits", "end_logits")
                if name in outputs]  # fmt: skip
        arrays = [output.float().cpu().numpy() for output in kept]
        for row, place in enumerate(places):
            found[place] = [array[row] for array in arrays]
    return found


def embeddings(
    source: Source, texts: Sequence[str], max_length: int, seed: int
) -> npt.NDArray[np.float32]:
    """Each text's mean vector after the embeddings and after each layer, of length 1.

    Args:
        source: the model.
        texts: n.
        max_length: tokens of a text at most.
        seed: of the weights of an untrained model.

    Returns:
        [layers + 1, n, width].
    """
    set_seed(seed)
    model, tokenizer = _load(source, "AutoModel"), source.tokenizer()
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)
    rows = [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]
    found: list[Any] = [None] * len(rows)
    for places, batch in _batches(model, tokenizer, rows):
        with torch.inference_mode():
            states = torch.stack(model(**batch, output_hidden_states=True).hidden_states)
            mask = batch["attention_mask"][None, :, :, None]
            means = (states * mask).sum(2) / mask.sum(2)
            vectors = torch.nn.functional.normalize(means, dim=-1).cpu().numpy()
        for row, place in enumerate(places):
            found[place] = vectors[:, row]
    return np.stack(found, axis=1)


def size_of(source: Source) -> dict[str, int]:
    """Parameters of the encoder, and how many of them are word embeddings."""
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(source.config())
    total = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": total, "embeddings": model.get_input_embeddings().weight.numel()}


def load_encoder(source: Source) -> Any:
    """The encoder alone, in fp32."""
    return _load(source, "AutoModel").eval()


def meta_encoder(source: Source) -> Any:
    """The encoder without numbers in it, to count what it computes."""
    config = source.config()
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config).eval()


def _with_head(source: Source, kind: Kind) -> Any:
    return _load(source, kind.head, num_labels=kind.num_labels, may_lack_head=True)


def _load(source: Source, auto_class: str, may_lack_head: bool = False, **settings: Any) -> Any:
    source.config()  # refuses what is no encoder
    factory = getattr(transformers, auto_class)
    config = AutoConfig.from_pretrained(source.source, **settings)
    config.dtype = torch.float32
    try:
        if source.untrained:
            return factory.from_config(config)
        model, loading = factory.from_pretrained(
            source.source, config=config, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # whatever a user's folder may provoke in there
        raise ConfigError(
            f"{source.key}={source.source!r} does not load ({one_line(error)}); give a whole model "
            "folder or a hub id"
        ) from error
    body = f"{model.base_model_prefix}." if may_lack_head else ""
    missing = sorted(
        name for name in loading["missing_keys"]
        if name.startswith(body) and "pooler" not in name
    )  # fmt: skip
    if missing:
        raise ConfigError(
            f"{source.key}={source.source!r} has no weights for {missing[0]!r} and "
            f"{len(missing) - 1} more, which would be random; name a folder with the whole encoder"
        )
    return model


def _with_length(inputs: Sequence[Input]) -> list[Input]:
    """As the sampler that batches inputs of about one length finds them."""
    return [{**row, "length": _length(row)} for row in inputs]


def _length(row: Input) -> int:
    ids = row["input_ids"]
    return max(map(len, ids)) if isinstance(ids[0], list) else len(ids)


def _batches(
    model: Any, tokenizer: Any, inputs: Sequence[Input]
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Batches of inputs of about one length, and their places."""
    order = sorted(range(len(inputs)), key=lambda place: (_length(inputs[place]), place))
    for start in range(0, len(order), BATCH_SIZE):
        places = order[start : start + BATCH_SIZE]
        batch = _batch(tokenizer, [_without_labels(inputs[place]) for place in places])
        yield places, {name: tensor.to(model.device) for name, tensor in batch.items()}


def _without_labels(row: Input) -> Input:
    return {k: v for k, v in row.items() if k not in ("labels", "start_positions", "end_positions")}


def _batch(tokenizer: Any, rows: Sequence[Input]) -> dict[str, torch.Tensor]:
    """Inputs padded to the longest one; those of several sequences as [inputs, sequences, T]."""
    rows = [{name: value for name, value in row.items() if name != "length"} for row in rows]
    names = [name for name in tokenizer.model_input_names if name in rows[0]]
    choices = len(rows[0]["input_ids"]) if isinstance(rows[0]["input_ids"][0], list) else 0
    flat = [{name: [value] if not choices else value for name, value in row.items()
             if name in names} for row in rows]  # fmt: skip
    sequences = [dict(zip(row, values, strict=True)) for row in flat
                 for values in zip(*row.values(), strict=True)]  # fmt: skip
    padded = tokenizer.pad(sequences, return_tensors="pt")
    batch = {name: tensor.view(len(rows), choices, -1) if choices else tensor
             for name, tensor in padded.items()}  # fmt: skip
    for name in ("labels", "start_positions", "end_positions"):
        if name in rows[0]:
            values = [row[name] for row in rows]
            if isinstance(values[0], list):
                longest = padded["input_ids"].shape[1]
                values = [row + [IGNORED] * (longest - len(row)) for row in values]
            batch[name] = torch.tensor(values)
    return batch


def _autocast(device: torch.device, enabled: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
