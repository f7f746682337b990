#!/usr/bin/env bash
# Image-to-video LoRA on all GPUs of this machine: with the settings of train_i2v_single_gpu.sh, which it runs, and these.
#   DATA=~/my_clips PROMPTS="a boat:::a bird" IMAGES=boat.png:::bird.png GPUS=4 bash scripts/train_i2v_multi_gpu.sh
# A step learns from --train_batch_size clips of each GPU: with more GPUs an epoch has fewer steps.
# Flags given to this script are passed on and win over those there.
set -euo pipefail

export DATA=${DATA:?set DATA to the folder of prompts.txt, videos.txt and the clips}
ENGINE=${ENGINE:-multi_gpu}                    # or deepspeed_zero2, deepspeed_zero2_offload, deepspeed_zero3, fsdp2
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

here=$(cd "$(dirname "$0")/.." && pwd)
export CONFIG="$here/accelerate_configs/$ENGINE.yaml" LAUNCH="--num_processes $GPUS"
exec bash "$here/scripts/train_i2v_single_gpu.sh" --checkpointing_steps 500 --dataloader_num_workers 2 "$@"
