#!/usr/bin/env bash
# Stable Diffusion 1.5, whole UNet. Usage: bash examples/recipes/sd_full.sh FOLDER_OF_CAPTIONED_PICTURES OUTPUT_FOLDER [more flags]
# Interrupted, the same command continues. MODEL (folder or hub name) and PRECISION (bf16) are taken from the environment; add --validation_prompts "...".
# One process needs no launcher: a stop signal reaches the script. Several GPUs: LAUNCH="accelerate launch --multi_gpu" before
# the command, or LAUNCH="torchrun --nproc_per_node=4".
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")/../..
exec ${LAUNCH:-python} "$here/text_to_image/train_text_to_image.py" --mixed_precision="${PRECISION:-bf16}" \
    --train_data_dir="${1:?usage: sd_full.sh PICTURES OUTPUT [flags]}" \
    --output_dir="${2:?usage: sd_full.sh PICTURES OUTPUT [flags]}" --resume_from_checkpoint=latest --checkpoints_total_limit=3 \
    --pretrained_model_name_or_path="${MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}" \
    --resolution=512 --random_flip --train_batch_size=4 --gradient_accumulation_steps=4 \
    --gradient_checkpointing --use_ema --snr_gamma=5 --caption_dropout=0.1 --learning_rate=1e-5 \
    --lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --max_train_steps=15000 \
    "${@:3}"
