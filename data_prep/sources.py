from __future__ import annotations

import dataclasses
import hashlib


@dataclasses.dataclass(frozen=True)
class Source:
    url: str
    name: str
    bytes: int
    format: str
    compression: str | None
    digest: str


@dataclasses.dataclass(frozen=True)
class Unit:
    source: Source
    start: int
    stop: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Fault:
    url: str
    offset: int
    reason: str
    bytes: int


def find_sources(patterns):
    from data_prep.documents import find_inputs

    return [
        Source(
            str(p),
            p.name,
            p.stat().st_size,
            "jsonl" if "jsonl" in p.name else "txt",
            "gz" if p.suffix == ".gz" else None,
            hashlib.sha256(p.read_bytes()).hexdigest(),
        )
        for p in find_inputs(patterns)
    ]


def split(source, unit_bytes):
    return [Unit(source, 0, source.bytes, source.bytes)]
