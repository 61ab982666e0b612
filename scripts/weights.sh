#!/bin/sh
# Everything in data/weights, from nothing: worlds, teachers, students, in this order. Hours on a CPU; goes on where it was stopped.
# Another world's students need other folders: the names of data/weights end in the world's digest.
set -eu
cd "$(dirname "$0")/.."
kdlab=.venv/bin/kdlab
size="--seed 7 --image-width 352 --image-height 198 --sweeps-per-keyframe 2"

$kdlab simulate data/world --scenes 30 --keyframes 14 $size
$kdlab simulate data/short --scenes 12 --keyframes 10 $size

# Teachers; the notebook's world is the short one.
$kdlab train tiny lidar --data data/short --epochs 40 --train.batch-size 4 --data.workers 1 --out runs/short-lidar
$kdlab train tiny lidar --data data/world --epochs 20 --data.workers 1 --out runs/lidar
$kdlab train tiny fusion --data data/world --epochs 20 --train.batch-size 4 --data.workers 1 --out runs/fusion
for run in short-lidar lidar fusion; do $kdlab evaluate --run runs/$run --split sim_val; done
.venv/bin/python -m kdlab.shipping runs/short-lidar=lidar runs/lidar=lidar runs/fusion=fusion

# Students: seed 0 of the core tables.
$kdlab train tiny camera --data data/world --epochs 16 --train.batch-size 4 --data.workers 1 --seed 100 --out runs/start
$kdlab ablate studies/core.toml
$kdlab ablate studies/simdistill.toml
ship() { .venv/bin/python -m kdlab.shipping "$(echo runs/"$1"/seed0-*)=$2"; }
ship core/base camera
for name in unidistill distillbev labeldistill; do ship "core/$name" "$name"; done
ship simdistill/simdistill simdistill
