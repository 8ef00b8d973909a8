"""How this process was started: alone, by deepspeed, by torchrun or by srun; and the first steps of each.

The one place that reads a launcher's environment variables.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch

from bridgetower.errors import ConfigError

# Long enough for rank 0 to check shards or evaluate while the others wait.
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
_SLURM_PORT_BASE, _SLURM_PORTS = 20_000, 20_000


class Launch(NamedTuple):
    """Place of this process in the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def device(self) -> torch.device:
        """The GPU of this rank, or the CPU."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def read_launch(environment: MutableMapping[str, str] | None = None) -> Launch:
    """Find out who started this process, and complete the variables that torch and DeepSpeed read.

    Args:
        environment: the process's own, if not given.

    Raises:
        ConfigError: the launcher's variables are incomplete.
    """
    env = os.environ if environment is None else environment
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds it by itself too, but warns of it when imported
    if "RANK" not in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        _translate_slurm(env)
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise ConfigError(
            f"RANK={env['RANK']} is set but {', '.join(missing)} is not. Start with deepspeed, torchrun, srun or plain "
            "python; they set all of them or none."
        )
    world_size = int(env["WORLD_SIZE"])
    local_world_size = int(
        env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or min(world_size, _visible_gpus() or 1)
    )
    launch = Launch(int(env["RANK"]), world_size, int(env["LOCAL_RANK"]), local_world_size)
    gpus = _visible_gpus()
    if gpus and launch.local_rank >= gpus:
        raise ConfigError(
            f"This node shows {gpus} GPU(s) but rank {launch.rank} is its process number {launch.local_rank}. "
            f"Start at most {gpus} processes a node."
        )
    return launch


def _translate_slurm(env: MutableMapping[str, str]) -> None:
    address = env.get("MASTER_ADDR")
    if address is None:
        nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
        names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        address = names.stdout.split()[0]
    tasks_here = _tasks_on_this_node(env)
    env.update(
        RANK=env["SLURM_PROCID"],
        WORLD_SIZE=env["SLURM_NTASKS"],
        LOCAL_RANK=env["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(tasks_here),
        MASTER_ADDR=address,
        MASTER_PORT=env.get("MASTER_PORT", str(_SLURM_PORT_BASE + int(env["SLURM_JOB_ID"]) % _SLURM_PORTS)),
    )


def _tasks_on_this_node(env: Mapping[str, str]) -> int:
    """SLURM_STEP_TASKS_PER_NODE is a list such as ``8(x7),4``."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_NTASKS"]).split(","):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[int(env.get("SLURM_NODEID", "0"))]


def _visible_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def computes_bf16(device: torch.device) -> bool:
    """True where bfloat16 is faster than float32: GPUs since Ampere, CPUs with avx512_bf16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def start(launch: Launch, threads_per_rank: int) -> None:
    """Set devices and threads, and join the other ranks.

    Args:
        threads_per_rank: CPU threads of this rank's computation; 0 shares the cores of the node.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads_per_rank or max(1, cores // launch.local_world_size))
    # The tokenizers' own threads do not survive the start of worker processes; ours are enough.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if launch.device.type == "cuda":
        torch.cuda.set_device(launch.device)
    # Where DeepSpeed looks for ninja when it builds an optimiser; a venv need not be activated to be used.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # DeepSpeed 0.19.8 calls it by its old name at every step, for which torch 2.14 warns every user.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # It only serves inference, and its build costs 71 s where init_distributed would start it (and fails without g++).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if launch.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, timeout=_COLLECTIVE_TIMEOUT, verbose=False
    )


def finish() -> None:
    """Leave the other ranks in order, so that this process can start again."""
    if torch.distributed.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()  # torch's alone would leave DeepSpeed with groups that are gone
