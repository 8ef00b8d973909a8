#!/usr/bin/env bash
# Runs sbatch with the settings of slurm/site.env (account, partition, ...), which sbatch reads from the environment:
#     slurm/submit.sh [sbatch options] slurm/pretrain_base.sh [PRESET] [--section.field=value ...] [--dry-run]
# --dry-run prints the commands and submits nothing.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
# shellcheck source=slurm/_launch.sh
. slurm/_launch.sh

options=()
while [ $# -gt 0 ] && [ ! -f "$1" ]; do
    options+=("$1")
    shift
done
[ $# -gt 0 ] || fail "which script? slurm/submit.sh [sbatch options] slurm/pretrain_base.sh [--section.field=value ...]"
read_site
read_words "$@"
if [ -z "$is_dry" ]; then
    command -v sbatch >/dev/null || fail "this machine has no sbatch. Log in to a node of the cluster that has it."
    exec sbatch "${options[@]}" "${words[@]}"
fi
for option in "${options[@]}"; do
    case $option in
        --nodes=*) export SLURM_JOB_NUM_NODES=${option#*=} ;;
        --ntasks-per-node=*) export SLURM_NTASKS_PER_NODE=${option#*=} ;;
        --gpus-per-node=*) export SLURM_GPUS_ON_NODE=${option#*=} ;;
        --cpus-per-task=*) export SLURM_CPUS_PER_TASK=${option#*=} ;;
    esac
done
env | sed -n 's/^SBATCH_/# SBATCH_/p' | sort
show sbatch "${options[@]}" "${words[@]}"
echo "# and in the job:"
exec bash "$@"
