#!/bin/bash
# One run for each config, as elements of one array job, each on one node and with a run folder of its own in RUNS (runs/sweep-JOBID).
# The same RUNS and the same list go on with the runs of an earlier sweep.
#
#   sbatch --array=0-1 slurm/sweep.sh configs/switchall_47m.yaml configs/dense_47m.yaml
#   sbatch --array=0-7%4 slurm/sweep.sh configs/paper/*.yaml          at most four at a time
#
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%A_%a.out

cd "${SLURM_SUBMIT_DIR:?this is a batch script: start it with sbatch}" || exit 2
configs=("$@")
element=${SLURM_ARRAY_TASK_ID:?start it with sbatch --array=0-N}
if [ "$element" -ge $# ]; then
    echo "error: --array must end below the number of configs, but this is element $element and there are $# configs" >&2
    exit 2
fi
export CONFIG=${configs[element]}
name=${CONFIG##*/}
export RUN_DIR=${RUNS:-runs/sweep-$SLURM_ARRAY_JOB_ID}/$element-${name%.yaml}
set --
source slurm/train_1b.sh
