"""How a process joins the ranks of its job, whether it was started by python, deepspeed, torchrun or srun.

No other file reads a launcher's environment variables.
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
    """Which rank this process is, and how many there are."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def device(self) -> torch.device:
        """GPU of this rank, or the CPU."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def read_launch(environment: MutableMapping[str, str] | None = None) -> Launch:
    """Find out which launcher started this process, and complete the variables that torch and DeepSpeed read.

    Args:
        environment: variables to read and complete; those of the process if not given.

    Raises:
        ConfigError: the launcher's variables are incomplete, or this node has fewer GPUs than ranks.
    """
    env = os.environ if environment is None else environment
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds that out by itself, but warns when it is imported
    if "RANK" not in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        _translate_slurm(env)
    if "RANK" not in env:
        env.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_find_free_port())
        )
    missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise ConfigError(
            f"RANK={env['RANK']} is set but {', '.join(missing)} is not. Start with deepspeed, torchrun, srun or plain "
            "python; they set all of them or none."
        )
    world_size = int(env["WORLD_SIZE"])
    local_world_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or min(world_size, _count_gpus() or 1))
    launch = Launch(int(env["RANK"]), world_size, int(env["LOCAL_RANK"]), local_world_size)
    gpus = _count_gpus()
    if gpus and launch.local_rank >= gpus:
        raise ConfigError(
            f"This node has {gpus} visible GPU(s), but rank {launch.rank} has local rank {launch.local_rank}. "
            f"Start at most {gpus} process(es) per node."
        )
    return launch


def _translate_slurm(env: MutableMapping[str, str]) -> None:
    """Set the variables of torch's launchers from those of srun."""
    address = env.get("MASTER_ADDR")
    if address is None:
        nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
        names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        address = names.stdout.split()[0]
    env.update(
        RANK=env["SLURM_PROCID"],
        WORLD_SIZE=env["SLURM_NTASKS"],
        LOCAL_RANK=env["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(_count_tasks_on_node(env)),
        MASTER_ADDR=address,
        MASTER_PORT=env.get("MASTER_PORT", str(_SLURM_PORT_BASE + int(env["SLURM_JOB_ID"]) % _SLURM_PORTS)),
    )


def _count_tasks_on_node(env: Mapping[str, str]) -> int:
    """Count the tasks on this node. SLURM_STEP_TASKS_PER_NODE is a list such as ``8(x7),4``: 7 nodes of 8, one of 4."""
    counts: list[int] = []
    for entry in env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_NTASKS"]).split(","):
        count, _, repeat = entry.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[int(env.get("SLURM_NODEID", "0"))]


def _count_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _find_free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def computes_bf16(device: torch.device) -> bool:
    """Return True if bfloat16 is faster than float32: on GPUs since Ampere and CPUs with avx512_bf16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def prepare_process(launch: Launch, threads_per_rank: int) -> None:
    """Set the threads, the device and the environment that this rank computes with; joins no process group.

    Benchmarks call this function too, so that they measure what a run computes.

    Args:
        threads_per_rank: CPU threads that this rank computes with; 0 divides the node's cores among its ranks.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads_per_rank or max(1, cores // launch.local_world_size))
    # Threads of the tokenizers library do not survive the fork of the loader's workers, and it would warn of that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if launch.device.type == "cuda":
        torch.cuda.set_device(launch.device)
    # DeepSpeed looks for ninja on the PATH when it builds an optimizer, also if the virtual environment is not active.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # DeepSpeed 0.19.8 calls this function by its old name in every step, and torch 2.14 warns of that.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)


def start(launch: Launch, threads_per_rank: int) -> None:
    """Prepare this process, and join the other ranks.

    Args:
        threads_per_rank: CPU threads that this rank computes with; 0 divides the node's cores among its ranks.
    """
    prepare_process(launch, threads_per_rank)
    import deepspeed

    from bridgetower.engine.zero import skip_inference_build

    deepspeed.utils.logger.setLevel(logging.WARNING)
    skip_inference_build()
    backend = "nccl" if launch.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, timeout=_COLLECTIVE_TIMEOUT, verbose=False
    )


def finish() -> None:
    """Leave the process group in order, so that this process can start again."""
    if torch.distributed.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()  # torch's own function would leave DeepSpeed with dead groups
