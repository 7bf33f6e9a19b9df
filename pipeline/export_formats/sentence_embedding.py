"""What makes an encoder's folder a sentence-transformers model: mean pooling, in four JSON files.

They are written here, in the form of sentence-transformers 2 to 5, rather than by that library: its
version 6 writes new keys and module names, while servers look for the older ones. It reads both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

POOLINGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")


def write_sentence_transformer(folder: Path, width: int, max_tokens: int) -> list[str]:
    """Let a model's folder load as a SentenceTransformer.

    Args:
        folder: with a transformers encoder and its tokenizer.
        width: of its last hidden states.
        max_tokens: that it has positions for; longer texts are cut.

    Returns:
        The files, relative to the folder.
    """
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ]
    pooling = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in POOLINGS}
    files: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine", "prompts": {}},
        "1_Pooling/config.json": {"word_embedding_dimension": width, **pooling},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return list(files)
