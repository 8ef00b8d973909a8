#!/usr/bin/env bash
# Pretrains BridgeTower-Base as published: 64 GPUs, global batch 4096, 100,000 steps. From the root of the repository:
#     sbatch [sbatch options] slurm/pretrain_base.sh [PRESET] [--section.field=value ...]
# PRESET, or the run.json of a run, trains something else on the same nodes. With --ntasks-per-node=1 one task per node
# starts the ranks through torchrun.
#SBATCH --job-name=bridgetower-base
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
. slurm/_launch.sh || { echo "error: submit from the root of the repository, not from $PWD" >&2; exit 2; }
launch pretrain/train.py base_4m "$@"
