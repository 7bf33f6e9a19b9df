"""The tokenizer seam: the teacher's own fast tokenizer, and batches of text to ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.command import ConfigError, one_line, skip_unreachable_hub
from data_prep.shards import id_dtype, tokenizer_fingerprint


class Tokenizer:
    """The teacher's fast tokenizer, without truncation, padding or special tokens.

    Args:
        source: hub id or folder.

    Raises:
        ConfigError: nothing loads from there, it is not a fast tokenizer, or it does not frame a
            text as one token, text, one token, or has no padding token of its own.
    """

    def __init__(self, source: str) -> None:
        skip_unreachable_hub(source)
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # "sequence longer than the maximum" is what we cut ourselves
        try:
            loaded: Any = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # a damaged tokenizer.json raises a bare Exception
            raise ConfigError(
                f"the tokenizer {source!r} does not load ({one_line(error)}); name a hub id or a "
                "folder with tokenizer.json in prep.tokenizer or teacher.model"
            ) from error
        if not getattr(loaded, "is_fast", False):
            raise ConfigError(
                f"the tokenizer {source!r} has no fast (tokenizer.json) form, which batches need; "
                "convert it with transformers first"
            )
        framed: list[int] = loaded("")["input_ids"]
        pad_id: int | None = loaded.pad_token_id
        if len(framed) != 2 or pad_id is None or pad_id in framed:
            raise ConfigError(
                f"the tokenizer {source!r} frames an empty text as {framed} with padding {pad_id}; "
                "rows need one token before, one after, and a padding token that is neither"
            )
        self.cls_id, self.sep_id = framed
        self.pad_id = pad_id
        self.vocab_size = max(loaded.get_vocab().values()) + 1  # ids may have gaps
        self.dtype = id_dtype(self.vocab_size)
        self.fingerprint = tokenizer_fingerprint(loaded)
        self._backend = loaded.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[Any]]:
        """The ids of each text, without special tokens around it."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: npt.NDArray[Any]) -> str:
        """The text of ids [length], without the frame and other special tokens."""
        text: str = self._backend.decode(ids.tolist(), skip_special_tokens=True)
        return text
