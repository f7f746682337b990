#!/usr/bin/env bash
# LoRA training on several machines. Run it on each of them with the same settings and its own NODE_RANK. Under Slurm,
# scripts/train_multi_node.sbatch does that. By hand, with the address of the first machine:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 DATA=/shared/clips OUTPUT=/shared/lora bash scripts/train_multi_node.sh
# If it hangs at the start, run the same command with CHECK=1 on all machines: it trains nothing, and tells which
# machines reach each other, and how fast. DATA and OUTPUT must be folders that all machines share. It runs
# train_t2v_single_gpu.sh or train_i2v_single_gpu.sh, so all their settings apply here too.
# It resumes from the newest checkpoint in OUTPUT, or starts from scratch where there is none. If a process fails, the
# launchers end the others and start all of them again, RESTARTS times at most. All processes must be in a trusted
# network: whoever reaches MASTER_PORT can send them pickled objects, which can run any code.
# Flags given to this script are passed on and take precedence.
set -euo pipefail

export DATA=${DATA:?set DATA to the folder of the clips and their captions}
export OUTPUT=${OUTPUT:?set OUTPUT to a folder that all machines share}
KIND=${KIND:-t2v}                              # or i2v
export MODEL=${MODEL:-THUDM/CogVideoX-5b$([ "$KIND" = t2v ] || echo -I2V)}
export MIXED_PRECISION=${MIXED_PRECISION:-bf16}
ENGINE=${ENGINE:-multi_node}                   # or deepspeed_zero2, deepspeed_zero2_offload
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}   # of each machine
NODES=${NODES:-${SLURM_NNODES:?set NODES to the number of machines}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK: 0 on the first machine, 1 on the second, ...}}
MASTER_ADDR=${MASTER_ADDR:?set MASTER_ADDR to the address of the first machine}
MASTER_PORT=${MASTER_PORT:-29500}              # a port of the first machine that the others can reach
RESTARTS=${RESTARTS:-3}                        # 0 if the machines cannot resolve each other's host names
CHECK=${CHECK:-}

here=$(cd "$(dirname "$0")/.." && pwd)
export CONFIG="$here/accelerate_configs/$ENGINE.yaml"
# The static rendezvous, accelerate's default, and a shared store keep the addresses of the processes that have ended,
# and restarted processes try to connect to those (pytorch issue 135712). c10d, the other one, needs host names.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export LAUNCH="--num_machines $NODES --machine_rank $NODE_RANK --num_processes $((NODES * GPUS))
    --main_process_ip $MASTER_ADDR --main_process_port $MASTER_PORT
    --max_restarts $RESTARTS --rdzv_backend $([ "$RESTARTS" = 0 ] && echo static || echo c10d)"
# After SIGTERM the launcher kills the processes that still run after this many seconds. The default of 30 may be too
# short to finish a step and write a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}

# The most common cause of a hang is a host name that has another address on another machine. The next one is a machine
# with several networks: name the one to use in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (ip -br address lists them).
echo "machine $NODE_RANK of $NODES: $(hostname), $GPUS GPUs; the first one is $MASTER_ADDR:$MASTER_PORT" \
     "($(getent hosts "$MASTER_ADDR" | head -n 1 || true))" >&2

if [ -n "$CHECK" ]; then
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    echo "RendezvousTimeoutError or DistStoreError means: not all $NODES machines reached the first one" >&2
    # Wait a minute for the other machines instead of ten: join_timeout is for c10d, timeout for static.
    # shellcheck disable=SC2086
    exec bash "$here/scripts/launch.sh" --config_file "$CONFIG" $LAUNCH --mixed_precision "$MIXED_PRECISION" \
        --max_restarts 0 --rdzv_conf join_timeout=60,timeout=60 "$here/tools/check_machines.py"
fi
exec bash "$here/scripts/train_${KIND}_single_gpu.sh" --resume_from_checkpoint latest "$@"
