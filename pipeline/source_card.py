"""What the card of a model that others made says of it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download

CARD = "README.md"
PATIENCE = 5.0  # seconds that a hub has to answer


def card_of(source: str) -> str | None:
    """The card of a model's folder or hub id; None where there is none, or no hub to ask."""
    path = Path(source) / CARD
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(source, CARD, etag_timeout=PATIENCE))
        except Exception:  # no card, no network, no leave: whatever it is, nothing is known
            return None
    return path.read_text(encoding="utf-8") if path.is_file() else None


def licence_of(source: str) -> str | None:
    """The licence that a model's card names in its front matter; None where it says nothing."""
    front = re.match(r"---\n(.*?)\n---", card_of(source) or "", re.DOTALL)
    if front is None:
        return None
    try:
        fields = yaml.safe_load(front[1])
    except yaml.YAMLError:  # somebody else's text: as good as none
        return None
    licence = fields.get("license") if isinstance(fields, dict) else None
    return ", ".join(licence) if isinstance(licence, list) else licence
