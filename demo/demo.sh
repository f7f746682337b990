#!/usr/bin/env bash
# The training of `make demo`: a LoRA of a tiny model (KIND t2v or i2v) on four clips of a smiley.
# DEMO is the folder that has model/, clips/ and, for i2v, images/. The result is written to its smiley/.
set -euo pipefail

case ${KIND:-t2v} in
    t2v) script=train_cogvideox_lora.py
         images=() ;;
    i2v) script=train_cogvideox_image_to_video_lora.py
         images=(--validation_images "$DEMO/images/right.png:::$DEMO/images/down.png") ;;
    *) echo "KIND must be t2v or i2v, not $KIND" >&2; exit 2 ;;
esac
config=accelerate_configs/cpu.yaml
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    config=accelerate_configs/single_gpu.yaml
fi

accelerate launch --quiet --config_file "$config" --num_cpu_threads_per_process "$(nproc)" "$script" \
    --pretrained_model_name_or_path "$DEMO/model" \
    --instance_data_root "$DEMO/clips" \
    --validation_prompt "a smiley moves right:::a smiley moves down" \
    ${images[@]+"${images[@]}"} \
    --height 96 --width 144 --max_num_frames 17 --fps 8 \
    --rank 32 --lora_alpha 32 --learning_rate 2e-2 --lr_scheduler cosine --lr_warmup_steps 20 \
    --train_batch_size 4 --max_train_steps 1000 --validation_steps 250 --optimizer adamw --mixed_precision no \
    --num_inference_steps 25 --guidance_scale 1 --seed 42 \
    --output_dir "$DEMO/smiley"
