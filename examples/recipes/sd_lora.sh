#!/usr/bin/env bash
# Stable Diffusion 1.5, LoRA. Usage: bash examples/recipes/sd_lora.sh FOLDER_OF_CAPTIONED_PICTURES OUTPUT_FOLDER [more flags]
# Interrupted, the same command continues. MODEL (folder or hub name) and PRECISION (bf16) are taken from the environment; add --validation_prompt "...".
# One process needs no launcher: a stop signal reaches the script. Several GPUs: LAUNCH="accelerate launch --multi_gpu" before
# the command, or LAUNCH="torchrun --nproc_per_node=4".
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")/../..
exec ${LAUNCH:-python} "$here/text_to_image/train_text_to_image_lora.py" --mixed_precision="${PRECISION:-bf16}" \
    --train_data_dir="${1:?usage: sd_lora.sh PICTURES OUTPUT [flags]}" \
    --output_dir="${2:?usage: sd_lora.sh PICTURES OUTPUT [flags]}" --resume_from_checkpoint=latest --checkpoints_total_limit=3 \
    --pretrained_model_name_or_path="${MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}" \
    --resolution=512 --random_flip --train_batch_size=4 --rank=16 --snr_gamma=5 --learning_rate=1e-4 \
    --lr_scheduler=constant_with_warmup --lr_warmup_steps=100 --max_train_steps=5000 --save_kohya \
    "${@:3}"
