#!/bin/bash
# Submits the chain prepare -> distil -> evaluate, each stage after the one before has succeeded.
# From the root of the clone:
#
#   RECIPE=recipes/mine.yaml SHARDS=/data/shards OUTPUT_DIR=runs/mine slurm/submit.sh
#   RECIPE=… OUTPUT_DIR=runs/mine TASKS=xnli slurm/submit.sh --seeds 1,2,3
#
#   --seeds 1,2,3   three runs, in OUTPUT_DIR/seed-1 and so on, as one array
#   --dry_run       prints the commands and submits nothing
#
# The environment sets what the head of each .sbatch here lists, and flags of sbatch for each stage:
# PREPARE_FLAGS, DISTILL_FLAGS, EVALUATE_FLAGS ("--nodes=4 --partition=long"), split at blanks.
# Without TASKS nothing is evaluated. Stages that are finished are skipped; while jobs of the same
# OUTPUT_DIR are in the queue nothing is submitted. So the same command goes on after a failure.

set -euo pipefail

[[ -f slurm/job.sh ]] || {
    echo "submit.sh: no slurm/job.sh in $PWD; call it from the root of the clone" >&2
    exit 2
}
. slurm/job.sh

seeds=("")
dry_run=
while (($# > 0)); do
    case $1 in
        --seeds)
            [[ ${2:-} =~ ^[0-9]+(,[0-9]+)*$ ]] ||
                fail "--seeds '${2:-}' is no list of numbers with commas, such as 1,2,3"
            IFS=, read -r -a seeds <<< "$2"
            shift
            ;;
        --dry_run) dry_run=1 ;;
        --help)
            sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
            exit
            ;;
        *) fail "unknown argument '$1'; see slurm/submit.sh --help" ;;
    esac
    shift
done

read_environment
if [[ -z ${SHARDS:-} ]]; then
    for key in data.shards prep.output_dir; do
        SHARDS=$(recipe_value "$key") || fail "$PYTHON finds no $key in $RECIPE; set SHARDS"
        [[ -z $SHARDS ]] || break
    done
    [[ -n $SHARDS ]] || fail "data.shards and prep.output_dir of $RECIPE are null; set SHARDS"
fi
export RECIPE SHARDS OUTPUT_DIR

# Jobs are found again by their comment.
comment="output_dir=$(realpath -m "$OUTPUT_DIR")"
queue=$(squeue --me --noheader --format='%k|job %i, %j: %T') || fail "squeue failed; try again"
queued=()
while IFS= read -r line; do
    [[ $line != "$comment|"* ]] || queued+=("${line#"$comment|"}")
done <<< "$queue"
if ((${#queued[@]} > 0)); then
    echo "jobs of $OUTPUT_DIR are in the queue, so nothing is submitted:"
    printf '  %s\n' "${queued[@]}"
    exit 0
fi

folder_of() { echo "$OUTPUT_DIR${1:+/seed-$1}"; }

# Submits a stage and sets `job` to its number. $1: its script; $2: what it waits for, or nothing;
# $3: flags of sbatch; then its seeds.
submit() {
    local script=$1 after=$2 flags=() command
    read -r -a flags <<< "$3"
    shift 3
    local log=$OUTPUT_DIR/logs/%x-%j.out seed
    command=(sbatch --parsable --export=ALL --comment="$comment")
    [[ -z $after ]] || command+=(--dependency="$after" --kill-on-invalid-dep=yes)
    if [[ -n ${1:-} ]]; then
        command+=(--array="$(IFS=, && echo "$*")")
        log=$OUTPUT_DIR/seed-%a/logs/%x-%A_%a.out
    fi
    command+=(--output="$log" "${flags[@]}" "slurm/$script.sbatch")
    if [[ -n $dry_run ]]; then
        printf '%q ' "${command[@]}"
        echo
        job="<$script>"
        return
    fi
    for seed in "${@:-}"; do # Slurm makes no folders
        mkdir -p "$(folder_of "$seed")/logs"
    done
    job=$("${command[@]}") || fail "sbatch refused $script; what was submitted before it stays"
    job=${job%%;*}
    echo "$script: job $job${after:+, $after}"
}

prepared=
if [[ $SHARDS == *://* ]]; then
    echo "prepare_data: $SHARDS is not in a folder, skipped"
elif [[ -f $SHARDS/manifest.json ]]; then
    echo "prepare_data: $SHARDS is finished, skipped"
else
    submit prepare_data "" "${PREPARE_FLAGS:-}" ""
    prepared=afterok:$job
fi

untrained=() unscored=()
for seed in "${seeds[@]}"; do
    folder=$(folder_of "$seed")
    if [[ ! -f $folder/student/model.safetensors ]]; then
        untrained+=("$seed")
        continue
    fi
    echo "distill_xlmr: $folder is finished, skipped"
    if [[ -f $folder/evaluation/results.json ]]; then
        echo "evaluate: $folder is finished, skipped"
    else
        unscored+=("$seed")
    fi
done
if ((${#untrained[@]} > 0)); then
    submit distill_xlmr "$prepared" "${DISTILL_FLAGS:-}" "${untrained[@]}"
    if [[ -n ${TASKS:-} ]]; then # of an array, each task after its own run
        kind=afterok
        [[ -z ${untrained[0]} ]] || kind=aftercorr
        submit evaluate "$kind:$job" "${EVALUATE_FLAGS:-}" "${untrained[@]}"
    fi
fi
if ((${#unscored[@]} > 0)) && [[ -n ${TASKS:-} ]]; then
    submit evaluate "" "${EVALUATE_FLAGS:-}" "${unscored[@]}"
fi
