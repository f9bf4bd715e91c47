#!/bin/bash
#SBATCH --job-name=esm2_650m
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1       # a launcher a node; it starts a rank for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0                   # all of the node's
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300       # five minutes before the time is over, to this script
#SBATCH --requeue
#SBATCH --open-mode=append

# What to train: sbatch docs/jobs/slurm.sh yamls/NAME.yaml key=value ..., or without arguments this.
if [ $# -eq 0 ]; then
    set -- yamls/650m.yaml data.remote=/shared/uniref50 "data.local=/local/$USER/uniref50" \
        save_folder=/shared/runs/esm2_650m/checkpoints
fi

source .venv/bin/activate
export GPUS=8 WORLD_SIZE=$((8 * SLURM_JOB_NUM_NODES)) MASTER_PORT=29500
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export TMPDIR="/local/$USER/tmp"  # on each node, the same at every start
export TRITON_CACHE_DIR="$TMPDIR/triton"  # not in a home folder that many nodes share, and collide in

# A rank that gets SIGUSR1 makes all finish their update, save and leave, however long that takes.
trap "srun --overlap --nodes=1 --ntasks=1 pkill --oldest --signal USR1 --full 'python[^ ]* [^ ]*train.py'" USR1

# SLURM 22.05 to 23.02 do not hand --cpus-per-task on to srun.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    mkdir -p "$TMPDIR"
    NODE_RANK=$SLURM_NODEID exec composer --nproc "$GPUS" train.py "$@"
' bash "$@" &
wait $!
code=$?
if [ "$code" -eq 138 ]; then          # SIGUSR1 ended the wait, and nothing else
    wait $!
    code=$?
fi
case "$code" in
    0 | 2 | 3) ;;                     # done, a mistake, diverged: the same command would not go on
    75) scontrol requeue "$SLURM_JOB_ID" ;;
    *)                                # a lost node, a store that was away
        if [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
            scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
esac
exit "$code"
