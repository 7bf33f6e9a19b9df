"""Silent corruption: ranks that compute, or hold, something else than the others do.

All ranks pass one micro-batch through teacher and student, without dropout, and digest the weights
of which each has a whole copy. Ranks of equal hardware must come to the same bits. A processor that
errs now and then is found when it errs in the check. The teacher's weights stay wrong when a bit of
them has flipped; the student's are written anew from their masters in every step. What only one
rank has, a shard of the optimizer's state or of ZeRO-3's weights, cannot be compared.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from data_prep.command import RunError
from pipeline.collectives import gather, on_rank_0
from pipeline.provenance import processor

if TYPE_CHECKING:
    from pipeline.run import Run


def check_corruption(runs: Sequence[Run]) -> None:
    """Compare the ranks.

    Args:
        runs: at the same step, of one teacher and one loader.

    Raises:
        RunError: they differ, naming what, and the ranks and hosts in the minority.
    """
    found = gather(what_a_rank_has(runs))
    on_rank_0(lambda: refuse_differences(found, runs[0].state.step, runs[0].hosts))


@torch.no_grad()
def what_a_rank_has(runs: Sequence[Run]) -> dict[str, Any]:
    """The hardware, and by its name everything that must be equal on equal hardware."""
    first = runs[0]
    batch = first.loader.micro_batch(first.state.step - 1, 0, 0).to(first.device)
    facts: dict[str, Any] = {"teacher's weights": digest(first.teacher_weights())}
    for run in runs:
        name = run.recipe.output_dir
        run.engine.train(False)
        losses = run.objective.losses(run.engine(batch), run.teacher(batch), batch)
        run.engine.train(True)
        facts[f"weights of {name}"] = digest(run.engine.replicas())
        facts[f"losses of {name}"] = [float(loss).hex() for loss in losses.values()]
    return {"hardware": (processor(first.device), torch.get_num_threads()), "facts": facts}


def digest(tensors: Sequence[torch.Tensor]) -> str:
    """Of the tensors' bits, read where they are; one number of each leaves the device."""
    if not tensors:
        return ""
    hashes = torch.stack([torch.hash_tensor(tensor) for tensor in tensors])
    return hashlib.blake2b(hashes.cpu().numpy().tobytes(), digest_size=16).hexdigest()


def refuse_differences(found: Sequence[Mapping[str, Any]], step: int, hosts: Sequence[str]) -> None:
    """Name what differs, and on whom.

    Args:
        found: of each rank, `what_a_rank_has`.
        step: steps done.
        hosts: by rank.

    Raises:
        RunError: something differs between ranks of equal hardware.
    """
    alike: dict[Any, list[int]] = defaultdict(list)
    for rank, one in enumerate(found):
        alike[one["hardware"]].append(rank)
    for ranks in alike.values():
        for name in found[ranks[0]]["facts"]:
            by_value: dict[str, list[int]] = defaultdict(list)
            for rank in ranks:
                by_value[str(found[rank]["facts"][name])].append(rank)
            groups = sorted(by_value.values(), key=len)
            if len(groups) == 1:
                continue
            is_tie = len(groups[0]) == len(groups[-1])
            odd = sorted(
                rank for group in groups if is_tie or group != groups[-1] for rank in group
            )
            named = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in odd)
            against = "contradict each other" if is_tie else "against all others"
            raise RunError(
                f"step {step}: the {name} differ between ranks, which must have the same bits: "
                f"{named} {against}; memory or a processor there has failed without saying so: "
                "start the same command again without these hosts; it goes on from the last "
                "checkpoint"
            )
