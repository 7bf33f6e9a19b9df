"""How much of each language: shares of tokens, and which documents make them up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from data_prep.command import ConfigError
from data_prep.config import Prep


@dataclasses.dataclass(frozen=True)
class Dose:
    """How often a language's documents are in the rows.

    Args:
        copies: times that each document is.
        draw: documents whose draw is below this are there once more.
    """

    copies: int
    draw: int


def quotas(tokens: Mapping[str, int], prep: Prep) -> dict[str, int]:
    """Tokens to train on of each language.

    Shares follow p ~ weight * tokens ** smoothing (Conneau and Lample 2019, section 3.1). The
    total is prep.max_tokens, or what there is: then languages rich in text give up what poor ones
    are repeated by. A language that would have to be repeated more than prep.max_repeats times
    stays at that, and the others share what it leaves.

    Args:
        tokens: what there is of each language.
        prep: the recipe's section.

    Raises:
        ConfigError: prep.weights names a language that there is no text of.
    """
    weights = prep.weights or {}
    if unknown := sorted(set(weights) - set(tokens)):
        raise ConfigError(
            f"prep.weights names {unknown[0]!r}, of which there is no text, so the weight would do "
            f"nothing; the languages are {', '.join(sorted(tokens))}"
        )
    wanted = {
        name: weights.get(name, 1.0) * n**prep.smoothing for name, n in sorted(tokens.items()) if n
    }
    wanted = {name: weight for name, weight in wanted.items() if weight}
    left = sum(tokens[name] for name in wanted) if prep.max_tokens is None else prep.max_tokens
    found: dict[str, int] = {}
    while wanted:
        total = sum(wanted.values())
        full = [
            name
            for name, weight in wanted.items()
            if left * weight / total >= prep.max_repeats * tokens[name]
        ]
        for name in full:
            found[name] = int(prep.max_repeats * tokens[name])
            del wanted[name]
        left -= sum(found[name] for name in full)
        if not full:
            found |= {name: round(left * weight / total) for name, weight in wanted.items()}
            break
    return found


def doses(draws: Mapping[str, npt.NDArray[np.int64]], prep: Prep) -> dict[str, Dose]:
    """Which documents make up each language's quota.

    Documents are taken by whole draws, so a language gets less than its quota by less than one draw
    has, which is about a part in DRAWS of its text. However small the quota is, it gets something.

    Args:
        draws: language -> [DRAWS] framed tokens of the documents of each draw.
        prep: the recipe's section.

    Raises:
        ConfigError: as `quotas`.
    """
    wanted = quotas({name: int(of_draw.sum()) for name, of_draw in draws.items()}, prep)
    found = {}
    for name, quota in wanted.items():
        copies, rest = divmod(quota, int(draws[name].sum()))
        draw = int(np.searchsorted(np.cumsum(draws[name]), rest, side="right"))
        if not copies:  # something of it, be it one document
            draw = max(draw, int(np.flatnonzero(draws[name])[0]) + 1)
        found[name] = Dose(copies, draw)
    return found


def mix_table(tokens: Mapping[str, float], prep: Prep, error: Mapping[str, float] | None) -> str:
    """What there is and what is taken of each language, for people.

    Args:
        tokens: what there is of each language, measured or estimated.
        prep: the recipe's section.
        error: standard error of each estimate, as a share of it; None where they are measured.
    """
    there = {name: round(n) for name, n in tokens.items()}
    taken = quotas(there, prep)
    total_there, total_taken = sum(there.values()) or 1, sum(taken.values()) or 1
    head = ["language", "tokens", "share", "to train on", "share", "times"]
    rows: list[Sequence[str]] = [head]
    for name in sorted(there):
        n, quota = there[name], taken.get(name, 0)
        within = "" if error is None else f" ±{error[name]:.0%}"
        rows.append(
            [name, f"{n:,}{within}", f"{n / total_there:.1%}", f"{quota:,}",
             f"{quota / total_taken:.1%}", f"{quota / n if n else 0:.2f}"]
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    )
