#!/usr/bin/env bash
# Fine-tunes BridgeTower-Base for retrieval on Flickr30K: 8 GPUs, global batch 512, 20 epochs at 384 px.
# From the root of the repository:
#     sbatch [sbatch options] slurm/finetune_flickr30k.sh [PRESET] --init=PATH [--section.field=value ...]
# PRESET, such as flickr30k_large or the run.json of a run, trains something else on the same node. With
# --ntasks-per-node=1 one task starts the ranks through torchrun.
#SBATCH --job-name=bridgetower-flickr30k
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=10
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.out
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
. slurm/_launch.sh || { echo "error: submit from the root of the repository, not from $PWD" >&2; exit 2; }
launch finetune/train.py flickr30k_base "$@"
