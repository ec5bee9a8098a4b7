"""The flags, in groups that a script picks from. Nothing heavier than argparse is imported.

Names, types and defaults are those of the published training scripts; docs/differences.md lists what differs. The range
of a flag is given with it; combinations of flags are checked in `checks.py`.
"""

from .numbers import bucket_shapes, multiple_of_8, not_negative, positive, seed, share, token_length

INTERPOLATION_MODES = ["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"]
LR_SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
TRACKERS = [
    "tensorboard", "wandb", "comet_ml", "all", "none", "aim", "clearml", "dvclive", "mlflow", "swanlab", "trackio",
]  # fmt: skip


def add_stable_diffusion_args(parser):
    group = parser.add_argument_group("model")
    text = "Model to fine-tune: folder or hub name of a pipeline, or a single file (.safetensors, .ckpt)."
    group.add_argument("--pretrained_model_name_or_path", required=True, help=text)
    text = "VAE to use in place of the model's: folder, hub name or single file."
    group.add_argument("--pretrained_vae_model_name_or_path", help=text)
    group.add_argument("--revision", help="Branch, tag or commit of the hub repository.")
    group.add_argument("--variant", help="Variant of the weight files to load, e.g. fp16.")


def add_kandinsky_args(parser):
    group = parser.add_argument_group("model")
    for part in ("decoder", "prior"):
        default = f"kandinsky-community/kandinsky-2-2-{part}"
        flag = f"--pretrained_{part}_model_name_or_path"
        group.add_argument(flag, default=default, help=f"Folder or hub name of the {part}.")


def add_data_source_args(parser):
    """The flags that `open_dataset` reads. A script that opens its own data set leaves them out, with their checks."""
    group = parser.add_argument_group("data source")
    group.add_argument("--dataset_name", help="Name on the hub, or local folder, of a data set.")
    group.add_argument("--dataset_config_name", help="Configuration of that data set, if it has several.")
    group.add_argument(
        "--train_data_dir",
        help="Folder of images, with captions in .txt files beside them or in a metadata.jsonl (file_name, text); with "
        "--dataset_name, its data_dir.",
    )
    group.add_argument(
        "--max_train_samples", type=positive(int), help="Train on this many samples only, chosen by the seed."
    )
    text = "Suffix of caption files beside the images. Default: .txt, or .caption where more images have one."
    group.add_argument("--caption_extension", help=text)
    text = "Repeat the images of a folder such as `10_zwx dog` ten times; its name is the caption of those without one."
    group.add_argument("--repeats_from_folders", action="store_true", help=text)
    group.add_argument("--num_repeats", type=positive(int), default=1, help="Repeat all images so many times an epoch.")


def add_data_args(parser):
    group = parser.add_argument_group("data")
    group.add_argument("--image_column", default="image", help="Column that holds the image.")
    group.add_argument(
        "--skip_bad_samples", action="store_true", help="Leave out samples that cannot be used, and list them."
    )
    group.add_argument("--cache_dir", help="Folder where downloaded models and data sets are kept.")
    group.add_argument(
        "--dataloader_num_workers",
        type=not_negative(int),
        help="Number of loader processes; results do not depend on it. Default: all cores but one, at most 8.",
    )


def add_caption_args(parser):
    group = parser.add_argument_group("captions")
    text = "Column that holds a caption, or a list of captions, one of which is chosen at random each time."
    group.add_argument("--caption_column", default="text", help=text)
    text = "Share of samples trained with the empty caption; about 0.1 keeps classifier-free guidance working."
    group.add_argument("--caption_dropout", type=share, default=0.0, help=text)
    group.add_argument("--caption_prefix", help="Words before every caption but the empty one of --caption_dropout.")
    group.add_argument("--caption_suffix", help="Words after it.")
    text = "Draw the order of a caption's tags, which commas separate, anew at each visit."
    group.add_argument("--shuffle_caption", action="store_true", help=text)
    text = "Share of a caption's tags that is left out, drawn anew at each visit."
    group.add_argument("--caption_tag_dropout_rate", type=share, default=0.0, help=text)
    text = "Number of tags at a caption's start that are neither shuffled nor left out."
    group.add_argument("--keep_tokens", type=not_negative(int), default=0, help=text)


def add_text_encoder_args(parser):
    group = parser.add_argument_group("text encoder")
    text = "Tokens of a caption that are read: 75, or 150 or 225 in pieces of 75, as kohya and A1111 read."
    group.add_argument("--max_token_length", type=token_length, default=75, help=text)
    text = "Take the states of this layer, counted from the last, as kohya and A1111 count: 2 is the last but one."
    group.add_argument("--clip_skip", type=positive(int), default=1, help=text)


def add_decoder_condition_args(parser):
    group = parser.add_argument_group("conditioning")
    text = "Column of captions, checked if given; the decoder is conditioned on the image itself."
    group.add_argument("--caption_column", help=text)
    text = "Share of samples trained with the empty embedding; about 0.1 keeps classifier-free guidance working."
    group.add_argument("--image_embeds_dropout", type=share, default=0.0, help=text)


def add_resolution_arg(parser, text: str):
    group = parser.add_argument_group("images")
    group.add_argument("--resolution", type=multiple_of_8, default=512, help=text)


def add_bucket_args(parser):
    group = parser.add_argument_group("images")
    text = "Train each image in the shape, of a few of --resolution's area, that keeps most of it; an update is of one."
    group.add_argument("--use_aspect_ratio_buckets", action="store_true", help=text)
    text = 'Those shapes: "height,width;height,width". Default: those of diffusers, and smaller ones for small images.'
    group.add_argument("--aspect_ratio_buckets", type=bucket_shapes, help=text)


def add_image_args(parser):
    group = parser.add_argument_group("images")
    text = "Side of the square training images, in pixels."
    group.add_argument("--resolution", type=multiple_of_8, default=512, help=text)
    group.add_argument("--center_crop", action="store_true", help="Crop the centre square instead of a random one.")
    group.add_argument("--random_flip", action="store_true", help="Mirror each image left to right half of the time.")
    group.add_argument(
        "--image_interpolation_mode", default="lanczos", choices=INTERPOLATION_MODES, help="Filter for resizing."
    )


def add_training_args(parser):
    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", default="sd-model-finetuned", help="Folder for everything that the run writes.")
    text = "Random seed; if unset a random one is chosen, logged and stored in the checkpoints."
    group.add_argument("--seed", type=seed, help=text)
    group.add_argument(
        "--train_batch_size", type=positive(int), default=16, help="Samples per micro-batch and process."
    )
    group.add_argument("--num_train_epochs", type=positive(int), default=100, help="Number of passes over the data.")
    group.add_argument(
        "--max_train_steps", type=positive(int), help="Number of weight updates; overrides --num_train_epochs."
    )
    group.add_argument(
        "--gradient_accumulation_steps", type=positive(int), default=1, help="Micro-batches per weight update."
    )
    text = "Precision of the arithmetic; trained weights are fp32. Default: what accelerate is set to."
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help=text)
    text = "Use TF32 for matrix products on Ampere and later GPUs: faster, less exact."
    group.add_argument("--allow_tf32", action="store_true", help=text)
    group.add_argument("--local_rank", type=int, default=-1, help="Set by old launchers; use accelerate launch.")


def add_network_args(parser, *, xformers=True):
    group = parser.add_argument_group("speed and memory")
    text = "Compile the trained network: block by block (the default), or as one, which takes minutes longer."
    group.add_argument("--torch_compile", nargs="?", const="regional", choices=["regional", "whole"], help=text)
    add_gradient_checkpointing_arg(group)
    if xformers:
        group.add_argument(
            "--enable_xformers_memory_efficient_attention",
            action="store_true",
            help="Use xFormers' attention instead of PyTorch's.",
        )


def add_gradient_checkpointing_arg(group):
    text = "Compute activations again in the backward pass: less memory, slower."
    group.add_argument("--gradient_checkpointing", action="store_true", help=text)


def add_optimizer_args(parser, *, eight_bit=True, scale_lr=False):
    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--learning_rate", type=not_negative(float), default=1e-4, help="Learning rate after the warm-up."
    )
    if scale_lr:
        text = "Multiply the learning rate by processes x batch size x accumulation."
        group.add_argument("--scale_lr", action="store_true", help=text)
    group.add_argument(
        "--lr_scheduler", default="constant", help=", ".join([*LR_SCHEDULERS, "piecewise_constant:RULES"])
    )
    text = "Length of the warm-up, in updates; constant has none."
    group.add_argument("--lr_warmup_steps", type=not_negative(int), default=500, help=text)
    if eight_bit:
        text = "AdamW with 8-bit state, from the package bitsandbytes: less memory."
        group.add_argument("--use_8bit_adam", action="store_true", help=text)
    group.add_argument("--adam_beta1", type=share, default=0.9, help="Decay rate of the first moment.")
    group.add_argument("--adam_beta2", type=share, default=0.999, help="Decay rate of the second moment.")
    group.add_argument("--adam_weight_decay", type=not_negative(float), default=1e-2, help="Decoupled weight decay.")
    group.add_argument("--adam_epsilon", type=positive(float), default=1e-8, help="Added to AdamW's denominator.")
    group.add_argument("--max_grad_norm", type=positive(float), default=1.0, help="Gradients are clipped to this norm.")


def add_loss_args(parser, *, noise=False):
    group = parser.add_argument_group("training objective")
    text = "Min-SNR weights of the loss with this gamma (arXiv:2303.09556); 5.0 is usual."
    group.add_argument("--snr_gamma", type=positive(float), help=text)
    if not noise:
        return
    text = "What the network predicts: epsilon or v_prediction. Default: as the model was trained."
    group.add_argument("--prediction_type", help=text)
    text = "Random offset of the noise per channel, for very dark and very bright images; 0.1 is usual."
    group.add_argument("--noise_offset", type=not_negative(float), default=0, help=text)
    text = "More noise on the input than in the target (arXiv:2301.11706); 0.1 is usual."
    group.add_argument("--input_perturbation", type=not_negative(float), default=0, help=text)
    text = "Train with DREAM (arXiv:2312.00210), at the cost of one more forward pass."
    group.add_argument("--dream_training", action="store_true", help=text)
    group.add_argument(
        "--dream_detail_preservation", type=not_negative(float), default=1.0, help="The exponent p of DREAM."
    )


def add_ema_args(parser, *, placement=True):
    group = parser.add_argument_group("weight averaging (EMA)")
    text = "Keep an average of the weights, validate with it and export it."
    group.add_argument("--use_ema", action="store_true", help=text)
    if placement:
        group.add_argument("--offload_ema", action="store_true", help="Keep the average in host memory.")
        group.add_argument(
            "--foreach_ema", action="store_true", help="Update the average in one fused operation (always so on CUDA)."
        )
        group.add_argument(
            "--non_ema_revision", help="Revision of the UNet to train; --revision is then the average's."
        )


def add_encoding_args(parser, *, crops=False):
    group = parser.add_argument_group("cached encodings")
    text = "Run the frozen networks once, before training, and keep their outputs on disk."
    group.add_argument("--cache_encodings", action="store_true", help=text)
    text = "Folder of the cache; runs may share it. Default: encodings, in the output folder."
    group.add_argument("--encodings_dir", help=text)
    if crops:
        text = "Number of random crops to cache of each image that is not square."
        group.add_argument("--cache_crops", type=positive(int), default=4, help=text)


def add_checkpoint_args(parser):
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--checkpointing_steps", type=positive(int), default=500, help="Save one every this many updates."
    )
    group.add_argument(
        "--checkpoints_total_limit",
        type=positive(int),
        help="Keep this many, and remove older ones. Default: all are kept.",
    )
    group.add_argument(
        "--resume_from_checkpoint", help="latest, the name of a checkpoint in the output folder, or a path."
    )


def add_validation_args(parser, *, single=False):
    group = parser.add_argument_group("validation")
    if single:
        group.add_argument("--validation_prompt", help="Prompt to make images of before, during and after training.")
        group.add_argument("--num_validation_images", type=not_negative(int), default=4, help="Number of images of it.")
        group.add_argument(
            "--validation_epochs", type=positive(int), default=1, help="Make them every this many epochs."
        )
    else:
        names = ("--validation_prompts", "--validation_prompt")  # by either name in the guides
        text = "Prompts to make images of before, during and after training."
        group.add_argument(*names, nargs="+", help=text)
        group.add_argument(
            "--validation_epochs", type=positive(int), default=5, help="Make them every this many epochs."
        )


def add_lora_args(parser, *, kohya=False):
    group = parser.add_argument_group("LoRA adapters")
    group.add_argument("--rank", type=positive(int), default=4, help="Rank of the low-rank matrices.")
    if kohya:
        text = "Also write a file for A1111, ComfyUI and kohya, at the end and with each checkpoint."
        group.add_argument("--save_kohya", action="store_true", help=text)
        add_tool_file_args(group)
        text = "LoRA file to start from, of these scripts, diffusers or kohya; its rank is taken over."
        group.add_argument("--network_weights", help=text)
        parser.refused["--save_single_file"] = (
            "adapters are no whole model: this script writes pytorch_lora_weights.safetensors, and with --save_kohya "
            "kohya_lora_weights.safetensors for A1111 and ComfyUI"
        )


def add_single_file_args(parser):
    group = parser.add_argument_group("single file")
    text = "Also write the model as one .safetensors for A1111, ComfyUI and model sites."
    group.add_argument("--save_single_file", action="store_true", help=text)
    add_tool_file_args(group)


def add_tool_file_args(group):
    """Flags for files that other tools read. Their names are kohya's."""
    text = "Precision of the numbers in that file; fp16 halves it, and is what model sites have."
    group.add_argument("--save_precision", choices=["fp32", "fp16", "bf16"], default="fp32", help=text)
    group.add_argument("--metadata_title", help="Title in its header. Default: made of the base model's name.")
    group.add_argument("--metadata_license", help="License in its header.")
    group.add_argument("--metadata_trigger_phrase", help="Words in its header that call up what was learned.")


def add_reporting_args(parser, *, project=True):
    group = parser.add_argument_group("logging and hub")
    group.add_argument("--logging_dir", default="logs", help="Folder of tracker logs, in the output folder.")
    group.add_argument("--log_file", help="File that all messages, and a line each --logging_steps, are appended to.")
    group.add_argument(
        "--logging_steps", type=positive(int), default=10, help="Read and log the loss every this many updates."
    )
    group.add_argument("--report_to", default="tensorboard", help=f"{', '.join(TRACKERS)}; or several: a,b.")
    if project:
        group.add_argument(
            "--tracker_project_name", default="text2image-fine-tune", help="Project name in the trackers."
        )
    group.add_argument("--push_to_hub", action="store_true", help="Upload weights, model card and images at the end.")
    group.add_argument("--hub_token", help="Token for the hub; better: `hf auth login`. Others see command lines.")
    group.add_argument("--hub_model_id", help="Repository to push to; default: the output folder's name.")
