#!/usr/bin/env bash
# One training job; edit the lines below for your cluster, or override them on the command line of sbatch.
#
#   python train_seg.py configs/seg.yaml --check                          first: does it fit, how long will it take
#   sbatch slurm/train.sh train_seg.py configs/seg.yaml [key=value ...]
#   sbatch --gres=gpu:a40:1 --time=12:00:00 slurm/train.sh train_seg.py configs/seg_s8_a40.yaml
#   sbatch --nodes=2 --gres=gpu:a100:4 slurm/train.sh train_ssl.py configs/ssl.yaml
#
# Two minutes before the time is up, Slurm sends SIGUSR1: the script saves, exits with 85, and the job queues itself
# again; started again, the same command goes on from there. The same after preemption (SIGTERM).
#SBATCH --job-name=dinocell
#SBATCH --partition=gpu
#SBATCH --gres=gpu:a100:1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=56:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%x-%j.log

set -uo pipefail
[ $# -ge 2 ] || { echo "usage: sbatch slurm/train.sh SCRIPT.py CONFIG.yaml [key=value ...]"; exit 2; }
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ -f "$1" ] || { echo "error: $1 is not in $PWD; submit from the repository's folder"; exit 2; }
[ -n "${VENV:-}" ] && . "$VENV/bin/activate"              # VENV=/path/to/venv sbatch ...
mkdir -p runs

# one process for each GPU; srun hands signals and exit codes through, which torchrun would not
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
gpus=${SLURM_GPUS_ON_NODE:-1}
srun --ntasks-per-node="$gpus" --ntasks=$((SLURM_JOB_NUM_NODES * gpus)) --cpus-per-task=$((SLURM_CPUS_ON_NODE / gpus)) \
    --kill-on-bad-exit=0 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python "$@"' train "$@"
code=$?
if [ "$code" -eq 85 ]; then
    echo "saved before the end; queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
