"""Writes a table of the GPU memory that the training scripts take with networks of the real size.

python benchmarks/memory.py --append

Each row is a run of a script's main() in a process of its own, up to its second weight update (memory_driver.py).
Nothing is downloaded, and no weights are on disk.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import models
import pictures
import report
import runs
import torch

GIB = 2**30
BF16, CHECKPOINTING = "--mixed_precision=bf16", "--gradient_checkpointing"
PLAIN = [  # of every script
    "1", f"1 {BF16}", f"1 {BF16} --cache_encodings", f"4 {BF16}", f"4 {BF16} {CHECKPOINTING}", f"8 {BF16}",
    f"8 {BF16} {CHECKPOINTING}",
]  # fmt: skip
STABLE_DIFFUSION = ["1 --mixed_precision=fp16", f"1 {BF16} {CHECKPOINTING}", *PLAIN]
FULL = [f"4 {BF16} {CHECKPOINTING} --use_ema", f"1 {BF16} {CHECKPOINTING} --use_8bit_adam"]
LORA = [f"4 {BF16} --rank=16", f"16 {BF16} {CHECKPOINTING} --cache_encodings"]
LARGE = f"1 {BF16} {CHECKPOINTING} --resolution=768"
ROWS = {  # script -> the batch size and the flags of each row
    "sd": [*STABLE_DIFFUSION, *FULL, f"4 {BF16} {CHECKPOINTING} --use_ema --offload_ema", LARGE],
    "sd_lora": STABLE_DIFFUSION + LORA, "prior": PLAIN + FULL, "prior_lora": PLAIN + LORA,
    "decoder": [*PLAIN, *FULL, LARGE], "decoder_lora": PLAIN + LORA,
}  # fmt: skip

COLUMNS = {"start": "start", "update": "update", "optimizer": "its optimizer step"}
TEXT = """GiB at the peak, of what torch's allocator gave out; 512 px (Stable Diffusion, decoder) and `--rank=4` unless
the flags say otherwise. Start: loading, encoding and the first update. Update: the second one, forward and backward
pass and the optimizer's step, which stands alone in the last column."""


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument(
        "--flags",
        metavar="BATCH FLAGS",
        help="One row of these for each script, e.g. '4 --use_ema', instead of the usual ones.",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="Rows measured at once; those that fail beside others are repeated alone."
    )
    parser.add_argument("--output", type=Path, default=runs.HERE / "RESULTS.md", help="Where the table goes.")
    parser.add_argument("--append", action="store_true", help="To what is in that file, instead of in its place.")
    return parser.parse_args()


def measure(name: str, row: str, pipelines: dict[str, Path], data: Path, folder: Path) -> dict[str, int] | str:
    """What memory_driver.py measures, in bytes; of a run that failed the last line that it wrote.

    Of `pipelines`, which are tiny, flags are checked alone: the driver puts others in their place.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    batch, *flags = row.split()
    size = {} if name.startswith("prior") else {"resolution": 512}
    tokens = runs.training_flags(
        name, pipelines, train_data_dir=data, output_dir=folder / "output", report_to="none", logging_steps=10**6,
        dataloader_num_workers=1, train_batch_size=batch, **size,
    )  # fmt: skip
    file = folder / "memory.json"
    process = subprocess.run(
        [sys.executable, runs.HERE / "memory_driver.py", file, name, *tokens, *flags],
        env=runs.environment(folder), capture_output=True, text=True, check=False,
    )  # fmt: skip
    return json.loads(file.read_text()) if file.exists() else runs.last_line(process.stderr)


def measure_rows(name: str, rows: list[str], jobs: int, measure, work: Path) -> list[list[str]]:
    """The table's lines; each is printed when it is measured."""

    def once(i: int):
        measured = measure(name, rows[i], folder=work / f"{name}-{i}")
        print(name, *line(rows[i], measured), flush=True)
        return measured

    with ThreadPoolExecutor(jobs) as pool:
        measured = list(pool.map(once, range(len(rows))))
    if jobs > 1:
        measured = [once(i) if isinstance(found, str) else found for i, found in enumerate(measured)]
    return [line(row, found) for row, found in zip(rows, measured)]


def line(row: str, measured: dict[str, int] | str) -> list[str]:
    batch, _, flags = row.partition(" ")
    shown = [batch, f"`{flags}`" if flags else "(fp32)"]
    if isinstance(measured, str):
        return [*shown, measured, *["-"] * len(COLUMNS)]
    peak = max(measured["start"], measured["update"])
    return [*shown, f"**{peak / GIB:.2f}**", *(f"{measured[name] / GIB:.2f}" for name in COLUMNS)]


def main() -> None:
    args = parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: what is measured is the memory of a CUDA device, and there is none")
    results = report.Report(args.output, args.append)
    results.add(f"## GPU memory\n\n{report.machine()}\n\n    {report.command()}\n\n{TEXT}")
    with tempfile.TemporaryDirectory() as work:
        data = pictures.make(Path(work, "pictures"), 16, (512, 512))
        tiny = models.build(Path(work, "models"), "tiny", {name.removesuffix("_lora") for name in args.scripts})
        for name in args.scripts:
            rows = [args.flags] if args.flags else ROWS[name]
            lines = measure_rows(name, rows, args.jobs, partial(measure, pipelines=tiny, data=data), Path(work))
            results.add(f"### {name}\n\n{report.table(['batch', 'flags', 'peak', *COLUMNS.values()], lines)}")


if __name__ == "__main__":
    main()
