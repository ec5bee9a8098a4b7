"""Host memory and time that the single file of a Stable Diffusion 1.5 takes, with random weights of its real sizes.

    python benchmarks/single_file.py [--work DIR]

Each line is a process of its own: the peak of its resident memory over the size of the file that it wrote, or read. The
file is read back by diffusers and compared with the folder, tensor by tensor. Takes 12 GB of disk, 10 GB of memory.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = """
import json, resource, sys, time
from t2i_training.model import single_file
start = time.perf_counter()
single_file.main(sys.argv[1:])
seconds = time.perf_counter() - start
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, seconds]))
"""


def make_model(folder: Path) -> None:
    """The pipeline's folder: networks in the published sizes, weights as they are initialised."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from t2i_training.sources import families

    torch.manual_seed(0)
    families.write(families.SD1, folder)
    UNet2DConditionModel.from_config(families.SD1["unet/config.json"]).save_pretrained(folder / "unet")
    AutoencoderKL.from_config(families.SD1["vae/config.json"]).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(**families.SD1["text_encoder/config.json"])).save_pretrained(folder / "text_encoder")


def measure(folder: Path, *options: str) -> None:
    """Run the command in a process of its own, and print what it took."""
    tokens = [sys.executable, "-c", PROGRAM, str(folder), *options]
    lines = subprocess.run(tokens, capture_output=True, text=True, check=True).stdout.splitlines()
    peak, seconds = json.loads(lines[-1])
    size = (folder / "single_file.safetensors").stat().st_size
    print(
        f"| {' '.join(options)} | {size / 2**30:.2f} | {peak / 2**30:.2f} | {peak / size:.2f} | {seconds:.0f} |",
        flush=True,
    )


def compare(folder: Path) -> None:
    """Load the file with diffusers; fail unless every tensor is the folder's, rounded once to the file's precision."""
    import torch
    from diffusers import StableDiffusionPipeline

    start = time.perf_counter()
    file = str(folder / "single_file.safetensors")
    read = StableDiffusionPipeline.from_single_file(file, config=str(folder), local_files_only=True)
    print(f"\ndiffusers loads it in {time.perf_counter() - start:.0f} s", end="; ", flush=True)
    written = StableDiffusionPipeline.from_pretrained(folder)
    count = 0
    for part in ("unet", "vae", "text_encoder"):
        found, expected = getattr(read, part).state_dict(), getattr(written, part).state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
            count += 1
    print(f"its {count} tensors are the folder's, to the last bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="Folder for the model. Default: a temporary one.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.work or Path(temporary)) / "sd15"
        if not folder.exists():  # in a process of its own: a child's peak counts what its parent had at the fork
            process = multiprocessing.get_context("spawn").Process(target=make_model, args=(folder,))
            process.start()
            process.join()
        print("| options | file, GiB | peak memory, GiB | ratio | seconds |\n| --- | --- | --- | --- | --- |")
        for precision in ("fp16", "bf16", "fp32"):
            measure(folder, f"--save_precision={precision}")
        compare(folder)


if __name__ == "__main__":
    main()
