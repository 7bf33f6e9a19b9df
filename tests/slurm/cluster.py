"""A real Slurm cluster on this host: munged, slurmctld and slurmds, all in a temporary folder.

Every part is found through ``SLURM_CONF``, so that a cluster which the host belongs to is neither
seen nor touched. Nodes come in pairs, a partition each: n0 and n1 (no GPU, `cpu`), g0 and g1 (two
GPUs each, as far as Slurm can tell), a0 and a1, b0 and b1 with a spare one, b2, c0 and c1 (for jobs
at the same time); these names do not resolve, as on sites where only ``NodeAddr`` does. Jobs of
`urgent` preempt those of `cpu`, which Slurm ends at once, and of `graced`, which get time to end by
themselves.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
PAIRS = {"cpu": "n", "gpu": "g", "a": "a", "b": "b", "c": "c"}  # partition -> nodes
NODES = (*(f"{name}{number}" for name in PAIRS.values() for number in (0, 1)), "b2")
CPUS_PER_NODE = 4
GPUS_PER_NODE = 2
START_TIMEOUT_S = 60.0
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"})


class ClusterUnavailableError(Exception):
    """This host cannot run a cluster, for a reason that is not ours: a test should be skipped."""


def why_unavailable() -> str | None:
    """Returns what keeps this host from running a cluster, or None."""
    path = _search_path()
    if missing := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "slurmd starts the tasks of a job as root only"
    return None


@dataclass
class Cluster:
    """A running cluster; made by :func:`running_cluster`."""

    folder: Path
    env: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        """Returns what a Slurm command prints; raises with what it said if it fails."""
        env = self.env | dict(env or {})
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {done.stderr}")
        return done.stdout

    def submit(
        self, script: Path | str, *flags: str, cwd: Path, env: Mapping[str, str] | None = None
    ) -> int:
        """Submits a script from folder ``cwd`` and returns the job's id."""
        printed = self.run("sbatch", "--parsable", *flags, str(script), cwd=cwd, env=env)
        return int(printed.split(";")[0])

    def job(self, job_id: int | str) -> dict[str, str]:
        """Returns the fields of ``scontrol show job``, such as JobState, Restarts and ExitCode."""
        line = self.run("scontrol", "show", "job", str(job_id), "--oneliner")
        return dict(part.split("=", 1) for part in line.split() if "=" in part)

    def wait_for(
        self, job_id: int | str, done: Callable[[dict[str, str]], bool], *, timeout_s: float
    ) -> dict[str, str]:
        """Returns the first state of the job for which ``done`` holds."""
        deadline = time.monotonic() + timeout_s
        while not done(state := self.job(job_id)):
            if time.monotonic() > deadline or state["JobState"] in ENDED:
                wanted = ("JobState", "Reason", "Restarts", "ExitCode")
                seen = {key: state.get(key) for key in wanted}
                raise TimeoutError(f"job {job_id} is {seen}; waited at most {timeout_s:g} s")
            time.sleep(0.2)
        return state

    def wait_for_end(self, job_id: int | str, *, timeout_s: float) -> dict[str, str]:
        """Returns the state in which the job ended for good."""
        return self.wait_for(job_id, lambda job: job["JobState"] in ENDED, timeout_s=timeout_s)

    def signal(self, job_id: int | str, name: str, *flags: str) -> None:
        """Signals the job's steps, or with ``--batch`` its batch shell only."""
        self.run("scancel", f"--signal={name}", *flags, str(job_id))

    def wait_for_requeue(self, job_id: int | str, *, timeout_s: float, restarts: int = 1) -> None:
        """Waits until the job is in the queue again, and ends the hold that Slurm puts on it there.

        Slurm holds it for two minutes. It has to be seconds at least: a node refuses to start a job
        in the second in which it was told to kill it, and the job then counts as failed.
        """

        def is_back(job: dict[str, str]) -> bool:
            return job["JobState"] == "PENDING" and int(job["Restarts"]) >= restarts

        self.wait_for(job_id, is_back, timeout_s=timeout_s)
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+2")

    def start(self) -> None:
        """Starts the daemons and returns when every node is idle."""
        folder = self.folder
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(os.urandom(128))
        files = (f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed"))
        self._spawn("munged", "--foreground", f"--socket={folder}/munge.socket", *files)
        self._wait_until((folder / "munge.socket").exists, "munged has a socket")
        self._write_config()
        self._spawn("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self._wait_until(self._all_idle, "every node is idle")

    def start_node(self, node: str) -> None:
        """Starts a node's daemon, which marks all that it starts with the node's name."""
        self._spawn(f"slurmd-{node}", "-D", "-N", node, env={"SLURMD_NODENAME": node})

    def kill_node(self, node: str) -> None:
        """Kills all processes of a node at once, as the loss of the machine does."""
        for pid in self.processes(f"SLURMD_NODENAME={node}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons.pop(f"slurmd-{node}").wait()

    def give_node_up(self, node: str) -> None:
        """What Slurm does by itself with a node that has not answered for SlurmdTimeout."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def bring_node_back(self, node: str) -> None:
        """Starts the daemon of a node that was given up."""
        self.start_node(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        state = ("sinfo", "--noheader", f"--nodes={node}", "--format=%T", "--partition=all")
        self._wait_until(lambda: self.run(*state).strip() == "idle", f"{node} is idle")

    def stop(self) -> None:
        """Ends every job and process of the cluster."""
        with contextlib.suppress(Exception):
            self.run("scancel", "--user=root")
            self._wait_until(self._all_idle, "every node is idle")
        for process in reversed(self.daemons.values()):
            process.terminate()
        for process in reversed(self.daemons.values()):
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self.processes():  # what a daemon has left behind, such as a slurmstepd
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, *marks: str) -> list[int]:
        """Returns this cluster's living processes: all inherit its SLURM_CONF, no others do.

        Args:
            marks: what else has to stand in their environment.
        """
        wanted = {mark.encode() for mark in (f"SLURM_CONF={self.env['SLURM_CONF']}", *marks)}
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if wanted <= set(environ.read_bytes().split(b"\0")):
                    found.append(int(environ.parent.name))
        return found

    def logs(self) -> str:
        """Returns the end of each daemon's log."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def _spawn(self, name: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        program = shutil.which(name.split("-")[0], path=self.env["PATH"])
        assert program, f"{name} was there when why_unavailable() looked"
        with (self.folder / f"{name}.out.log").open("wb") as out:
            self.daemons[name] = subprocess.Popen(
                [program, *arguments],
                env=self.env | dict(env or {}),
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def _wait_until(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not done():
            dead = [name for name, process in self.daemons.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = self.logs()
                # Some versions of slurmd want a cgroup, which a container may not allow.
                if any(name.startswith("slurmd") for name in dead) and "cgroup" in logs:
                    raise ClusterUnavailableError(f"slurmd cannot use cgroups here:\n{logs}")
                raise RuntimeError(f"waited for: {what}; ended: {dead}\n{logs}")
            time.sleep(0.1)

    def _all_idle(self) -> bool:
        nodes = subprocess.run(
            ["scontrol", "show", "node", "--oneliner"], env=self.env, capture_output=True, text=True
        ).stdout
        return nodes.count(" State=IDLE ") == len(NODES)

    def _write_config(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        control_port, *ports = _free_ports(1 + len(NODES))
        # The ports of jobs follow from their numbers: another cluster here has other ones.
        (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
FirstJobId={1 + control_port % 15000}
KillWait=5
MinJobAge=3600
ReturnToService=2
{"".join(_node_line(node, host, port) for node, port in zip(NODES, ports, strict=True))}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{"".join(_partition_line(name) for name in PAIRS)}
PartitionName=all Nodes=ALL State=UP
PartitionName=graced Nodes=n0,n1 GraceTime=60 State=UP
PartitionName=urgent Nodes=n0,n1 PriorityTier=10 State=UP
""")
        # Slurm wants a device for each GPU, but not that it is a GPU.
        (folder / "gres.conf").write_text("NodeName=g[0-1] Name=gpu File=/dev/null,/dev/zero\n")
        (folder / "state").mkdir()
        version = subprocess.run(
            ["slurmd", "-V"], env=self.env, capture_output=True, text=True, check=True
        ).stdout
        if int(version.split()[-1].split(".")[0]) >= 24:  # earlier versions do not know the word
            (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Yields a running cluster and leaves no process or file of it behind.

    Raises:
        ClusterUnavailableError: If the host cannot run one.
    """
    if reason := why_unavailable():
        raise ClusterUnavailableError(reason)
    # munged wants a folder that others may enter; a Unix socket's path has to be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    outside = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    env = outside | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _search_path()}
    cluster = Cluster(folder, env)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _search_path() -> str:
    """Returns PATH with the folders of daemons, which it lacks for some users."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"])


def _node_line(node: str, host: str, port: int) -> str:
    gres = f" Gres=gpu:{GPUS_PER_NODE}" if node.startswith("g") else ""
    return (
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
        f" CPUs={CPUS_PER_NODE}{gres}\n"
    )


def _partition_line(name: str) -> str:
    nodes = ",".join(node for node in NODES if node.startswith(PAIRS[name]))
    default = "YES" if name == "cpu" else "NO"
    return f"PartitionName={name} Nodes={nodes} Default={default} State=UP\n"


def _free_ports(count: int) -> list[int]:
    """Returns different ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
