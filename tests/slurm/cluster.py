"""A real Slurm on this machine: Debian's slurmctld, two slurmd (nodes with 8 fake GPUs each), and munge.

Needs root, and apt if the packages are missing. Outside of its own folder it changes only the installed packages and
/etc/hosts, which has the names of the nodes while it runs.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

HOSTS = Path("/etc/hosts")
MARK = "# a node of tests/slurm"
PROGRAMS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "munged": "munge", "shellcheck": "shellcheck"}
NODES, CPUS, GPUS = ("n1", "n2"), 16, 8

# cred_expire: how long a requeued job waits before it starts again; 120 s by default.
# config_overrides: nodes may have more CPUs than the machine.
SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=200000,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
ReturnToService=2
SlurmdTimeout=60
MinJobAge=3600
PropagateResourceLimits=NONE
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus}
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}]
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """A cluster of two nodes. `environment` is that of a login node."""

    def __init__(self) -> None:
        """Start everything, after installing Slurm if it is missing: in 2 s, or 15 s with the installation."""
        if os.geteuid() != 0:
            raise RuntimeError("Only root can start Slurm's daemons. Run `make test-slurm` as root, in a container.")
        install()
        # Not in pytest's folder: the path of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            wait_for(
                lambda: set(self.call("sinfo", "-hN", "-p", "main", "-t", "idle", "-o", "%N").split()) == {*NODES}, 60
            )
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        for name in ("munge", "state", "spool", "dev"):
            (self.folder / name).mkdir()
        port, *node_ports = find_free_ports(1 + len(NODES))
        content = SLURM_CONF.format(
            host=host, folder=self.folder, port=port, first_port=node_ports[0], last_port=node_ports[-1], cpus=CPUS,
            gpus=GPUS, memory=read_memory_mib(), nodes=f"n[1-{len(NODES)}]",
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(content)
        for gpu in range(GPUS):
            (self.folder / f"dev/nvidia{gpu}").touch()
        (self.folder / "gres.conf").write_text(
            f"NodeName=n[1-{len(NODES)}] Name=gpu File={self.folder}/dev/nvidia[0-{GPUS - 1}]\n"
        )
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        # So that the names that `scontrol show hostnames` prints can be resolved.
        HOSTS.write_text(remove_nodes(HOSTS.read_text()) + "".join(f"127.0.0.1 {node} {MARK}\n" for node in NODES))

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        flags = {"key-file": key, "socket": folder / "socket", "pid-file": folder / "pid"}
        flags |= {"log-file": folder / "log", "seed-file": folder / "seed"}
        self._start(
            "munged", "munged", "--force", "--foreground", *(f"--{name}={path}" for name, path in flags.items())
        )
        wait_for(lambda: (folder / "socket").exists(), 20)

    def _start(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self._daemons[name] = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, start_new_session=True
        )

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self._start(node, "slurmd", "-D", "-N", node)

    def crash_node(self, node: str) -> None:
        """Kill everything that runs on a node at once, like a power failure."""
        tasks = [process for process in psutil.process_iter() if _find_node(process) == node]
        daemons = {parent for task in tasks if (parent := task.parent()) and parent.name().startswith("slurmstepd")}
        for process in (psutil.Process(self._daemons.pop(node).pid), *daemons, *tasks):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def call(self, *command: str) -> str:
        """Run a command of Slurm. Fails with its output if the exit code is not 0.

        Returns: its output.
        """
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=60)
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def show_job(self, job_id: str) -> dict[str, str]:
        """Read what Slurm knows about a job: JobState, Restarts, NodeList, ExitCode, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", "-o", job_id)))

    def stop(self) -> None:
        """Stop the jobs, then the daemons."""
        if "slurmctld" in self._daemons:
            for state in ("PENDING", "RUNNING"):
                subprocess.run(["scancel", f"--state={state}"], env=self.environment, timeout=30, check=False)
            with suppress(TimeoutError, AssertionError):
                wait_for(lambda: not self.call("squeue", "-h"), 30)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        HOSTS.write_text(remove_nodes(HOSTS.read_text()))
        shutil.rmtree(self.folder, ignore_errors=True)


def install() -> None:
    """Install the programs that are missing."""
    packages = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)})
    if packages:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            command = ["apt-get", "-qq", "-o", "Acquire::Retries=3", *words]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def _find_node(process: psutil.Process) -> str:
    """Find the node on which a process of a job runs."""
    try:
        return process.environ().get("SLURMD_NODENAME", "")
    except psutil.Error:
        return ""


def remove_nodes(hosts: str) -> str:
    """Remove the lines of an earlier cluster."""
    return "".join(line for line in hosts.splitlines(keepends=True) if MARK not in line)


def read_memory_mib() -> int:
    """Read the memory of this machine, in MiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def find_free_ports(count: int) -> list[int]:
    """Find consecutive ports on which nobody listens."""
    for first in range(16_800, 20_000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + offset))
            return [first + offset for offset in range(count)]
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise RuntimeError("no free ports between 16800 and 20000")


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition is true.

    Raises:
        TimeoutError: it is still false after ``seconds``.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"the condition is still false after {seconds} s")
        time.sleep(0.3)
