"""`python -m pipeline.preflight [--nodes A,B] [--patience S]` with train.py's arguments.

Started on all ranks as train.py is, it looks at their nodes before a run begins there: software,
GPUs, the shared folder, clocks, disk and network. Exit status: 0 nothing was found; 1 one line for
each thing that was, with its node; 2 bad configuration. What hangs, or does not come, is named
after two minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from data_prep.command import (
    EXIT_FAILED,
    EXIT_FINISHED,
    ElsewhereError,
    RunError,
    one_line,
    run_command,
    skip_unreachable_hub,
)
from pipeline.config import Recipe, check_world, load_recipes, read_ds_config
from pipeline.topology import Topology, launched_rank, rank_0_address

if TYPE_CHECKING:
    import torch

PATIENCE_S = 120.0  # imports from a cold network file system take long
FOREVER = timedelta(days=1)  # a stage's own bound is shorter
SEEN_WITHIN_S = 10.0  # a network file system may show a new file late
MAX_SKEW_S = 5.0
MAX_TAKEN = 0.1  # of a GPU's memory, before this run takes any
SLOWEST = 1 / 3  # of the median
NODES_TO_COMPARE = 3  # of two, nobody can tell which one is slow
CHECKPOINT_BYTES = 16  # a parameter: fp32 weights, two moments, and the weights that it computes in
GPU_SIZE, CPU_SIZE = 4096, 512  # of the matrices
GPU_BYTES, CPU_BYTES = 1 << 28, 1 << 22  # of what is sent
GB = 10**9


@dataclasses.dataclass(kw_only=True)
class Facts:
    """What one rank says of its node; None where there was nothing to look at.

    Args:
        rank: its number.
        node: its node's name.
        software: name -> version, and `commit` of the clone.
        num_gpus: that the rank sees.
        gpu: the name of its own.
        gpu_bytes: memory of its own GPU.
        gpu_bytes_free: of these, before anything of this run is there.
        faults: what is wrong with the rank or its node, whatever others have.
        inputs: path -> digest of what the run reads there; None where it is missing.
        unseen: ranks whose files in output_dir are not there for this rank.
        disk_bytes_free: in output_dir.
        clock_s: what its clock is ahead of rank 0's.
        product_rate: multiply-adds a second of its matrix products.
        link_rate: bytes a second between the node and the nearer of its neighbours, each way.
    """

    rank: int
    node: str
    software: dict[str, str | None] = dataclasses.field(default_factory=dict)
    num_gpus: int = 0
    gpu: str | None = None
    gpu_bytes: int = 0
    gpu_bytes_free: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)
    inputs: dict[str, str | None] = dataclasses.field(default_factory=dict)
    unseen: list[int] = dataclasses.field(default_factory=list)
    disk_bytes_free: int | None = None
    clock_s: float = 0.0
    product_rate: float | None = None
    link_rate: float | None = None


def findings(ranks: Sequence[Facts], *, output_dir: str, disk_bytes: int) -> list[str]:
    """What is wrong with these nodes for this run, a line each.

    Args:
        ranks: the facts of all ranks, in their order.
        output_dir: of the run.
        disk_bytes: that the run's checkpoints need there, besides what they take already.
    """
    first = ranks[0]
    found = [(rank.node, fault) for rank in ranks for fault in rank.faults]
    for name in first.software:
        found += _deviating(name, [(r.node, r.software.get(name)) for r in ranks])
    found += _deviating("GPUs for a rank to see:", [(r.node, r.num_gpus) for r in ranks])
    found += _deviating("GPU", [(r.node, r.gpu) for r in ranks])
    for rank in ranks:
        taken = rank.gpu_bytes - rank.gpu_bytes_free
        if taken > MAX_TAKEN * rank.gpu_bytes:
            what = f"{taken / GB:.1f} of {rank.gpu_bytes / GB:.1f} GB of rank {rank.rank}'s GPU"
            found.append((rank.node, f"{what} are taken already; end what runs there"))
        for path, digest in rank.inputs.items():
            if digest is None:
                found.append((rank.node, f"{path} is not there; mount it, or copy it"))
            elif first.inputs.get(path) not in (None, digest):
                found.append((rank.node, f"{path} is another file than on {first.node}"))
    apart = [
        *(r.node for r in ranks if r.unseen and r.rank),
        *(ranks[i].node for i in first.unseen),
    ]
    found += [
        (
            node,
            f"output_dir={output_dir} is not the folder that {first.node} has under this name; "
            "put it on a file system that all nodes share",
        )
        for node in apart
    ]
    found += _wrong_clocks(ranks)
    frees = [(r.disk_bytes_free, r.node) for r in ranks if r.disk_bytes_free is not None]
    if frees and min(frees)[0] < disk_bytes:
        free, node = min(frees)
        found.append(
            (
                node,
                f"{free / GB:.1f} GB are free in output_dir={output_dir}, and checkpoints will "
                f"take {disk_bytes / GB:.1f} more; make room, or lower train.keep_checkpoints",
            )
        )
    found += _slow("matrix products", [(r.node, r.product_rate) for r in ranks], "G/s")
    found += _slow("network", [(r.node, r.link_rate) for r in ranks], "GB/s")
    return [f"node {node}: {fault}" for node, fault in dict.fromkeys(found)]


def _deviating(what: str, values: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Nodes that have another value than most; of values as frequent, the first node's counts."""
    ((usual, _),) = Counter(value for _, value in values).most_common(1)
    return [
        (node, f"{what} {value}, where most have {usual}; make them equal")
        for node, value in values
        if value != usual
    ]


def _wrong_clocks(ranks: Sequence[Facts]) -> list[tuple[str, str]]:
    median = statistics.median(rank.clock_s for rank in ranks)
    wrong = {r.node: r.clock_s - median for r in ranks if abs(r.clock_s - median) > MAX_SKEW_S}
    return [
        (
            node,
            f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the others'; "
            "synchronise it (chrony, ntp)",
        )
        for node, skew in wrong.items()
    ]


def _slow(what: str, rates: Sequence[tuple[str, float | None]], unit: str) -> list[tuple[str, str]]:
    """Nodes with a rank far below the median rank's rate."""
    known = [(node, rate) for node, rate in rates if rate is not None]
    if len({node for node, _ in known}) < NODES_TO_COMPARE:
        return []
    median = statistics.median(rate for _, rate in known)
    return [
        (
            node,
            f"slow {what}, {rate / GB:.2f} {unit} where the median is {median / GB:.2f}; leave "
            "the node out (sbatch --exclude)",
        )
        for node, rate in known
        if rate < SLOWEST * median
    ]


class Meeting:
    """Where ranks leave and find each other's words: works before collectives do, and without.

    Args:
        topology: of all ranks.
        expected: names of the nodes that should come; may be empty.
        patience_s: what a stage may take before it is ended with a line that says why.

    Raises:
        RunError: rank 0 cannot be reached, or not listen.
    """

    def __init__(self, topology: Topology, *, expected: Sequence[str], patience_s: float) -> None:
        self.topology = topology
        self.node = os.environ.get("SLURMD_NODENAME") or platform.node()
        self.address = rank_0_address()
        self._expected = expected
        self._patience_s = patience_s
        # torchrun listens there itself.
        listens = topology.rank == 0 and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
        try:
            self._store = self._connect(patience_s, listens=listens)
        except RuntimeError as error:
            raise RunError(
                f"node {self.node}: rank {topology.rank} cannot {'listen' if listens else 'reach'} "
                f"rank 0 at {self.address} ({one_line(error)[:200]}); look at names, firewall and "
                "whether another job has the port"
            ) from error
        self._store.set(f"node/{topology.rank}", self.node)

    def _connect(self, timeout_s: float, *, listens: bool) -> Any:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        host, _, port = self.address.rpartition(":")
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(host, int(port), None, listens, timeout=timeout, wait_for_workers=False)
        return PrefixStore("preflight", store)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Bound what is done inside: whoever is not done in time ends, and rank 0 says why."""
        rank = self.topology.rank
        self._store.set(f"at/{rank}", name)
        # Rank 0 speaks for all; others only where it does not.
        timer = threading.Timer(self._patience_s + 10 * (rank > 0), self._give_up, [name])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self, stage: str) -> None:
        """End this process, which hangs, with a line that names who is late."""
        try:
            late = self._late(stage) if self.topology.rank == 0 else ["rank 0 does not answer"]
        except RuntimeError as error:
            late = [one_line(error)]
        for line in late:
            print(f"error: {line}; waited {self._patience_s:g} s for {stage}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_FAILED)

    def _late(self, stage: str) -> list[str]:
        store = self._connect(5.0, listens=False)  # the other connection is in use by what hangs
        ranks = range(self.topology.world_size)
        came = {r: store.get(f"node/{r}").decode() for r in ranks if store.check([f"node/{r}"])}
        missing = [r for r in ranks if r not in came]
        absent = [name for name in self._expected if name not in came.values()]
        lines = [f"node {name}: no rank of it came" for name in absent]
        if missing and not absent:
            lines = [f"rank {r} did not come, of the nodes {came}" for r in missing]
        for rank, node in came.items():
            if store.check([f"at/{rank}"]) and (at := store.get(f"at/{rank}").decode()) != stage:
                lines.append(f"node {node}: rank {rank} is still at {at}")
        return lines or [f"all ranks are there, on {sorted(set(came.values()))}, and hang"]

    def collect(self, name: str, item: Any) -> list[Any]:
        """All ranks' items, in their order, on rank 0; nothing on the others, who do not wait."""
        self._store.set(f"{name}/{self.topology.rank}", json.dumps(item))
        if self.topology.rank > 0:
            return []
        keys = [f"{name}/{rank}" for rank in range(self.topology.world_size)]
        self._store.wait(keys, FOREVER)
        return [json.loads(self._store.get(key)) for key in keys]

    def announce(self, name: str, item: Any) -> Any:
        """Rank 0's item, on all ranks."""
        if self.topology.rank == 0:
            self._store.set(name, json.dumps(item))
            return item
        try:
            self._store.wait([name], FOREVER)
            return json.loads(self._store.get(name))
        except RuntimeError as error:
            raise ElsewhereError(EXIT_FAILED) from error  # rank 0 left, and has said why

    def connect_ranks(self, backend: str) -> None:
        """Make the process group, whose operations need collectives to work."""
        import torch.distributed as dist

        dist.init_process_group(
            backend,
            store=self._store,
            rank=self.topology.rank,
            world_size=self.topology.world_size,
            timeout=FOREVER,
        )


def look(recipes: Sequence[Recipe], meeting: Meeting) -> int:
    """All checks, in the order in which they need more and more of the nodes.

    Returns:
        The exit status, the same on all ranks.
    """
    facts = Facts(rank=meeting.topology.rank, node=meeting.node)
    output_dir = os.path.commonpath([recipe.output_dir for recipe in recipes])

    def is_fine(name: str) -> bool:
        ranks = [Facts(**each) for each in meeting.collect(name, dataclasses.asdict(facts))]
        found = findings(ranks, output_dir=output_dir, disk_bytes=needed) if ranks else []
        for line in found:
            print(f"error: {line}", file=sys.stderr)
        fine = bool(meeting.announce(f"{name} is fine", not found))
        meeting.collect(f"{name} heard", None)  # rank 0, where all words are kept, leaves last
        return fine

    with meeting.stage("all ranks"):
        nodes = meeting.announce("nodes", meeting.collect("here", meeting.node))
    with meeting.stage("software and GPUs"):
        describe(facts, recipes[0], meeting.topology)
        needed = checkpoint_bytes(recipes) if facts.rank == 0 else 0
    with meeting.stage("the shared folder"):
        look_at_folder(facts, Path(output_dir), meeting)
    # A rank without a working GPU, or of another torch, would hang in a collective.
    with meeting.stage("what all ranks found"):
        if not is_fine("each rank"):
            return EXIT_FAILED
    with meeting.stage("the network"):
        bus_rate = measure(facts, nodes, meeting)
        if not is_fine("all ranks"):
            return EXIT_FAILED
    if facts.rank == 0:
        speed = f", all-reduce {bus_rate / GB:.2f} GB/s" if bus_rate else ""
        print(
            f"preflight: {len(set(nodes))} nodes, {len(nodes)} ranks, {facts.gpu or 'no GPUs'}"
            f"{speed}; nothing found",
            flush=True,
        )
    return EXIT_FINISHED


def describe(facts: Facts, recipe: Recipe, topology: Topology) -> None:
    """What a rank can say by itself."""
    import torch

    from pipeline.provenance import software

    facts.software = software()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        facts.num_gpus = torch.cuda.device_count()
        if topology.local_rank >= facts.num_gpus:
            facts.faults.append(
                f"rank {facts.rank} is number {topology.local_rank} of its node, which has "
                f"{facts.num_gpus} GPUs for it to see; start one task per GPU"
            )
            return
        device = torch.device("cuda", topology.local_rank)
        facts.gpu = torch.cuda.get_device_name(device)
        facts.gpu_bytes_free, facts.gpu_bytes = torch.cuda.mem_get_info(device)
    elif Path("/proc/driver/nvidia/version").exists():
        facts.faults.append("it has an NVIDIA driver, but torch sees no GPU; repair the driver")
    facts.faults += gpu_faults(_nvidia_smi())
    dtype = {"float8": "bfloat16"}.get(recipe.teacher.dtype, recipe.teacher.dtype)
    try:
        is_right, facts.product_rate = product(device, getattr(torch, dtype))
    except RuntimeError as error:
        facts.faults.append(f"rank {facts.rank}'s matrix product fails ({one_line(error)[:200]})")
    else:
        if not is_right:
            facts.faults.append(f"rank {facts.rank}'s matrix product is wrong; leave the node out")
    facts.inputs = {path: _digest(Path(path)) for path in inputs(recipe)}


def inputs(recipe: Recipe) -> list[str]:
    """Files that every node has to have: the shards' manifest and the teacher's configuration."""
    from data_prep.shards import MANIFEST

    paths = []
    if "://" not in recipe.shards and not recipe.data.prepare:
        paths.append(f"{recipe.shards}/{MANIFEST}")
    if os.path.isabs(recipe.teacher.model) or os.path.isdir(recipe.teacher.model):
        paths.append(f"{recipe.teacher.model}/config.json")
    return paths


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def product(device: torch.device, dtype: torch.dtype) -> tuple[bool, float]:
    """A product of whole numbers, whose sums are exact in fp32, against the same in fp64.

    Returns:
        Whether each element is the fp64 one rounded once, and multiply-adds a second.
    """
    import torch

    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randint(-8, 9, (size, size), generator=generator).to(device, dtype) for _ in range(2)
    )
    exact = (left.double() @ right.double()).to(dtype)
    is_right, seconds = True, []
    for _ in range(4):
        _wait(device)
        started = time.perf_counter()
        got = left @ right
        _wait(device)
        seconds.append(time.perf_counter() - started)
        is_right = is_right and bool(torch.equal(got, exact))
    return is_right, size**3 / min(seconds)


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_faults(report: str | None) -> list[str]:
    """What `nvidia-smi -q -x` reports of failing memory and of GPUs that want a reset.

    Args:
        report: its XML; None where there is no nvidia-smi.
    """
    if report is None:
        return []
    faults = []
    for gpu in ElementTree.fromstring(report).iter("gpu"):
        name = f"GPU {gpu.get('id')}"
        for counter in gpu.iterfind("ecc_errors/volatile//*"):
            is_bad = "uncorrectable" in counter.tag or "double_bit" in counter.tag
            if is_bad and (counter.text or "").strip().isdigit() and int(counter.text or 0) > 0:
                faults.append(
                    f"{name}: {counter.tag} {counter.text} since it was started; drain it"
                )
        faults += [
            f"{name}: {tag}; reset it, and drain it if that remains"
            for tag in ("remapped_row_pending", "remapped_row_failure", "reset_required")
            if any((flag.text or "").strip() == "Yes" for flag in gpu.iter(tag))
        ]
        action = (gpu.findtext("gpu_recovery_action") or "None").strip()
        if action not in ("None", "N/A"):
            faults.append(
                f"{name}: the driver asks for a recovery ({action}), see dmesg for the XID"
            )
    return faults


def _nvidia_smi() -> str | None:
    try:
        done = subprocess.run(["nvidia-smi", "-q", "-x"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def look_at_folder(facts: Facts, output_dir: Path, meeting: Meeting) -> None:
    """Whether every rank can write to output_dir, and sees there what others write."""
    name = meeting.announce("folder", f".preflight-{uuid.uuid4().hex}")
    folder = output_dir / name
    own = folder / str(facts.rank)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text(facts.node)
        facts.disk_bytes_free = shutil.disk_usage(folder).free
    except OSError as error:
        facts.faults.append(
            f"output_dir={output_dir} cannot be written ({error.strerror}); make it writable there"
        )
    writers = meeting.collect("written", facts.disk_bytes_free is not None)
    writers = meeting.announce("writers", writers)
    expected = range(len(writers)) if facts.rank == 0 else [0]
    facts.unseen = [r for r in expected if writers[r] and not _appears(folder / str(r))]
    meeting.collect("read", None)
    if facts.rank == 0 or facts.unseen:  # the one of all, or one of this node alone
        shutil.rmtree(folder, ignore_errors=True)


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def checkpoint_bytes(recipes: Sequence[Recipe]) -> int:
    """What the checkpoints of these students will take, besides what they take already."""
    from pipeline.models import num_parameters, read_config, student_config

    total = 0
    for recipe in recipes:
        config = student_config(recipe.student, read_config("teacher.model", recipe.teacher.model))
        parameters = num_parameters(config)
        if recipe.student.vocabulary != "full":  # how much is left of it shows later
            parameters -= config.vocab_size * config.hidden_size
        files = Path(recipe.output_dir, "checkpoints").rglob("*")
        there = sum(path.stat().st_size for path in files if path.is_file())
        whole = (recipe.train.keep_checkpoints + 1) * CHECKPOINT_BYTES * parameters
        total += max(0, whole - there)
    return total


def measure(facts: Facts, nodes: Sequence[str], meeting: Meeting) -> float:
    """Clocks, links between neighbouring nodes, and the all-reduce of all ranks.

    Args:
        facts: get `clock_s` and `link_rate`.
        nodes: of each rank.
        meeting: of the ranks.

    Returns:
        The bus bandwidth of the all-reduce, bytes a second: 2 (n - 1) / n of the buffer's size,
        over its time; 0 for one rank.

    Raises:
        RunError: the ranks cannot be connected.
    """
    import torch
    import torch.distributed as dist

    if len(nodes) == 1:
        return 0.0
    device = torch.device("cpu")
    if facts.num_gpus:
        device = torch.device("cuda", meeting.topology.local_rank)
        torch.cuda.set_device(device)
    try:
        meeting.connect_ranks("nccl" if facts.num_gpus else "gloo")
        facts.clock_s = _clock(device)
        _measure_links(facts, nodes, device)
        buffer = torch.ones((GPU_BYTES if facts.num_gpus else CPU_BYTES) // 4, device=device)
        seconds = min(_seconds(lambda: dist.all_reduce(buffer), device) for _ in range(4))
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        raise RunError(
            f"node {facts.node}: rank {facts.rank} cannot talk to the others "
            f"({one_line(error)[:200]}); look at GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and the "
            "firewall"
        ) from error
    return 2 * (len(nodes) - 1) / len(nodes) * buffer.nbytes / seconds


def _clock(device: torch.device) -> float:
    """What this rank's clock is ahead of rank 0's, by looking at both at the end of barriers."""
    import torch
    import torch.distributed as dist

    times = []
    for _ in range(5):
        _seconds(lambda: dist.all_reduce(torch.ones(1, device=device)), device)
        times.append(time.time())
    own = torch.tensor(times, dtype=torch.float64, device=device)
    first = own.clone()
    dist.broadcast(first, src=0)
    return float((own - first).median())


def _measure_links(facts: Facts, nodes: Sequence[str], device: torch.device) -> None:
    """Exchange a buffer between the first ranks of neighbouring nodes, in a ring."""
    import torch
    import torch.distributed as dist

    leaders = [nodes.index(name) for name in dict.fromkeys(nodes)]
    size = (GPU_BYTES if facts.num_gpus else CPU_BYTES) // 4
    sent, received = torch.ones(size, device=device), torch.empty(size, device=device)

    def exchange(other: int) -> None:
        operations = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    for pairs in ring_rounds(leaders):
        dist.barrier()
        for pair in pairs:
            if facts.rank in pair:
                (other,) = set(pair) - {facts.rank}
                work = functools.partial(exchange, other)
                seconds = min(_seconds(work, device) for _ in range(4))
                facts.link_rate = max(facts.link_rate or 0.0, sent.nbytes / seconds)


def ring_rounds(leaders: Sequence[int]) -> list[list[tuple[int, int]]]:
    """The links of a ring in rounds, in each of which every leader has one link at most."""
    links = list(itertools.pairwise(leaders))
    rounds = [links[0::2], links[1::2]]
    if len(leaders) > 2:
        rounds.append([(leaders[-1], leaders[0])])
    return [pairs for pairs in rounds if pairs]


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Look at the nodes that the launcher started this on. See the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.preflight",
        epilog="All other arguments are those of pipeline/train.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", default="", help="names of the nodes that have to be there: A,B")
    parser.add_argument(
        "--patience", type=float, default=PATIENCE_S, help="seconds that each check may take (120)"
    )
    own, arguments = parser.parse_known_args(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost peer is said in one line
    recipes, options = load_recipes(arguments)
    for recipe in recipes:
        skip_unreachable_hub(recipe.teacher.model, recipe.student.model, recipe.prep.tokenizer)
    topology = Topology.from_environment()
    check_world(recipes[0], topology.world_size)
    read_ds_config(options.deepspeed)
    expected = [name for name in own.nodes.split(",") if name]
    return look(recipes, Meeting(topology, expected=expected, patience_s=own.patience))


if __name__ == "__main__":
    run_command(main, rank=launched_rank())
