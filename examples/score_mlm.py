"""Held-out masked-language-model loss per language, of any model folder on any jsonl text.

    python examples/score_mlm.py --model models/pocket-teacher --input 'recipes/demo_text/*.jsonl'

Losses are per masked token, so they compare models that share a tokenizer, and no others.
"""

from __future__ import annotations

import glob
import gzip
import json
from pathlib import Path
from typing import NamedTuple

import torch
from jsonargparse import auto_cli
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

MASK_SHARE = 0.15


class Score(NamedTuple):
    """How well one language's masked tokens were predicted."""

    documents: int
    masked_tokens: int
    loss: float  # nats per masked token
    top1: float  # share of masked tokens whose likeliest prediction is right


def read_documents(pattern: str) -> dict[str, list[str]]:
    """Texts by language, from .jsonl or .jsonl.gz files that have `text` and `lang` on each line.

    Raises:
        ValueError: no file matches, or a line has no text or language.
    """
    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise ValueError(f"input={pattern!r} matches no file, so there is no text; check the glob")
    documents: dict[str, list[str]] = {}
    for path in paths:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                document = json.loads(line)
                if not (document.get("text") and document.get("lang")):
                    raise ValueError(f"{path}:{number} lacks 'text' or 'lang'; add it or drop it")
                documents.setdefault(document["lang"], []).append(document["text"])
    return dict(sorted(documents.items()))


@torch.inference_mode()
def score_language(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    seq_len: int = 128,
    batch_size: int = 32,
    seed: int = 1,
) -> Score:
    """The loss on 15% of the tokens of `texts`, all of them replaced by the mask token.

    Training leaves one chosen token in ten as it is; here none stays, so that what is measured is
    prediction from context. The draw depends on the seed and this language's rows only: adding a
    language or changing the batch size moves no mask.

    Args:
        model: a masked language model in eval mode.
        tokenizer: its tokenizer.
        texts: one language's documents; long ones are cut into rows of `seq_len` ids.
        seq_len: ids in a row, special tokens included.
        batch_size: rows per forward pass; changes speed, not the result.
        seed: of the choice of masked tokens.
    """
    cut = tokenizer(texts, truncation=True, max_length=seq_len, return_overflowing_tokens=True)
    rows = [torch.tensor(row) for row in cut["input_ids"]]
    special = torch.tensor(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(seed)
    masks = [
        (torch.rand(len(row), generator=generator) < MASK_SHARE) & ~torch.isin(row, special)
        for row in rows
    ]
    loss, hits, masked_tokens = 0.0, 0, 0
    for start in range(0, len(rows), batch_size):
        span = slice(start, start + batch_size)
        ids = pad_sequence(rows[span], batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = pad_sequence(masks[span], batch_first=True)  # False where padded
        logits = model(
            input_ids=ids.masked_fill(mask, tokenizer.mask_token_id).to(model.device),
            attention_mask=(ids != tokenizer.pad_token_id).to(model.device),
        ).logits[mask.to(model.device)]
        targets = ids[mask].to(model.device)
        loss += cross_entropy(logits.float(), targets, reduction="sum").item()
        hits += int((logits.argmax(-1) == targets).sum())
        masked_tokens += len(targets)
    if not masked_tokens:
        raise ValueError(f"no token was masked in {len(texts)} documents; give more text")
    return Score(len(texts), masked_tokens, loss / masked_tokens, hits / masked_tokens)


def score_folder(
    model: str | Path, documents: dict[str, list[str]], *, seq_len: int = 128, seed: int = 1
) -> dict[str, Score]:
    """Score a saved model (folder or hub id) in float32, on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForMaskedLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
    return {
        language: score_language(network, tokenizer, texts, seq_len=seq_len, seed=seed)
        for language, texts in documents.items()
    }


def as_table(scores: dict[str, Score]) -> str:
    """The scores as a Markdown table, with the plain mean over languages as its last row."""
    lines = [
        "| language | documents | masked tokens | loss (nats) | top-1 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    mean = Score(
        sum(score.documents for score in scores.values()),
        sum(score.masked_tokens for score in scores.values()),
        sum(score.loss for score in scores.values()) / len(scores),
        sum(score.top1 for score in scores.values()) / len(scores),
    )
    lines += [
        f"| {name} | {score.documents} | {score.masked_tokens} | {score.loss:.2f} "
        f"| {score.top1:.1%} |"
        for name, score in {**scores, "mean": mean}.items()
    ]
    return "\n".join(lines)


def main(
    model: str, input: str, max_documents: int | None = None, seq_len: int = 128, seed: int = 1
) -> None:
    """Print the held-out loss of a masked language model, language by language.

    Args:
        model: folder or hub id of a masked language model.
        input: glob of .jsonl or .jsonl.gz files whose lines have `text` and `lang`.
        max_documents: score only the first so many of each language.
        seq_len: ids in a row; longer documents are cut into several rows.
        seed: of the choice of masked tokens.
    """
    documents = {name: texts[:max_documents] for name, texts in read_documents(input).items()}
    print(as_table(score_folder(model, documents, seq_len=seq_len, seed=seed)))


if __name__ == "__main__":
    auto_cli(main, as_positional=False, description=__doc__)
