#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Continued pretraining: run.sh LATENT OUT FILE...
# FLAGS holds further flags for train.py, DEVICES the number of GPUs or NPUs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"
"${start[@]}" "$here/train.py" \
    --model_name_or_path "$model" --trust_remote_code --dtype bfloat16 \
    --train_files "${files[@]}" --block_size 4096 --output_dir "$output" \
    --deepspeed "$here/ds_zero2.json" --bf16 --gradient_checkpointing \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --num_train_epochs 1 \
    --learning_rate 1e-4 --lr_scheduler_type cosine --warmup_steps 100 --weight_decay 0.1 --adam_beta2 0.95 \
    --max_grad_norm 1.0 --logging_steps 10 --save_steps 500 --save_total_limit 2 --report_to none ${FLAGS:-}
