"""What ran, on what, from what: written before the first step."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from data_prep.command import masked
from pipeline.config import ROOT, Recipe
from pipeline.topology import Topology

PACKAGES = ("deepspeed", "torch", "transformers", "tokenizers", "webdataset", "numpy")


def provenance(recipe: Recipe, topology: Topology, shards_digest: str) -> dict[str, Any]:
    """Versions, commit, hardware and digests. Nothing of the environment: it holds secrets.

    The command's own are masked.
    """
    return {
        "command": [masked(argument) for argument in sys.argv],
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "commit_is_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "host": platform.node(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "world_size": topology.world_size,
        "threads_per_rank": torch.get_num_threads(),
        "shards_digest": shards_digest,
        "teacher_digest": _folder_digest(recipe.teacher.model),
    }


def software() -> dict[str, str | None]:
    """What has to be the same on all nodes of a run: versions, and the clone's commit."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages, "commit": _git("rev-parse", "HEAD")}


def processor(device: torch.device) -> str:
    """The name of what computes on a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _folder_digest(source: str) -> str | None:
    """The digest of a teacher folder's weights; None for a hub id, whose name says it."""
    digest = hashlib.sha256()
    files = sorted(Path(source).glob("*.safetensors")) + sorted(Path(source).glob("*.bin"))
    for path in files:
        with open(path, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest() if files else None
