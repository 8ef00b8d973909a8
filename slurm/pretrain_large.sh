#!/usr/bin/env bash
# BridgeTower-Large as published: 64 GPUs, global batch 4096, 100,000 steps. From the root of the repository:
#     sbatch slurm/pretrain_large.sh [--section.field=value ...]
#SBATCH --job-name=bridgetower-large
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/_launch.sh" pretrain/train.py large_4m "$@"
