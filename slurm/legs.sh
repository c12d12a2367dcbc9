#!/usr/bin/env bash
# dinocell_s8 on one GPU: pretraining, supervised training, tables, benchmarks. In legs, for a machine lent by the minute.
#
#   slurm/legs.sh 540 out batch=32 crop=256 compile=true    a leg of at most 540 s; the same command goes on where the last one stopped
#   PRETRAIN=480 TRAIN=840 slurm/legs.sh ... seconds for each part, all legs together: 8 and 14 minutes
#   SSL=configs/a.yaml SEG=configs/b.yaml slurm/legs.sh 540 out data.root=../data     other parts; key=value go to
#                                            train_seg.py, data.root to pretraining too
#
# Each leg may be the last: it ends with exported half-precision weights in final_models/, copied to out/ in pieces of 15 MB
# (cat out/x.pt.* > x.pt) with the logs. How many steps fit is measured once, at the start of each part, and kept.
# Of the supervised part they are those of the network for all; its decoders' are set aside.
set -uo pipefail
usage="usage: slurm/legs.sh SECONDS [OUT] [key=value ...]"
leg=${1:-}
[[ $leg =~ ^[0-9]+$ ]] || { echo "$usage"; exit 2; }
out=""
if [ $# -ge 2 ] && [[ $2 != *=* ]]; then out=$2; shift; fi
shift
cd "$(dirname "$0")/.." || exit 2
keep=runs/legs
mkdir -p "$keep"
python=${PYTHON:-python}

left() { echo $((leg - SECONDS)); }

name_of() { sed -n 's/^experiment: *//p' "$1"; }

deliver() {                                                   # what there is, in pieces that travel
    local config name
    [ -n "$out" ] || return 0
    mkdir -p "$out"
    for config in "$SSL" "$SEG"; do
        name=$(name_of "$config")
        [ -f "final_models/$name.pt" ] && rm -f "$out/$name".pt.* && split -b 15M -d "final_models/$name.pt" "$out/$name.pt."
        [ -f "runs/$name/log.jsonl" ] && cp "runs/$name/log.jsonl" "$out/$name.jsonl"
    done
    cp "$keep"/*.txt "$out" 2> /dev/null
    return 0
}

part() {                                                      # part SCRIPT CONFIG SECONDS [key=value ...]
    local script=$1 config=$2 seconds=$3 name
    shift 3
    name=$(name_of "$config")
    [ -f "$keep/$name.done" ] && return 0
    if [ ! -f "$keep/$name.steps" ]; then
        local rate then
        "$python" "$script" "$config" "$@" --check > "$keep/$name.check.txt" 2>&1 || { cat "$keep/$name.check.txt"; exit 1; }
        rate=$(sed -n 's/^\([0-9.]*\) s a step on .*/\1/p' "$keep/$name.check.txt")
        then=$(sed -n 's/^then .* decoders .*, \([0-9]*\) steps in all$/\1/p' "$keep/$name.check.txt")    # of decoders: theirs too
        awk -v s="$seconds" -v r="$rate" -v t="${then:-0}" -v w="$(sed -n 's/^warmup: *\([0-9]*\).*/\1/p' "$config")" \
            'BEGIN { n = int(s / r) - t; if (n < 2 * w) n = 2 * w; print n }' > "$keep/$name.steps"
        echo "$name: $rate s a step, $(cat "$keep/$name.steps") steps in $seconds s"
    fi
    [ "$(left)" -gt 5 ] || { deliver; exit 85; }
    timeout -s USR1 "$(left)" "$python" "$script" "$config" "steps=$(cat "$keep/$name.steps")" "$@"
    local code=$?
    # timeout says 124 when it had to signal, whatever the script then answered; training that stopped so goes on next time
    if [ "$code" -eq 124 ] || [ "$code" -eq 85 ]; then deliver; echo "leg over in $name; the same command goes on"; exit 85; fi
    [ "$code" -eq 0 ] || { deliver; exit "$code"; }
    touch "$keep/$name.done"
    deliver
}

measured() {                                                  # measured FILE SCRIPT ...: what it prints
    local file=$1 code
    shift
    [ "$(left)" -gt 5 ] || { deliver; echo "leg over while measuring; the same command goes on"; exit 85; }
    timeout "$(left)" "$python" "$@" 2>&1 | tee "$keep/$file"
    code=${PIPESTATUS[0]}
    if [ "$code" -eq 124 ]; then deliver; echo "leg over while measuring; the same command goes on"; exit 85; fi
    [ "$code" -eq 0 ] || { deliver; exit "$code"; }
}

SSL=${SSL:-configs/ssl_s8.yaml} SEG=${SEG:-configs/dinocell_s8.yaml}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2> /dev/null | tee "$keep/hardware.txt"
roots=()
for given in "$@"; do [[ $given == data.root=* ]] && roots+=("$given"); done
part train_ssl.py "$SSL" "${PRETRAIN:-480}" ${roots[@]+"${roots[@]}"}
part train_seg.py "$SEG" "${TRAIN:-840}" "init=final_models/$(name_of "$SSL").pt" "$@"
if [ "${MEASURE:-yes}" = yes ]; then
    [ "$(left)" -gt 60 ] || { echo "leg over before measuring; the same command goes on"; exit 85; }
    measured bench.txt bench/bench.py network segment train_seg ssl watershed
    measured results.txt evaluate.py bench configs/results.yaml
    cp docs/results.md "$keep/results.md.txt"
fi
deliver
