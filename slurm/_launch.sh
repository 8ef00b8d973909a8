# Read by the scripts of this folder, and the one place where a job starts its processes, hears Slurm's signals and queues
# itself again:
#     launch PROGRAM DEFAULT_PRESET [PRESET] [--section.field=value ...] [--dry-run]     one process a GPU, on all nodes
#     run_here PROGRAM [words ...] [--dry-run]                                           one process, on this node
# Settings of the site come from slurm/site.env, or from the file that $SITE_ENV names.
# shellcheck shell=bash
set -uo pipefail

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 2
}

# Sets and exports every NAME=value of the site's file that the environment does not have: what a person sets for one job
# wins. The file is read and never run.
read_site() {
    local file=${SITE_ENV:-slurm/site.env} line name value number=0
    [ -f "$file" ] || { [ -z "${SITE_ENV:-}" ] || fail "SITE_ENV=$SITE_ENV is no file."; return 0; }
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        line=${line%$'\r'}
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] ||
            fail "$file, line $number: '$line' is not NAME=value, without spaces around the =."
        name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
        case $name in
            PYTHON | MODULES | CONTAINER | CONTAINER_MOUNTS | SCRATCH | RANKS_PER_NODE | CPU_BIND) ;;
            SBATCH_* | SRUN_* | NCCL_* | TORCH_* | GLOO_* | UCX_* | FI_* | OMP_* | MASTER_PORT | WANDB_* | AWS_*) ;;
            *) fail "$file, line $number: $name is unknown. slurm/site.env.example lists every name." ;;
        esac
        [[ $value =~ ^\"(.*)\"$ || $value =~ ^\'(.*)\'$ ]] && value=${BASH_REMATCH[1]}
        [ -n "${!name+set}" ] || export "$name=$value"
    done <"$file"
}

# Takes --dry-run out of the words: sets `words` and `is_dry`.
read_words() {
    local word
    words=() is_dry=
    for word in "$@"; do
        if [ "$word" = --dry-run ]; then is_dry=1; else words+=("$word"); fi
    done
}

# Sets `python`, the words of the command that runs Python, and tries it.
find_python() {
    python=("${PYTHON:-.venv/bin/python}")
    container_flags=()
    if [ -n "${MODULES:-}" ] && [ -z "$is_dry" ]; then
        [ "$(type -t module)" = function ] || fail "MODULES=$MODULES is set, but this node has no command 'module'."
        # shellcheck disable=SC2086  # names, separated by spaces
        module load $MODULES || fail "\`module load $MODULES\` failed. \`module avail\` lists what there is."
    fi
    if [ -n "${CONTAINER:-}" ]; then
        if srun --help 2>/dev/null | grep -q -- --container-image; then  # Slurm with pyxis
            container_flags=("--container-image=$CONTAINER" "--container-mounts=$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
                "--container-workdir=$PWD")
        else
            local runner
            runner=$(command -v apptainer || command -v singularity) ||
                fail "CONTAINER=$CONTAINER is set, but this node has neither pyxis (srun --container-image) nor apptainer."
            python=("$runner" exec --nv --bind "$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" --pwd "$PWD" "$CONTAINER"
                "${python[@]}")
        fi
    fi
    # With pyxis only srun can look into the container; a missing package then shows in the step.
    [ -n "$is_dry" ] || [ ${#container_flags[@]} -gt 0 ] || "${python[@]}" -c 'import bridgetower' ||
        fail "'${python[*]}' cannot import bridgetower." \
            "Install it (README, On a cluster), or set PYTHON or CONTAINER in slurm/site.env."
}

# Checks where this runs. Outside of a job only --dry-run is left to do.
begin() {
    [ -f "$1" ] || fail "$PWD has no '$1'. Submit from the root of the repository."
    [ -n "${SLURM_JOB_ID:-}" ] || [ -n "$is_dry" ] ||
        fail "this runs inside a job: \`slurm/submit.sh $0 ...\` (sbatch with the settings of slurm/site.env)." \
            "--dry-run shows what it would run."
    read_site
    find_python
}

# Outside of a job: sets the variables of the one that this script's #SBATCH lines ask for. submit.sh knows better.
expect_job() {
    local nodes per_node
    nodes=$(asked --nodes) per_node=$(asked --ntasks-per-node)
    SLURM_JOB_NUM_NODES=${SLURM_JOB_NUM_NODES:-${nodes:-1}}
    SLURM_NTASKS=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:-${per_node:-1}}))}
    SLURM_GPUS_ON_NODE=${SLURM_GPUS_ON_NODE:-$(asked --gpus-per-node)}
    SLURM_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$(asked --cpus-per-task)}
    MASTER_ADDR=${MASTER_ADDR:-FIRST_NODE}
}

asked() {
    sed -n "s/^#SBATCH $1=//p" "$0"
}

show() {
    printf '%q ' "$@"
    echo
}

run_here() {
    local program=$1
    shift
    read_words "$@"
    begin "$program"
    [ -z "$is_dry" ] || { show "${python[@]}" "$program" "${words[@]}"; return 0; }
    exec "${python[@]}" "$program" "${words[@]}"
}

launch() {
    local program=$1 preset=$2
    shift 2
    case ${1:-} in "" | -*) ;; *) preset=$1; shift ;; esac
    read_words "$@"
    begin "$program"

    [ -n "${SLURM_JOB_ID:-}" ] || expect_job
    local nodes=${SLURM_JOB_NUM_NODES:-1} tasks ranks_per_node=1 command
    tasks=${SLURM_NTASKS:-$nodes}
    command=("${python[@]}" -- "$program" "$preset" "${words[@]}")
    if [ "$tasks" -le "$nodes" ]; then  # one task a node: it starts a process for each GPU
        tasks=$nodes
        ranks_per_node=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    elif [ -n "${RANKS_PER_NODE:-}" ] && [ $((RANKS_PER_NODE * nodes)) -ne "$tasks" ]; then
        fail "RANKS_PER_NODE=$RANKS_PER_NODE, but the job has $tasks tasks on $nodes nodes." \
            "Use --ntasks-per-node=1 to have one task a node start them, or leave RANKS_PER_NODE out."
    fi
    export MASTER_ADDR MASTER_PORT
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" 2>/dev/null | head -n 1)}
    MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 20000))}
    set_defaults "$ranks_per_node"
    local srun=(srun "--nodes=$nodes" "--ntasks=$tasks" --label --kill-on-bad-exit=0
        "--cpu-bind=${CPU_BIND:-cores}" "${container_flags[@]}")
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || srun+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")  # srun has not asked sbatch since 22.05
    if [ -n "$is_dry" ]; then
        show "${srun[@]}" bash slurm/_task.sh "$ranks_per_node" "${command[@]}"
        return 0
    fi
    export RANK_LOGS=${RANK_LOGS:-slurm-${SLURM_JOB_NAME:-job}-$SLURM_JOB_ID}
    mkdir -p "$RANK_LOGS" || fail "cannot make the folder $RANK_LOGS for the logs of the ranks."
    rm -f "$RANK_LOGS"/.stopped.*
    echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $nodes nodes, $tasks tasks, $ranks_per_node ranks a task;" \
        "one log a rank in $RANK_LOGS"

    # Slurm signals this shell alone, 300 s before the time limit; the trainers save on it and end with exit code 75. On
    # SIGTERM (preemption, scancel) they save and stay: whether the job comes back is then Slurm's decision.
    trap 'ask_to_stop &' USR1
    trap 'echo "terminated: saving"' TERM
    # Not --kill-on-bad-exit: the first rank that ends with 75 would have the others killed before they end with it. After
    # the first rank has ended, however it did, the others have SLURM_WAIT seconds.
    "${srun[@]}" bash slurm/_task.sh "$ranks_per_node" "${command[@]}" &
    local step=$! code
    while :; do  # a trapped signal ends `wait` early
        wait "$step"
        code=$?
        kill -0 "$step" 2>/dev/null || break
    done
    # torchrun gives its own exit code, so each rank leaves a note of a 75.
    if [ "$code" = 75 ] || { [ "$code" != 0 ] && compgen -G "$RANK_LOGS/.stopped.*" >/dev/null; }; then
        requeue "stopped with a checkpoint"
    fi
    # Ranks that miss another's answer end long before Slurm takes a silent node for dead (SlurmdTimeout, mostly 300 s).
    if [ "$code" != 0 ] && [ "$code" != 2 ] && [ "$nodes" -gt 1 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ] &&
        ! timeout --kill-after=5 60 srun --overlap "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 true; then
        requeue "a node of ${SLURM_JOB_NODELIST:-this job} does not answer"
    fi
    exit "$code"
}

requeue() {
    echo "$1; queueing the job again"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60  # Slurm ends this script
}

# Again and again, as a trainer that is still starting does not hear it.
ask_to_stop() {
    while scancel --signal=USR1 "$SLURM_JOB_ID"; do sleep 10; done
}

# What a job needs on most clusters; each is left as it is where the site's file or the environment sets it.
set_defaults() {
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # Seconds from the end of the first task until srun ends the others.
    export SLURM_WAIT=${SLURM_WAIT:-120}
    # A rank that waits in vain ends with the reason instead of hanging until the time limit.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    # Products run on GPUs; more threads than cores only get in each other's way.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_PER_TASK:-1} + $1 - 1) / $1))}
    # torchrun would answer a signal itself, with SIGKILL for its ranks 30 s later.
    export TORCHELASTIC_SIGNALS_TO_HANDLE=${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGINT}
    # Compiled kernels on the node's own disk: hundreds of ranks that lock files in a shared home stand still.
    if [ -n "${SCRATCH:-}" ]; then
        export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$SCRATCH/triton}
        export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$SCRATCH/inductor}
        export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$SCRATCH/torch_extensions}
    fi
}
