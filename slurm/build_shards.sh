#!/usr/bin/env bash
# Builds the shards of a corpus as a job array; each task builds its share. From the root of the repository:
#     sbatch [--array=0-31] slurm/build_shards.sh cc3m --raw=/data/cc3m --out=/data/shards/cc3m [flags]
# The task that finds all shards there writes the manifest. Submitted again after an interruption, with the same --array,
# it builds what is missing. Python is .venv/bin/python of the folder the job is submitted from, or $PYTHON.
#SBATCH --job-name=bridgetower-shards
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem-per-cpu=1G
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || { echo "error: this runs as a job array. Use \`sbatch $0 ...\`." >&2; exit 2; }
cd "$SLURM_SUBMIT_DIR"
[ -f data_prep/build_shards.py ] || {
    echo "error: $SLURM_SUBMIT_DIR has no data_prep/build_shards.py. Submit from the root of the repository." >&2
    exit 2
}
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import bridgetower' || {
    echo "error: $python cannot import bridgetower. Install it (\`make demo\` makes .venv) or set PYTHON." >&2
    exit 2
}
part=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / ${SLURM_ARRAY_TASK_STEP:-1}))
exec "$python" data_prep/build_shards.py "$@" --slice="$part/$SLURM_ARRAY_TASK_COUNT"
