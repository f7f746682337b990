#!/usr/bin/env bash
# LoRA training on several machines: run it on each of them, with the same settings but for its rank. Under Slurm that is
# what scripts/train_multi_node.sbatch does; by hand, with the address of the first machine:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 DATA=/shared/clips OUTPUT=/shared/lora bash scripts/train_multi_node.sh
# When it hangs at the start, do the same with CHECK=1: it trains nothing, and says which machines reach each other, and
# how fast. DATA and OUTPUT must be folders that all machines share. The other settings are those of
# train_t2v_single_gpu.sh or train_i2v_single_gpu.sh, which it runs; flags given to this script are passed on and win.
set -euo pipefail

export DATA=${DATA:?set DATA to the folder of prompts.txt, videos.txt and the clips}
export OUTPUT=${OUTPUT:?set OUTPUT to a folder that all machines share}
KIND=${KIND:-t2v}                              # or i2v
export MODEL=${MODEL:-THUDM/CogVideoX-5b$([ "$KIND" = t2v ] || echo -I2V)}
export MIXED_PRECISION=${MIXED_PRECISION:-bf16}
ENGINE=${ENGINE:-multi_node}                   # or deepspeed_zero2, deepspeed_zero2_offload, deepspeed_zero3, fsdp2
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}   # of each machine
NODES=${NODES:-${SLURM_NNODES:?set NODES to the number of machines}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK: 0 on the first machine, 1 on the second, ...}}
MASTER_ADDR=${MASTER_ADDR:?set MASTER_ADDR to the address of the first machine}
MASTER_PORT=${MASTER_PORT:-29500}              # one that the others can reach there
CHECK=${CHECK:-}

here=$(cd "$(dirname "$0")/.." && pwd)
export CONFIG="$here/accelerate_configs/$ENGINE.yaml"
export LAUNCH="--num_machines $NODES --machine_rank $NODE_RANK --num_processes $((NODES * GPUS))
    --main_process_ip $MASTER_ADDR --main_process_port $MASTER_PORT"

# A name that means another address on another machine is the commonest cause of a hang, a machine with several networks
# the next: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME then name the one to take (ip -br address lists them).
echo "machine $NODE_RANK of $NODES: $(hostname), $GPUS GPUs; the first one is $MASTER_ADDR:$MASTER_PORT" \
     "($(getent hosts "$MASTER_ADDR" | head -n 1 || true))" >&2

if [ -n "$CHECK" ]; then
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # shellcheck disable=SC2086
    exec accelerate launch --quiet --config_file "$CONFIG" $LAUNCH --mixed_precision "$MIXED_PRECISION" \
        "$here/tools/check_machines.py"
fi
exec bash "$here/scripts/train_${KIND}_single_gpu.sh" --checkpointing_steps 500 --dataloader_num_workers 2 "$@"
