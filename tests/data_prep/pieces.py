"""Rows taken apart, by docs/data_format.md alone, and put together to the documents they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from data_prep.shards import ShardReader

Encode = Callable[[str], bytes]


def encoder(teacher_dir: Path) -> Encode:
    """Gives a text's ids, two bytes each, as the library has them that decides what is right."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(teacher_dir / "tokenizer.json"))
    loaded.no_truncation()
    loaded.no_padding()
    return lambda text: np.array(loaded.encode(text, add_special_tokens=False).ids, "<u2").tobytes()


def segments_of(folder: Path) -> dict[str, list[bytes]]:
    """Language -> the ids of each of its segments without the frame, by the format alone."""
    reader = ShardReader(str(folder))
    found: dict[str, list[bytes]] = {}
    for index in range(len(reader.blocks())):
        input_ids, cu_seqlens, meta = reader.read_sample(index)
        assert input_ids.dtype == np.dtype("<u2")
        flat, bounds = input_ids.tobytes(), (2 * cu_seqlens.astype(np.int64)).tolist()
        for start, stop, language in zip(
            bounds[:-1], bounds[1:], meta["segment_languages"], strict=True
        ):
            if language is not None:
                found.setdefault(language, []).append(flat[start + 2 : stop - 2])
    return found


def assert_is_made_of(documents: dict[str, list[bytes]], segments: dict[str, list[bytes]]) -> None:
    """Each language's segments, each used once, make up all its documents, end to end."""
    assert documents.keys() == segments.keys()
    for language, wholes in documents.items():
        pieces = Pieces(segments[language])
        for whole in sorted(wholes, key=len, reverse=True):
            assert pieces.take(whole), (language, len(whole))
        assert not pieces.number, language


class Pieces:
    """Segments that are taken to make up documents."""

    def __init__(self, segments: Iterable[bytes]) -> None:
        self._left: dict[bytes, dict[bytes, int]] = {}  # first id -> content -> how many
        self.number = 0
        for segment in sorted(segments, key=len, reverse=True):
            self._add(segment, 1)

    def _add(self, segment: bytes, times: int) -> None:
        same = self._left.setdefault(segment[:2], {})
        same[segment] = same.get(segment, 0) + times
        self.number += times

    def _fitting(self, document: bytes, start: int) -> list[bytes]:
        """Those that the document goes on with, the longest last."""
        same = self._left.get(document[start : start + 2], {})
        return [s for s in reversed(same) if same[s] and document.startswith(s, start)]

    def take(self, document: bytes) -> bool:
        """Use segments up that make up the document, in order; False where none do."""
        start, path, choices = 0, list[bytes](), [self._fitting(document, 0)]
        while start < len(document):
            if choices[-1]:
                path.append(choices[-1].pop())
                self._add(path[-1], -1)
                start += len(path[-1])
                choices.append(self._fitting(document, start))
            else:  # another choice, one step back
                choices.pop()
                if not path:
                    return False
                start -= len(path[-1])
                self._add(path.pop(), 1)
        return True
