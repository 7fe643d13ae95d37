#!/bin/bash
# Trains configs/switchall_1b.yaml on two nodes of 8 GPUs; goes on by itself after a preemption, a time limit, a dead node or a bad one
# (slurm/requeue.sh).
#
#   sbatch slurm/train_1b.sh                                from the folder of the clone; slurm/README.md tells of a day with it
#   sbatch --nodes=4 slurm/train_1b.sh --set optim.lr=5.0e-4      any number of nodes; what follows the script goes to launcher/main.py
#
# What differs from site to site is in env.sh. What may be set in the environment of sbatch:
#   CONFIG, RUN_DIR   the config, and the run folder: another run needs another one
#   PREFLIGHT=0       does not look at the nodes first
#   RANK_LOGS=1       what the ranks say goes to logs/NAME-JOBID-RANK.out, not to the job's log
#   LAUNCH            srun (one task for each GPU) | torchrun | deepspeed | mpirun: who starts the ranks. torchrun and deepspeed end
#                     with codes of their own: only with srun and mpirun does a preempted job come back for sure
#   ENV_SH            another file in the place of slurm/env.sh
#
#SBATCH --job-name=switchall_1b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
# SIGTERM goes to the ranks 300 s before the time limit, and when SLURM preempts: they save after the step they are in and end with
# 85. A save takes seconds (--dry-run says how many), a step less; the rest is for an evaluation that has just begun.

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this is a batch script: start it with sbatch}"
wrong() {
    echo "error: $*" >&2
    exit 2
}
[ -f launcher/main.py ] || wrong "sbatch must be called in the folder of the clone, but it was called in $PWD"
CONTAINER=()
set +eu # what sites source, as `module`, may not bear it
source "${ENV_SH:-slurm/env.sh}"
set -eu
CONFIG=${CONFIG:-configs/switchall_1b.yaml}
RUN_DIR=${RUN_DIR:-runs/$SLURM_JOB_NAME}
LAUNCH=${LAUNCH:-srun} PREFLIGHT=${PREFLIGHT:-1} RANK_LOGS=${RANK_LOGS:-0}
[[ " $*" != *[\ =]run.dir=* ]] || wrong "the run folder must be given as RUN_DIR, which this script looks into, but it is in: $*"
[[ $LAUNCH =~ ^(srun|torchrun|deepspeed|mpirun)$ ]] || wrong "LAUNCH must be srun, torchrun, deepspeed or mpirun, but it is $LAUNCH"
[[ $PREFLIGHT =~ ^[01]$ ]] || wrong "PREFLIGHT must be 0 or 1, but it is $PREFLIGHT"
[[ $RANK_LOGS =~ ^[01]$ ]] || wrong "RANK_LOGS must be 0 or 1, but it is $RANK_LOGS"
[ -n "${SLURM_NTASKS_PER_NODE:-}" ] || wrong "--ntasks-per-node, the ranks of a node, must be given to sbatch, but is not"
TRAINER=(launcher/main.py --config "$CONFIG" --set run.dir="$RUN_DIR" "$@")
source slurm/requeue.sh

# ---- settings, each with its reason ----
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # since SLURM 22.05 srun no longer takes it over from sbatch
export OMP_NUM_THREADS=1                             # a run repeats its losses only with the same number of threads
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1       # the last words of a rank that dies are in the log
export TRITON_CACHE_DIR=${TMPDIR:-/tmp}/triton-$UID  # on the node's own disk: ranks of all nodes in one folder on a shared one wait for locks
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                # the reason of a failure, and nothing else
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1             # a broken link ends the rank instead of leaving it in a collective for ever
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} # rows received differ in number from step to step

# ---- are the nodes well? A bad one is excluded from the job, which goes back into the queue ----
# The verdict is read from what the preflight prints, not from a file: the first node, where this runs, may be what lacks a file system.
bad_nodes() { # shows what it reads, and gives what stands in: bad nodes: n2,n5
    local line bad=
    while IFS= read -r line; do
        echo "$line" >&3
        [[ $line != "bad nodes: "* ]] || bad=${line#bad nodes: }
    done
    echo "$bad"
}
rc=0
if [ "$PREFLIGHT" = 1 ]; then
    # --kill-on-bad-exit=0: a bad node must not end the others, which decide about it; timeout: it may never answer
    { bad=$(timeout -k 30 20m srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 "${CONTAINER[@]}" \
        "$PYTHON" launcher/preflight.py --config "$CONFIG" --set run.dir="$RUN_DIR" "$@" | bad_nodes) || rc=$?; } 3>&1
    [ -z "$bad" ] || exclude_and_requeue "$bad" "bad nodes"
    [ "$rc" != 143 ] || requeue "asked to end during the preflight" # by SIGTERM, before the training had begun
    if [ "$rc" != 0 ]; then
        [ "$rc" = 2 ] || exclude_lost_nodes # 2: the command or the config is wrong
        say "stopped: the preflight ended with $rc, and no node can be blamed for it (see above)"
        exit 1
    fi
fi

# ---- is there any sense in starting? ----
mkdir -p "$RUN_DIR"
ATTEMPTS=$RUN_DIR/attempts-$SLURM_JOB_ID
newest >>"$ATTEMPTS"
if [ "$(wc -l <"$ATTEMPTS")" -gt 2 ] && [ "$(tail -n 3 "$ATTEMPTS" | sort -u | wc -l)" = 1 ]; then
    say "stopped: this is the third start from $(newest), the two before made no progress; find out why in this log, then sbatch again"
    exit 1
fi
say "start on $SLURM_JOB_NODELIST from $(newest); $(git describe --always --dirty 2>/dev/null || echo 'no git')"

# ---- train ----
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
PORT=$((20000 + SLURM_JOB_ID % 10000)) # as launcher/environment.py has it: two jobs on one node do not meet
LOGS=()
[ "$RANK_LOGS" = 0 ] || LOGS=(--output="logs/%x-%j-%t.out")
# --kill-on-bad-exit: a rank that fails ends the others, by SIGTERM at once and by SIGKILL after SLURM's KillWait, 30 s on most sites;
# --wait: one that ends well leaves them a minute.
SRUN=(srun --kill-on-bad-exit=1 --wait=60 --label "${LOGS[@]}" "${CONTAINER[@]}")
# The one task gets the CPUs of all the ranks that it starts.
ONE_EACH=(--ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$((SRUN_CPUS_PER_TASK * SLURM_NTASKS_PER_NODE))")
case $LAUNCH in
srun) COMMAND=("${SRUN[@]}" "$PYTHON" "${TRAINER[@]}") ;;
torchrun) COMMAND=("${SRUN[@]}" "${ONE_EACH[@]}" "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_NNODES"
    --nproc-per-node="$SLURM_NTASKS_PER_NODE" --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$MASTER:$PORT" "${TRAINER[@]}") ;;
deepspeed)
    HOSTFILE=$RUN_DIR/hostfile-$SLURM_JOB_ID
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$SLURM_NTASKS_PER_NODE/" >"$HOSTFILE"
    # --no_ssh: srun starts one of its launchers on each node, which needs to know the node's number there
    COMMAND=("${SRUN[@]}" "${ONE_EACH[@]}" bash -c '"$0" -m deepspeed.launcher.runner --no_ssh --node_rank="$SLURM_NODEID" "$@"' "$PYTHON"
        --hostfile="$HOSTFILE" --master_addr="$MASTER" --master_port="$PORT" "${TRAINER[@]}") ;;
mpirun)
    export MASTER_ADDR=${MASTER_ADDR:-$MASTER} MASTER_PORT=${MASTER_PORT:-$PORT} # MPI does not say where rank 0 is
    COMMAND=("$MPIRUN" -n "$((SLURM_NNODES * SLURM_NTASKS_PER_NODE))" "$PYTHON" "${TRAINER[@]}")
    ;;
esac
stop_if_ended
"${COMMAND[@]}" &
step=$!
wait "$step" || rc=$?
while kill -0 "$step" 2>/dev/null; do # `wait` returns when the trap has run
    rc=0
    wait "$step" || rc=$?
done

# ---- what next? ----
is_new() { # a file that this start has written. Listed first: NFS remembers for a minute what was in a folder
    ls "$RUN_DIR" >/dev/null && [ "$RUN_DIR/$1" -nt "$ATTEMPTS" ]
}
is_free() { # no other job has the run folder: whom it refuses ends its other ranks by SIGTERM too, and must not come back
    [ ! -e "$RUN_DIR/lock" ] || flock --nonblock "$RUN_DIR/lock" true
}
stop_if_ended
if [ "$rc" = 85 ]; then
    requeue "ended early at $(newest)"
elif [ "$rc" = 0 ] && is_new done; then
    say "done: $(cat "$RUN_DIR/done")"
elif [ "$rc" = 0 ]; then
    say "failed: srun ended with 0 but $RUN_DIR/done was not written: a node failed; SLURM requeues the job if it may"
    exit 1
elif [ "$rc" = 143 ] && ! is_new crash.json && is_free; then # SIGTERM in the second before a rank can listen
    exclude_lost_nodes
    requeue "a rank was ended by a signal, and no rank has written why"
else
    say "failed with $rc at $(newest)"
    if is_new crash.json; then "$PYTHON" -m train.crash "$RUN_DIR" || true; fi
    [ "$rc" = 2 ] || exclude_lost_nodes # 2: the config is wrong
    exit "$rc"
fi
