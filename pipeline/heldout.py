"""The held-out loss of each language: the objective without dropout on rows never trained on."""

from __future__ import annotations

import torch

from pipeline.collectives import all_sum
from pipeline.config import Objective
from pipeline.engine import Engine
from pipeline.loader import Batch
from pipeline.models import TeacherModel
from pipeline.objectives import minilmv2, total
from pipeline.topology import Topology


@torch.no_grad()
def heldout_losses(
    engine: Engine,
    teacher: TeacherModel,
    heldout: dict[str, list[Batch]],
    objective: Objective,
    topology: Topology,
    device: torch.device,
) -> dict[str, float]:
    """Mean loss a token of each language, and the languages' mean.

    Ranks share the batches. All do equally many forward passes, since ZeRO-3 gathers weights in
    each: a rank without a batch left repeats one that counts for nothing.

    Returns:
        `heldout_loss` and `heldout_loss_LANG` for each language, in nats.
    """
    engine.train(False)
    sums = torch.zeros(len(heldout), 2, dtype=torch.float64)
    for number, batches in enumerate(heldout.values()):
        for start in range(0, len(batches), topology.world_size):
            index = start + topology.rank
            batch = batches[min(index, len(batches) - 1)].to(device)
            losses = minilmv2(engine(batch), teacher(batch), batch.cu_seqlens, objective)
            if index < len(batches):
                loss = float(total(losses, objective))
                sums[number] += torch.tensor([loss * batch.num_tokens, batch.num_tokens])
    engine.train(True)
    sums = all_sum(sums.to(device)).cpu()
    means = (sums[:, 0] / sums[:, 1]).tolist()
    by_language = dict(zip(heldout, means, strict=True))
    return {
        "heldout_loss": sum(means) / len(means),
        **{f"heldout_loss_{language}": loss for language, loss in by_language.items()},
    }
