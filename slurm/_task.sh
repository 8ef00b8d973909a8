#!/usr/bin/env bash
# The command that srun starts: `_task.sh RANKS PYTHON... -- PROGRAM...` runs RANKS processes in this task. Each rank writes
# its own log beside the merged one.
set -uo pipefail
# Python handles these signals once it is up. Until then they must not end anything, nor end this shell.
trap '' USR1 TERM

ranks=$1
shift
python=()
while [ "$1" != -- ]; do
    python+=("$1")
    shift
done
shift

if [ "$ranks" -gt 1 ]; then
    exec "${python[@]}" -m torch.distributed.run --nnodes="$SLURM_STEP_NUM_NODES" --node-rank="$SLURM_NODEID" \
        --nproc-per-node="$ranks" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
        --no-python bash slurm/_task.sh 1 "${PYTHON:-.venv/bin/python}" -- "$@"
fi

rank=${RANK:-$SLURM_PROCID}
exec > >(exec tee -a "$RANK_LOGS/rank$(printf %05d "$rank").log") 2>&1
tee=$!
echo "rank $rank on ${SLURMD_NODENAME:-this node}, restart ${SLURM_RESTART_COUNT:-0}"
"${python[@]}" "$@"
code=$?
[ "$code" != 75 ] || : >"$RANK_LOGS/.stopped.$rank"
exec >&- 2>&-
wait "$tee"  # otherwise its last lines are lost when the task ends
exit "$code"
