#!/bin/bash
# Pretrain under Slurm, on one node or several; goes on by itself after the time limit and after pre-emption:
#   sbatch --nodes 2 docs/cluster/slurm.sh STORE OUTPUT
#SBATCH --job-name=pretrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
export OMP_NUM_THREADS=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # how long torchrun lets an iteration end, where it knows this variable
nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))

again() { # 300 s before the time limit: have last.pt written, and queue the same job once more
    kill -TERM $!
    wait $! || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap again USR1

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend c10d --rdzv_endpoint "${nodes[0]}:29500" --rdzv_id "$SLURM_JOB_ID" \
    -m monai.bundle run pretrain --config_file "['configs/pretrain.json','configs/multi_gpu.json']" \
    --dataset_dir "$1" --output_dir "$2" &
wait $!
