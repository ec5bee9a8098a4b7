"""The flags, in groups that a script picks from. Nothing heavier than argparse is imported.

Names, types and defaults are those of the published training scripts; what differs is listed in the README. What the
flags may hold, and how they go together, is checked in `checks.py`.
"""

import argparse
import difflib
import re

from . import texts

INTERPOLATION_MODES = ["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"]
LR_SCHEDULERS = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
TRACKERS = [
    "tensorboard", "wandb", "comet_ml", "all", "none", "aim", "clearml", "dvclive", "mlflow", "swanlab", "trackio",
]  # fmt: skip


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        silent = action.default in (None, False, argparse.SUPPRESS) or "default" in action.help
        return action.help if silent else f"{action.help.rstrip('.')}. Default: %(default)s."


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print a usage of some forty lines in front of it
        if unknown := re.match(r"unrecognized arguments: (--\w+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message += f" (did you mean {near[0]}?)" if near else ""
        message = re.sub(r"hf_\w{9,}", "hf_***", texts.printable(" ".join(message.split())))
        if re.search("^unrecognized|has no flag", message):  # perhaps a mistyped --hub_token
            message = re.sub(r"(\S*tok\S*?[= ])\S+", r"\1***", message)
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser whose description is the script's own docstring, with the `--config` flag already on it."""
    parser = _Parser(usage="%(prog)s FLAGS", description=docstring, formatter_class=_Formatter)
    parser.add_argument("--config", metavar="YAML", help="File with defaults for any flag; the command line wins.")
    return parser


def add_stable_diffusion_args(parser):
    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="Pipeline folder or hub name.")
    group.add_argument("--revision", help="Branch, tag or commit of the hub repository.")
    group.add_argument("--variant", help="Weight files to load, e.g. fp16.")


def add_kandinsky_args(parser):
    group = parser.add_argument_group("model")
    for part in ("decoder", "prior"):
        default = f"kandinsky-community/kandinsky-2-2-{part}"
        flag = f"--pretrained_{part}_model_name_or_path"
        group.add_argument(flag, default=default, help=f"Folder or hub name of a {part}.")


def add_data_args(parser):
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub name or local folder of a dataset.")
    group.add_argument("--dataset_config_name", help="Configuration of that dataset, if it has several.")
    group.add_argument(
        "--train_data_dir",
        help="Folder of pictures with a metadata.jsonl (file_name, text); with --dataset_name, the dataset's data_dir.",
    )
    group.add_argument("--image_column", default="image", help="Column that holds the picture.")
    group.add_argument("--max_train_samples", type=int, help="Train on this many samples, chosen by the seed.")
    group.add_argument(
        "--skip_bad_samples", action="store_true", help="Train without the samples that cannot be used, and list them."
    )
    group.add_argument("--cache_dir", help="Where downloaded models and datasets are kept.")
    group.add_argument(
        "--dataloader_num_workers",
        type=int,
        help="Loader processes; default: as the cores allow, 8 at most. Results do not depend on it.",
    )


def add_caption_args(parser):
    group = parser.add_argument_group("captions")
    group.add_argument("--caption_column", default="text", help="Column of a caption, or of a list to draw one from.")
    text = "Share of samples that see the empty caption; about 0.1 keeps classifier-free guidance alive."
    group.add_argument("--caption_dropout", type=float, default=0.0, help=text)


def add_decoder_condition_args(parser):
    group = parser.add_argument_group("condition")
    group.add_argument("--caption_column", help="Checked if given; the decoder is conditioned on the picture itself.")
    text = "Share of samples that see the empty embedding; about 0.1 keeps classifier-free guidance alive."
    group.add_argument("--image_embeds_dropout", type=float, default=0.0, help=text)


def add_resolution_arg(parser, text: str):
    parser.add_argument("--resolution", type=int, default=512, help=text)


def add_image_args(parser):
    group = parser.add_argument_group("pictures")
    group.add_argument("--resolution", type=int, default=512, help="Side of the square that is trained on, in pixels.")
    group.add_argument("--center_crop", action="store_true", help="Crop the centre instead of a random square.")
    group.add_argument("--random_flip", action="store_true", help="Mirror half of the pictures.")
    group.add_argument(
        "--image_interpolation_mode", default="lanczos", choices=INTERPOLATION_MODES, help="Resize filter."
    )


def add_training_args(parser):
    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", default="sd-model-finetuned", help="Everything the run leaves goes here.")
    group.add_argument("--seed", type=int, help="Seed of every draw; if unset one is drawn, logged and kept.")
    group.add_argument("--train_batch_size", type=int, default=16, help="Samples per micro-batch and process.")
    group.add_argument("--num_train_epochs", type=int, default=100, help="Passes over the data.")
    group.add_argument("--max_train_steps", type=int, help="Number of weight updates; overrides --num_train_epochs.")
    group.add_argument("--gradient_accumulation_steps", type=int, default=1, help="Micro-batches per weight update.")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: what accelerate is set to.")
    group.add_argument("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later GPUs.")
    group.add_argument("--local_rank", type=int, default=-1, help="Set by legacy launchers; use accelerate launch.")


def add_network_args(parser, *, xformers=True):
    group = parser.add_argument_group("network")
    text = "Compile the trained network: block by block (the default), or as one, which takes minutes longer."
    group.add_argument("--torch_compile", nargs="?", const="regional", choices=["regional", "whole"], help=text)
    add_gradient_checkpointing_arg(group)
    if xformers:
        group.add_argument(
            "--enable_xformers_memory_efficient_attention",
            action="store_true",
            help="Attention by xFormers instead of torch's own.",
        )


def add_gradient_checkpointing_arg(group):
    text = "Recompute activations: less memory, slower."
    group.add_argument("--gradient_checkpointing", action="store_true", help=text)


def add_optimizer_args(parser, *, eight_bit=True):
    group = parser.add_argument_group("optimizer")
    group.add_argument("--learning_rate", type=float, default=1e-4, help="Peak learning rate.")
    group.add_argument(
        "--lr_scheduler", default="constant", help=", ".join([*LR_SCHEDULERS, "piecewise_constant:RULES"])
    )
    group.add_argument("--lr_warmup_steps", type=int, default=500, help="Warm-up, in updates; not for constant.")
    if eight_bit:
        group.add_argument("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state, from bitsandbytes.")
    group.add_argument("--adam_beta1", type=float, default=0.9, help="Decay of the first moment.")
    group.add_argument("--adam_beta2", type=float, default=0.999, help="Decay of the second moment.")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="Decoupled weight decay.")
    group.add_argument("--adam_epsilon", type=float, default=1e-8, help="Added to the denominator.")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")


def add_scale_lr_arg(parser):
    parser.add_argument(
        "--scale_lr", action="store_true", help="Multiply the rate by processes x batch x accumulation."
    )


def add_loss_args(parser):
    group = parser.add_argument_group("objective")
    group.add_argument("--snr_gamma", type=float, help="Min-SNR loss weights (arXiv:2303.09556); 5.0 is usual.")


def add_noise_args(parser):
    group = parser.add_argument_group("noise")
    group.add_argument("--prediction_type", help="epsilon or v_prediction; default: the model's own.")
    group.add_argument("--noise_offset", type=float, default=0, help="Per-channel offset of the noise; 0.1 is usual.")


def add_full_noise_args(parser):
    group = parser.add_argument_group("noise, full fine-tuning")
    group.add_argument("--input_perturbation", type=float, default=0, help="arXiv:2301.11706; 0.1 is usual.")
    group.add_argument("--dream_training", action="store_true", help="DREAM (arXiv:2312.00210); one more forward pass.")
    group.add_argument("--dream_detail_preservation", type=float, default=1.0, help="The exponent p of DREAM.")


def add_ema_args(parser, *, placement=True):
    group = parser.add_argument_group("weight averaging")
    group.add_argument("--use_ema", action="store_true", help="Keep, validate and export averaged weights.")
    if placement:
        group.add_argument("--offload_ema", action="store_true", help="Keep the average in host memory.")
        group.add_argument(
            "--foreach_ema", action="store_true", help="Update the average in one fused sweep (always so on CUDA)."
        )
        group.add_argument(
            "--non_ema_revision", help="Revision of the UNet to train; --revision is then the average's."
        )


def add_encoding_args(parser, *, crops=False):
    group = parser.add_argument_group("encodings")
    group.add_argument(
        "--cache_encodings",
        action="store_true",
        help="Run the frozen networks once, before training, and keep what they make of pictures and captions on disk.",
    )
    group.add_argument("--encodings_dir", help="Where; runs may share it. Default: encodings, in the output folder.")
    if crops:
        group.add_argument(
            "--cache_crops", type=int, default=4, help="Random crops to keep of each picture that is not square."
        )


def add_checkpoint_args(parser):
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--checkpointing_steps", type=int, default=500, help="Save every this many updates.")
    group.add_argument(
        "--checkpoints_total_limit", type=int, help="Keep this many; older ones are removed after a save."
    )
    group.add_argument(
        "--resume_from_checkpoint", help="latest, the name of a checkpoint in the output folder, or a path."
    )


def add_validation_args(parser, *, single=False):
    group = parser.add_argument_group("validation")
    if single:
        group.add_argument("--validation_prompt", help="Prompt drawn before, during and after training.")
        group.add_argument("--num_validation_images", type=int, default=4, help="Pictures of it to draw.")
        group.add_argument("--validation_epochs", type=int, default=1, help="Draw them every this many epochs.")
    else:
        group.add_argument("--validation_prompts", nargs="+", help="Prompts drawn before, during and after training.")
        group.add_argument("--validation_epochs", type=int, default=5, help="Draw them every this many epochs.")


def add_lora_args(parser, *, kohya=False):
    group = parser.add_argument_group("adapters")
    group.add_argument("--rank", type=int, default=4, help="Rank of the low-rank matrices.")
    if kohya:
        group.add_argument("--save_kohya", action="store_true", help="Also write a file for A1111, ComfyUI and kohya.")


def add_reporting_args(parser, *, project=True):
    group = parser.add_argument_group("logging and hub")
    group.add_argument("--logging_dir", default="logs", help="Tracker logs, below the output folder.")
    group.add_argument("--logging_steps", type=int, default=10, help="Read and log the loss every this many updates.")
    group.add_argument("--report_to", default="tensorboard", help=", ".join(TRACKERS))
    if project:
        group.add_argument(
            "--tracker_project_name", default="text2image-fine-tune", help="Project name in the trackers."
        )
    group.add_argument("--push_to_hub", action="store_true", help="Upload weights, card and pictures at the end.")
    group.add_argument("--hub_token", help="Token for the hub; better: `hf auth login`. Others see command lines.")
    group.add_argument("--hub_model_id", help="Repository to push to; default: the output folder's name.")
