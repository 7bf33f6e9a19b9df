# What the job scripts of this folder have in common. They source it from the clone, where sbatch
# was called, since Slurm runs a copy of a script in a folder of its own.
#
# The environment sets, for all of them:
#
#   RECIPE      file under recipes/
#   SHARDS      folder of the shards           (empty: what the recipe says)
#   OUTPUT_DIR  folder of the run              (empty: what the recipe says)
#   PYTHON      (the clone's .venv if there is one)
#   CONTAINER   what Python runs in: a command ("apptainer exec --nv image.sif") or, where it begins
#               with --, flags of srun ("--container-image=image.sqsh --container-mounts=/data")
#   MAX_RESTARTS  how often a job requeues itself
#
# An array's tasks are seeds: `sbatch --array=1,2,3` makes three runs in OUTPUT_DIR/seed-1 and so on.
# Each rank's output is in OUTPUT_DIR/logs/.

STOPPED=85 # train.py's status when it was asked to stop and has saved

# The number of an array's last task is that of the whole array: only the pair names the task.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:-}}

fail() {
    echo "${SLURM_JOB_NAME:-submit.sh}: $1" >&2
    exit 2
}

# The value of a dotted key of the recipe, nothing where it is null or not there.
recipe_value() {
    "$PYTHON" -c '
import functools, sys, yaml
sections = lambda found, name: (found or {}).get(name)
value = functools.reduce(sections, sys.argv[2].split("."), yaml.safe_load(open(sys.argv[1])))
print("" if value is None else value)' "$RECIPE" "$1" 2> /dev/null
}

# Finds Python, the container, and the folders that the recipe names where the environment does not.
read_environment() {
    : "${RECIPE:=recipes/xlmr_large_to_l6h384.yaml}" "${MAX_RESTARTS:=100}"
    [[ -f $RECIPE ]] || fail "no file $RECIPE (from $PWD); set RECIPE to a file that exists"
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=python
        [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
    fi
    container=() container_flags=()
    case ${CONTAINER:-} in
        --*) read -r -a container_flags <<< "$CONTAINER" ;;
        *) read -r -a container <<< "${CONTAINER:-}" ;;
    esac
    if [[ -z ${OUTPUT_DIR:-} ]]; then
        OUTPUT_DIR=$(recipe_value output_dir) && [[ -n $OUTPUT_DIR ]] ||
            fail "$PYTHON finds no output_dir in $RECIPE (from $PWD); set OUTPUT_DIR"
    fi
}

# What a job knows of itself: its folders, its tasks, where its ranks meet. $1: how many tasks a
# node gets where nobody says.
join_job() {
    read_environment
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || OUTPUT_DIR=$OUTPUT_DIR/seed-$SLURM_ARRAY_TASK_ID
    logs=$OUTPUT_DIR/logs
    mkdir -p "$logs" || fail "no folder $logs can be made; set OUTPUT_DIR to one that can"
    rank_logs=(--open-mode=append --output="$logs/$SLURM_JOB_NAME-$job-rank-%4t.log")

    # An exclusive job is given all GPUs of its nodes, but a step of it only those that it asks for.
    step=("${container_flags[@]}")
    local gpus=${SLURM_GPUS_ON_NODE:-0} tasks_per_node=$1
    if [[ -n ${SLURM_NTASKS:-} ]]; then
        tasks_per_node=$(((SLURM_NTASKS + SLURM_NNODES - 1) / SLURM_NNODES))
    else
        step+=(--ntasks-per-node="$tasks_per_node")
    fi
    if ((gpus > 0)); then
        step+=(--gpus-per-node="$gpus")
    fi
    # Tasks share a node's CPUs evenly; srun takes no --cpus-per-task from the job since Slurm 22.05.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / tasks_per_node))}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
    # Job control puts srun into a process group of its own: a signal to this shell's group, such as
    # that of scancel --full, would make it abort the step.
    set -m
}

# Whether Slurm lets this start of the job be: it may have ended it already, or started the next one.
is_running() {
    local state
    state=$(scontrol show job "$job" --oneliner) || return 1
    [[ $state == *" JobState=RUNNING "* && $state == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

# This shell is signalled (by --signal=B: before the time limit, by preemption, by the user) and
# passes it on to the tasks of all nodes, again and again, since a step that is just starting loses
# signals. Once Slurm itself ends the job, for a cancel or a requeue, it has signalled the tasks
# already, and a scancel would hit the job's next start.
asked=
forward() {
    signalled=1
    [[ -z $asked ]] || return 0
    echo "$SLURM_JOB_NAME: asked to stop by SIG$1" >&2
    while kill -0 "$$" 2> /dev/null; do # Slurm's kill may miss this loop
        if is_running; then scancel --signal="$1" "$job" || true; fi
        sleep 5
    done &
    asked=$!
}

# Runs a step, `run_step FLAGS… PROGRAM…`, and sets `status` to srun's.
run_step() {
    srun --kill-on-bad-exit=1 --wait="${SLURM_WAIT:-60}" "${step[@]}" "$@" &
    local srun_pid=$!
    # A trapped signal ends the wait before srun does, and then its status is not srun's.
    while true; do
        signalled=
        wait "$srun_pid" && status=0 || status=$?
        [[ -n $signalled ]] || break
    done
    if [[ -n $asked ]]; then
        { kill -- "-$asked" && wait "$asked"; } 2> /dev/null || true
    fi
}

lost_nodes() {
    sinfo --noheader --Node --dead --nodes="$SLURM_JOB_NODELIST" --format=%N | sort -u | paste -sd ' '
}

# Ends this start of the job after a step that failed: for good, unless the job is to go on.
end() {
    grep -hs '^error: ' "$logs/$SLURM_JOB_NAME-$job"-rank-*.log | tail -n 20 >&2 || true
    echo "$SLURM_JOB_NAME: ended with status $status; each rank's output is in $logs" >&2
    # Whoever was asked to stop before it could listen has lost no more than a kill would cost.
    if [[ -n $asked ]] && ((status == 128 + $(kill -l USR1) || status == 128 + $(kill -l TERM))); then
        requeue
    fi
    # The other nodes' ranks notice a lost node long before Slurm gives it up and requeues the job. A
    # requeue before that would leave the job pending for good (Slurm 22.05: BadConstraints).
    if [[ -n $(lost_nodes) ]]; then
        echo "$SLURM_JOB_NAME: no answer from $(lost_nodes); it goes on once Slurm gives that up" >&2
        trap - TERM USR1 # a shell that lingers makes Slurm's kill reach into the next start
        local deadline=$((SECONDS + 1800))
        while [[ -n $(lost_nodes) ]] && ((SECONDS < deadline)); do sleep 2; done
        requeue
    fi
    exit "$status"
}

# Ends this start of the job, to go on in its next one.
requeue() {
    # A job that is being cancelled gets here too, and requeueing would bring it back to life.
    is_running || exit "$STOPPED"
    if ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
        echo "$SLURM_JOB_NAME: stopped after MAX_RESTARTS=$MAX_RESTARTS restarts" >&2
        exit "$STOPPED"
    fi
    scontrol requeue "$job" || exit "$STOPPED"
    exit 0
}
