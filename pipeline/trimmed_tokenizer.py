"""A fast tokenizer with fewer tokens that treats text as the whole one does, where it can.

Dropped are only tokens that kept ones can spell: special and added tokens stay, and so does every
token that no others make up, such as characters, bytes and BPE's alphabet. Text that needs none of
the dropped tokens is tokenised as before, since each algorithm finds among fewer tokens what it
found among all: Unigram the best path, WordPiece the longest match, BPE the same merges, for which
the kept tokens' parts are kept, their parts', and so on. Other text is spelt by kept tokens.

Kept tokens are numbered in their old order. None up to the padding token is dropped, because
RoBERTa and its kin count positions from the padding's id.
"""

from __future__ import annotations

import collections
import json
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.command import ConfigError
from pipeline.models import load_tokenizer

BYTE = re.compile("<0x[0-9A-F]{2}>")

Json = dict[str, Any]
Ids = npt.NDArray[np.int64]


def kept_ids(tokenizer: Any, is_wanted: npt.NDArray[np.bool_]) -> Ids:
    """The ids of the tokens that are wanted and of those that a tokenizer cannot do without.

    Args:
        tokenizer: a fast transformers tokenizer.
        is_wanted: [ids].

    Returns:
        Ascending ids.

    Raises:
        ConfigError: the tokenizer is of a kind that cannot be trimmed.
    """
    content = _content(tokenizer)
    ids = _ids_by_token(content["model"])
    always = {token["id"] for token in content["added_tokens"]}
    always |= {*tokenizer.all_special_ids, *range(tokenizer.pad_token_id + 1)}
    wanted = {token for token, id_ in ids.items() if is_wanted[id_] or id_ in always}
    kept = _with_spelling(content["model"], wanted)
    return np.array(sorted({ids[token] for token in kept} | always), dtype=np.int64)


def trimmed_tokenizer(tokenizer: Any, kept: Ids) -> Any:
    """A transformers tokenizer of the kept tokens alone, as it loads from a folder.

    Args:
        tokenizer: the whole one, fast.
        kept: from `kept_ids`; a token's place there is its new id.
    """
    content = trimmed_content(
        _content(tokenizer), {old: new for new, old in enumerate(kept.tolist())}
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        text = json.dumps(content, ensure_ascii=False)
        (Path(folder) / "tokenizer.json").write_text(text, encoding="utf-8")
        trimmed = load_tokenizer(folder)
    old = tokenizer.convert_ids_to_tokens(kept.tolist())
    assert trimmed.convert_ids_to_tokens(list(range(len(kept)))) == old
    return trimmed


def _content(tokenizer: Any) -> Json:
    """What tokenizer.json holds."""
    content: Json = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = content["model"]["type"]
    if kind not in ("Unigram", "BPE", "WordPiece") or tokenizer.unk_token_id is None:
        raise ConfigError(
            f"student.vocabulary cannot trim a {kind} tokenizer whose unknown token is "
            f"{tokenizer.unk_token!r}: Unigram, BPE and WordPiece with an unknown token can be "
            "trimmed; use student.vocabulary=full"
        )
    return content


def _ids_by_token(model: Json) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {token: id_ for id_, (token, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _with_spelling(model: Json, wanted: set[str]) -> set[str]:
    """The wanted tokens, those that they are made of, and those that no others make up."""
    tokens = _ids_by_token(model).keys()
    if model["type"] == "BPE":
        parts: dict[str, set[str]] = collections.defaultdict(set)
        for pair in model["merges"]:
            parts[_merged(model, pair)].update(pair)
        return _closure(wanted | (tokens - parts.keys()), parts)
    kept = wanted | {token for token in tokens if _is_letter(model, token, tokens)}
    if model["type"] == "Unigram":
        # An unknown character is scored relative to the lowest score of all tokens.
        kept.add(min(model["vocab"], key=lambda entry: entry[1])[0])
    return kept


def _is_letter(model: Json, token: str, tokens: Collection[str]) -> bool:
    """Whether no other tokens spell a token of a Unigram or WordPiece model."""
    letters = _letters(model, token)
    return len(letters) == 1 or bool(BYTE.fullmatch(token)) or not all(x in tokens for x in letters)


def _letters(model: Json, token: str) -> list[str]:
    """A token's characters, as the model would write each by itself."""
    prefix = model.get("continuing_subword_prefix") or ""
    if prefix and token.startswith(prefix) and token != prefix:
        return [prefix + letter for letter in token.removeprefix(prefix)]
    return [token[:1], *(prefix + letter for letter in token[1:])]


def _merged(model: Json, pair: Sequence[str]) -> str:
    """What a merge of BPE makes."""
    first, second = pair
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def _closure(tokens: set[str], parts: Mapping[str, set[str]]) -> set[str]:
    """The tokens, their parts, their parts' parts and so on."""
    found, new = set(tokens), set(tokens)
    while new:
        new = {part for token in new for part in parts.get(token, ())} - found
        found |= new
    return found


def trimmed_content(content: Json, new_ids: Mapping[int, int]) -> Json:
    """What tokenizer.json holds for the kept tokens alone, under their new ids.

    Args:
        content: what it holds for all.
        new_ids: of the kept tokens, by their old ones.
    """
    model = dict(content["model"])
    kept = {t: new_ids[id_] for t, id_ in _ids_by_token(model).items() if id_ in new_ids}
    if model["type"] == "Unigram":
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in kept]
        model["unk_id"] = new_ids[model["unk_id"]]
    else:
        model["vocab"] = kept
    if model["type"] == "BPE":
        model["merges"] = [
            pair for pair in model["merges"] if {*pair, _merged(model, pair)} <= kept.keys()
        ]
    added = [{**token, "id": new_ids[token["id"]]} for token in content["added_tokens"]]
    trimmed = {**content, "model": model, "added_tokens": added}
    if content["post_processor"]:
        trimmed["post_processor"] = _renumbered(content["post_processor"], new_ids)
    return trimmed


def _renumbered(processor: Json, new_ids: Mapping[int, int]) -> Json:
    """A post-processor with the new ids of the special tokens that it sets around a text."""
    kind = processor["type"]
    if kind == "Sequence":
        steps = [_renumbered(step, new_ids) for step in processor["processors"]]
        return {**processor, "processors": steps}
    if kind == "TemplateProcessing":
        special = {
            name: {**token, "ids": [new_ids[id_] for id_ in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
        return {**processor, "special_tokens": special}
    if kind in ("BertProcessing", "RobertaProcessing"):
        framed = {
            part: [processor[part][0], new_ids[processor[part][1]]] for part in ("sep", "cls")
        }
        return {**processor, **framed}
    return processor
