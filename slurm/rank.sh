#!/bin/bash
# One process of a training on several hosts: `srun slurm/rank.sh dmat train-robust ...` starts one per task, and dmat
# finds the others by the variables that torchrun would set.
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
exec "$@"
