#!/usr/bin/env bash
# What needs a GPU, in a few minutes on a bare machine with the packages of requirements.txt:
#
#     bash benchmarks/gpu.sh OUT DATA.tar [WEIGHTS.pth]
#
# (a) the tests marked cuda, (b) speeds against the textbook form, (c) for the rest of the time, training:
# options/train_lite.yml on DATA.tar (python -m benchmarks.pack ROOT DATA.tar), from WEIGHTS.pth where it is
# given, with a large batch. What fails does not keep the rest from running; the exit status says that
# something did. OUT gets at most 8 files, each below 16 MB. Settings by environment: MINUTES, in all; DEVICE;
# BATCH; STEPS instead of an estimate; SPEED, TRAIN and TESTS, arguments instead.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "$1") data=$(realpath "$2") weights=${3:+$(realpath "$3")}
minutes=${MINUTES:-8} device=${DEVICE:-cuda}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
left() { awk -v total="$minutes" -v gone="$SECONDS" 'BEGIN {print int(60 * total - gone)}'; }
note() { echo "== $SECONDS s: $*" | tee -a "$out/summary.txt"; }

note "tests"
# Not through a pipe, which workers of the compiler would keep open.
timeout 150 python3 -m pytest -v -m cuda -rs ${TESTS:-} > "$out/tests.txt" 2>&1 || failed=1
cat "$out/tests.txt"
note "speed"
timeout 180 python3 -m benchmarks.speed --device "$device" --out "$out/speed.csv" \
    ${SPEED:---what forward step step_recompute inference --sizes 512 --repeats 2} 2>&1 | tee "$out/speed.txt" || failed=1
note "training"
mkdir "$work/data" && tar -xf "$data" -C "$work/data" || failed=1
train() {   # NAME STEPS ...: a run of so many steps on the packed images, with more settings
    timeout -s TERM "$(($(left) - 20))" python3 train.py --opt options/train_lite.yml --set root="$work/data" \
        output="$work" name="$1" steps="$2" batch="${BATCH:-48}" patch=128 progressive=[] \
        workers=8 save_every=100000 validation.every=100000 warmup=20 ${TRAIN:-} \
        ${weights:+pretrained="$weights"} "${@:3}"
}
probe=${PROBE:-60}
train probe "$probe" log_every=$((probe / 2)) validation.sets=[] > "$out/train.txt" 2>&1 || failed=1
rate=$(awk -F, 'NR == 2 {s = $1; t = $2} END {if ($2 > t) print ($1 - s) / ($2 - t)}' "$work/probe/losses.csv")
steps=${STEPS:-$(awk -v rate="${rate:-0}" -v left="$(left)" 'BEGIN {print int(rate * (left - 60) * 0.9)}')}
note "${rate:-no} steps a second: $steps steps"
if [ "$steps" -gt "$probe" ]; then
    train trained "$steps" ema=0.998 log_every=$((steps / 20 + 1)) >> "$out/train.txt" 2>&1 || failed=1
    cp "$work"/trained/{losses.csv,validation.csv,options.yml} "$out"
    python3 -m benchmarks.give_away "$work/trained/last.pth" "$out/weights.pth" || failed=1
fi
note "done, failed: $failed"
exit "$failed"
