"""Which rank this process is: the only reader of the launchers' environment."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

from data_prep.command import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """This process among all. `local` counts the processes of one host."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Topology:
        """Ranks as `deepspeed`, `torchrun` or `srun` set them, or one rank alone.

        Writes RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT back where they are
        missing, since torch.distributed reads them there.

        Raises:
            ConfigError: srun started several tasks but nobody said where rank 0 listens.
        """
        env = os.environ
        if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
            visible = env.get("CUDA_VISIBLE_DEVICES", "")
            bound = len(visible.split(",")) == 1 and visible != ""  # srun bound one GPU to the task
            env["LOCAL_RANK"] = "0" if bound else env["SLURM_LOCALID"]
            per_node = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1"))
            env.setdefault("LOCAL_WORLD_SIZE", per_node.split("(")[0].split(",")[0])
            if "MASTER_ADDR" not in env:
                raise ConfigError(
                    "srun started several tasks but MASTER_ADDR is not set, so they cannot find "
                    "each other; start them through slurm/distill_xlmr.sbatch, which sets it"
                )
        env.setdefault("RANK", "0")
        env.setdefault("WORLD_SIZE", "1")
        env.setdefault("LOCAL_RANK", "0")
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in env:
            env["MASTER_PORT"] = str(_free_port()) if env["WORLD_SIZE"] == "1" else "29500"
        local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or "1"
        return cls(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env["LOCAL_RANK"]),
            local_world_size=int(local),
        )

    @property
    def threads(self) -> int:
        """CPU threads for this rank: its even share of the host's cores, at least one."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)

    @property
    def cpus(self) -> set[int]:
        """This rank's even share of the processors that it may use, threads of a core together."""
        allowed = sorted(os.sched_getaffinity(0), key=_core_of)
        share = max(1, len(allowed) // self.local_world_size)
        return set(allowed[self.local_rank * share :][:share]) or set(allowed)

    def pin(self) -> None:
        """Keep this rank's threads on its share, where ranks have the whole host among them.

        Processors that are fewer than the host's were assigned by somebody else: a scheduler, a
        launcher that binds ranks, a container. They stay as they are.
        """
        if self.local_world_size > 1 and len(os.sched_getaffinity(0)) == os.cpu_count():
            os.sched_setaffinity(0, self.cpus)


def launched_rank() -> int:
    """This process's rank before anything is checked, to decide who speaks."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def rendezvous() -> tuple[str, int]:
    """Host and port of the store by which the ranks found each other."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def rank_0_address() -> str:
    """HOST:PORT where rank 0 listens; known once there is a topology."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _core_of(cpu: int) -> tuple[int, int, int]:
    """Sorts processors by socket and core; one whose place is not told stands for itself."""
    folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        socket_id, core = (
            int((folder / name).read_text()) for name in ("physical_package_id", "core_id")
        )
    except (OSError, ValueError):
        return 0, cpu, cpu
    return socket_id, core, cpu
