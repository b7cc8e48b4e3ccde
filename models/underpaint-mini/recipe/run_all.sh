#!/bin/sh
# Train, export and judge everything: [FIRST=DIR] recipe/run_all.sh WORK OUT [SECONDS]
#
# WORK holds sprites.npz (recipe.prepare); SECONDS bounds the training, 400 unless said; DIR is an earlier export to
# compare with. Stages that do not need each other share one GPU; on a CPU they take turns. Run again, it resumes where
# it was stopped.
set -eu
work=$1 out=$2 total=${3:-400}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$work"
export PYTHONPATH="$here" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    gpu=true
    export OMP_NUM_THREADS=4
else
    gpu=false
fi

stage() { # stage NAME PERCENT MODULE [OPTION...]
    name=$1 seconds=$((total * $2 / 100)) module=$3
    shift 3
    "$python" -m "recipe.$module" --work "$work" --name "$name" --seconds $((seconds > 0 ? seconds : 1)) "$@" \
        >>"$work/$name.log" 2>&1 || { echo "recipe.$module failed:" && tail -n 5 "$work/$name.log"; exit 1; } >&2
}

all() { # all JOB...: wait for each to end, and fail if one did
    failed=0
    for job; do wait "$job" || failed=1; done
    return $failed
}

# What needs nothing runs first, what needs the autoencoder and the text tower after them. Shares are of the time: on a GPU
# the first two stages run together and so do the other four; on a CPU all six add up to the whole.
if $gpu; then
    stage vae 25 train_vae & vae=$!
    stage text 15 train_text & text=$!
    all $vae $text
    stage unet 70 train_unet & unet=$!
    stage clip 60 train_clip & clip=$!
    stage judge 60 train_clip --seed 1 & judge=$!
    stage ddpm 60 train_ddpm & ddpm=$!
    all $unet $clip $judge $ddpm
else
    stage vae 8 train_vae
    stage text 2 train_text
    stage clip 15 train_clip
    stage judge 15 train_clip --seed 1
    stage unet 45 train_unet
    stage ddpm 15 train_ddpm
fi
"$python" -m recipe.export --work "$work" --out "$out"
"$python" -m recipe.evaluate --work "$work" ${FIRST:+--model first="$FIRST"} --model new="$out" >"$work/figures.md"
cat "$work/figures.md"
