#!/bin/bash
# Trains configs/switchall_1b.yaml on two nodes of 8 GPUs; goes on by itself after a preemption, a time limit, a dead node or a bad one.
#
#   sbatch slurm/train_1b.sh                                from the folder of the clone; slurm/README.md tells of a day with it
#   sbatch --nodes=4 slurm/train_1b.sh --set optim.lr=5.0e-4      any number of nodes; what follows the script goes to launcher/main.py
#
# What differs from site to site is in env.sh. What may be set in the environment of sbatch:
#   CONFIG, RUN_DIR   the config, and the run folder: another run needs another one
#   PREFLIGHT=0       does not look at the nodes first
#   RANK_LOGS=1       what the ranks say goes to logs/NAME-JOBID-RANK.out, not to the job's log
#   LAUNCH            srun (one task for each GPU) | torchrun | deepspeed | mpirun: who starts the ranks. Only srun requeues
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
if [ ! -f launcher/main.py ]; then
    echo "error: sbatch must be called in the folder of the clone, but it was called in $PWD" >&2
    exit 2
fi
CONTAINER=()
set +eu # what sites source, as `module`, may not bear it
source "${ENV_SH:-slurm/env.sh}"
set -eu
CONFIG=${CONFIG:-configs/switchall_1b.yaml}
RUN_DIR=${RUN_DIR:-runs/$SLURM_JOB_NAME}
case " $* " in *" run.dir="*)
    echo "error: the run folder must be given as RUN_DIR, which this script looks into, but it is in: $*" >&2
    exit 2
    ;;
esac
TRAINER=(launcher/main.py --config "$CONFIG" --set run.dir="$RUN_DIR" "$@")
RESTARTS=${SLURM_RESTART_COUNT:-0} # not set in the first start
# Of an array one element's number is also that of the whole, and `scontrol requeue` would take them all.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
say() { echo "$(date +%FT%T) [job $SLURM_JOB_ID, restart $RESTARTS] $*"; }

# ---- settings, each with its reason ----
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # since SLURM 22.05 srun no longer takes it over from sbatch
export OMP_NUM_THREADS=1                             # a run repeats its losses only with the same number of threads
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1       # the last words of a rank that dies are in the log
export TRITON_CACHE_DIR=${TMPDIR:-/tmp}/triton-$UID  # on the node's own disk: ranks of all nodes in one folder on a shared one wait for locks
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                # the reason of a failure, and nothing else
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1             # a broken link ends the rank instead of leaving it in a collective for ever
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} # rows received differ in number from step to step

# ---- are the nodes well? A bad one is excluded from the job, which goes back into the queue ----
exclude_and_requeue() { # a comma list of nodes
    trap '' TERM # requeueing ends this script; the lines after it need a moment
    local all
    all=$(scontrol show job "$JOB" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p' | grep -v '(null)' || true)
    all=$1${all:+,$all}
    if ! scontrol requeuehold "$JOB"; then # a job that runs cannot be changed
        say "stopped: the job cannot be requeued (see above); to go on: sbatch --exclude=$all with the same RUN_DIR"
    elif ! scontrol update jobid="$JOB" ExcNodeList="$all"; then # released, it would start on the bad node again and again
        say "held: $1 cannot be excluded (see above); to go on: scancel $JOB, then sbatch --exclude=$all with the same RUN_DIR"
    elif ! scontrol release "$JOB"; then
        say "held: to go on: scontrol release $JOB"
    fi # what SLURM now sends this script is ignored: only its end lets the nodes go before KillWait is over
    exit 1
}
requeue() {
    trap - TERM # the requeue ends this script: at once, which a trap would put off to the end of the sleep
    if ! scontrol requeue "$JOB"; then
        say "stopped: the job cannot be requeued (see above); to go on: sbatch with the same RUN_DIR"
    else
        sleep 60
    fi
    exit 1
}
mkdir -p "$RUN_DIR"
if [ "${PREFLIGHT:-1}" = 1 ]; then
    BAD=$RUN_DIR/bad-nodes-$SLURM_JOB_ID
    rm -f "$BAD"
    rc=0
    # --kill-on-bad-exit=0: a bad node must not end the others, which decide about it; timeout: it may never answer
    timeout 20m srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 "${CONTAINER[@]}" \
        "$PYTHON" launcher/preflight.py --config "$CONFIG" --set run.dir="$RUN_DIR" "$@" --bad-nodes-file "$BAD" || rc=$?
    if [ -s "$BAD" ]; then
        say "bad nodes: $(cat "$BAD"); they are excluded and the job goes back into the queue"
        exclude_and_requeue "$(cat "$BAD")"
    elif [ "$rc" = 143 ]; then # SIGTERM came before the training had begun
        say "asked to end during the preflight; the job goes back into the queue"
        requeue
    elif [ "$rc" != 0 ]; then
        say "stopped: the preflight ended with $rc, and no node can be blamed for it (see above)"
        exit 1
    fi
fi

# ---- is there any sense in starting? ----
newest() { # the checkpoint that `latest` names, as in: CHECKSUM  step_000100/manifest.json
    [ -f "$RUN_DIR/checkpoints/latest" ] && sed 's|.* \(step_[0-9]*\)/.*|\1|' "$RUN_DIR/checkpoints/latest" || echo "the beginning"
}
ATTEMPTS=$RUN_DIR/attempts-$SLURM_JOB_ID
newest >>"$ATTEMPTS"
if [ "$(wc -l <"$ATTEMPTS")" -gt 2 ] && [ "$(tail -n 3 "$ATTEMPTS" | sort -u | wc -l)" = 1 ]; then
    say "stopped: this is the third start from $(newest), the two before made no progress; find out why in this log, then sbatch again"
    exit 1
fi
say "start on $SLURM_JOB_NODELIST from $(newest); $(git describe --always --dirty 2>/dev/null || echo 'no git')"

# ---- train ----
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
: "${SLURM_NTASKS_PER_NODE:?give sbatch --ntasks-per-node}"
PORT=$((20000 + SLURM_JOB_ID % 10000)) # as launcher/environment.py has it: two jobs on one node do not meet
LOGS=()
[ "${RANK_LOGS:-0}" = 1 ] && LOGS=(--output="logs/%x-%j-%t.out")
# --kill-on-bad-exit: one dead rank ends the others. --wait: they get a minute for their last words.
SRUN=(srun --kill-on-bad-exit=1 --wait=60 --label "${LOGS[@]}" "${CONTAINER[@]}")
ONE_EACH=(--ntasks="$SLURM_NNODES" --ntasks-per-node=1)
case ${LAUNCH:-srun} in
srun) COMMAND=("${SRUN[@]}" "$PYTHON" "${TRAINER[@]}") ;;
torchrun) COMMAND=("${SRUN[@]}" "${ONE_EACH[@]}" "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_NNODES"
    --nproc-per-node="$SLURM_NTASKS_PER_NODE" --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$MASTER:$PORT" "${TRAINER[@]}") ;;
deepspeed)
    HOSTFILE=$RUN_DIR/hostfile-$SLURM_JOB_ID
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$SLURM_NTASKS_PER_NODE/" >"$HOSTFILE"
    # --no_ssh: srun starts one of its launchers on each node, which needs to know the node's number there
    COMMAND=("${SRUN[@]}" "${ONE_EACH[@]}" bash -c '"$0" --no_ssh --node_rank="$SLURM_NODEID" "$@"' "${PYTHON%/*}/deepspeed"
        --hostfile="$HOSTFILE" --master_addr="$MASTER" --master_port="$PORT" "${TRAINER[@]}") ;;
mpirun)
    export MASTER_ADDR=${MASTER_ADDR:-$MASTER} MASTER_PORT=${MASTER_PORT:-$PORT} # MPI does not say where rank 0 is
    COMMAND=("$MPIRUN" -n "$((SLURM_NNODES * SLURM_NTASKS_PER_NODE))" "$PYTHON" "${TRAINER[@]}")
    ;;
*)
    echo "error: LAUNCH must be srun, torchrun, deepspeed or mpirun, but it is $LAUNCH" >&2
    exit 2
    ;;
esac

# This shell hears SIGTERM where the whole job is ended: by scancel, or by a preemption after which SLURM itself requeues.
ended_from_outside=0
trap 'ended_from_outside=1' TERM
rc=0
"${COMMAND[@]}" &
step=$!
wait "$step" || rc=$?
while kill -0 "$step" 2>/dev/null; do # `wait` returns when the trap has run
    rc=0
    wait "$step" || rc=$?
done

# ---- what next? ----
if [ "$ended_from_outside" = 1 ]; then
    say "ended from outside at $(newest); no requeue"
    exit "$rc"
elif [ "$rc" = 85 ]; then
    say "ended early at $(newest); the job goes back into the queue"
    requeue
elif [ "$rc" = 0 ] && [ -f "$RUN_DIR/done" ]; then
    say "done: $(cat "$RUN_DIR/done")"
elif [ "$rc" = 0 ]; then
    say "failed: srun ended with 0 but $RUN_DIR/done is missing: a node failed; SLURM requeues the job if it may"
    exit 1
else
    say "failed with $rc at $(newest)"
    if [ "$RUN_DIR/crash.json" -nt "$ATTEMPTS" ]; then "$PYTHON" -m train.crash "$RUN_DIR" || true; fi
    # SLURM itself may need minutes to see that a node is dead
    lost=
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        timeout 30 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" true 2>/dev/null || lost=${lost:+$lost,}$node
    done
    if [ -n "$lost" ]; then
        say "lost nodes: $lost; they are excluded and the job goes back into the queue"
        exclude_and_requeue "$lost"
    fi
    exit "$rc"
fi
