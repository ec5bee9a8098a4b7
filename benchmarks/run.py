"""Measures the training scripts on this machine and writes a table; what is measured stands in README.md.

python benchmarks/run.py --size medium --reference_scripts DIR
"""

import argparse
import dataclasses
import importlib.metadata
import math
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

import flops
import models
import pictures
import rates
import report
import runs
import starts
import torch

BEGAN = time.monotonic()
PARTS = ("flops", "rate", "starts", "checkpoint", "help")  # without flax, which needs JAX, and buckets
# Height and width, of equal areas in the UNet at all depths: sides that it cannot halve are rounded up.
BUCKETS = ((384, 384), (256, 576), (576, 256), (192, 768), (768, 192))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(models.SCALES), default="medium", help="Of the networks.")
    parser.add_argument("--scripts", nargs="+", choices=list(runs.SCRIPTS), default=list(runs.SCRIPTS))
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "flax", "buckets"], default=list(PARTS))
    parser.add_argument("--reference_scripts", type=Path, metavar="DIR", help="Holds the scripts to compare with.")
    parser.add_argument("--output", type=Path, default=runs.HERE / "RESULTS.md", help="Where the tables go.")
    parser.add_argument("--append", action="store_true", help="To what is in that file, instead of in its place.")
    parser.add_argument("--variants", nargs="+", choices=list(rates.VARIANTS), help="Default: as the README says.")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=FLAGS", help="One more, e.g. 'tf32=--allow_tf32'."
    )
    parser.add_argument("--flags", default="", help="Flags that every run gets, the reference's too.")
    parser.add_argument("--batch", type=int, help="Images in an update.")
    parser.add_argument("--images", type=int, help="Images in the data set.")
    parser.add_argument("--together", action="store_true", help="On a GPU, hold a script's variants at once.")
    parser.add_argument("--seconds", type=float, default=math.inf, help="Begin no measurement after so many.")
    parser.add_argument("--samples", nargs="+", type=int, default=[1000, 10000], help="Data sets of the cache starts.")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "t2i-benchmarks"))
    return parser.parse_args()


def prepare(args) -> rates.Bench:
    """Models, images and plan."""
    plan, scale = rates.PLANS[args.size], models.SCALES[args.size]
    square = (scale.resolution, scale.resolution)
    if args.images:
        plan = dataclasses.replace(plan, pictures=args.images)
    if args.batch:
        plan = dataclasses.replace(plan, batch=dict.fromkeys(plan.batch, args.batch))
    variants = args.variants or list(rates.VARIANTS)[: None if args.size == "full" else 2]
    bench = rates.Bench(
        work=args.work, size=args.size, plan=plan, resolution=scale.resolution, reference=args.reference_scripts,
        pipelines=models.build(args.work / "models", args.size, {name.removesuffix("_lora") for name in args.scripts}),
        pictures=pictures.make(args.work / "pictures" / f"{scale.resolution}px", plan.pictures, square),
        cuda=torch.cuda.is_available(), common=shlex.split(args.flags),
        variants={name: rates.VARIANTS[name] for name in variants}
        | {name: shlex.split(flags) for name, _, flags in (text.partition("=") for text in args.variant)},
        together=args.together, deadline=BEGAN + args.seconds,
    )  # fmt: skip
    if args.size == "full":
        bench.common += ["--mixed_precision", "bf16", "--dataloader_num_workers", "8"]
    return bench


def add_rates(args, bench: rates.Bench, results: report.Report) -> None:
    """The tables of all scripts, with each script anew: what was measured before an interruption is in the file."""
    if not bench.together:
        with bench.start(args.scripts[0], "plain", runs.own_script(args.scripts[0])):
            pass  # thrown away: from here on file caches are warm, and `datasets` knows the images
    device, dtype = ("cuda", torch.bfloat16) if bench.cuda else ("cpu", torch.float32)
    ceiling = flops.matrix_rate(device, dtype, args.size)
    measured, late, before = {}, [], results.mark()
    for variants in rates.stages(bench):
        for name in args.scripts:
            if bench.late():
                late += [f"{name} {variant}" for variant in variants if variant in rates.scripts_of(bench, name)]
                continue
            measured[name] = measured.get(name, {}) | rates.measure(bench, name, variants)
            results.back(before)
            add_rate_tables(bench, measured, ceiling, results)
    if late:
        results.add(f"Not reached within {args.seconds:g} s: {', '.join(late)}.")


def add_rate_tables(bench: rates.Bench, measured: dict, ceiling: float, results: report.Report) -> None:
    text = f"{bench.resolution} px; in brackets, times the rate of the reference, or else of the plain run."
    results.add(f"### Training rate, images/s\n\n{text}\n\n{report.rate_table(bench, measured)}")
    if reasons := report.failures(measured):
        results.add(reasons)
    results.add(f"### Start to first update, s\n\n{report.start_table(bench, measured)}")
    if bench.cuda:
        text = "GiB that torch's allocator had given out at most during the updates that were measured."
        results.add(f"### GPU memory, GiB\n\n{text}\n\n{report.memory_table(bench, measured)}")
    results.add(
        "### Utilisation\n\nArithmetic of the networks, as a share of what a large matrix product reaches.\n\n"
        + report.utilisation_table(bench, measured, ceiling)
    )


def add_starts(args, bench: rates.Bench, results: report.Report) -> None:
    tiny = models.build(args.work / "models", "tiny", {"sd"})
    measured = {count: starts.cache_starts(bench, tiny, count) for count in args.samples}
    results.add(
        "### Start to first update with --cache_encodings, s\n\nTiny networks, images of 8 px.\n\n"
        + report.cache_table(measured)
    )


def add_checkpoint(args, bench: rates.Bench, results: report.Report) -> None:
    rows, name = [], args.scripts[0]
    for variant, script in rates.scripts_of(bench, name).items():
        if variant in (rates.REFERENCE, rates.PLAIN):
            rows.append([name, variant, *starts.checkpoint_stall(bench, name, variant, script)])
    header = ["script", "variant", "the loop stands still, s", "size of the checkpoint, GB"]
    results.add(f"### Checkpoints\n\n{report.table(header, rows)}")


def add_flax(args, bench: rates.Bench, results: report.Report) -> None:
    scripts = {"torch": runs.own_script("sd"), "flax": runs.flax_script()}
    with bench.start("sd", "torch", scripts["torch"]):
        pass  # thrown away, as above
    measured = {name: rates.Result() for name in scripts}
    rates.alternate(bench, "sd", scripts, measured)
    text = f"{bench.resolution} px. Compiling is within the start, and not in the updates."
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    batch = bench.plan.batch["sd"]
    results.add(f"### Flax beside torch\n\n{text} {versions}.\n\n{report.flax_table(*measured.values(), batch)}")


def add_buckets(args, bench: rates.Bench, results: report.Report) -> None:
    """The same images of five shapes, cut to squares and in buckets of equal area."""
    named = ";".join(f"{height},{width}" for height, width in BUCKETS)
    bench = dataclasses.replace(
        bench, pictures=pictures.make(args.work / "pictures" / "buckets", 60, *BUCKETS), resolution=BUCKETS[0][0],
        plan=dataclasses.replace(bench.plan, dropped=15, rounds=15, updates=5), reference=None,
        variants={rates.PLAIN: [], "buckets": ["--use_aspect_ratio_buckets", "--aspect_ratio_buckets", named]},
    )  # fmt: skip
    measured = {name: rates.measure(bench, name, list(bench.variants)) for name in args.scripts}
    text = f"60 images of five shapes, plain in squares of {BUCKETS[0][0]} px, and in `{named}`, of the same area."
    results.add(f"### Aspect-ratio buckets, images/s\n\n{text}\n\n{report.rate_table(bench, measured)}")
    if reasons := report.failures(measured):
        results.add(reasons)


def add_help(args, bench: rates.Bench, results: report.Report) -> None:
    rows = []
    for name in args.scripts:
        reference = runs.reference_script(name, bench.reference)
        own = f"{starts.help_seconds(runs.own_script(name), 5):.2f}"
        rows.append([name, f"{starts.help_seconds(reference, 1):.1f}" if reference else "-", own])
    results.add(f"### --help, s\n\n{report.table(['script', 'reference', 'here'], rows)}")


def main() -> None:
    args = parse_args()
    results = report.Report(args.output, args.append)
    results.add(f"## Networks: {args.size}\n\n{report.machine()}\n\n    {report.command()}")
    bench = prepare(args)
    if "flops" in args.parts:
        text = "GFLOP per image; the real figures are of Stable Diffusion 1.5 and Kandinsky 2.2 at 512 px."
        results.add(f"### Arithmetic\n\n{text}\n\n{report.work_table(args.size, args.scripts)}")
    parts = {
        "rate": add_rates, "starts": add_starts, "checkpoint": add_checkpoint, "help": add_help, "flax": add_flax,
        "buckets": add_buckets,
    }  # fmt: skip
    for part, add in parts.items():
        if part in args.parts and bench.late():
            results.add(f"Not reached within {args.seconds:g} s: {part}.")
        elif part in args.parts:
            add(args, bench, results)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and so end the runs that are open
    try:
        main()
    except runs.Failed as error:
        sys.exit(f"error: a run did not start: {error}")
