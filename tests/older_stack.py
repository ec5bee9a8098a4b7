"""What pipelines, loaded by the documented calls, give for fixed inputs, whichever libraries are on the import path.

python older_stack.py target.npz kind=folder ...
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

PROMPT = "Tiger face <3"


def picture(pipeline, **steps) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "np", "generator": generator}
    return pipeline(PROMPT, **arguments | steps).images[0]


def tokens(tokenizer) -> torch.Tensor:
    return tokenizer(PROMPT, padding="max_length", truncation=True, return_tensors="pt").input_ids


def pixels(processor) -> torch.Tensor:
    """Resized, which transformers 5 rounds in another way: within one grey level of 255."""
    ramp = np.arange(60 * 40 * 3, dtype=np.uint32).reshape(60, 40, 3) % 256
    return processor(Image.fromarray(ramp.astype(np.uint8)), return_tensors="pt").pixel_values


def noise(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0))


def of_stable_diffusion(folder) -> dict:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    ids = tokens(pipeline.tokenizer)
    found = {"ids": ids, "states": pipeline.text_encoder(ids)[0], "picture": picture(pipeline)}
    if pipeline.safety_checker is not None:
        found["pixels"] = pixels(pipeline.feature_extractor)
        found["safety"] = pipeline.safety_checker.vision_model(noise(found["pixels"])).pooler_output
    return found


def of_prior(folder) -> dict:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    ids, seen = tokens(pipeline.tokenizer), pixels(pipeline.image_processor)
    embeds = pipeline(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).image_embeds
    text, image = pipeline.text_encoder(ids).text_embeds, pipeline.image_encoder(noise(seen)).image_embeds
    return {"ids": ids, "pixels": seen, "text": text, "image": image, "embeds": embeds}


def of_decoder(folder) -> dict:
    pipeline = AutoPipelineForText2Image.from_pretrained(folder)
    return {"picture": picture(pipeline, prior_num_inference_steps=3)}


def of_adapters(folder) -> dict:
    """`folder` is base and adapters' file, with a comma between them."""
    base, file = folder.split(",")
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(str(Path(file).parent), weight_name=Path(file).name)
    return {"picture": picture(pipeline)}


KINDS = {"sd": of_stable_diffusion, "prior": of_prior, "decoder": of_decoder, "adapters": of_adapters}


@torch.no_grad()
def outputs(wanted: list[str]) -> dict[str, np.ndarray]:
    """kind=folder ... -> "place in that list.name" -> numbers."""
    found = {}
    for place, (kind, folder) in enumerate(item.split("=", 1) for item in wanted):
        found |= {f"{place}.{name}": np.asarray(value) for name, value in KINDS[kind](folder).items()}
    return found


if __name__ == "__main__":
    np.savez(sys.argv[1], **outputs(sys.argv[2:]))
