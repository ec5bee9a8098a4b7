#!/usr/bin/env bash
# Kandinsky 2.2 decoder, whole UNet. Usage: bash examples/recipes/kandinsky_decoder.sh FOLDER_OF_CAPTIONED_PICTURES OUTPUT_FOLDER [more flags]
# Interrupted, the same command continues. PRECISION (bf16) is taken from the environment; add --validation_prompts "...".
# One process needs no launcher: a stop signal reaches the script. Several GPUs: LAUNCH="accelerate launch --multi_gpu" before
# the command, or LAUNCH="torchrun --nproc_per_node=4".
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")/../..
exec ${LAUNCH:-python} "$here/kandinsky2_2/text_to_image/train_text_to_image_decoder.py" --mixed_precision="${PRECISION:-bf16}" \
    --train_data_dir="${1:?usage: kandinsky_decoder.sh PICTURES OUTPUT [flags]}" \
    --output_dir="${2:?usage: kandinsky_decoder.sh PICTURES OUTPUT [flags]}" --resume_from_checkpoint=latest --checkpoints_total_limit=3 \
    --resolution=768 --train_batch_size=1 --gradient_accumulation_steps=4 --gradient_checkpointing \
    --use_ema --snr_gamma=5 --image_embeds_dropout=0.1 --learning_rate=1e-5 --lr_scheduler=constant_with_warmup --lr_warmup_steps=100 \
    --max_train_steps=15000 \
    "${@:3}"
