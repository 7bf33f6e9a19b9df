"""What a preparation did, as a table for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.command import masked
from data_prep.durable import write_durably
from data_prep.shards import Manifest

_DROPPED = {
    "broken": "broken lines",
    "empty": "empty",
    "short": "short",
    "repetitive": "repetitive",
    "language": "in another language",
    "excluded": "evaluation text",
    "duplicate": "duplicate",
    "near_duplicate": "near duplicates",
    "duplicate_line": "of repeated lines",
    "no_tokens": "without tokens",
    "mixing": "left out by the language mix",
}


def summary_table(manifest: Manifest, seconds: float) -> str:
    """Documents, tokens and share of each language, the rows' fill, and what was dropped."""
    total = sum(manifest.tokens.values())
    lines = [f"{'language':<10}{'documents':>11}{'tokens':>14}{'share':>8}{'held-out rows':>15}"]
    for language in sorted(manifest.accounting):
        counts = manifest.accounting[language]
        tokens = manifest.tokens.get(language, 0)
        lines.append(
            f"{language:<10}{counts.get('documents_in', 0):>11,}{tokens:>14,}"
            f"{tokens / total:>8.1%}{manifest.heldout_rows.get(language, 0):>15,}"
        )
    fill = total / (manifest.rows * manifest.seq_len)
    lines.append(
        f"{manifest.rows:,} rows of {manifest.seq_len} tokens, {fill:.2%} full, "
        f"in {len(manifest.shards)} shards, {seconds:.1f} s"
    )
    for rule, meaning in _DROPPED.items():
        documents = sum(c.get(f"documents_{rule}", 0) for c in manifest.accounting.values())
        chars = sum(c.get(f"chars_{rule}", 0) for c in manifest.accounting.values())
        if documents:
            lines.append(f"dropped: {documents:,} documents, {chars:,} characters: {meaning}")
    return "\n".join(lines)


def report_losses(folder: Path, generation: int, read: Mapping[str, Any]) -> None:
    """Say which evaluation files text was dropped for, and list what cannot be read.

    Args:
        folder: of the shards, where the list goes.
        generation: whose text it is: each has a list of its own, the first faults.jsonl.
        read: what the first stage gives: `excluded_by`, evaluation file -> documents, and `faults`,
            the url, offset, reason and bytes of each.
    """
    for file, number in sorted(read["excluded_by"].items()):
        print(f"excluded: {number:,} documents that share text with {file}", flush=True)
    faults: Sequence[Sequence[Any]] = read["faults"]
    path = folder / ("faults.jsonl" if generation == 1 else f"faults-{generation:06d}.jsonl")
    if not faults:
        path.unlink(missing_ok=True)  # of a preparation that was given up, of other text
        return
    names = ("url", "offset", "reason", "bytes")
    lines = [masked(json.dumps(dict(zip(names, fault, strict=True)))) for fault in faults]
    write_durably(path, "\n".join(lines) + "\n")
    url, offset, reason, _ = faults[0]
    print(
        f"warning: {len(faults)} places cannot be read and are left out; {path} lists them, the "
        f"first is {masked(url)} at {offset}: {masked(reason)}",
        file=sys.stderr,
    )


def heldout_warning(manifest: Manifest, wanted: int) -> str | None:
    """One line where languages have too little text for the held-out rows that were asked for."""
    few = [f"{name} {rows}" for name, rows in manifest.heldout_rows.items() if rows < wanted]
    if not few:
        return None
    return (
        f"warning: too little text for prep.heldout_rows={wanted} in some languages, because at "
        f"most half of the documents are held out; they have: {', '.join(few)}"
    )
