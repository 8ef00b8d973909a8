"""Every launcher's variables give rank, world size and local rank."""

from __future__ import annotations

import pytest

from bridgetower.engine.launch import Launch, read_launch
from bridgetower.errors import ConfigError

# Variables that srun sets for the third of 2 + 2 tasks.
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "MASTER_ADDR": "node7",
}


def test_plain_python_is_one_rank_with_a_port_of_its_own():
    environment: dict[str, str] = {}
    assert read_launch(environment) == Launch(0, 1, 0, 1)
    assert environment["MASTER_ADDR"] == "127.0.0.1" and int(environment["MASTER_PORT"]) > 0


def test_torchrun_and_deepspeed_set_everything():
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert read_launch({**environment, "LOCAL_WORLD_SIZE": "2"}) == Launch(3, 4, 1, 2)  # torchrun
    assert read_launch({**environment, "LOCAL_SIZE": "2"}) == Launch(3, 4, 1, 2)  # deepspeed


def test_srun_is_translated():
    environment = dict(SLURM)
    assert read_launch(environment) == Launch(2, 4, 0, 2)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("node7", "24711")


def test_nodes_may_have_different_numbers_of_tasks():
    uneven = {**SLURM, "SLURM_NTASKS": "60", "SLURM_STEP_TASKS_PER_NODE": "8(x7),4"}
    assert read_launch({**uneven, "SLURM_NODEID": "6"}).local_world_size == 8
    assert read_launch({**uneven, "SLURM_NODEID": "7"}).local_world_size == 4


def test_shell_inside_a_job_is_one_rank():
    # After salloc, plain python has SLURM_NTASKS of the allocation, but is not a step of it.
    inside = {name: value for name, value in SLURM.items() if name not in ("SLURM_STEP_ID", "SLURM_PROCID")}
    assert read_launch(inside).world_size == 1


def test_missing_variables_are_an_error_that_names_them():
    with pytest.raises(ConfigError, match=r"WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"):
        read_launch({"RANK": "0"})
