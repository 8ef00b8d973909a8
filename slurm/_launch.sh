# Functions that the job scripts of this folder share: a job starts its processes, handles Slurm's signals and requeues
# itself here, and nowhere else.
#     launch PROGRAM DEFAULT_PRESET [PRESET] [--section.field=value ...] [--dry-run]     one process per GPU, on all nodes
#     run_here PROGRAM [words ...] [--dry-run]                                           one process, on this node
# Settings of the cluster come from slurm/site.env, or from the file that $SITE_ENV names.
# shellcheck shell=bash
set -uo pipefail

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 2
}

# Exports every NAME=value of the site's file, unless the environment already has NAME: a setting for one job wins. The file
# is read and never run.
read_site() {
    local file=${SITE_ENV:-slurm/site.env} line name value number=0
    [ -f "$file" ] || { [ -z "${SITE_ENV:-}" ] || fail "SITE_ENV=$SITE_ENV is not a file."; return 0; }
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        line=${line%$'\r'}
        [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
        [[ $line =~ ^([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] ||
            fail "$file, line $number: '$line' is not NAME=value (no spaces around the =)."
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

# Separates --dry-run from the other words: sets `words` and `is_dry`.
read_words() {
    local word
    words=() is_dry=
    for word in "$@"; do
        if [ "$word" = --dry-run ]; then is_dry=1; else words+=("$word"); fi
    done
}

# Sets `python`, the command that runs Python, as a list of words, and tries it.
find_python() {
    python=("${PYTHON:-.venv/bin/python}")
    container_flags=()
    if [ -n "${MODULES:-}" ] && [ -z "$is_dry" ]; then
        [ "$(type -t module)" = function ] || fail "MODULES=$MODULES is set, but this node has no command 'module'." \
            "Leave MODULES out; PYTHON or CONTAINER may be enough."
        # shellcheck disable=SC2086  # several names, separated by spaces
        module load $MODULES || fail "\`module load $MODULES\` failed. \`module avail\` lists the modules."
    fi
    if [ -n "${CONTAINER:-}" ]; then
        if srun --help 2>/dev/null | grep -q -- --container-image; then  # Slurm with pyxis
            container_flags=("--container-image=$CONTAINER" "--container-mounts=$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
                "--container-workdir=$PWD")
        else
            local runner
            runner=$(command -v apptainer || command -v singularity) ||
                fail "CONTAINER=$CONTAINER is set, but this node has neither pyxis (srun --container-image) nor apptainer." \
                    "Load apptainer with MODULES, or set PYTHON instead of CONTAINER."
            python=("$runner" exec --nv --bind "$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" --pwd "$PWD" "$CONTAINER"
                "${python[@]}")
        fi
    fi
    # With pyxis only srun can start the container, so that a missing package shows no sooner than in the step.
    [ -n "$is_dry" ] || [ ${#container_flags[@]} -gt 0 ] || "${python[@]}" -c 'import bridgetower' ||
        fail "'${python[*]}' cannot import bridgetower." \
            "Install it (README, On a cluster), or set PYTHON or CONTAINER in slurm/site.env."
}

# Stops outside the root of the repository, and outside of a job unless --dry-run is given.
begin() {
    [ -f "$1" ] || fail "$PWD has no '$1'. Submit from the root of the repository."
    [ -n "${SLURM_JOB_ID:-}" ] || [ -n "$is_dry" ] ||
        fail "this runs inside a job: submit it with \`slurm/submit.sh $0 ...\`, which is sbatch with the settings of" \
            "slurm/site.env. --dry-run prints the command instead."
    read_site
    find_python
}

# For --dry-run outside of a job: sets the variables that Slurm would set for this script's #SBATCH lines. submit.sh has set
# those of options on its command line.
expect_job() {
    local nodes per_node
    nodes=$(read_option --nodes) per_node=$(read_option --ntasks-per-node)
    SLURM_JOB_NUM_NODES=${SLURM_JOB_NUM_NODES:-${nodes:-1}}
    SLURM_NTASKS=${SLURM_NTASKS:-$((SLURM_JOB_NUM_NODES * ${SLURM_NTASKS_PER_NODE:-${per_node:-1}}))}
    SLURM_GPUS_ON_NODE=${SLURM_GPUS_ON_NODE:-$(read_option --gpus-per-node)}
    SLURM_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$(read_option --cpus-per-task)}
    MASTER_ADDR=${MASTER_ADDR:-FIRST_NODE}
}

# Prints the value of an option in the #SBATCH lines of this script.
read_option() {
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
    if [ "$tasks" -le "$nodes" ]; then  # one task per node, which starts one process per GPU
        tasks=$nodes
        ranks_per_node=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    elif [ -n "${RANKS_PER_NODE:-}" ] && [ $((RANKS_PER_NODE * nodes)) -ne "$tasks" ]; then
        fail "RANKS_PER_NODE=$RANKS_PER_NODE, but the job has $tasks tasks on $nodes nodes." \
            "Use --ntasks-per-node=1 to let one task per node start them, or leave RANKS_PER_NODE out."
    fi
    export MASTER_ADDR MASTER_PORT
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" 2>/dev/null | head -n 1)}
    MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 20000))}
    set_defaults "$ranks_per_node"
    local srun=(srun "--nodes=$nodes" "--ntasks=$tasks" --label --kill-on-bad-exit=0
        "--cpu-bind=${CPU_BIND:-cores}" "${container_flags[@]}")
    # Since Slurm 22.05 srun does not inherit this option from sbatch.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || srun+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
    if [ -n "$is_dry" ]; then
        show "${srun[@]}" bash slurm/_task.sh "$ranks_per_node" "${command[@]}"
        return 0
    fi
    export RANK_LOGS=${RANK_LOGS:-slurm-${SLURM_JOB_NAME:-job}-$SLURM_JOB_ID}
    mkdir -p "$RANK_LOGS" || fail "cannot create the folder $RANK_LOGS for the ranks' logs. Set RANK_LOGS to another one."
    rm -f "$RANK_LOGS"/.stopped.*
    echo "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $nodes nodes, $tasks tasks, $ranks_per_node ranks per task;" \
        "one log per rank in $RANK_LOGS"

    # 300 s before the time limit Slurm sends USR1 to this shell alone, which passes it on to the trainers: they save and exit
    # with 75. SIGTERM (preemption, scancel) reaches the trainers from Slurm itself: they save and stay alive, because
    # whether the job is requeued is Slurm's decision.
    trap 'ask_to_stop &' USR1
    trap 'echo "terminated: saving"' TERM
    # With --kill-on-bad-exit=1 the first rank that exits with 75 would get the others killed before they have. Instead,
    # srun gives the others SLURM_WAIT seconds after the first rank has ended, whatever its exit code.
    "${srun[@]}" bash slurm/_task.sh "$ranks_per_node" "${command[@]}" &
    local step=$! code
    while :; do  # a trapped signal makes `wait` return early
        wait "$step"
        code=$?
        kill -0 "$step" 2>/dev/null || break
    done
    # torchrun replaces the exit code of its ranks, so a rank that exits with 75 also leaves a file.
    if [ "$code" = 75 ] || { [ "$code" != 0 ] && compgen -G "$RANK_LOGS/.stopped.*" >/dev/null; }; then
        requeue "stopped with a checkpoint"
    fi
    # Ranks that lose a peer exit long before Slurm declares its node dead (SlurmdTimeout, usually 300 s), so ask the nodes.
    # The limit of 20 restarts ends a job whose nodes keep failing.
    if [ "$code" != 0 ] && [ "$code" != 2 ] && [ "$nodes" -gt 1 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ] &&
        ! timeout --kill-after=5 60 srun --overlap "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 true; then
        requeue "a node of ${SLURM_JOB_NODELIST:-this job} does not answer"
    fi
    exit "$code"
}

requeue() {
    echo "$1; requeueing the job"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60  # Slurm ends this script
}

# Repeats the signal: a trainer that is still starting ignores it.
ask_to_stop() {
    while scancel --signal=USR1 "$SLURM_JOB_ID"; do sleep 10; done
}

# Sets what a job needs on most clusters, unless the site's file or the environment sets it.
set_defaults() {
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # Seconds between the end of the first task and the moment at which srun ends the others.
    export SLURM_WAIT=${SLURM_WAIT:-120}
    # A rank whose peer is gone exits with an error instead of hanging until the time limit.
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
    # Matmuls run on GPUs. More threads than cores would only slow each other down.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_PER_TASK:-1} + $1 - 1) / $1))}
    # torchrun would handle USR1 and TERM itself, and kill its ranks 30 s later.
    export TORCHELASTIC_SIGNALS_TO_HANDLE=${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGINT}
    # Compiled kernels go to the node's own disk: hundreds of ranks would wait for each other's locks in a shared home.
    if [ -n "${SCRATCH:-}" ]; then
        export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$SCRATCH/triton}
        export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$SCRATCH/inductor}
        export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$SCRATCH/torch_extensions}
    fi
}
