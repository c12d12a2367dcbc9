#!/usr/bin/env bash
# A training job. Run on the login node it checks the configuration there and submits itself; flags before the
# script's name, all written --name=value, are sbatch's and override the lines below.
#
#   slurm/train.sh train_seg.py configs/seg.yaml [key=value ...]                    one A100, 56 hours at most
#   slurm/train.sh --gres=gpu:a40:1 --mem=64G --cpus-per-task=8 --time=12:00:00 train_seg.py configs/seg_s8_a40.yaml
#   slurm/train.sh --nodes=2 --gres=gpu:a100:4 --cpus-per-task=64 --mem=256G train_ssl.py configs/ssl.yaml
#   sbatch [flags] slurm/train.sh train_ssl.py configs/ssl.yaml [key=value ...]     no check (instruct.py has none)
#
# --mem and --cpus-per-task are of one node: with 4 GPUs ask for 4 times as much. The partition `gpu` has 4 GPUs on
# each of 2 nodes; --partition=NAME takes another. VENV=/path/to/venv before the command activates that environment.
# Everything is printed into runs/<experiment>/logs/slurm-<job>.log.
#
# Two minutes before the time is up Slurm sends SIGUSR1: the script saves, exits with 85, and the job is queued again;
# the same command then goes on from there. What Slurm preempts (SIGTERM) is saved too, and Slurm itself queues it again
# (--requeue). scancel ends this shell as well, so that a cancelled job stays cancelled.
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
#SBATCH --output=slurm-%j.log

set -uo pipefail
flags=()
while [[ "${1:-}" == --* ]]; do flags+=("$1"); shift; done
[ $# -ge 2 ] || { echo "usage: slurm/train.sh [--flag=value ...] SCRIPT.py CONFIG.yaml [key=value ...]"; exit 2; }
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
[ -f "$1" ] || { echo "error: $1 is not in $PWD; submit from the repository's folder"; exit 2; }
[ -z "${VENV:-}" ] || . "$VENV/bin/activate" || exit 2

# where this configuration's run folder is; a mistake in the configuration ends here
logs=$(python - "$@" <<'PYTHON'
import importlib, sys
from pathlib import Path
sys.path.insert(0, ".")
import runs

def say() -> int:
    files, overrides = runs.split_arguments(sys.argv[2:])
    given = next((name for name in files if name.endswith((".yaml", ".yml"))), None)
    config = runs.load_config(importlib.import_module(Path(sys.argv[1]).stem).Config, given, overrides)
    print(Path(config.output_base_dir) / "runs" / config.experiment / "logs")
    return 0

sys.exit(runs.guarded(say))
PYTHON
) || exit 1
mkdir -p "$logs" || exit 1

if [ -z "${SLURM_JOB_ID:-}" ]; then                       # on the login node
    python "$@" --check || exit 1
    exec sbatch --output="$logs/slurm-%j.log" "${flags[@]+"${flags[@]}"}" slurm/train.sh "$@"
fi
echo "log: $logs/slurm-$SLURM_JOB_ID.log"
exec >>"$logs/slurm-$SLURM_JOB_ID.log" 2>&1

# One process for each GPU. srun hands signals and exit codes through, which torchrun would not; it waits ten minutes
# for the others when one ends, so that the first can save, and none hangs for ever when one has failed.
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) PYTHONUNBUFFERED=1
gpus=${SLURM_GPUS_ON_NODE:-1}
srun --ntasks-per-node="$gpus" --ntasks=$((SLURM_JOB_NUM_NODES * gpus)) --cpus-per-task=$((SLURM_CPUS_ON_NODE / gpus)) \
    --kill-on-bad-exit=0 --wait=600 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python "$@"' train "$@"
code=$?
if [ "$code" -eq 85 ]; then
    echo "saved before the end; queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
