"""Failures of memory and of GPUs, in one line that says what to do."""

from __future__ import annotations

import contextlib
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence

import psutil
import torch

from data_prep.command import RunError, one_line
from pipeline.config import Recipe
from pipeline.progress import PROGRESS

SMI = ("nvidia-smi", "-q", "-d", "ECC,PAGE_RETIREMENT,ROW_REMAPPER")
PATIENCE = 20.0  # seconds: nvidia-smi may hang with the GPU
NUM_XIDS = 3  # of the kernel's last ones
GB = 1e9


@contextlib.contextmanager
def naming_faults(recipe: Recipe, rank: int) -> Iterator[None]:
    """Turn a want of memory, and a GPU that fails, into one line.

    Raises:
        RunError: naming rank, host, and what the rank was doing.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError(explain_memory(error, recipe, rank)) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # the CPU allocator's, which has no type
            raise RunError(explain_memory(error, recipe, rank)) from error
        if isinstance(error, torch.AcceleratorError) or re.search(r"CU(DA|BLAS|DNN)", str(error)):
            raise RunError(explain_gpu(error, rank)) from error
        raise


def explain_memory(error: BaseException, recipe: Recipe, rank: int) -> str:
    """What was asked for, what there is, and what to set."""
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    wanted = f"{asked[1]} more" if asked else "more memory"
    micro = recipe.train.micro_batch_size
    remedy = (
        f"halve train.micro_batch_size={micro}: a step keeps its rows, in more passes (a run that "
        "has checkpoints asks for --allow_change train.micro_batch_size)"
        if micro > 1
        else "train.micro_batch_size is 1 already: use ds_configs/zero3.json, or shorter rows"
    )
    return (
        f"{_where(rank)}: no room for {wanted}; {_memory()}; {remedy}; `python -m pipeline.plan` "
        "says what fits"
    )


def _memory() -> str:
    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        return (
            f"this rank has {torch.cuda.memory_allocated() / GB:.1f} GB in tensors and "
            f"{torch.cuda.memory_reserved() / GB:.1f} GB reserved, {free / GB:.1f} of the GPU's "
            f"{total / GB:.1f} GB are free"
        )
    host, mine = psutil.virtual_memory(), psutil.Process().memory_info().rss
    return (
        f"this rank has {mine / GB:.1f} GB, {host.available / GB:.1f} of the host's "
        f"{host.total / GB:.1f} GB are free"
    )


def explain_gpu(error: BaseException, rank: int) -> str:
    """The error, and what driver and kernel know of the GPUs' memory."""
    first = one_line(str(error).strip().partition("\n")[0])
    smi = _output(SMI)
    counters = "nvidia-smi cannot be asked" if smi is None else ", ".join(bad_memory(smi))
    dmesg = _output(("dmesg",))
    kernel = "its log cannot be read" if dmesg is None else "; ".join(xids(dmesg))
    return (
        f"{_where(rank)}: the GPU failed ({first}); its memory: "
        f"{counters or 'no error counted'}; kernel: {kernel or 'no Xid'}; start the same command "
        "again, which goes on from the last checkpoint, and without this host if it happens again"
    )


def bad_memory(smi: str) -> list[str]:
    """The counters above 0 and the flags that are set, as "GPU 07:00.0 Volatile … : 2".

    Args:
        smi: what `nvidia-smi -q` printed: a line a heading or "name : value", by indentation.
    """
    found, gpu = [], ""
    headings: list[tuple[int, str]] = []
    for line in smi.splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        name, has_value, value = (word.strip() for word in text.partition(" : "))
        if text.startswith("GPU 0"):
            gpu, headings = "GPU " + text.split()[1].partition(":")[2], []
        elif not has_value:
            headings = [(i, h) for i, h in headings if i < indent] + [(indent, text)]
        elif gpu and ((value.isdigit() and int(value)) or value == "Yes"):
            path = [h for i, h in headings if i < indent]
            found.append(" ".join([gpu, *path, name, value]))
    return found


def xids(dmesg: str) -> list[str]:
    """The last of NVIDIA's numbered errors in the kernel's log."""
    return [one_line(line) for line in dmesg.splitlines() if "NVRM: Xid" in line][-NUM_XIDS:]


def _where(rank: int) -> str:
    return f"{PROGRESS.describe()}, rank {rank} ({platform.node()})"


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
