"""Keys by which equal lines and nearly equal documents are found, without comparing pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.command import ConfigError
from data_prep.shingles import mix, shingles, whole

SHORTEST_LINE = 20
"""Characters: a shorter line ("1.", "Read more") repeats by chance and is never dropped."""
SHINGLE_WORDS = 5
"""Words in a run: documents are compared as sets of these."""
SIGNATURE = 256
"""Minimum hashes in a document's signature."""
SURE = 0.9
"""Least chance that a pair as similar as the threshold shares a band."""
_SEED = 1


def line_hashes(text: str) -> NDArray[np.uint64]:
    """A hash of each line of a document cleaned with `keep_lines`.

    Args:
        text: lines between single newlines.

    Returns:
        [lines] hashes, the same on every machine; 0 for a line of fewer than SHORTEST_LINE
        characters, which is never a duplicate.
    """
    lines = text.split("\n")
    return np.array(
        [
            xxhash.xxh3_64_intdigest(line.encode()) if len(line) >= SHORTEST_LINE else 0
            for line in lines
        ],
        np.uint64,
    )


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """How the signature is cut into bands, of which one must agree in all its rows.

    Two documents whose sets of shingles have the Jaccard similarity s share a band with
    probability 1 - (1 - s**rows)**bands. Rows are as many, hence other pairs found as few, as
    leave this at least SURE at the threshold.

    Args:
        threshold: Jaccard similarity, above 0 and at most 1.

    Returns:
        Bands and rows, together at most SIGNATURE.
    """
    fitting = (
        (SIGNATURE // rows, rows)
        for rows in range(SIGNATURE, 1, -1)
        if 1 - (1 - threshold**rows) ** (SIGNATURE // rows) >= SURE
    )
    return next(fitting, (SIGNATURE, 1))


def near_duplicate_bands(texts: Sequence[str], threshold: float) -> NDArray[np.uint64]:
    """Keys of documents: two are near duplicates where any column has the same key in both.

    Args:
        texts: cleaned documents.
        threshold: Jaccard similarity of their sets of runs of SHINGLE_WORDS words (see
            `shingles`) from which documents are to be found; above 0 and at most 1.

    Returns:
        [texts, bands] keys, the same on every machine and for any batch a text is in. A text
        shorter than a run is compared as a whole.

    Raises:
        ConfigError: rensa is not installed.
    """
    rensa = load_rensa()
    bands, rows = bands_and_rows(threshold)
    sets = [_shingle_set(text) for text in texts]
    offsets = np.cumsum([0, *map(len, sets)], dtype=np.uint64)
    flat = np.concatenate([np.zeros(0, np.uint64), *sets])
    signatures = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        flat, offsets, num_perm=bands * rows, seed=_SEED
    ).to_rows()
    values = np.array(signatures, np.uint64).reshape(len(texts), bands, rows)
    keys = np.zeros((len(texts), bands), np.uint64)
    for row in range(rows):
        keys = mix(keys ^ values[:, :, row])
    return keys


def load_rensa() -> Any:
    """The package that `near_duplicate_bands` computes with.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import rensa
    except ImportError as error:
        raise ConfigError(
            "prep.near_duplicates needs the package rensa, which is not installed here; "
            "pip install rensa==0.5.0, or set it to null"
        ) from error
    return rensa


def _shingle_set(text: str) -> NDArray[np.uint64]:
    """Never empty: a text without words is its own only shingle."""
    for found in (shingles(text, SHINGLE_WORDS), whole(text)):
        if len(found):
            return found
    return np.array([xxhash.xxh3_64_intdigest(text.encode())], np.uint64)
