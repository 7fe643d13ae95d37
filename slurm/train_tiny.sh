#!/bin/bash
# train_1b.sh on two CPU nodes with gloo: the same body, for trying a cluster and for the tests of these scripts (tests/slurm).
#
#   make train            once, for the shards
#   sbatch slurm/train_tiny.sh
#
#SBATCH --job-name=switchall_tiny
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=1
#SBATCH --time=01:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out

cd "${SLURM_SUBMIT_DIR:?this is a batch script: start it with sbatch}" || exit 2
export CONFIG=${CONFIG:-configs/tiny_cpu.yaml}
export DS_ACCELERATOR=cpu
source slurm/train_1b.sh
