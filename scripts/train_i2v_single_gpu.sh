#!/usr/bin/env bash
# Image-to-video LoRA on one GPU. Edit the settings, or override them from the environment:
#   DATA=~/my_clips PROMPTS="TOK a boat:::TOK a bird" IMAGES=boat.png:::bird.png bash scripts/train_i2v_single_gpu.sh
# The settings are those of README.md. Flags given to this script are passed on and take precedence over those here.
# If the run stops, give the same command with --resume_from_checkpoint latest added.
# CogVideoX 1.5 (MODEL=THUDM/CogVideoX1.5-5B-I2V) needs these flags: --max_num_frames 81 --fps 16 --height 768 --width 1360
set -euo pipefail

MODEL=${MODEL:-THUDM/CogVideoX-5b-I2V}         # 1.0 works at 480 x 720 only
MIXED_PRECISION=${MIXED_PRECISION:-bf16}       # the dtype that it was trained in
DATA=${DATA:?set DATA to the folder of the clips and their captions}
OUTPUT=${OUTPUT:-cogvideox-i2v-lora}
RANK=${LORA_RANK:-64}
STEPS=${STEPS:-2000}                           # for 25 clips; 4000 for 100
ID_TOKEN=${ID_TOKEN-TOK}                       # trigger word, put before every caption; empty: none
PROMPTS=${PROMPTS:-}                           # validation prompts, joined by :::; write the trigger word into them
IMAGES=${IMAGES:-}                             # a start image for each of them, joined by :::

here=$(cd "$(dirname "$0")/.." && pwd)
CONFIG=${CONFIG:-$here/accelerate_configs/single_gpu.yaml}
LAUNCH=${LAUNCH:-}                             # more flags for accelerate launch

optional=()
if [ -f "$DATA/prompts.txt" ]; then            # else each clip has its caption beside it
    optional+=(--caption_column prompts.txt --video_column videos.txt)
fi
if [ -n "$ID_TOKEN" ]; then
    optional+=(--id_token "$ID_TOKEN")
fi
if [ -n "$PROMPTS" ]; then
    optional+=(--validation_prompt "$PROMPTS" --validation_images "$IMAGES" --validation_steps 250)
fi

# shellcheck disable=SC2086
exec bash "$here/scripts/launch.sh" --config_file "$CONFIG" $LAUNCH --mixed_precision "$MIXED_PRECISION" \
    "$here/train_cogvideox_image_to_video_lora.py" \
    --pretrained_model_name_or_path "$MODEL" --mixed_precision "$MIXED_PRECISION" \
    --instance_data_root "$DATA" \
    --height 480 --width 720 --max_num_frames 49 --fps 8 \
    --rank "$RANK" --lora_alpha "$RANK" \
    --optimizer adamw --learning_rate 1e-3 --lr_scheduler cosine_with_restarts --lr_warmup_steps 200 \
    --train_batch_size 1 --max_train_steps "$STEPS" \
    --gradient_checkpointing --enable_slicing --enable_tiling --allow_tf32 \
    --checkpointing_steps 500 --checkpoints_total_limit 3 --dataloader_num_workers 2 --seed 42 \
    ${optional[@]+"${optional[@]}"} \
    --report_to tensorboard --output_dir "$OUTPUT" \
    "$@"
