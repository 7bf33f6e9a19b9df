"""`deepspeed pipeline/train.py --deepspeed ds_configs/zero2.json --config RECIPE [--KEY VALUE]`.

Starts a run, or goes on with the one in output_dir. Exit status: 0 finished, 1 failed, 2 bad
configuration, 85 stopped on request with a checkpoint saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

# A launcher puts this file's folder first on sys.path, where our modules would shadow libraries.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(p for p in sys.path if Path(p).resolve() != _HERE)]

from collections.abc import Sequence

from data_prep.command import EXIT_FINISHED, run_command, skip_unreachable_hub
from pipeline.config import check_world, load_recipes, read_ds_config
from pipeline.ds_config import merge_ds_config
from pipeline.stopping import StopRequest
from pipeline.topology import Topology, launched_rank


def main(argv: Sequence[str] | None = None) -> int:
    """Train the recipe that the command line names, to its end or until asked to stop."""
    stop = StopRequest()  # first of all: a signal during start-up is a request too
    recipes, options = load_recipes(argv)
    world_size = Topology.from_environment().world_size
    for recipe in recipes:
        check_world(recipe, world_size)
        merge_ds_config(read_ds_config(options.deepspeed), recipe, world_size)
        skip_unreachable_hub(recipe.teacher.model, recipe.student.model, recipe.prep.tokenizer)
    # They load torch and transformers: a typo is refused before.
    from pipeline.assemble import assemble
    from pipeline.collectives import disconnect, naming_lost_ranks
    from pipeline.faults import naming_faults
    from pipeline.loop import train
    from pipeline.profiling import profiling
    from pipeline.watchdog import Watchdog

    output_dir = Path(options.output_dir)
    watchdog = Watchdog(output_dir, recipes[0].watch.hang_seconds)
    rank = launched_rank()
    with naming_lost_ranks(rank), naming_faults(recipes[0], rank), watchdog:
        runs = assemble(
            recipes,
            stop,
            watchdog,
            deepspeed=options.deepspeed,
            allow_change=options.allow_change,
        )
        status = EXIT_FINISHED
        if runs:
            folder = output_dir / "profile"
            with profiling(folder, enabled=options.profile, rank=rank) as after_step:
                status = train(runs, after_step)
        disconnect()
    return status


if __name__ == "__main__":
    run_command(main, rank=launched_rank())
