#!/usr/bin/env bash
# Text-to-video LoRA on one GPU. Edit the settings, or override them from the environment:
#   MODEL=THUDM/CogVideoX-5b MIXED_PRECISION=bf16 DATA=~/my_clips bash scripts/train_t2v_single_gpu.sh
# Flags given to this script are passed on and win over those here.
set -euo pipefail

MODEL=${MODEL:-THUDM/CogVideoX-2b}             # 2b was trained in fp16, 5b in bf16
MIXED_PRECISION=${MIXED_PRECISION:-fp16}
DATA=${DATA:?set DATA to the folder of prompts.txt, videos.txt and the clips}
OUTPUT=${OUTPUT:-cogvideox-lora}
CACHE=${CACHE:-$HOME/.cache/huggingface/hub}   # downloaded models
RANK=${LORA_RANK:-64}
EPOCHS=${EPOCHS:-30}
PROMPTS=${PROMPTS:-}                           # validation prompts, joined by :::

here=$(cd "$(dirname "$0")/.." && pwd)
CONFIG=${CONFIG:-$here/accelerate_configs/single_gpu.yaml}
LAUNCH=${LAUNCH:-}                             # more flags for accelerate launch

validation=()
if [ -n "$PROMPTS" ]; then
    validation=(--validation_prompt "$PROMPTS" --validation_prompt_separator ::: --num_validation_videos 1
                --validation_epochs 10)
fi

# shellcheck disable=SC2086
exec accelerate launch --quiet --config_file "$CONFIG" $LAUNCH --mixed_precision "$MIXED_PRECISION" \
    "$here/train_cogvideox_lora.py" \
    --gradient_checkpointing \
    --pretrained_model_name_or_path "$MODEL" \
    --cache_dir "$CACHE" \
    --enable_tiling \
    --enable_slicing \
    --instance_data_root "$DATA" \
    --caption_column prompts.txt \
    --video_column videos.txt \
    ${validation[@]+"${validation[@]}"} \
    --seed 42 \
    --rank "$RANK" \
    --lora_alpha "$RANK" \
    --mixed_precision "$MIXED_PRECISION" \
    --output_dir "$OUTPUT" \
    --height 480 --width 720 --fps 8 --max_num_frames 49 \
    --skip_frames_start 0 --skip_frames_end 0 \
    --train_batch_size 1 \
    --num_train_epochs "$EPOCHS" \
    --checkpointing_steps 1000 \
    --gradient_accumulation_steps 1 \
    --learning_rate 1e-3 \
    --lr_scheduler cosine_with_restarts --lr_warmup_steps 200 --lr_num_cycles 1 \
    --optimizer AdamW --adam_beta1 0.9 --adam_beta2 0.95 --max_grad_norm 1.0 \
    --allow_tf32 \
    "$@"
