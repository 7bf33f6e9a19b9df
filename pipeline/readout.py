"""How much of the teacher's last hidden states a student's vectors determine, on held-out rows.

The vectors are the queries, keys and values of the student's last layer: what has trained, whatever
it was compared with. A linear map to the teacher's states is fitted on half of the held-out rows by
ridge regression, and judged on the other half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from data_prep.command import ConfigError
from pipeline.config import Recipe
from pipeline.loader import Loader, open_shards
from pipeline.models import Target, load_teacher, read_config
from pipeline.objectives import QKV, Outputs
from pipeline.topology import Topology

RIDGE = 1e-4  # of the mean squared feature, added to the normal equations' diagonal


def rank(recipe: Recipe, students: Mapping[int, str]) -> list[dict[str, Any]]:
    """Teacher layers by what the students that learnt from them determine, best first.

    Args:
        recipe: names the teacher and the shards.
        students: folder of each layer's student.

    Returns:
        For each `layer`, `explained` (the languages' mean) and `by_language`: shares, at most 1,
        of the variance of the teacher's last hidden states.

    Raises:
        ConfigError: the shards have no held-out rows.
    """
    reader = open_shards(recipe)
    if not reader.manifest.heldout_rows:
        raise ConfigError(
            f"data.shards={recipe.shards} has no held-out rows to judge by; prepare with "
            "prep.heldout_rows above 0"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    alone = Topology(rank=0, local_rank=0, world_size=1, local_world_size=1)
    loader = Loader(reader, alone, batch_size=1, micro=1, seed=recipe.seed)
    rows = reader.manifest.heldout_rows  # 0 of a language with a single document
    heldout = {language: loader.heldout(language) for language, n in rows.items() if n}

    def model(source: str, needs: Any) -> Iterator[Any]:
        last = Target(needs, read_config("teacher.model", source).num_hidden_layers)
        of_source = dataclasses.replace(recipe.teacher, model=source, dtype="float32")
        encoder = load_teacher(dataclasses.replace(recipe, teacher=of_source), device, [last])
        for batches in heldout.values():
            yield [encoder(batch.to(device)) for batch in batches]

    targets = [
        [output.hidden for output in outputs] for outputs in model(recipe.teacher.model, Outputs)
    ]
    ranking = []
    for layer, source in students.items():
        features = [[torch.cat(qkv, dim=1) for qkv in outputs] for outputs in model(source, QKV)]
        check_size(recipe, features)
        shares = dict(zip(heldout, explained(features, targets), strict=True))
        mean = sum(shares.values()) / len(shares)
        ranking.append({"layer": layer, "explained": mean, "by_language": shares})
    return sorted(ranking, key=lambda entry: -entry["explained"])


def check_size(recipe: Recipe, features: Sequence[Sequence[torch.Tensor]]) -> None:
    """Refuse to fit a map with nearly as many coefficients as there are tokens to fit it on.

    Raises:
        ConfigError: half of the held-out tokens are fewer than twice the features.
    """
    tokens = sum(len(_halves(of_language)[0]) for of_language in features)
    width = features[0][0].shape[1]
    if tokens < 2 * width:
        raise ConfigError(
            f"data.shards={recipe.shards} have {tokens} held-out tokens to fit {width} features "
            f"on, too few for a sound comparison; prepare with more prep.heldout_rows, for at "
            f"least {2 * width} in half of them"
        )


def explained(
    features: Sequence[Sequence[torch.Tensor]], targets: Sequence[Sequence[torch.Tensor]]
) -> list[float]:
    """The share of the targets' variance that a linear map of the features explains.

    Args:
        features: for each language, batches [T, f].
        targets: the same, [T, d].

    Returns:
        For each language 1 - |Y - Y'|^2 / |Y - mean Y|^2 over its odd batches, where Y' is of the
        ridge regression over the even batches of all languages. One batch is halved.
    """
    halves = [[_halves(of_language) for of_language in side] for side in (features, targets)]
    x, y = (torch.cat([fit for fit, _ in side]).double() for side in halves)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    squares = x.T @ x
    ridge = RIDGE * squares.diagonal().mean() * torch.eye(len(squares), device=x.device)
    weights = torch.linalg.solve(squares + ridge, x.T @ y)
    shares = []
    for (_, test_x), (_, test_y) in zip(*halves, strict=True):
        error = test_y.double() - mean_y - (test_x.double() - mean_x) @ weights
        spread = test_y.double() - test_y.double().mean(0)
        shares.append(float(1 - error.square().sum() / spread.square().sum()))
    return shares


def _halves(batches: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What is fitted on, and what is judged by: [T, width] each."""
    if len(batches) == 1:
        first, second = batches[0].chunk(2)
        return first, second
    return torch.cat(list(batches[::2])), torch.cat(list(batches[1::2]))
