"""How much of each language and source: shares of tokens, and which documents make them up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from data_prep.command import ConfigError
from data_prep.config import Prep


@dataclasses.dataclass(frozen=True)
class Dose:
    """How often the documents of a language and pool are in the rows.

    Args:
        copies: times that each document is.
        draw: documents whose draw is below this are there once more.
    """

    copies: int
    draw: int


def check_mix(
    tokens: Mapping[str, npt.NDArray[Any]], prep: Prep, earlier: Collection[str] = ()
) -> None:
    """Refuse weights that would do nothing, or leave nothing.

    Args:
        tokens: what there is of each language, [pools].
        prep: the recipe's section.
        earlier: languages of earlier generations, which may be named though nothing is new there.

    Raises:
        ConfigError: naming the key, its value, the rule and the remedy.
    """
    weights, used = prep.weights or {}, _usable(tokens, prep)
    known = {*tokens, *earlier}
    if unknown := sorted(set(weights) - known):
        raise ConfigError(
            f"prep.weights names {unknown[0]!r}, of which there is no text, so the weight would do "
            f"nothing; the languages are {', '.join(sorted(known))}"
        )
    for name, weight in sorted(weights.items()):
        if weight and name in tokens and not used[name]:
            raise ConfigError(
                f"prep.weights.{name}={weight} asks for a language whose text is all in sources "
                "that prep.source_weights leaves out with 0; change one of them"
            )
    if tokens and not any(n and weights.get(name, 1.0) for name, n in used.items()):
        raise ConfigError(
            "prep.weights and prep.source_weights are 0 for all that there is text of "
            f"({', '.join(sorted(tokens))}), so nothing would be trained on; give some of it more"
        )


def _usable(tokens: Mapping[str, npt.NDArray[Any]], prep: Prep) -> dict[str, int]:
    """What there is of each language in pools that are not left out."""
    kept = np.array([pool.weight > 0 for pool in prep.pools])
    return {name: int(of_pools[kept].sum()) for name, of_pools in tokens.items()}


def quotas(tokens: Mapping[str, int], prep: Prep) -> dict[str, int]:
    """Tokens to train on of each language.

    Shares follow p ~ weight * tokens ** smoothing (Conneau and Lample 2019, section 3.1). The
    total is prep.max_tokens, or what there is: then languages rich in text give up what poor ones
    are repeated by. A language that would have to be repeated more than prep.max_repeats times
    stays at that, and the others share what it leaves.

    Args:
        tokens: what there is of each language, sources that are left out apart.
        prep: the recipe's section.
    """
    weights = prep.weights or {}
    wanted = {
        name: weights.get(name, 1.0) * n**prep.smoothing for name, n in sorted(tokens.items()) if n
    }
    wanted = {name: weight for name, weight in wanted.items() if weight}
    total = sum(tokens[name] for name in wanted) if prep.max_tokens is None else prep.max_tokens
    return _fill(total, wanted, tokens, prep.max_repeats)


_Key = TypeVar("_Key")


def _fill(
    total: int, wanted: dict[_Key, float], tokens: Mapping[_Key, int], max_repeats: float
) -> dict[_Key, int]:
    """Share out a total as wanted; what would be repeated too often gives up the excess."""
    found: dict[_Key, int] = {}
    wanted, left = dict(wanted), total
    while wanted:
        sum_wanted = sum(wanted.values())
        full = [
            key
            for key, weight in wanted.items()
            if left * weight / sum_wanted >= max_repeats * tokens[key]
        ]
        for key in full:
            found[key] = int(max_repeats * tokens[key])
            del wanted[key]
        left -= sum(found[key] for key in full)
        if not full:
            found |= {key: round(left * weight / sum_wanted) for key, weight in wanted.items()}
            break
    return found


def pool_quotas(
    tokens: Mapping[str, npt.NDArray[Any]], prep: Prep
) -> dict[str, npt.NDArray[np.int64]]:
    """Tokens to train on of each language and pool, [pools].

    Languages have their `quotas`. Within one, documents are repeated in proportion to their pools'
    weights, so that shares follow weight * tokens, but none more than prep.max_repeats times.

    Args:
        tokens: what there is of each language, [pools].
        prep: the recipe's section.
    """
    found = {}
    for name, quota in quotas(_usable(tokens, prep), prep).items():
        there = dict(enumerate(tokens[name].tolist()))
        wanted = {place: pool.weight * there[place] for place, pool in enumerate(prep.pools)}
        wanted = {place: weight for place, weight in wanted.items() if weight}
        taken = _fill(quota, wanted, there, prep.max_repeats)
        found[name] = np.array([taken.get(place, 0) for place in there])
    return found


def doses(draws: Mapping[str, npt.NDArray[np.int64]], prep: Prep) -> dict[str, list[Dose]]:
    """Which documents make up the quota of each language and pool.

    Documents are taken by whole draws, so a pool gets less than its quota by less than one draw
    has, which is about a part in DRAWS of its text. However small the quota is, it gets something.

    Args:
        draws: language -> [pools, DRAWS] framed tokens of the documents of each draw.
        prep: the recipe's section.

    Returns:
        language -> [pools] doses.
    """
    wanted = pool_quotas({name: of_pools.sum(1) for name, of_pools in draws.items()}, prep)
    weights = [pool.weight for pool in prep.pools]
    return {
        name: [
            _dose(quota, of_draw) if weight and of_draw.any() else Dose(0, 0)
            for quota, of_draw, weight in zip(of_pools.tolist(), draws[name], weights, strict=True)
        ]
        for name, of_pools in wanted.items()
    }


def _dose(quota: int, of_draw: npt.NDArray[np.int64]) -> Dose:
    copies, rest = divmod(quota, int(of_draw.sum()))
    draw = int(np.searchsorted(np.cumsum(of_draw), rest, side="right"))
    if not copies:  # something of it, be it one document
        draw = max(draw, int(np.flatnonzero(of_draw)[0]) + 1)
    return Dose(copies, draw)


def mix_table(
    tokens: Mapping[str, npt.NDArray[Any]],
    prep: Prep,
    variances: Mapping[str, npt.NDArray[np.float64]] | None,
) -> str:
    """What there is and what is taken of each language, and of its pools, for people.

    Args:
        tokens: what there is of each language, measured or estimated, [pools].
        prep: the recipe's section.
        variances: of the estimates, [pools]; None where they are measured.
    """
    there = {name: np.rint(of_pools).astype(np.int64) for name, of_pools in tokens.items()}
    taken = pool_quotas(there, prep)
    total_there = sum(int(of_pools.sum()) for of_pools in there.values()) or 1
    total_taken = sum(int(of_pools.sum()) for of_pools in taken.values()) or 1

    def row(label: str, n: int, quota: int, variance: float) -> list[str]:
        within = "" if variances is None else f" ±{math.sqrt(variance) / max(n, 1):.0%}"
        return [label, f"{n:,}{within}", f"{n / total_there:.1%}", f"{quota:,}",
                f"{quota / total_taken:.1%}", f"{quota / n if n else 0:.2f}"]  # fmt: skip

    rows = [["language", "tokens", "share", "to train on", "share", "times"]]
    nothing = np.zeros(len(prep.pools), np.int64)
    for name, of_pools in sorted(there.items()):
        numbers = [of_pools, taken.get(name, nothing), (variances or {}).get(name, nothing)]
        rows.append(row(name, *(column.sum() for column in numbers)))
        if prep.source_weights:
            rows += [
                row(f"  {pool.glob or 'other files'}", *of_pool)
                for pool, *of_pool in zip(prep.pools, *numbers, strict=True)
                if of_pool[0]
            ]
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
