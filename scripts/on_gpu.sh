#!/usr/bin/env bash
# Tries this project on a machine with one GPU and measures it, in at most LIMIT seconds (540 unless set):
#   bash scripts/on_gpu.sh FOLDER [PHASE...]
# The phases, with the seconds that each may take:
#   facts    45   versions; rates of the device, of its copies and of each attention kernel; pinned memory
#   prepare  75   models with random weights and two clips, written to $TMPDIR: 16 GB
#   step    190   a training step of the 5B, with diffusers' example's way first: time, memory, loss (11 GB more)
#   run     110   the 2B script as a user runs it: encoding, steps in fp16, SIGTERM, resuming, a sample
#   card     70   the 5B's smallest setting, the base in host memory, with 4 GiB for torch
#   image   110   the 5B-I2V script at its smallest, with two samples, while another process holds all but 6 GiB
#   text     45   T5-XXL for one prompt, on the device and on the CPU
#   more    200   a step of the 5B in further settings
#   long    110   a step of CogVideoX 1.5 (11 GB more)
# The first seven run unless phases are named, the most valuable first. run and image need what prepare has written.
# A phase that fails or lasts too long ends alone. When LIMIT is reached, the others are left out.
#
# FOLDER gets log.txt (all that was printed), table.txt (its tables, which are also printed last) and five JSON files at
# most. A second call with the same FOLDER adds to them. docs/testing.md says how to send them in.
# Without a GPU all models are tiny, to try this script itself. The models stay in $TMPDIR/on_gpu and may be deleted.
set -u

export out=${1:?bash scripts/on_gpu.sh FOLDER [PHASE...]}
shift
mkdir -p "$out" || exit
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
phases=${*:-facts prepare step run card image text}
limit=${LIMIT:-540}

export python=${PYTHON:-python3} tiny='' models=${TMPDIR:-/tmp}/on_gpu smallest="base on the host, offloaded, 8-bit Adam"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
unset PYTHONDONTWRITEBYTECODE  # a dozen programs start here: with bytecode files each takes half the time to load
if ! nvidia-smi -L >/dev/null 2>&1; then
    tiny=tiny-  # before a model's name
    models+=/tiny
    export ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1
fi
mkdir -p "$models" || exit

facts() {
    [ -n "$tiny" ] || nvidia-smi --query-gpu=name,memory.total,memory.free,driver_version --format=csv
    $python benchmarks/device_facts.py --results "$out/facts.json" --disk "$models"
}

prepare() {
    $python benchmarks/make_model.py "$models" "${tiny}2b" "${tiny}5b-i2v"
}

measure_step() {  # measure_step MODEL RESULTS STEPS SETTING...
    local name=$tiny$1 results=$out/$2.json steps=$3
    shift 3
    $python benchmarks/train_step.py "$name" --rank 64 --steps "$steps" --model_folder "$models/step-$name" \
        --results "$results" ${gib:+--gib "$gib"} --settings "$@"
}

step() {
    measure_step 5b step 2 "diffusers' example" recomputed "library's blocks" "cuDNN attention" "attention kept" \
        offloaded "base on the host" "base on the host, offloaded"
}

card() {
    gib=4 measure_step 5b card 2 "$smallest"
}

more() {
    measure_step 5b more 2 recomputed "flash attention" "efficient attention" "no recomputation" \
        "compiled, attention kept" compiled
}

long() {
    measure_step 1.5-5b long 1 "$smallest"
}

set_flags() {  # set_flags MODEL DTYPE: of both scripts, in the array `flags`
    local size=(--height 480 --width 720 --max_num_frames 49) dtype=$2
    if [ -n "$tiny" ]; then
        size=(--height 64 --width 96 --max_num_frames 9)
        dtype=no
    fi
    output=$models/run-$1
    flags=(
        --pretrained_model_name_or_path "$models/$tiny$1" --instance_data_root "$models/clips"
        --caption_column prompts.txt --video_column videos.txt --precompute_dir "$models/encoded-$1"
        --output_dir "$output" "${size[@]}" --mixed_precision "$dtype" --rank 64 --lora_alpha 64 --learning_rate 1e-3
        --train_batch_size 1 --gradient_checkpointing --num_inference_steps 2 --seed 0
    )
}

count_steps() {  # of the run in $output
    cat "$output/metrics.jsonl" 2>/dev/null | wc -l
}

run() {  # stopped after three steps, resumed for two more, with a sample at the end
    set_flags 2b fp16
    rm -rf "$output"
    $python train_cogvideox_lora.py "${flags[@]}" --max_train_steps 1000 --dataloader_num_workers 2 &
    local process=$! code=0
    while kill -0 $process 2>/dev/null && [ "$(count_steps)" -lt 3 ]; do
        sleep 0.2
    done
    kill -TERM $process
    wait $process || code=$?
    echo "| exit code after SIGTERM (143 is right) | $code |"
    $python train_cogvideox_lora.py "${flags[@]}" --max_train_steps $(($(count_steps) + 2)) \
        --resume_from_checkpoint latest --checkpoint_policy attention --validation_prompt "a red square" || code=1
    $python benchmarks/run_table.py "$output"
    [ $code = 143 ] && [ -s "$output/pytorch_lora_weights.safetensors" ]
}

image() {  # two samples of one prompt, before the first step and after the last one
    set_flags 5b-i2v bf16
    rm -rf "$output"
    if [ -z "$tiny" ]; then
        rm -f "$models/held"
        $python benchmarks/hold_memory.py 6 >"$models/held" &
        local holder=$!
        trap 'kill $holder' EXIT
        until [ -s "$models/held" ]; do
            kill -0 $holder || return  # it could not take the memory
            sleep 0.2
        done
        cat "$models/held"
    fi
    $python train_cogvideox_image_to_video_lora.py "${flags[@]}" --max_train_steps 2 --offload_activations \
        --use_8bit_adam --offload_base --num_validation_videos 2 --validation_prompt "a red square" \
        --validation_images "$models/start.png" || return
    $python benchmarks/run_table.py "$output"
    [ "$(find "$output/validation" -name '*.mp4' | wc -l)" = 4 ]
}

text() {
    $python benchmarks/text_encoder.py ${tiny:+--tiny}
}

run_phase() {  # run_phase NAME SECONDS: of these, no more than are left
    local most=$2 left=$((limit - SECONDS - 5)) begun=$SECONDS code
    [ "$left" -lt "$most" ] && most=$left
    printf '\n==== %s, at %s s\n' "$1" "$SECONDS"
    if [ "$most" -lt 1 ]; then
        echo "| phase $1 | no time |"
        return
    fi
    # A program that goes on after SIGTERM would hold the GPU in later phases. The phase waits for it, and both are
    # killed 5 seconds later.
    timeout -k 5 "$most" bash -c "trap 'wait; exit 124' TERM; $1"
    code=$?
    echo "| phase $1 | $((SECONDS - begun)) s of $most | exit code $code |"
}

export -f facts prepare measure_step step card more long set_flags count_steps run image text
declare -A seconds=(
    [facts]=45 [prepare]=75 [step]=190 [run]=110 [card]=70 [image]=110 [text]=45 [more]=200 [long]=110
)
for name in $phases; do
    if [ -n "${seconds[$name]:-}" ]; then
        run_phase "$name" "${seconds[$name]}" 2>&1
    else
        echo "| phase $name | there is no such phase |"
    fi
done | tee -a "$out/log.txt"
grep '^|' "$out/log.txt" | sed 's/^| phase .*/&\n/' >"$out/table.txt"
printf '\n==== table, at %s s\n' "$SECONDS"
cat "$out/table.txt"
