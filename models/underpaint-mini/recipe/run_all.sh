#!/bin/sh
# Train, export and judge everything: recipe/run_all.sh WORK OUT [SECONDS]
#
# WORK holds sprites.npz (recipe.prepare); SECONDS bounds the training, 400 unless said. Stages that do not need each
# other share one GPU; on a CPU they take turns. Run again, it resumes where it was stopped.
set -eu
work=$1 out=$2 total=${3:-400}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$here" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    gpu=true
    export OMP_NUM_THREADS=4
else
    gpu=false
    export OMP_WAIT_POLICY=PASSIVE
fi

stage() { # stage NAME PERCENT MODULE [OPTION...]
    name=$1 seconds=$((total * $2 / 100)) module=$3
    shift 3
    "$python" -m "recipe.$module" --work "$work" --name "$name" --seconds "$seconds" "$@" >>"$work/$name.log" 2>&1
}

# What needs nothing runs first, what needs the autoencoder and the CLIP after them. Shares are of the time on a GPU,
# where the first line's stages run together and so do the second line's; on a CPU all five add up to the whole.
if $gpu; then
    stage vae 35 train_vae & vae=$!
    stage clip 35 train_clip & clip=$!
    wait $vae
    wait $clip
    stage unet 65 train_unet & unet=$!
    stage ddpm 50 train_ddpm & ddpm=$!
    stage judge 35 train_clip --seed 1 & judge=$!
    wait $unet
    wait $ddpm
    wait $judge
else
    stage vae 12 train_vae
    stage clip 16 train_clip
    stage unet 46 train_unet
    stage ddpm 14 train_ddpm
    stage judge 12 train_clip --seed 1
fi
"$python" -m recipe.export --work "$work" --out "$out"
"$python" -m recipe.evaluate --work "$work" --model new="$out" ${FIRST:+--model first="$FIRST"} | tee "$work/figures.md"
