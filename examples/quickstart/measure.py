"""Counts how many images of a pipeline carry the quickstart's style.

    python examples/quickstart/measure.py examples/quickstart/tiny-emoji-diffusion    # the base
    python examples/quickstart/measure.py quickstart-output                           # fine-tuned by run.sh
    python examples/quickstart/measure.py examples/quickstart/tiny-emoji-diffusion --lora LORA_OUTPUT_FOLDER

Draws 16 captions with a fixed seed: 8 of those in pictures/, and 8 that the pipeline knows but no image there shows.
"""

import argparse

SEEN = (
    "tangerine", "banana", "cat face", "penguin", "rocket", "sunflower", "octopus", "guitar",
)  # fmt: skip
UNSEEN = (
    "tiger face", "red apple", "violin", "strawberry", "owl", "airplane", "snowman", "school bag",
)  # fmt: skip


def load(folder, lora=None):
    """The pipeline in `folder`, with the adapters in folder `lora` if there are any."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    if lora is not None:
        pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, captions=(*SEEN, *UNSEEN), num_inference_steps=20):
    """One image of each caption; the noise of the i-th has seed i."""
    import torch

    generators = [torch.Generator().manual_seed(i) for i in range(len(captions))]
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": 4.0, "height": 64, "width": 64}
    return pipeline(list(captions), generator=generators, **options).images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline_folder")
    parser.add_argument("--lora", metavar="FOLDER", help="adapters to draw with")
    args = parser.parse_args()
    from make_pictures import carries_style

    carried = [carries_style(picture) for picture in draw(load(args.pipeline_folder, args.lora))]
    seen, unseen = carried[: len(SEEN)], carried[len(SEEN) :]
    print(f"{sum(carried)} of {len(carried)} images carry the style: ", end="")
    print(f"{sum(seen)} of {len(seen)} trained captions, {sum(unseen)} of {len(unseen)} others")


if __name__ == "__main__":
    main()
