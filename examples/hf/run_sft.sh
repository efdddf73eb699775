#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Supervised fine-tuning: run_sft.sh LATENT OUT FILE.jsonl...
# FLAGS holds further flags for train_sft.py, DEVICES the number of GPUs or NPUs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/start.sh"
"${start[@]}" "$here/train_sft.py" \
    --model_name_or_path "$model" --trust_remote_code --dtype bfloat16 \
    --train_files "${files[@]}" --max_length 4096 --output_dir "$output" \
    --deepspeed "$here/ds_zero2.json" --bf16 --gradient_checkpointing \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --num_train_epochs 3 \
    --learning_rate 2e-5 --lr_scheduler_type cosine --warmup_steps 50 \
    --max_grad_norm 1.0 --logging_steps 10 --save_strategy epoch --save_total_limit 2 --report_to none ${FLAGS:-}
