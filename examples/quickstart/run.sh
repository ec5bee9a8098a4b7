#!/usr/bin/env bash
# Makes the environment if needed, then fine-tunes the bundled tiny Stable Diffusion on the bundled pictures.
# Further flags are passed on, e.g. `bash examples/quickstart/run.sh --max_train_steps=100`. Run again, it continues.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../environment.sh"
exec .venv/bin/python text_to_image/train_text_to_image.py \
    --pretrained_model_name_or_path=examples/quickstart/tiny-emoji-diffusion \
    --train_data_dir=examples/quickstart/pictures \
    --resolution=64 --center_crop --cache_encodings \
    --train_batch_size=8 --max_train_steps=400 \
    --learning_rate=1e-3 --lr_scheduler=cosine --lr_warmup_steps=20 \
    --use_ema --snr_gamma=5 --caption_dropout=0.1 --seed=0 \
    --validation_prompts "sunflower" "rocket" "octopus" "fox face" "red apple" "tiger face" --validation_epochs=25 \
    --checkpointing_steps=200 --resume_from_checkpoint=latest \
    --output_dir=quickstart-output "$@"
