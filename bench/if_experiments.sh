#!/usr/bin/env bash
# Experiments 1 to 5 of fine-tuning, end to end on drawn donors and with the small network: that every step runs, and
# what the tables look like. Scores of drawn fields say nothing about immunofluorescence.
#   STEPS=30 bench/if_experiments.sh            19 trainings of so many steps, each with a validation
# Own tiles: leave out the first two commands, SMALL and the sed; the configurations say the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
STEPS=${STEPS:-30}
SMALL=(init=final_models/dinocell_tiny.pt crop=128 batch=8 steps="$STEPS" warmup=5 val_every="$STEPS" log_every=10
       ema=0.9 lr=1e-4)
mkdir -p dat
for name in if_e1 if_e2 if_e4; do sed s/dinocell_s8/dinocell_tiny/g configs/$name.yaml > dat/$name.yaml; done

python bench/draw_donors.py out=dat/drawn_if
python data.py split dat/drawn_if by=donor fractions=0.6,0.2,0.2 out=dat/if
for part in train validation; do
    python data.py convert dat/if/$part dat/if_AT8/$part match=AT8
    python data.py convert dat/if/$part dat/if_marker_only/$part channels=marker
done
# 1: five recipes
python train_seg.py configs/if_generic.yaml "${SMALL[@]}"
python train_seg.py configs/if_marker.yaml "${SMALL[@]}"
python train_seg.py configs/if_hybrid.yaml "${SMALL[@]}" init=final_models/if_generic.pt lr=3e-5
python train_seg.py configs/if_marker_only.yaml "${SMALL[@]}"
python evaluate.py bench dat/if_e1.yaml
# 2: how many labelled tiles
for n in 2 5 10 20 30; do for s in 0 1 2; do
    python train_seg.py configs/if_budget.yaml "${SMALL[@]}" data.limit=$n seed=$s experiment=if_budget/tuned_${n}_$s
done; done
python evaluate.py bench dat/if_e2.yaml
# 3: post-processing of saved predictions; 4: label folders of other programs, where there are any
python evaluate.py gating configs/gating.yaml predictions=runs/if_e1/generic root=dat/if experiment=if_e3 marker=2 \
    "sets=[{name: all_markers, path: test}]"
python evaluate.py bench dat/if_e4.yaml
# 5: the share of AT8-positive cells of each donor against outcomes: one is the share that was drawn, one is by lot
python downstream.py configs/downstream.yaml tiles=dat/drawn_if outcomes=dat/drawn_if/outcomes.tsv out=runs/if_e5 \
    'pattern=AT8_\d+_b0c(?P<channel>\d+)' 'columns=[share,lot]' min_tiles=2 min_cells=20 "models=[{name: baseline, weights: final_models/dinocell_tiny.pt},
    {name: finetuned, weights: final_models/if_generic.pt}]"
