"""Makes the bundled tiny Stable Diffusion pipeline from a font: 64×64 emoji, under 8 MB, in about an hour on two cores.

    python examples/quickstart/make_pipeline.py --font NotoColorEmoji.ttf --build_dir build/quickstart

Stages, each of which can be run alone with ``--stage`` and finds the earlier ones' work in ``--build_dir``:
``data`` (captioned images), ``vae`` (autoencoder), ``base`` (tokenizer, text encoder, fresh UNet, put together),
``unet`` (this project's own training script), ``check`` (fp16 export, a drawing per caption, how many are recognised).
"""

import argparse
import json
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from emoji_font import CORPUS, caption, on_ground, read_glyphs
from tiny_vae import SIZE, contact_sheet, read_data, train_vae
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from t2i_training import files
from t2i_training.run import clip_names
from t2i_training.run.export import strip_local_paths

HERE = Path(__file__).resolve().parent
TRAINING_SCRIPT = HERE.parents[1] / "text_to_image" / "train_text_to_image.py"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# CLIP's own splitting rule, github.com/openai/CLIP simple_tokenizer.py
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", help="a CBDT font")
    parser.add_argument("--build_dir", type=Path, default=Path("build/quickstart"), help="intermediate results")
    parser.add_argument("--output_dir", type=Path, default=HERE / "tiny-emoji-diffusion", help="the finished pipeline")
    parser.add_argument("--stage", choices=["all", "data", "vae", "base", "unet", "check"], default="all")
    parser.add_argument("--vae_minutes", type=float, default=14)
    parser.add_argument("--unet_steps", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def make_data(args):
    """Writes ``build_dir/data``: 128×128 PNGs on white and ``metadata.jsonl``, one row per emoji of the corpus."""
    glyphs = read_glyphs(args.font)
    folder = args.build_dir / "data"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for emoji in CORPUS:
            text = caption(emoji)
            file_name = text.replace(" ", "_") + ".png"
            on_ground(glyphs[emoji], 128).save(folder / file_name)
            metadata.write(json.dumps({"file_name": file_name, "text": text}) + "\n")
    print(f"data: {len(CORPUS)} captioned images in {folder}")


# --- tokenizer, text encoder, fresh UNet ------------------------------------------------------------------------------


def save_tokenizer(folder, captions, names):
    """Trains CLIP's kind of byte-level BPE on emoji names and writes the three tokenizer files.

    All 256 bytes are tokens, in mid-word and at a word's end, so that any caption in any script can be encoded.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=800, initial_alphabet=byte_tokens, end_of_word_suffix="</w>")
    learner.train_from_iterator(captions * 20 + names, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = byte_tokens + [token + "</w>" for token in byte_tokens] + ["".join(merge) for merge in merges]
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(tokens), BOS, EOS])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)
    write_tokenizer(tokenizer, vocab, merges, folder)
    return tokenizer


def write_tokenizer(tokenizer, vocab, merges, folder):
    # transformers 5 writes tokenizer.json alone; older stacks and ports read the other two.
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def new_text_encoder(tokenizer):
    """A two-layer CLIP text model that is never trained.

    The UNet learns to read whatever the text encoder says, so random weights do, provided that different words get
    different states. CLIP's own initial scale would not: embeddings of std 0.02 drown in the attention's output,
    which is the mean over the words so far and nearly the same for all captions. At std 1 each state is its own word,
    with some of the words before it mixed in.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModel(config)
    for name, weight in text_encoder.named_parameters():
        if name.endswith("token_embedding.weight"):
            torch.nn.init.normal_(weight, std=1.0)
        elif name.endswith("position_embedding.weight"):
            torch.nn.init.normal_(weight, std=0.3)
    return text_encoder


def new_unet(text_encoder):
    # Attention at every level, the finest too (two fifths of a step's cost): LoRA's adapters sit on attention alone,
    # and without them at the finest level they cannot redraw what it adds last. Most weights sit at 4 by 4 positions.
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 64, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=text_encoder.config.hidden_size,
    )


def make_base(args):
    """Puts the trained autoencoder and the untrained rest together in ``build_dir/fresh`` (fp32)."""
    captions = read_data(args)[1]
    folder = args.build_dir / "fresh"
    names = [name for emoji in read_glyphs(args.font) if (name := unicodedata.name(emoji, "").lower())]
    tokenizer = save_tokenizer(args.build_dir / "tokenizer", captions, names)
    text_encoder = new_text_encoder(tokenizer).eval()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(args.build_dir / "vae"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=new_unet(text_encoder),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_pipeline(pipeline, folder, args)
    report_base(pipeline, captions)


def save_pipeline(pipeline, folder, args):
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):  # which the pipeline does not write
        shutil.copy(args.build_dir / "tokenizer" / name, folder / "tokenizer" / name)


@torch.no_grad()
def report_base(pipeline, captions):
    """Prints the sizes, the longest caption in tokens, and how far apart the captions are to the text encoder."""
    for name in ("vae", "text_encoder", "unet"):
        print(f"base: {name} {sum(p.numel() for p in getattr(pipeline, name).parameters()):,} weights")
    lengths = [len(ids) for ids in pipeline.tokenizer(captions).input_ids]
    ids = pipeline.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    states = pipeline.text_encoder(ids)[0].flatten(1)
    distances = torch.pdist(states)
    print(f"base: {len(pipeline.tokenizer)} tokens, longest caption {max(lengths)} of {ids.shape[1]}")
    print(f"base: distance between captions: least {distances.min():.1f}, mean {distances.mean():.1f}")


# --- training, export ------------------------------------------------------------------------------------------------


def train_unet(args):
    """Trains the UNet as any user would: this project's own script, on a folder of captioned images."""
    command = [
        sys.executable,
        str(TRAINING_SCRIPT),
        f"--pretrained_model_name_or_path={args.build_dir / 'fresh'}",
        f"--train_data_dir={args.build_dir / 'data'}",
        f"--output_dir={args.build_dir / 'trained'}",
        f"--resolution={SIZE}",
        "--center_crop",
        "--train_batch_size=32",
        f"--max_train_steps={args.unet_steps}",
        "--learning_rate=1e-3",
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=200",
        "--snr_gamma=5",
        "--caption_dropout=0.1",
        "--use_ema",
        "--checkpointing_steps=1000",
        "--checkpoints_total_limit=1",
        "--logging_steps=100",
        "--seed=0",
    ]
    print("unet:", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def export(args):
    """Saves the trained pipeline in half precision to ``--output_dir``, with its tokenizer files and model card."""
    pipeline = StableDiffusionPipeline.from_pretrained(args.build_dir / "trained", safety_checker=None)
    save_pipeline(pipeline.to(torch.float16), args.output_dir, args)
    # The file is half precision to be small. Saying so in config.json would make transformers 5 load it as half
    # precision everywhere, next to networks that diffusers loads in fp32, and CPU inference would fail.
    config_file = args.output_dir / "text_encoder" / "config.json"
    config = json.loads(config_file.read_text()) | {"dtype": "float32"}
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    strip_local_paths(args.output_dir)
    clip_names.keep_old_names(args.output_dir)
    files.apply_umask(args.output_dir)


@torch.no_grad()
def check(args, num_inference_steps=25, guidance_scale=4.0):
    """Exports, draws every caption once with the exported pipeline and counts the recognised drawings.

    A drawing is recognised if, among all training images, the nearest (mean squared pixel difference) is the one
    that belongs to its caption. Writes ``check.png``, drawings in the order of the data, and the model card.
    """
    export(args)
    pipeline = StableDiffusionPipeline.from_pretrained(args.output_dir, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pictures, captions = read_data(args)
    drawings = []
    for first in range(0, len(captions), 32):
        drawings += pipeline(
            captions[first : first + 32],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(first),
            output_type="pt",
        ).images
    drawings = 2 * torch.stack(list(drawings)) - 1
    nearest = torch.cdist(drawings.flatten(1), pictures.flatten(1)).argmin(1)
    recognised = int((nearest == torch.arange(len(captions))).sum())
    contact_sheet(drawings, 21).save(args.build_dir / "check.png")
    missed = [f"{captions[i]} (nearer to {captions[n]})" for i, n in enumerate(nearest.tolist()) if i != n]
    size = sum(file.stat().st_size for file in args.output_dir.rglob("*.safetensors"))
    print(f"check: {recognised} of {len(captions)} recognised; weights {size / 1e6:.2f} MB; missed: {missed}")
    card = (HERE / "model_card.md").read_text()
    numbers = {"captions": len(captions), "recognised": recognised, "list": ", ".join(sorted(captions))}
    (args.output_dir / "README.md").write_text(card.format(**numbers))


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    stages = {"data": make_data, "vae": train_vae, "base": make_base, "unet": train_unet, "check": check}
    for name, run_stage in stages.items():
        if args.stage in ("all", name):
            run_stage(args)


if __name__ == "__main__":
    main()
