from __future__ import annotations

from pathlib import Path

from data_prep.shards import Manifest
from data_prep.summary import heldout_warning, summary_table


def test_the_table_says_what_the_manifest_says(prepared: tuple[Path, Manifest]) -> None:
    manifest = prepared[1]
    lines = summary_table(manifest, 1.25).splitlines()
    by_language = {line.split()[0]: line.split()[1:] for line in lines[1:16]}
    assert by_language.keys() == manifest.accounting.keys()
    total = sum(manifest.tokens.values())
    for language, (documents, tokens, share, rows) in by_language.items():
        assert int(documents) == manifest.accounting[language]["documents_in"]
        assert int(tokens.replace(",", "")) == manifest.tokens[language]
        assert share == f"{manifest.tokens[language] / total:.1%}"
        assert int(rows) == manifest.heldout_rows[language]
    fill = total / (manifest.rows * manifest.seq_len)
    assert lines[16].startswith(f"{manifest.rows} rows of 64 tokens, {fill:.2%} full")
    mixing = sum(counts.get("documents_mixing", 0) for counts in manifest.accounting.values())
    assert lines[17].startswith(f"dropped: {mixing} documents")


def test_too_few_held_out_rows_are_warned_of_by_name(prepared: tuple[Path, Manifest]) -> None:
    manifest = prepared[1]
    assert heldout_warning(manifest, 2) is None
    warning = heldout_warning(manifest, 3)
    assert warning is not None
    assert warning.startswith("warning: ")
    assert "sw 2" in warning
    assert "\n" not in warning
