# How a job goes back into the queue, and what it does not go back for: sourced by train_1b.sh, which calls these in the order of its life.
# What puts the job back ends the script. None of it happens after a scancel: the job would come back from the dead.

RESTARTS=${SLURM_RESTART_COUNT:-0} # not set in the first start
# Of an array one element's number is also that of the whole, and `scontrol requeue` would take them all.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
# This shell hears SIGTERM where the whole job is ended: by scancel, or by a preemption after which SLURM itself requeues.
ended_from_outside=0
trap 'ended_from_outside=1' TERM

say() { echo "$(date +%FT%T) [job $SLURM_JOB_ID, restart $RESTARTS] $*"; }

newest() { # the checkpoint that `latest` names, as in: CHECKSUM  step_000100/manifest.json
    [ -f "$RUN_DIR/checkpoints/latest" ] && sed 's|.* \(step_[0-9]*\)/.*|\1|' "$RUN_DIR/checkpoints/latest" || echo "the beginning"
}

stop_if_ended() {
    [ "$ended_from_outside" = 1 ] || return 0
    say "ended from outside at $(newest); no requeue"
    exit 143
}

requeue() { # why
    stop_if_ended
    say "$1; the job goes back into the queue"
    trap - TERM # the requeue ends this script: at once, which a trap would put off to the end of the sleep
    if ! scontrol requeue "$JOB"; then
        say "stopped: the job cannot be requeued (see above); to go on: sbatch with the same RUN_DIR"
    else
        sleep 60
    fi
    exit 1
}

exclude_and_requeue() { # a comma list of nodes, and what they are
    local job all asked node nodes left
    if ! job=$(scontrol show job "$JOB"); then
        stop_if_ended
        say "stopped: $2: $1, but SLURM does not tell of the job (see above); to go on: sbatch --exclude=$1 with the same RUN_DIR"
        exit 1
    fi
    all=$(sed -n 's/.*ExcNodeList=\([^ (]\+\).*/\1/p' <<<"$job") # (null): none
    all=$1${all:+,$all}
    asked=$(sed -n 's/.*ReqNodeList=\([^ (]\+\).*/\1/p' <<<"$job")
    for node in ${asked:+$(scontrol show hostnames "$asked")}; do
        if [[ ",$1," == *",$node,"* ]]; then
            say "stopped: $2: $1, but the job asks for $node by name; to go on: sbatch with another --nodelist and the same RUN_DIR"
            exit 1
        fi
    done
    nodes=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N | sort -u || true) # nothing: SLURM does not tell
    left=$(grep -cvxFf <(scontrol show hostnames "$all") <<<"$nodes" || true)
    if [ "$left" = 0 ]; then
        say "stopped: $2: $1, and without $all the partition $SLURM_JOB_PARTITION has no node left; to go on: sbatch when they are repaired"
        exit 1
    fi
    stop_if_ended
    say "$2: $1; they are excluded and the job goes back into the queue"
    if [ -n "$nodes" ] && [ "$left" -lt "$SLURM_NNODES" ]; then # whether it may be smaller, SLURM does not tell a job
        say "without $all the partition $SLURM_JOB_PARTITION has $left node(s), and this start had $SLURM_NNODES: a job of a fixed size waits" \
            "for ever; then: scancel $JOB, and sbatch with a smaller --nodes and the same RUN_DIR"
    fi
    trap '' TERM # requeueing ends this script; the lines after it need a moment
    if ! scontrol requeuehold "$JOB"; then # a job that runs cannot be changed
        say "stopped: the job cannot be requeued (see above); to go on: sbatch --exclude=$all with the same RUN_DIR"
    elif ! scontrol update jobid="$JOB" ExcNodeList="$all"; then # released, it would start on the bad node again and again
        say "held: $1 cannot be excluded (see above); to go on: scancel $JOB, then sbatch --exclude=$all with the same RUN_DIR"
    elif ! scontrol release "$JOB"; then
        say "held: to go on: scontrol release $JOB"
    fi # what SLURM now sends this script is ignored: only its end lets the nodes go before KillWait is over
    exit 1
}

answers() { timeout -k 10 30 srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" true 2>/dev/null; }

exclude_lost_nodes() { # SLURM itself may need minutes to see that a node is dead
    local node lost=
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        for _ in 1 2; do # twice, because a controller that starts anew is silent for seconds, of every node
            stop_if_ended
            if answers "$node"; then continue 2; fi
            if ! answers "$SLURMD_NODENAME"; then # this script runs there
                say "no node can be asked whether it lives: SLURM itself does not answer"
                return
            fi
            sleep 10
        done
        lost=${lost:+$lost,}$node
    done
    [ -z "$lost" ] || exclude_and_requeue "$lost" "lost nodes"
}
