#!/usr/bin/env bash
# Runs a training script on every task of a Slurm job, saves before the time limit, and queues the job again if needed:
#     sbatch [sbatch options] slurm/_launch.sh pretrain/train.py PRESET [--section.field=value ...]
# The other scripts of this folder call it. Python is .venv/bin/python of the folder the job is submitted from, or $PYTHON.
#SBATCH --job-name=bridgetower
#SBATCH --output=slurm-%x-%j.out
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -uo pipefail

[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: this runs inside a job. Use \`sbatch $0 ...\`." >&2; exit 2; }
cd "$SLURM_SUBMIT_DIR" || exit 2
[ -f "${1:-}" ] || {
    echo "error: $SLURM_SUBMIT_DIR has no '${1:-}'. Submit from the root of the repository." >&2
    exit 2
}
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import bridgetower' || {
    echo "error: $python cannot import bridgetower. Install it (\`make demo\` makes .venv) or set PYTHON." >&2
    exit 2
}

# Slurm signals this shell alone, 300 s before the time limit; the trainers save on it and end with exit code 75. On
# SIGTERM (preemption, scancel) they save and stay: whether the job comes back is then Slurm's decision.
trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap 'echo "terminated: saving"' TERM

# Not --kill-on-bad-exit: the first rank that ends with 75 would have the others killed before they end with it. After the
# first rank has ended, however it did, the others have two minutes.
srun --kill-on-bad-exit=0 --wait=120 "$python" "$@" &
step=$!
while :; do  # a trapped signal ends `wait` early
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
done

if [ "$code" = 75 ]; then
    echo "stopped with a checkpoint; queueing the job again"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60  # Slurm ends this script
fi
exit "$code"
