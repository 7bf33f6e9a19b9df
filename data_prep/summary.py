"""What a preparation did, as a table for people."""

from __future__ import annotations

from data_prep.shards import Manifest

_DROPPED = {
    "broken": "broken lines",
    "empty": "empty",
    "duplicate": "duplicate",
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


def heldout_warning(manifest: Manifest, wanted: int) -> str | None:
    """One line where languages have too little text for the held-out rows that were asked for."""
    few = [f"{name} {rows}" for name, rows in manifest.heldout_rows.items() if rows < wanted]
    if not few:
        return None
    return (
        f"warning: too little text for prep.heldout_rows={wanted} in some languages, because at "
        f"most half of the documents are held out; they have: {', '.join(few)}"
    )
