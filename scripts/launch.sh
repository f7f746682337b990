#!/usr/bin/env bash
# Runs `accelerate launch` with the arguments given, and passes signals on. The other scripts here use it:
#   bash scripts/launch.sh --config_file accelerate_configs/single_gpu.yaml train_cogvideox_lora.py ...
# Without it, SIGTERM to `accelerate launch` ends the launcher only: the trainer goes on and keeps the GPU. Here the
# launcher and the trainer are one process group, and a signal to this script is sent to every process of that group.
# The exit code is 143 after SIGTERM, 130 after Ctrl-C, and that of the launcher else: 1 for every other failure.
set -euo pipefail

# At a signal, accelerate and torch print a traceback of the launcher, among which the trainer's own words are lost.
# This Python program runs the file `accelerate` without it.
without_traceback='
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except KeyboardInterrupt:
    sys.exit(130)
except Exception as error:
    if not hasattr(error, "sigval"):  # the signal that ended a launcher of several processes
        raise
    sys.exit(128 + error.sigval)
'
if ! program=$(command -v accelerate); then
    echo "launch.sh: accelerate is not installed here: pip install -r requirements.txt" >&2
    exit 127
fi
read -r first_line <"$program" || true
launcher=("$program")
if [[ $first_line == "#!"*python* ]]; then
    read -ra interpreter <<<"${first_line#??}"
    launcher=("${interpreter[@]}" -c "$without_traceback" "$program")
fi

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
"${launcher[@]}" launch --quiet "$@" &
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
