#!/bin/bash
# Pretrain on several machines without Slurm: start this on each, with the name of the first one. All see STORE and OUTPUT.
#   docs/cluster/torchrun.sh HEAD STORE OUTPUT
# Elastic: it begins with any number of machines of the range, and where one is lost the others start again from last.pt.
set -euo pipefail
export OMP_NUM_THREADS=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else a restart finds the addresses of processes that are gone

exec torchrun \
    --nnodes "${MACHINES:-1:4}" --nproc_per_node "${PROCESSES:-gpu}" --max_restarts 10 \
    --rdzv_backend c10d --rdzv_endpoint "$1:29500" --rdzv_id pretrain \
    -m monai.bundle run pretrain --config_file "['configs/pretrain.json','configs/multi_gpu.json']" \
    --dataset_dir "$2" --output_dir "$3"
