"""The quickstart's autoencoder: 64×64 images to 16×16×4 latents and back, trained on every emoji of the font.

Fine-tuning changes what a pipeline draws, but not what its autoencoder can express. So this one also sees coloured
grounds, turned hues, inversions and lights in the dark, and the looks that users fine-tune towards survive it.
"""

import json
import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from emoji_font import CORPUS, glowing_outlines, on_ground, read_glyphs
from make_pictures import neon_sign
from PIL import Image

SIZE = 64  # pixels per side of what the pipeline makes


def read_data(args):
    """The corpus as ``(N, 3, 64, 64)`` float32 in −1…1, and its N captions in the same order."""
    rows = [json.loads(line) for line in (args.build_dir / "data" / "metadata.jsonl").read_text().splitlines()]
    pictures = [
        np.asarray(Image.open(args.build_dir / "data" / row["file_name"]).resize((SIZE, SIZE), Image.LANCZOS))
        for row in rows
    ]
    return torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1, [row["text"] for row in rows]


def new_vae():
    # The encoder runs at every training step: few channels at full size, more at a quarter of it.
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def vae_pictures(args):
    """Every emoji of the font, twice: ``(N, 4, 64, 64)`` uint8 RGBA and ``(N, 3, 64, 64)`` uint8 glowing outlines."""
    glyphs = read_glyphs(args.font).values()
    on_white = np.stack([np.asarray(on_ground(glyph, SIZE)) for glyph in glyphs]).astype(np.int16)
    on_black = np.stack([np.asarray(on_ground(glyph, SIZE, (0, 0, 0))) for glyph in glyphs]).astype(np.int16)
    # white ground less black ground is 255 * (1 - alpha); on black the colours are already premultiplied by alpha
    alpha = 255 - (on_white - on_black).mean(-1, keepdims=True).round()
    drawn = np.concatenate([on_black, alpha], -1).clip(0, 255).astype(np.uint8)
    light = np.stack([(255 * glowing_outlines(glyph, SIZE)).astype(np.uint8) for glyph in glyphs])
    return torch.tensor(drawn).permute(0, 3, 1, 2), torch.tensor(light).permute(0, 3, 1, 2)


def vae_batch(drawn, light, size, generator):
    """``(size, 3, 64, 64)`` float32 in −1…1: emoji on white, on random colours, as lights in the dark."""

    def chance(p):
        return torch.rand(size, 1, 1, 1, generator=generator) < p

    index = torch.randint(len(drawn), (size,), generator=generator)
    painted, lights = drawn[index].float() / 255, light[index].float() / 255
    if torch.rand((), generator=generator) < 0.4:  # one hue turn for the batch
        turn = torch.randperm(3, generator=generator)
        painted, lights = torch.cat([painted[:, turn], painted[:, 3:]], 1), lights[:, turn]
    ground = torch.rand(size, 3, 1, 1, generator=generator)
    ground = torch.where(chance(0.6), torch.ones_like(ground), ground)
    dark = 0.35 * torch.rand(size, 3, 1, 1, generator=generator)
    pictures = painted[:, :3] + (1 - painted[:, 3:]) * ground
    pictures = torch.where(chance(0.4), dark + (1 - dark) * lights, pictures)
    pictures = torch.where(chance(0.05), 1 - pictures, pictures)
    pictures = torch.where(chance(0.5), pictures.flip(-1), pictures)
    shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
    return 2 * pictures.roll(shift, (-2, -1)) - 1


def train_vae(args, batch_size=16, peak_lr=2e-3):
    """Trains the autoencoder for ``--vae_minutes`` and saves it with the latents' measured scale."""
    vae, generator = new_vae(), torch.Generator().manual_seed(0)
    drawn, light = vae_pictures(args)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=1e-4)
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        done = min(1.0, (time.monotonic() - start) / (60 * args.vae_minutes))
        optimizer.param_groups[0]["lr"] = peak_lr * min(1.0, (step + 1) / 200) * (1 - done) + 1e-6
        pictures = vae_batch(drawn, light, batch_size, generator)
        with torch.autocast("cpu", torch.bfloat16):  # worth it where the processor has AVX512-BF16
            posterior = vae.encode(pictures).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            rebuilt = vae.decode(latents).sample
        error = rebuilt.float() - pictures
        # L1 keeps edges crisp, L2 is what PSNR counts; the KL term only keeps the latents near one scale.
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-5 * posterior.kl().float().mean() / 64
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"vae: step {step} ({done:.0%})  mse {error.square().mean():.5f}  loss {loss:.4f}", flush=True)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(read_data(args)[0]).latent_dist.sample(generator)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    vae.save_pretrained(args.build_dir / "vae")
    print(f"vae: {step} steps, scaling_factor {vae.config.scaling_factor}")
    report_vae(vae, args)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB, averaged over images; both ``(N, 3, H, W)`` in −1…1."""
    return (10 * torch.log10(4 / (a - b).square().mean((1, 2, 3)))).mean().item()


@torch.no_grad()
def report_vae(vae, args):
    """Prints how well both looks survive the autoencoder and saves ``vae.png``: originals above reconstructions."""
    glyphs = read_glyphs(args.font)
    signs = np.stack([np.asarray(neon_sign(glyphs[emoji], SIZE)) for emoji in CORPUS])
    looks = {"white": read_data(args)[0], "night": torch.tensor(signs).permute(0, 3, 1, 2) / 127.5 - 1}
    rows = []
    for name, pictures in looks.items():
        rebuilt = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
        print(f"vae: {psnr(pictures, rebuilt):.2f} dB on {name} ground", flush=True)
        rows += [pictures[::8], rebuilt[::8]]
    contact_sheet(torch.cat(rows), len(rows[0])).save(args.build_dir / "vae.png")


def contact_sheet(pictures, columns):
    """``(N, 3, H, W)`` in −1…1 as one image, row by row."""
    pictures = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    height, width = pictures.shape[1:3]
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (i % columns * width, i // columns * height))
    return sheet
