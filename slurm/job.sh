#!/bin/bash
# A SLURM job that runs a command of dmat. Before its time is over, or when it is preempted, SLURM sends SIGUSR1: the
# command saves and ends with exit code 75, and the job is queued again. docs/cluster.md shows how to submit it.
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append

# SHARDS: how many the instance has. The tasks of the array divide them evenly.
if [ -n "${SHARDS:-}" ]; then
    index=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
    first=$((SHARDS * index / SLURM_ARRAY_TASK_COUNT))
    end=$((SHARDS * (index + 1) / SLURM_ARRAY_TASK_COUNT))
    [ "$first" -lt "$end" ] || exit 0 # more tasks than shards
    set -- "$@" --shards "$first:$end"
fi

signalled=138 # 128 + SIGUSR1
"$@" &
command=$!
trap 'kill -USR1 "$command"' USR1
wait "$command"
code=$?
if [ "$code" -eq "$signalled" ]; then # the signal came while this script waited
    wait "$command"
    code=$?
fi
# A command that got the signal before it could handle it has nothing to save.
if [ "$code" -eq 75 ] || [ "$code" -eq "$signalled" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
