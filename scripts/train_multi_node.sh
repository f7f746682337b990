#!/usr/bin/env bash
# LoRA training on several machines: run it on each of them, with the same settings but for its rank. Under Slurm that is
# what scripts/train_multi_node.sbatch does; by hand, with the address of the first machine:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 DATA=/shared/clips OUTPUT=/shared/lora bash scripts/train_multi_node.sh
# When it hangs at the start, do the same with CHECK=1: it trains nothing, and says which machines reach each other, and
# how fast. DATA and OUTPUT must be folders that all machines share.
# Flags given to this script are passed on and win over those here.
set -euo pipefail

KIND=${KIND:-t2v}                              # or i2v
MODEL=${MODEL:-}                               # default: CogVideoX-5b, or -5b-I2V
MIXED_PRECISION=${MIXED_PRECISION:-bf16}
DATA=${DATA:?set DATA to the folder of prompts.txt, videos.txt and the clips}
OUTPUT=${OUTPUT:?set OUTPUT to a folder that all machines share}
CACHE=${CACHE:-$HOME/.cache/huggingface/hub}   # downloaded models; each machine has its own, or they share it
RANK=${LORA_RANK:-64}
EPOCHS=${EPOCHS:-30}
PROMPTS=${PROMPTS:-}                           # validation prompts, joined by :::, shared out among the GPUs
IMAGES=${IMAGES:-}                             # i2v: a start image for each of them, joined by :::
ENGINE=${ENGINE:-multi_node}                   # or deepspeed_zero2, deepspeed_zero2_offload, deepspeed_zero3, fsdp2
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}   # of each machine
NODES=${NODES:-${SLURM_NNODES:?set NODES to the number of machines}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK: 0 on the first machine, 1 on the second, ...}}
MASTER_ADDR=${MASTER_ADDR:?set MASTER_ADDR to the address of the first machine}
MASTER_PORT=${MASTER_PORT:-29500}              # one that the others can reach there
CHECK=${CHECK:-}

here=$(cd "$(dirname "$0")/.." && pwd)
case $KIND in
    t2v) script=train_cogvideox_lora.py MODEL=${MODEL:-THUDM/CogVideoX-5b} ;;
    i2v) script=train_cogvideox_image_to_video_lora.py MODEL=${MODEL:-THUDM/CogVideoX-5b-I2V} ;;
    *) echo "KIND is t2v or i2v, not $KIND" >&2; exit 2 ;;
esac

# A name that means another address on another machine is the commonest cause of a hang, a machine with several networks
# the next: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME then name the one to take (ip -br address lists them).
echo "machine $NODE_RANK of $NODES: $(hostname), $GPUS GPUs; the first one is $MASTER_ADDR:$MASTER_PORT" \
     "($(getent hosts "$MASTER_ADDR" | head -n 1 || true))" >&2

launch=(accelerate launch --quiet --config_file "$here/accelerate_configs/$ENGINE.yaml"
        --num_machines "$NODES" --machine_rank "$NODE_RANK" --num_processes "$((NODES * GPUS))"
        --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" --mixed_precision "$MIXED_PRECISION")
if [ -n "$CHECK" ]; then
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    exec "${launch[@]}" "$here/tools/check_machines.py"
fi

validation=()
if [ -n "$PROMPTS" ]; then
    validation=(--validation_prompt "$PROMPTS" --validation_prompt_separator ::: --num_validation_videos 1
                --validation_epochs 10)
    if [ "$KIND" = i2v ]; then
        validation+=(--validation_images "$IMAGES")
    fi
fi

exec "${launch[@]}" "$here/$script" \
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
    --checkpointing_steps 500 \
    --gradient_accumulation_steps 1 \
    --learning_rate 1e-3 \
    --lr_scheduler cosine_with_restarts --lr_warmup_steps 200 --lr_num_cycles 1 \
    --optimizer AdamW --adam_beta1 0.9 --adam_beta2 0.95 --max_grad_norm 1.0 \
    --dataloader_num_workers 2 \
    --allow_tf32 \
    "$@"
