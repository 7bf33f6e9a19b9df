"""The job scripts with the real programs: whatever stops a run, it ends as if nothing had."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_recipe
from pipeline.preflight import checkpoint_bytes
from tests.pipeline.launch import TIMING
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "recipes/demo.yaml"
DISTILL = "slurm/distill_xlmr.sbatch"
PREPARE_ARGS = (
    "--prep.input=[recipes/demo_text/en.jsonl,recipes/demo_text/th.jsonl] --prep.seq_len=64 "
    "--prep.heldout_rows=0 --prep.rows_per_block=8"
)
STUDENT = (
    "--student.num_hidden_layers=2 --student.hidden_size=32 --student.intermediate_size=64 "
    "--train.batch_size=4 --train.micro_batch_size=2 --train.warmup_steps=4 --train.log_every=1 "
    "--train.eval_every=0"
)
MAX_STEPS = 100
PATIENCE_S = 400.0  # a machine that does much else is no failure

# Python, but train.py waits in each of its steps for as long as the file PACE says, and evaluate
# says what it was given.
PYTHON = """\
#!{python}
import json, os, runpy, sys, time
from pathlib import Path

sys.argv = [word for word in sys.argv[1:] if word != "-u"]
if sys.argv[:2] == ["-m", "pipeline.evaluate"]:
    given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
    assert Path(given["--model"], "model.safetensors").exists(), given
    folder = Path(given["--output_dir"])
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(given))
    sys.exit()
if sys.argv[:1] != ["pipeline/train.py"]:
    os.execv(sys.executable, [sys.executable, *sys.argv])
sys.path.insert(0, os.getcwd())
from pipeline.stopping import StopRequest

requested = StopRequest.requested

def slow(self):
    time.sleep(float(Path(os.environ["PACE"]).read_text()))
    return requested(self)

StopRequest.requested = slow
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process prepares."""
    folder = tmp_path_factory.mktemp("one process") / "shards"
    command = [sys.executable, "-m", "data_prep.build_shards", "--config", RECIPE]
    command += [f"--prep.output_dir={folder}", *PREPARE_ARGS.split()]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@dataclasses.dataclass
class Job:
    """A run of the job script in a folder of its own, at a pace of its own."""

    cluster: Cluster
    folder: Path
    shards: Path
    flags: Sequence[str]
    save_every: int
    id: int = 0

    def submit(self, *, pace_s: float = 0.0) -> None:
        self.folder.mkdir()
        self.set_pace(pace_s)
        (self.folder / "python").write_text(PYTHON.format(python=sys.executable))
        (self.folder / "python").chmod(0o755)
        extra = f"--train.max_steps={MAX_STEPS} --train.save_every={self.save_every} {STUDENT}"
        env = {
            "RECIPE": RECIPE,
            "SHARDS": str(self.shards),
            "OUTPUT_DIR": str(self.folder / "run"),
            "EXTRA_ARGS": extra,
            "PYTHON": str(self.folder / "python"),
            "PACE": str(self.folder / "pace"),
            "PREFLIGHT": "0",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # all nodes are one host, and may have one GPU
            "SLURM_WAIT": "20",
        }
        log = f"--output={self.folder}/job.out"
        self.id = self.cluster.submit(DISTILL, log, *self.flags, cwd=ROOT, env=env)

    def set_pace(self, seconds: float) -> None:
        partial = self.folder / "pace.partial"
        partial.write_text(str(seconds))
        partial.rename(self.folder / "pace")

    def metrics(self) -> list[dict[str, Any]]:
        path = self.folder / "run/metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{k: v for k, v in line.items() if k not in TIMING} for line in whole]

    def wait_for_steps(self, steps: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len(self.metrics()) < steps:
            state = self.cluster.job(self.id)["JobState"]
            assert state in {"PENDING", "CONFIGURING", "RUNNING"}, f"{state}\n{self.said()}"
            assert time.monotonic() < deadline, f"{len(self.metrics())} steps\n{self.said()}"
            time.sleep(0.2)

    def finish(self, *, restarts: int) -> None:
        self.set_pace(0)
        job = self.cluster.wait_for_end(self.id, timeout_s=PATIENCE_S)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", str(restarts)), self.said()

    def weights(self) -> bytes:
        return (self.folder / "run/student/model.safetensors").read_bytes()

    def said(self) -> str:
        logs = [self.folder / "job.out", *sorted(self.folder.glob("run/logs/*"))]
        return "\n".join(f"--- {log}\n{log.read_text()}" for log in logs if log.exists())


def reach_time_limit_three_times(job: Job) -> None:
    """Slurm looks twice a minute whose limit, less what --signal says, is reached."""
    job.submit(pace_s=1.0)  # at best 30 steps from look to look
    for restarts in (1, 2, 3):
        job.cluster.wait_for_requeue(job.id, timeout_s=PATIENCE_S, restarts=restarts)
        assert len(job.metrics()) < MAX_STEPS
    job.cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=UNLIMITED")
    job.finish(restarts=3)
    assert job.said().count("resuming from") >= 2  # the first signal may come before any step


def be_preempted(job: Job, urgent: Job) -> None:
    """The job that takes the nodes is the undisturbed run."""
    job.submit(pace_s=0.4)
    job.wait_for_steps(8)
    urgent.submit()
    job.cluster.wait_for_requeue(job.id, timeout_s=PATIENCE_S)
    urgent.finish(restarts=0)
    job.finish(restarts=1)
    assert "DUE TO PREEMPTION" in job.said()
    assert "resuming from" in job.said()
    assert "resuming from" not in urgent.said()


def lose_a_node(job: Job, node: str) -> None:
    """All processes of a node are killed; the partition has a spare one.

    The node itself comes back later: what Slurm could not tell it before, such as to kill the first
    step of this job, it is told then, whichever start that step is of.
    """
    job.submit(pace_s=0.4)
    job.wait_for_steps(8)
    job.cluster.kill_node(node)
    deadline = time.monotonic() + PATIENCE_S
    while f"no answer from {node}" not in job.said():
        assert time.monotonic() < deadline, job.said()
        time.sleep(0.2)
    job.cluster.give_node_up(node)
    job.cluster.wait_for_requeue(job.id, timeout_s=PATIENCE_S)
    job.finish(restarts=1)
    job.cluster.bring_node_back(node)
    assert "DUE TO NODE FAILURE" in job.said()
    assert "resuming from" in job.said()


def test_stopped_runs_end_as_the_undisturbed_one(
    cluster: Cluster, tmp_path: Path, shards: Path
) -> None:
    def job(name: str, *flags: str, save_every: int = 1000) -> Job:
        return Job(cluster, tmp_path / name, shards, flags, save_every)

    limited = job("limited", "--partition=a", "--time=10", "--signal=B:USR1@560")
    preempted, urgent = job("preempted", save_every=5), job("urgent", "--partition=urgent")
    bereft = job("bereft", "--partition=b", save_every=5)
    with ThreadPoolExecutor() as pool:  # most of their time they wait
        stories = [
            pool.submit(reach_time_limit_three_times, limited),
            pool.submit(be_preempted, preempted, urgent),
            pool.submit(lose_a_node, bereft, "b1"),
        ]
    for story in stories:
        story.result()
    metrics = urgent.metrics()
    assert [line["step"] for line in metrics] == list(range(1, MAX_STEPS + 1))
    for stopped in (limited, preempted, bereft):
        assert stopped.metrics() == metrics, stopped.folder.name
        assert stopped.weights() == urgent.weights(), stopped.folder.name

    # What the preflight says that checkpoints take is no less than they do, and not much more.
    (checkpoint,) = (urgent.folder / "run/checkpoints").glob("step-*")
    there = sum(path.stat().st_size for path in checkpoint.iterdir())
    keep = ["--train.keep_checkpoints=1", f"--output_dir={tmp_path / 'none'}"]
    recipe, _ = load_recipe(["--config", RECIPE, *STUDENT.split(), *keep])
    assert there <= checkpoint_bytes([recipe]) / 2 <= 1.3 * there


def test_a_chain_of_two_seeds_and_what_is_left_of_it(
    cluster: Cluster, tmp_path: Path, shards: Path
) -> None:
    run, python = tmp_path / "run", tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    (tmp_path / "pace").write_text("0")
    env = {
        "RECIPE": RECIPE,
        "SHARDS": str(tmp_path / "shards"),
        "OUTPUT_DIR": str(run),
        "TASKS": "xnli,squad_v2",
        "AGAINST": "models/pocket-teacher",
        "PREPARE_ARGS": PREPARE_ARGS.replace("=", " "),
        "EXTRA_ARGS": f"{STUDENT} --train.max_steps=3 --train.warmup_steps=1",
        "PREPARE_FLAGS": "--partition=c --ntasks-per-node=1",
        "DISTILL_FLAGS": "--partition=c --nodes=1 --ntasks=2",
        "EVALUATE_FLAGS": "--partition=c",
        "PYTHON": str(python),
        "PACE": str(tmp_path / "pace"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }

    def submit(*arguments: str) -> list[str]:
        return cluster.run("slurm/submit.sh", *arguments, cwd=ROOT, env=env).splitlines()

    commands = submit("--seeds", "1,2", "--dry_run")
    assert [line.split()[-1] for line in commands] == [
        f"slurm/{name}.sbatch" for name in ("prepare_data", "distill_xlmr", "evaluate")
    ]
    assert not run.exists(), "a dry run does nothing"

    submitted = submit("--seeds", "1,2")
    ids = [int(line.split()[2].rstrip(",")) for line in submitted]
    assert submitted == [
        f"prepare_data: job {ids[0]}",
        f"distill_xlmr: job {ids[1]}, afterok:{ids[0]}",
        f"evaluate: job {ids[2]}, aftercorr:{ids[1]}",
    ]
    head, *jobs = submit("--seeds", "3")
    assert head == f"jobs of {run} are in the queue, so nothing is submitted:"
    assert [line.split()[1].split("_")[0].rstrip(",") for line in jobs] == [str(i) for i in ids]

    def logs() -> str:
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in run.rglob("logs/*"))

    for name in (str(ids[0]), *(f"{i}_{seed}" for i in ids[1:] for seed in (1, 2))):
        cluster.wait_for(name, is_over, timeout_s=PATIENCE_S)
        assert cluster.job(name)["JobState"] == "COMPLETED", f"{name}\n{logs()}"

    def files(folder: Path) -> dict[str, bytes]:
        return {
            str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
        }

    assert files(tmp_path / "shards") == files(shards), "two MPI ranks on two nodes"
    students = [run / f"seed-{seed}" / "student/model.safetensors" for seed in (1, 2)]
    assert students[0].read_bytes() != students[1].read_bytes()
    assert logs().count("preflight: 1 nodes, 2 ranks, no GPUs, all-reduce") == 2
    for seed in (1, 2):
        results = json.loads((run / f"seed-{seed}/evaluation/results.json").read_text())
        assert results == {
            "--model": f"{run}/seed-{seed}/student",
            "--tasks": "xnli,squad_v2",
            "--output_dir": f"{run}/seed-{seed}/evaluation",
            "--against": "models/pocket-teacher",
            "--seed": str(seed),
        }
        names = {path.name for path in (run / f"seed-{seed}/logs").iterdir()}
        assert {f"distill_xlmr-{ids[1]}_{seed}-rank-{rank:04d}.log" for rank in (0, 1)} < names
        assert f"distill_xlmr-{ids[1]}_{seed}.out" in names

    lines = submit("--seeds", "1,2")
    assert len(lines) == 5
    assert all(line.endswith("is finished, skipped") for line in lines)
    (run / "seed-2/evaluation/results.json").unlink()
    (last,) = [line for line in submit("--seeds", "1,2", "--dry_run") if "skipped" not in line]
    assert "--array=2 " in last
    assert "evaluate.sbatch" in last
    assert "--dependency" not in last


def is_over(job: dict[str, str]) -> bool:
    return job["JobState"] not in {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}
