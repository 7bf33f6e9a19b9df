from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.command import RunError
from data_prep.container import Container, write_container

DTYPES = [
    np.dtype("<u2"),
    np.dtype(">i4"),
    np.dtype("?"),
    np.dtype("<f8"),
    np.dtype("M8[s]"),
    np.dtype("S5"),
    np.dtype([("hi", "<u8"), ("lo", "<u8"), ("language", "<u2")]),
    np.dtype([("a", "u1"), ("b", "<u8")], align=True),
    np.dtype([("a", "<u4", (2, 3)), ("nested", [("x", "<f4"), ("y", "S5")])]),
    np.dtype({"names": ["hi", "lo"], "formats": ["<u8"] * 2, "offsets": [0, 24], "itemsize": 40}),
]


def some(dtype: np.dtype[Any], count: int) -> np.ndarray:
    """Elements of any bytes; padding inside an element is part of it."""
    raw = np.random.default_rng(count).integers(0, 256, count * dtype.itemsize, dtype=np.uint8)
    return raw.view(dtype)


def bytes_of(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A small file of two arrays and a fact."""
    path = tmp_path / "small"
    with write_container(path) as writer:
        writer.append("a", np.arange(20, dtype="<u2"))
        writer.append("b", np.arange(5, dtype="<u8"))
        writer.facts["languages"] = ["de", "en"]
    return path


@pytest.mark.parametrize("count", [0, 1, 7])
def test_arrays_of_any_type_come_back(tmp_path: Path, count: int) -> None:
    arrays = {str(number): some(dtype, count) for number, dtype in enumerate(DTYPES)}
    with write_container(tmp_path / "file") as writer:
        for name, array in arrays.items():
            writer.append(name, array)
    file = Container(tmp_path / "file")
    for name, array in arrays.items():
        for found in (file.read(name), file.map(name)):
            assert found.dtype == array.dtype
            assert bytes_of(found) == bytes_of(array)
    assert "9" in file
    assert "10" not in file


def test_facts_come_back_and_may_be_filled_in_at_any_time(written: Path) -> None:
    assert Container(written).facts == {"languages": ["de", "en"]}


@given(st.lists(st.integers(0, 9), max_size=5), st.integers(-12, 12), st.integers(-12, 12))
def test_pieces_make_one_array_of_which_slices_are_read(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], start: int, stop: int
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "file"
    whole = np.arange(sum(sizes), dtype="<u4")
    ends = np.cumsum([0, *sizes])
    with write_container(path) as writer:
        writer.append("before", np.ones(3, np.uint8))  # so that the next is not aligned by itself
        writer.append("whole", whole[:0])
        for begin, end in itertools.pairwise(ends):
            writer.append("whole", whole[begin:end])
        writer.append("after", np.full(30, 255, np.uint8))
    file = Container(path)
    np.testing.assert_array_equal(file.read("whole"), whole)
    np.testing.assert_array_equal(file.read("whole", start, stop), whole[start:stop])
    np.testing.assert_array_equal(file.read("whole", start), whole[start:])
    np.testing.assert_array_equal(file.map("whole")[start:stop], whole[start:stop])


def test_an_array_that_is_not_contiguous_is_written_as_it_reads(tmp_path: Path) -> None:
    array = np.arange(20)[::-3]
    with write_container(tmp_path / "file") as writer:
        writer.append("a", array)
    np.testing.assert_array_equal(Container(tmp_path / "file").read("a"), array)


def test_mapped_elements_are_aligned(tmp_path: Path) -> None:
    with write_container(tmp_path / "file") as writer:
        for number in range(5):
            writer.append(f"odd/{number}", np.ones(2 * number + 1, np.uint8))
            writer.append(f"even/{number}", np.ones(3, np.uint64))
    file = Container(tmp_path / "file")
    assert all(file.map(f"even/{number}").ctypes.data % 16 == 0 for number in range(5))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros(1, np.uint8), "does not end here"),
        (np.zeros(0, np.uint8), "does not end here"),
        (np.zeros((2, 2), np.uint8), "no flat array"),
        (np.array([None]), "no flat array"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(
    tmp_path: Path, array: np.ndarray, reason: str
) -> None:
    with write_container(tmp_path / "file") as writer:
        writer.append("a", np.ones(3, np.uint8))
        writer.append("b", np.ones(3, np.uint16))
        with pytest.raises(ValueError, match="another type"):
            writer.append("b", np.ones(3, np.int16))
        with pytest.raises(ValueError, match=reason):
            writer.append("a", array)
    np.testing.assert_array_equal(Container(tmp_path / "file").read("b"), np.ones(3, np.uint16))


def test_the_file_appears_at_once_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with write_container(path) as writer:
        writer.append("a", np.ones(100_000))
        assert not path.exists()
    assert path.exists()


def test_a_file_that_is_not_finished_does_not_appear(tmp_path: Path) -> None:
    def write() -> None:
        with write_container(tmp_path / "file") as writer:
            writer.append("a", np.ones(3))
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert not (tmp_path / "file").exists()


def refused(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"{path.name} is damaged") as raised:
        Container(path)
    return "\n" not in str(raised.value)


def test_a_file_torn_at_any_byte_is_refused_by_name(written: Path) -> None:
    content = written.read_bytes()
    for at in range(len(content)):
        assert refused(written, content[:at])
        assert refused(written, content[:at] + bytes(len(content) - at))  # room made, not written
        assert refused(written, content[:at] + content[at + 1 :])
    assert refused(written, content + b"\0")
    assert refused(written, bytes(20))
    written.write_bytes(content)
    assert len(Container(written).read("a")) == 20


def test_a_changed_footer_is_refused(written: Path) -> None:
    content = written.read_bytes()
    for at in range(content.index(b'{"arrays"'), len(content)):
        assert refused(written, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def test_a_file_that_is_not_there_is_named_by_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        Container(tmp_path / "missing")
