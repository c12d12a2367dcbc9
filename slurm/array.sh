#!/usr/bin/env bash
# Many images or tiles shared out over a job array: each job runs SCRIPT ... shard=i/n with i its number and n their
# count. Run on the login node it checks there what is to be done, and submits itself; flags before the script's name,
# all written --name=value, are sbatch's and override the lines below.
#
#   slurm/array.sh --array=1-16 infer.py plates/ out=cells                       images; a table for each shard
#   slurm/array.sh --array=1-64 infer.py s3://bucket/plates out=s3://mine/cells
#   slurm/array.sh --array=1-16 --gres=gpu:a40:1 --mem=64G downstream.py infer configs/downstream.yaml [key=value ...]
#   SHARDS=16 slurm/array.sh --array=3 downstream.py infer configs/downstream.yaml      one of them again
#   python downstream.py merge configs/downstream.yaml                    when all are done; it says if one is not
#   sbatch [flags] slurm/array.sh SCRIPT.py ...                           no check
#
# Everything is printed into runs/<script>/logs/<job>_<shard>.log. VENV=/path/to/venv activates that environment.
# Two minutes before the time is up, Slurm sends SIGUSR1: the script ends with its image and exits with 85, and the
# job queues itself again; it goes on with the next image. The same after preemption (SIGTERM).
#SBATCH --job-name=dinocell-array
#SBATCH --partition=gpu
#SBATCH --gres=gpu:a100:1
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.log

set -uo pipefail
flags=()
while [[ "${1:-}" == --* ]]; do flags+=("$1"); shift; done
jobs=""                                                    # as sbatch takes them, but not this script
[[ " ${flags[*]-}" == *" --array" ]] && jobs=${1:-1-16}
[ "${1:-}" = -a ] && jobs=${2:-1-16}
[ -z "$jobs" ] || { echo "error: a blank where = is expected; write --array=$jobs"; exit 2; }
usage="usage: slurm/array.sh --array=1-16 [--flag=value ...] SCRIPT.py [WORDS ...] [key=value ...]"
[ $# -ge 2 ] || { echo "$usage"; exit 2; }
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit 2
[ -f "$1" ] || { echo "error: $1 is not in $PWD; submit from the repository's folder"; exit 2; }
[ -z "${VENV:-}" ] || . "$VENV/bin/activate" || exit 2

if [ -z "${SLURM_JOB_ID:-}${SLURM_ARRAY_TASK_ID:-}" ]; then          # on the login node
    [[ " ${flags[*]-} " == *" --array="* ]] || { echo "error: no job array; $usage"; exit 2; }
    [[ -n "${SHARDS:-}" || " ${flags[*]} " =~ \ --array=1-[0-9]+(%[0-9]+)?\  ]] || {
        echo "error: --array does not run from 1 to n; say --array=1-n, or SHARDS=n before the command"; exit 2; }
    [[ " $* " != *" overwrite=true "* ]] || {
        echo "error: overwrite=true would begin anew whenever the job is queued again; give another out="; exit 2; }
    python "$@" --check || exit 1
    logs="runs/$(basename "$1" .py)/logs"
    mkdir -p "$logs" || exit 1
    exec sbatch --output="$logs/%A_%a.log" "${flags[@]}" slurm/array.sh "$@"
fi
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || { echo "error: no job array; $usage"; exit 2; }
if [ "$SLURM_ARRAY_TASK_MIN" -ne 1 ] || [ "$SLURM_ARRAY_TASK_MAX" -ne "$SLURM_ARRAY_TASK_COUNT" ]; then
    # --array=3 alone, to do a shard again: the count must come from the first time
    [ -n "${SHARDS:-}" ] || { echo "error: --array does not run from 1 to n; say SHARDS=n before the command"; exit 2; }
fi

# srun, not python alone: it hands on the signal that Slurm sends to steps
srun --ntasks=1 python "$@" "shard=$SLURM_ARRAY_TASK_ID/${SHARDS:-$SLURM_ARRAY_TASK_COUNT}"
code=$?
if [ "$code" -eq 85 ]; then
    echo "stopped before the end; queued again"
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
