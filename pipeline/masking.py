"""Which tokens a masked language model has to predict, as a function of integers alone."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.command import ConfigError

MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens; the rest stays (BERT, arXiv 1810.04805)


class Masking:
    """BERT's masking: chosen tokens become the mask, another token, or stay as they are.

    Whether a token is chosen, and what becomes of it, depends on the seed and on the token's place
    in the stream of rows: not on when it is read, in which batch, or by which of how many ranks.
    In another epoch a row stands at another place.

    Args:
        tokenizer: the transformers tokenizer of the text; its special tokens are never chosen.
        probability: that an ordinary token is chosen, each for itself.
        seed: of the run.

    Raises:
        ConfigError: the tokenizer has no mask token.
    """

    def __init__(self, tokenizer: Any, probability: float, seed: int) -> None:
        if tokenizer.mask_token_id is None:
            raise ConfigError(
                f"the tokenizer {tokenizer.name_or_path!r} has no mask token, without which "
                "objective.name=distilbert has nothing to predict; use minilmv2 or minilm"
            )
        self._mask_id: int = tokenizer.mask_token_id
        ids, special = set(tokenizer.get_vocab().values()), set(tokenizer.all_special_ids)
        self._ordinary = np.array(sorted(ids - special), dtype=np.int64)
        self._is_ordinary = np.zeros(max(ids) + 1, dtype=np.bool_)
        self._is_ordinary[self._ordinary] = True
        self._probability, self._seed = probability, seed

    def __call__(
        self, ids: npt.NDArray[np.int64], first: int, stream: str
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Mask tokens that follow each other in a stream.

        Args:
            ids: [N] token ids.
            first: place of ids[0] in the stream.
            stream: its name; streams are masked independently.

        Returns:
            [N] ids for the models to read, and [N] whether a token is to be predicted.
        """
        choice, fate, substitute = self._noise(first, len(ids), stream).T
        is_chosen = self._is_ordinary[ids] & (choice < self._probability)
        others = self._ordinary[(substitute * len(self._ordinary)).astype(np.int64)]
        changed = np.where(fate < MASKED, self._mask_id, others)
        changes = is_chosen & (fate < MASKED + REPLACED)
        return np.where(changes, changed, ids), is_chosen

    def _noise(self, first: int, number: int, stream: str) -> npt.NDArray[np.float64]:
        """[number, 3] uniform from 0 to below 1.

        Philox computes its n-th four words from n and a key, so a token's place is its counter.
        """
        name = f"{self._seed}/{stream}".encode()
        key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
        words = np.random.Philox(key=key, counter=first).random_raw(4 * number)
        uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return uniform.reshape(number, 4)[:, :3]
