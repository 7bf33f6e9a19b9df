"""What docs/data_format.md tells readers to do works, and its tables name what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data_prep.shards import Manifest

BLOCKS = ("webdataset", "datasets", "numpy", "data_prep.shards")


@pytest.fixture(scope="module")
def page(repo: Path) -> str:
    return (repo / "docs" / "data_format.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("imported", BLOCKS)
def test_the_examples_run(page: str, prepared: tuple[Path, Manifest], imported: str) -> None:
    codes = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(codes) == len(BLOCKS)
    (code,) = (c for c in codes if re.search(rf"^(from|import) {imported}", c, re.MULTILINE))
    names: dict[str, object] = {"shards": str(prepared[0])}
    exec(code, names)
    assert names["input_ids"].shape[1] == prepared[1].seq_len
    if imported == "numpy":
        assert sum(len(text) for text in names["texts"]) > 0


def test_the_tables_name_every_key(page: str, prepared: tuple[Path, Manifest]) -> None:
    folder, manifest = prepared
    table = page.partition("## manifest.json")[2].partition("## Accounting")[0]
    first_cells = "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", first_cells)) == set(
        json.loads((folder / "manifest.json").read_text())
    )
    accounting = page.partition("## Accounting")[2]
    rules = re.findall(r"^\| `(\w+)`", accounting, re.MULTILINE)
    used = {key.partition("_")[2] for counts in manifest.accounting.values() for key in counts}
    assert used <= set(rules)
