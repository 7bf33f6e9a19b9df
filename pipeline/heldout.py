"""The held-out loss of each language: the objective without dropout on rows never trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.collectives import all_sum
from pipeline.engine import Engine
from pipeline.loader import Batch, Count
from pipeline.objectives import Compared, DistillationObjective
from pipeline.topology import Topology


@torch.no_grad()
def heldout_losses(
    engine: Engine,
    teacher: Callable[[Batch], Compared],
    heldout: dict[str, list[Batch]],
    objective: DistillationObjective,
    topology: Topology,
    device: torch.device,
) -> dict[str, float]:
    """Mean loss of each language, and the languages' mean.

    Ranks share the batches. All do equally many forward passes, since ZeRO-3 gathers weights in
    each: a rank without a batch left repeats one that counts for nothing.

    Returns:
        `heldout_loss` and `heldout_loss_LANG` for each language: the weighted sum of the
        objective's terms, each a mean over the language's positions.
    """
    engine.train(False)
    sums = torch.zeros(len(heldout), dtype=torch.float64)
    for number, batches in enumerate(heldout.values()):
        whole = Count.sum(batch.count for batch in batches)
        for start in range(0, len(batches), topology.world_size):
            index = start + topology.rank
            batch = batches[min(index, len(batches) - 1)].to(device)
            losses = objective.losses(engine(batch), teacher(batch), batch)
            if index < len(batches):
                shares = objective.shares(batch.count, whole)
                parts = {term: loss.double() * shares[term] for term, loss in losses.items()}
                sums[number] += float(objective.total(parts))
    engine.train(True)
    means = all_sum(sums.to(device)).tolist()
    by_language = dict(zip(heldout, means, strict=True))
    return {
        "heldout_loss": sum(means) / len(means),
        **{f"heldout_loss_{language}": loss for language, loss in by_language.items()},
    }
