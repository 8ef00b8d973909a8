#!/usr/bin/env bash
# Builds the shards of a corpus as a job array; each task builds its slice. From the root of the repository:
#     sbatch [--array=0-31] slurm/build_shards.sh cc3m --raw=/data/cc3m --out=/data/shards/cc3m [flags]
# The task that finds all shards complete writes the manifest. After an interruption, submit it again with the same --array:
# it builds what is missing.
#SBATCH --job-name=bridgetower-shards
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem-per-cpu=1G
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --requeue
#SBATCH --open-mode=append
. slurm/_launch.sh || { echo "error: submit from the root of the repository, not from $PWD" >&2; exit 2; }
[ -z "${SLURM_JOB_ID:-}" ] || [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || fail "this runs as a job array: sbatch --array=0-31 $0 ..."
part=$(((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}) / ${SLURM_ARRAY_TASK_STEP:-1}))
run_here data_prep/build_shards.py "$@" --slice="$part/${SLURM_ARRAY_TASK_COUNT:-1}"
