"""slurm/distill_xlmr.sbatch on a real cluster, with a stand-in for what it starts."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import CPUS_PER_NODE, GPUS_PER_NODE, Cluster, running_cluster

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "slurm/distill_xlmr.sbatch"
DEFAULT_OUTPUT = "runs/of the recipe"
DEFAULT_RECIPE = "recipes/xlmr_large_to_l6h384.yaml"
STOPPED = 85

PREFLIGHT = """\
import json, os, sys
from pathlib import Path

if os.environ["SLURM_PROCID"] == "0":
    Path("preflight.json").write_text(json.dumps(sys.argv[1:]))
sys.exit(int(os.environ.get("PREFLIGHT_STATUS", 0)))
"""

# Says what it was given, then ends: rank STUB_FAILS with 1; all with 0 if STUB_ENDS is set or this
# is a restart; else with 85 when asked to stop. Ranks take different times to leave, and while they
# do nothing handles signals any more, as in the end of a Python process that used a GPU.
STUB = """\
import json, os, signal, sys, time
from pathlib import Path

rank, start = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
asked = []
for name in ("SIGUSR1", "SIGTERM"):
    signal.signal(getattr(signal, name), lambda number, frame: asked.append(number))
said = Path("said") / (f"{start}-{rank}" + os.environ.get("SLURM_ARRAY_TASK_ID", "") + ".json")
said.parent.mkdir(exist_ok=True)
said.with_suffix(".tmp").write_text(json.dumps({"argv": sys.argv, "env": dict(os.environ)}))
said.with_suffix(".tmp").rename(said)
if "STUB_ENDS" in os.environ or start > 0:
    sys.exit(0)
if os.environ.get("STUB_FAILS") == str(rank):
    while len(list(said.parent.glob("*.json"))) < 2:
        time.sleep(0.05)  # the other rank has to be there to be ended
    sys.exit(1)
deadline = time.monotonic() + 100
while not asked and time.monotonic() < deadline:
    time.sleep(0.05)
for name in ("SIGUSR1", "SIGTERM"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
time.sleep(1.5 * rank)
sys.exit(85 if asked else 3)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A clone with the template as it is, and a stand-in for what it starts."""
    tree = tmp_path / "a clone"
    for name, text in {
        "pipeline/train.py": STUB,
        "pipeline/__init__.py": "",
        "pipeline/preflight.py": PREFLIGHT,
        DEFAULT_RECIPE: f"output_dir: {DEFAULT_OUTPUT}\n",
        "ds_configs/zero2.json": "{}",
        ".venv/bin/python": f'#!/bin/sh\nOF_CLONE=1 exec "{sys.executable}" "$@"\n',
    }.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tree / ".venv/bin/python").chmod(0o755)
    shutil.copytree(ROOT / "slurm", tree / "slurm")
    return tree


def said(tree: Path, start: int = 0) -> list[dict[str, Any]]:
    """What each rank of a start has said, by rank."""
    paths = sorted((tree / "said").glob(f"{start}-*.json"))
    assert [path.stem for path in paths] == [f"{start}-{rank}" for rank in range(len(paths))]
    return [json.loads(path.read_text()) for path in paths]


def said_by_seed(tree: Path) -> list[list[str]]:
    """What the runs of an array were given."""
    return [json.loads(path.read_text())["argv"] for path in (tree / "said").glob("0-0?.json")]


def wait_until(done: Callable[[], bool], what: str, *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for: {what}"
        time.sleep(0.1)


def log_of(job_id: int, folder: Path) -> str:
    return (folder / f"distill_xlmr-{job_id}.out").read_text()


def submit_and_start(
    cluster: Cluster,
    tree: Path,
    env: dict[str, str] | None = None,
    flags: Sequence[str] = (),
) -> int:
    """Submits the template and returns when both of its ranks can be asked to stop."""
    job_id = cluster.submit(TEMPLATE, *flags, cwd=tree, env=env)
    wait_until(lambda: len(list((tree / "said").glob("0-*.json"))) == 2, "two ranks start")
    return job_id


def test_verbatim_it_starts_one_rank_on_each_of_two_nodes(cluster: Cluster, tree: Path) -> None:
    job_id = cluster.submit(TEMPLATE, cwd=tree, env={"STUB_ENDS": "1"})
    job = cluster.wait_for_end(job_id, timeout_s=60)
    assert job["JobState"] == "COMPLETED", log_of(job_id, tree)
    ranks = said(tree)
    env = [rank["env"] for rank in ranks]
    assert {one["SLURMD_NODENAME"] for one in env} == {"n0", "n1"}
    assert [one["SLURM_PROCID"] for one in env] == ["0", "1"]
    assert {one["SLURM_LOCALID"] for one in env} == {"0"}
    assert {one["SLURM_STEP_NUM_TASKS"] for one in env} == {"2"}
    assert len({(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in env}) == 1
    assert socket.gethostbyname(env[0]["MASTER_ADDR"]) == "127.0.0.1"  # the name n0 has no address
    assert 10000 <= int(env[0]["MASTER_PORT"]) < 30000
    assert {one["SLURM_CPUS_PER_TASK"] for one in env} == {str(CPUS_PER_NODE)}
    assert {one["OMP_NUM_THREADS"] for one in env} == {str(CPUS_PER_NODE)}
    assert all("OF_CLONE" in one for one in env), "the clone's own Python is used"
    ds_config = "ds_configs/zero2.json"
    argv = ["--deepspeed", ds_config, "--config", DEFAULT_RECIPE, "--output_dir", DEFAULT_OUTPUT]
    assert all(rank["argv"] == ["pipeline/train.py", *argv] for rank in ranks)
    assert json.loads((tree / "preflight.json").read_text()) == ["--nodes", "n0,n1", *argv]
    logs = [f"distill_xlmr-{job_id}-rank-{rank:04d}.log" for rank in (0, 1)]
    assert sorted(path.name for path in (tree / DEFAULT_OUTPUT / "logs").iterdir()) == logs


def test_the_environment_sets_inputs_output_and_python(cluster: Cluster, tree: Path) -> None:
    (tree / "my recipe.yaml").touch()
    (tree / "zero1.json").touch()
    (tree / "pipeline/preflight.py").unlink()
    env = {
        "RECIPE": "my recipe.yaml",
        "DS_CONFIG": "zero1.json",
        "SHARDS": "my shards",
        "OUTPUT_DIR": "my runs/x",
        "EXTRA_ARGS": "--train.max_steps 7 --seed 2",
        "PYTHON": sys.executable,
        "PREFLIGHT": "0",
        "STUB_ENDS": "1",
    }
    job_id = cluster.submit(TEMPLATE, "--nodes=1", "--ntasks=2", cwd=tree, env=env)
    assert cluster.wait_for_end(job_id, timeout_s=60)["JobState"] == "COMPLETED"
    expected = ["pipeline/train.py", "--deepspeed", "zero1.json", "--config", "my recipe.yaml"]
    expected += ["--output_dir", "my runs/x", "--data.shards", "my shards"]
    expected += ["--train.max_steps", "7", "--seed", "2"]
    ranks = said(tree)
    assert [rank["argv"] for rank in ranks] == [expected] * 2
    assert not any("OF_CLONE" in rank["env"] for rank in ranks)
    assert {rank["env"]["SLURM_CPUS_PER_TASK"] for rank in ranks} == {str(CPUS_PER_NODE // 2)}


@pytest.mark.parametrize(
    ("flags", "tasks"),
    [
        pytest.param((), 2 * GPUS_PER_NODE, id="whole nodes"),
        pytest.param(("--ntasks-per-node=1",), 2, id="whole nodes, one task each"),
        pytest.param(
            ("--oversubscribe", "--nodes=1", "--gpus-per-node=2", "--ntasks-per-node=2"),
            2,
            id="part of a node",
        ),
    ],
)
def test_tasks_see_the_gpus_of_their_node(
    cluster: Cluster, tree: Path, flags: tuple[str, ...], tasks: int
) -> None:
    env = {"STUB_ENDS": "1"}
    job_id = cluster.submit(TEMPLATE, "--partition=gpu", *flags, cwd=tree, env=env)
    assert cluster.wait_for_end(job_id, timeout_s=60)["JobState"] == "COMPLETED"
    env_of_ranks = [rank["env"] for rank in said(tree)]
    assert len(env_of_ranks) == tasks
    assert {one.get("SLURM_GPUS_ON_NODE") for one in env_of_ranks} == {str(GPUS_PER_NODE)}
    local = {(one["SLURMD_NODENAME"], one["SLURM_LOCALID"]) for one in env_of_ranks}
    assert len(local) == tasks, "each task has a device of its own"


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        pytest.param("USR1", "--batch", id="as before the time limit"),
        pytest.param("TERM", "--full", id="the shell and all its children"),
    ],
)
def test_asked_to_stop_it_saves_and_requeues_itself(
    cluster: Cluster, tree: Path, name: str, flag: str
) -> None:
    job_id = submit_and_start(cluster, tree)
    cluster.signal(job_id, name, flag)
    cluster.wait_for_requeue(job_id, timeout_s=60)
    job = cluster.wait_for_end(job_id, timeout_s=60)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log_of(job_id, tree)
    assert [rank["env"]["SLURM_RESTART_COUNT"] for rank in said(tree, start=1)] == ["1", "1"]
    assert said(tree, start=1)[0]["argv"] == said(tree, start=0)[0]["argv"]
    assert not list((tree / DEFAULT_OUTPUT / "logs").glob("*.stopped")), "its note is gone"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_fails_ends_the_job_with_its_status(
    cluster: Cluster, tree: Path, rank: str
) -> None:
    job_id = cluster.submit(TEMPLATE, cwd=tree, env={"STUB_FAILS": rank})
    job = cluster.wait_for_end(job_id, timeout_s=30)  # the other rank would go on for longer
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "1:0", "0")


@pytest.mark.parametrize("bound", ["MAX_RESTARTS", "Requeue"])
def test_restarts_can_be_bounded_and_forbidden(cluster: Cluster, tree: Path, bound: str) -> None:
    env = {"MAX_RESTARTS": "0"} if bound == "MAX_RESTARTS" else {}
    job_id = submit_and_start(cluster, tree, env)
    if bound == "Requeue":
        cluster.run("scontrol", "update", f"JobId={job_id}", "Requeue=0")
    cluster.signal(job_id, "USR1", "--batch")
    job = cluster.wait_for_end(job_id, timeout_s=60)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", f"{STOPPED}:0", "0")
    assert ("MAX_RESTARTS=0" in log_of(job_id, tree)) == (bound == "MAX_RESTARTS")


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, tree: Path) -> None:
    job_id = submit_and_start(cluster, tree)
    cluster.run("scancel", str(job_id))
    cluster.wait_for(job_id, lambda job: job["JobState"] != "COMPLETING", timeout_s=60)
    job = cluster.job(job_id)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert job["ExitCode"].startswith(f"{STOPPED}:"), "there was time to save"


@pytest.mark.parametrize("missing", ["recipes/none.yaml", "slurm/job.sh"])
def test_what_is_missing_is_named_in_one_line(cluster: Cluster, tree: Path, missing: str) -> None:
    env = {"RECIPE": "recipes/none.yaml"} if missing.startswith("recipes") else {}
    cwd = tree if env else tree / "recipes"
    job_id = cluster.submit(tree / TEMPLATE, cwd=cwd, env=env)
    job = cluster.wait_for_end(job_id, timeout_s=60)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    (line,) = log_of(job_id, cwd).splitlines()
    assert missing in line
    assert str(cwd) in line
    assert not (tree / "said").exists()


@pytest.mark.parametrize("status", [1, 2])
def test_nothing_starts_where_the_preflight_fails(
    cluster: Cluster, tree: Path, status: int
) -> None:
    job_id = cluster.submit(TEMPLATE, cwd=tree, env={"PREFLIGHT_STATUS": str(status)})
    job = cluster.wait_for_end(job_id, timeout_s=60)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", f"{status}:0")
    assert not (tree / "said").exists()


@pytest.mark.parametrize(
    "container", ["env IN_CONTAINER=yes", "--export=ALL,IN_CONTAINER=yes --unbuffered"]
)
def test_a_container_is_a_command_or_flags_of_srun(
    cluster: Cluster, tree: Path, container: str
) -> None:
    env = {"CONTAINER": container, "PYTHON": sys.executable, "STUB_ENDS": "1"}
    job_id = cluster.submit(TEMPLATE, cwd=tree, env=env)
    job = cluster.wait_for_end(job_id, timeout_s=60)
    assert job["JobState"] == "COMPLETED", log_of(job_id, tree)
    assert [rank["env"]["IN_CONTAINER"] for rank in said(tree)] == ["yes", "yes"]


def test_a_seed_of_an_array_is_stopped_alone(cluster: Cluster, tree: Path) -> None:
    master = cluster.submit(TEMPLATE, "--array=4,5", "--nodes=1", "--ntasks=1", cwd=tree)
    wait_until(lambda: len(said_by_seed(tree)) == 2, "both seeds run")
    folders = {f"{DEFAULT_OUTPUT}/seed-{seed}" for seed in (4, 5)}
    assert {argv[argv.index("--output_dir") + 1] for argv in said_by_seed(tree)} == folders
    assert {tuple(argv[-2:]) for argv in said_by_seed(tree)} == {("--seed", "4"), ("--seed", "5")}
    last, other = f"{master}_5", f"{master}_4"
    assert cluster.job(last)["JobId"] == str(master), "its number is the array's, too"
    cluster.signal(last, "USR1", "--batch")
    cluster.wait_for_requeue(last, timeout_s=60)
    assert cluster.job(other)["JobState"] == "RUNNING"
    cluster.signal(other, "TERM", "--batch")
    cluster.wait_for_requeue(other, timeout_s=60)
    for job_id in (last, other):
        job = cluster.wait_for_end(job_id, timeout_s=60)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")


def test_a_preempted_job_gets_time_to_stop_and_goes_on(cluster: Cluster, tree: Path) -> None:
    job_id = submit_and_start(cluster, tree, flags=["--partition=graced"])
    urgent = cluster.submit(TEMPLATE, "--partition=urgent", cwd=tree, env={"STUB_ENDS": "1"})
    cluster.wait_for_requeue(job_id, timeout_s=60)
    assert "DUE TO PREEMPTION" not in log_of(job_id, tree), "it left before it was ended"
    assert cluster.wait_for_end(urgent, timeout_s=60)["JobState"] == "COMPLETED"
    job = cluster.wait_for_end(job_id, timeout_s=60)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")


def test_a_cluster_leaves_nothing_behind(cluster: Cluster, tmp_path: Path) -> None:
    stubborn = tmp_path / "stubborn.sbatch"
    stubborn.write_text("#!/bin/bash\ntrap '' TERM\nsrun bash -c 'touch started; sleep 1000'\n")
    with running_cluster() as other:
        held = other.submit(stubborn, "--hold", cwd=tmp_path)
        other.submit(stubborn, cwd=tmp_path)
        wait_until((tmp_path / "started").exists, "a task runs")
        assert other.job(held)["JobState"] == "PENDING"
        tasks = [
            pid for pid in other.processes() if Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
        ]
        assert tasks
    assert not any(Path(f"/proc/{pid}").exists() for pid in tasks)
    assert other.processes() == []
    assert not other.folder.exists()
    assert cluster.processes(), "another cluster on this host is left alone"
