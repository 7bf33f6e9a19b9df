"""How fast and how large encoders are: exact counts, and what is measured where this runs.

`python -m pipeline.evaluation.speed MODEL` measures one model in a process of its own, so that peak
memory is that model's.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_prep.command import EXIT_FINISHED, ConfigError, RunError, run_command
from pipeline.evaluation.fine_tuning import Source, load_encoder, meta_encoder

BATCHES = (1, 32)
LENGTHS = (32, 128, 512)
FLOPS_LENGTH = 128
WARMUP, FEWEST, ENOUGH_SECONDS = 2, 10, 3.0


def flops_per_token(source: Source) -> float:
    """Floating-point operations of a forward pass a token, of 128 together; 2 of multiply and add.

    Counted by torch on tensors without numbers: products and attention, no norms or activations.
    """
    length = source.max_length(FLOPS_LENGTH)
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        meta_encoder(source)(input_ids=ids)
    return counter.get_total_flops() / length


def measure(source: Source) -> dict[str, Any]:
    """Latency, throughput, peak memory and size on disk of one encoder.

    Returns:
        `device`, `threads`, `load_seconds`, `disk_bytes`, `peak_bytes` above what the libraries
        take, and `forward`: for each batch size and length p50 and p99 in milliseconds, and tokens
        a second at the median.
    """
    cuda = torch.cuda.is_available()
    before = _peak_bytes(cuda)
    started = time.perf_counter()
    model = load_encoder(source).to("cuda" if cuda else "cpu")
    loaded = time.perf_counter() - started
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    forward = []
    for batch in BATCHES:
        for length in sorted({source.max_length(length) for length in LENGTHS}):
            ids = torch.randint(5, vocabulary, (batch, length), generator=generator)
            seconds = _times(model, ids.to(model.device), cuda)
            p50, p99 = (float(np.percentile(seconds, q)) for q in (50, 99))
            forward.append({
                "batch": batch, "length": length, "p50_ms": 1e3 * p50, "p99_ms": 1e3 * p99,
                "tokens_per_second": batch * length / p50, "passes": len(seconds),
            })  # fmt: skip
    folder = Path(source.source)
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "load_seconds": loaded,
        "disk_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        if folder.is_dir() else None,
        "peak_bytes": _peak_bytes(cuda) - before,
        "forward": forward,
    }  # fmt: skip


@torch.inference_mode()
def _times(model: Any, ids: torch.Tensor, cuda: bool) -> list[float]:
    seconds: list[float] = []
    mask = torch.ones_like(ids)
    while len(seconds) < WARMUP + FEWEST or (sum(seconds) < ENOUGH_SECONDS and len(seconds) < 500):
        started = time.perf_counter()
        model(input_ids=ids, attention_mask=mask)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[WARMUP:]


def _peak_bytes(cuda: bool) -> int:
    if cuda:
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_apart(source: Source) -> dict[str, Any]:
    """As `measure`, in a fresh process.

    Raises:
        RunError: that process failed.
    """
    command = [sys.executable, "-m", "pipeline.evaluation.speed", source.source]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RunError(f"the speed of {source.source} cannot be measured ({reason})")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(speeds: dict[str, Any]) -> str:
    """The speeds of models as Markdown."""
    from pipeline.evaluation.retention import markdown

    head = ["model", "batch", "tokens", "p50, ms", "p99, ms", "tokens/s"]
    rows = [
        [name, str(one["batch"]), str(one["length"]), f"{one['p50_ms']:.2f}",
         f"{one['p99_ms']:.2f}", f"{one['tokens_per_second']:,.0f}"]
        for name, found in speeds.items() for one in found["forward"]
    ]  # fmt: skip
    return markdown(head, rows) + "\n"


def plot(scores: dict[str, float], speeds: dict[str, Any], path: Path) -> None:
    """Mean score over the median latency of one input of 128 tokens, a point a model, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "0"}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        for name, score in scores.items():
            if name not in speeds:
                continue
            forward = [one for one in speeds[name]["forward"] if one["batch"] == 1]
            one = min(forward, key=lambda one: abs(one["length"] - FLOPS_LENGTH))
            axes.plot(one["p50_ms"], 100 * score, "o")
            axes.annotate(name, (one["p50_ms"], 100 * score), xytext=(6, 4),
                          textcoords="offset points")  # fmt: skip
        axes.margins(0.2)
        axes.set_xlabel(f"ms for one input of {FLOPS_LENGTH} tokens, median")
        axes.set_ylabel("mean score")
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> int:
    """Measure one model and print JSON."""
    if len(sys.argv) != 2:
        raise ConfigError("name one model: python -m pipeline.evaluation.speed MODEL")
    print(json.dumps(measure(Source(sys.argv[1], "MODEL"))))
    return EXIT_FINISHED


if __name__ == "__main__":
    run_command(main)
