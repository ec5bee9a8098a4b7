"""The training scripts, with all that tests have to know of each: a new script, or a new flag, is entered here."""

from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
_SD, _KANDINSKY = REPOSITORY / "text_to_image", REPOSITORY / "kandinsky2_2" / "text_to_image"
ADAPTERS = "pytorch_lora_weights.safetensors"
_SD_DRAWS = {"random_flip": True, "caption_dropout": 0.5, "noise_offset": 0.1, "input_perturbation": 0.1}
_DATA = {"caption_extension", "repeats_from_folders", "num_repeats"}
_OURS = {"config", "log_file", "logging_steps", "skip_bad_samples", "cache_encodings", "encodings_dir", *_DATA}
_CAPTIONS = {"caption_dropout", "caption_prefix", "caption_suffix", "keep_tokens", "shuffle_caption",
             "caption_tag_dropout_rate"}  # fmt: skip
_FILES = {"save_precision", "metadata_title", "metadata_license", "metadata_trigger_phrase"}
_BUCKETS = {"use_aspect_ratio_buckets", "aspect_ratio_buckets"}
_SD_OURS = _OURS | _FILES | _CAPTIONS | _BUCKETS | {
    "cache_crops", "pretrained_vae_model_name_or_path", "max_token_length", "clip_skip",
}  # fmt: skip
_DREAM = {"input_perturbation", "dream_training", "dream_detail_preservation"}


@dataclass(frozen=True)
class Script:
    """A script; names of flags are without dashes."""

    path: Path
    base: str  # which model it starts from: "model" (Stable Diffusion), "prior" or "decoder"
    trained: str  # the file of its trained weights, in a checkpoint and in the output folder
    draws: dict  # flags that switch on everything that is drawn for a sample
    recipe: str  # in examples/recipes
    ours: set  # flags that the published script does not have
    compared_with: str | None = None  # the script whose repeated parts its own are equal to
    without: set = field(default_factory=set)  # functions that its story goes without
    graphs: tuple[int, int] = (0, 0)  # that torch.compile makes, whole and regional: blocks of equal shapes share one
    resumed: dict = field(default_factory=dict)  # flags of its own with which it is interrupted and resumed
    tensors: int = 0  # its optimizer then knows more of

    @property
    def is_lora(self) -> bool:
        return self.trained == ADAPTERS

    @property
    def validates(self) -> dict:
        """Flags with which it makes one validation image."""
        return {"validation_prompt": "a cat", "num_validation_images": 1} if self.is_lora else {
            "validation_prompts": "a cat"
        }  # fmt: skip


TORCH = {
    "sd": Script(
        _SD / "train_text_to_image.py", "model", "unet/diffusion_pytorch_model.safetensors", _SD_DRAWS, "sd_full.sh",
        ours=_SD_OURS | {"torch_compile", "save_single_file"},
        without={"embed_nothing"},  # no "no image" where there are captions
        graphs=(1, 8), resumed={"use_ema": True}, tensors=50,
    ),
    "sd_lora": Script(
        _SD / "train_text_to_image_lora.py", "model", ADAPTERS, _SD_DRAWS, "sd_lora.sh",
        ours=_SD_OURS | {"torch_compile", "save_kohya", "network_weights", *_DREAM},  # the objective is the full run's
        compared_with="sd", without={"embed_nothing"},
        graphs=(1, 9), resumed={"snr_gamma": 5.0, "save_kohya": True}, tensors=60,
    ),
    "prior": Script(
        _KANDINSKY / "train_text_to_image_prior.py", "prior", "prior/diffusion_pytorch_model.safetensors",
        {"caption_dropout": 0.5}, "kandinsky_prior.sh",
        ours=_OURS | _CAPTIONS | {"torch_compile", "gradient_checkpointing"},
        compared_with="sd", without={"embed_nothing"},
        graphs=(1, 1), resumed={"use_ema": True, "snr_gamma": 5.0}, tensors=20,
    ),
    "prior_lora": Script(
        _KANDINSKY / "train_text_to_image_prior_lora.py", "prior", ADAPTERS,
        {"caption_dropout": 0.5}, "kandinsky_prior_lora.sh",
        ours=_OURS | _CAPTIONS | {"torch_compile", "gradient_checkpointing"},
        compared_with="prior", without={"embed_nothing", "export"},
        graphs=(1, 2), resumed={"gradient_checkpointing": True}, tensors=15,
    ),
    "decoder": Script(
        _KANDINSKY / "train_text_to_image_decoder.py", "decoder", "unet/diffusion_pytorch_model.safetensors",
        {"image_embeds_dropout": 0.5}, "kandinsky_decoder.sh",
        ours=_OURS | _BUCKETS | {"torch_compile", "caption_column", "image_embeds_dropout"},
        compared_with="sd", without={"read_caption", "encode_captions"},  # it is conditioned on the image itself
        graphs=(1, 11), resumed={"use_ema": True}, tensors=100,
    ),
    "decoder_lora": Script(
        _KANDINSKY / "train_text_to_image_decoder_lora.py", "decoder", ADAPTERS,
        {"image_embeds_dropout": 0.5}, "kandinsky_decoder_lora.sh",
        ours=_OURS | _BUCKETS | {"torch_compile", "caption_column", "image_embeds_dropout"},
        compared_with="decoder", without={"read_caption", "encode_captions", "export"},
        graphs=(1, 12), resumed={"gradient_checkpointing": True}, tensors=40,
    ),
}  # fmt: skip
SCRIPTS = TORCH | {  # JAX is optional: the tests of this one are skipped without it
    "sd_flax": Script(
        _SD / "train_text_to_image_flax.py", "model", "unet/diffusion_pytorch_model.safetensors", _SD_DRAWS,
        "sd_flax.sh",
        ours=_SD_OURS | _DREAM | {
            "save_single_file",
            "validation_prompts", "gradient_accumulation_steps", "gradient_checkpointing", "lr_warmup_steps",
            "snr_gamma", "use_ema", "noise_offset", "prediction_type", "allow_tf32", "dataloader_num_workers",
            "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_epochs",
            "tracker_project_name", "image_interpolation_mode", "shard_parameters",
        },
        resumed={"use_ema": True},
    ),
}  # fmt: skip
