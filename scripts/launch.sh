#!/usr/bin/env bash
# Runs `accelerate launch` with the arguments given, and passes signals on. The other scripts here use it:
#   bash scripts/launch.sh --config_file accelerate_configs/single_gpu.yaml train_cogvideox_lora.py ...
# Without it, SIGTERM to `accelerate launch` ends the launcher only: the trainer goes on and keeps the GPU. Here the
# launcher and the trainer are one process group, and a signal to this script is sent to every process of that group.
# The exit code is 143 after SIGTERM, 130 after Ctrl-C, and that of the launcher else: 1 for every other failure.
set -euo pipefail

running() {  # A process that has ended, but that its parent did not collect (state Z), does not count.
    awk -v group="$group" '$5 == group && $3 != "Z" { found = 1 } END { exit !found }' \
        < <(cat /proc/[0-9]*/stat 2>/dev/null)
}

pass_on() {
    signalled=yes
    kill "-$1" -- "-$group" 2>/dev/null || true
}

signalled=
set -m  # gives the next background job a process group of its own, and leaves Ctrl-C enabled in it
accelerate launch --quiet "$@" &
group=$!
set +m
trap 'pass_on TERM' TERM HUP
trap 'pass_on INT' INT

wait "$group" || true  # returns early at a signal
while [ -n "$signalled" ] && running; do  # the launcher may end while the trainer still writes its checkpoint
    sleep 0.2
done
code=0
wait "$group" || code=$?
exit "$code"
