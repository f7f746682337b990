#!/usr/bin/env bash
# Image-to-video LoRA on all GPUs of this machine. It runs train_i2v_single_gpu.sh, so all its settings apply here too:
#   DATA=~/my_clips PROMPTS="TOK a boat" IMAGES=boat.png GPUS=4 bash scripts/train_i2v_multi_gpu.sh
# A step learns from --train_batch_size clips of each GPU: with N GPUs fewer STEPS are enough.
# It resumes from the newest checkpoint in OUTPUT, or starts from scratch where there is none. If a process fails, the
# launcher ends the others and starts all of them again, RESTARTS times at most.
# Flags given to this script are passed on and take precedence.
set -euo pipefail

export DATA=${DATA:?set DATA to the folder of the clips and their captions}
ENGINE=${ENGINE:-multi_gpu}                    # or deepspeed_zero2, deepspeed_zero2_offload
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
RESTARTS=${RESTARTS:-3}

here=$(cd "$(dirname "$0")/.." && pwd)
export CONFIG="$here/accelerate_configs/$ENGINE.yaml"
# The static rendezvous, accelerate's default, and a shared store keep the addresses of the processes that have ended,
# and restarted processes try to connect to those (pytorch issue 135712). store_type=file needs no fixed port, so that
# several runs can use one machine.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export LAUNCH="--num_processes $GPUS --max_restarts $RESTARTS --rdzv_backend c10d --rdzv_conf store_type=file"
# After SIGTERM the launcher kills the processes that still run after this many seconds. The default of 30 may be too
# short to finish a step and write a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}
exec bash "$here/scripts/train_i2v_single_gpu.sh" --resume_from_checkpoint latest "$@"
