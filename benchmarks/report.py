"""The tables: Markdown from what was measured, and the machine that it was measured on."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
from pathlib import Path

import flops
import rates
import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Date, processor, cores, accelerator and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    return (
        f"{datetime.date.today()}; {models[0] if models else platform.processor()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads{gpu}; load before the start {os.getloadavg()[0]:.1f}.\n"
        f"Python {platform.python_version()}, {versions}."
    )


def command() -> str:
    """As it was given, without folders of this machine."""
    words = []
    for word in sys.argv[1:]:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(flag + equals + ("DIR" if Path(value).is_absolute() else value))
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


class Report:
    """The file, written anew with every part: what was measured before an interruption is there."""

    def __init__(self, path: Path, append: bool):
        self._path = path
        self._text = path.read_text() if append and path.exists() else "# Results\n"

    def mark(self) -> str:
        """Where the report stands; `back` goes there again."""
        return self._text

    def back(self, mark: str) -> None:
        self._text = mark

    def add(self, text: str) -> None:
        print(f"\n{text}", flush=True)
        self._text = f"{self._text.rstrip()}\n\n{text}\n"
        self._path.write_text(self._text)


def work_table(size: str, names: list[str]) -> str:
    rows = []
    for name in names:
        frozen, trained = flops.per_image(name, size)
        real_frozen, real_trained = flops.per_image(name, "full")
        rows.append([
            name, f"{frozen * 1e3:.4g}", f"{trained * 1e3:.4g}", f"{frozen / trained:.2f}",
            f"{real_frozen * 1e3:.0f}", f"{real_trained * 1e3:.0f}", f"{real_frozen / real_trained:.2f}",
            f"{1 + real_frozen / real_trained:.2f}",
        ])  # fmt: skip
    header = ["script", "frozen", "trained", "ratio", "real, frozen", "real, trained", "ratio", "caching could bring"]
    return table(header, rows)


def rate_table(bench: rates.Bench, measured: dict) -> str:
    """Images per second, and how many times the reference's rate (where there is none: the plain run's) that is."""
    columns = [rates.REFERENCE] * (bench.reference is not None) + list(bench.variants)
    columns = [c for c in columns if c == rates.REFERENCE or any(c in results for results in measured.values())]
    rows = []
    for name, results in measured.items():
        batch = bench.plan.batch[name.removesuffix("_lora")]
        base = next((c for c in (rates.REFERENCE, rates.PLAIN) if c in results and results[c].seconds), None)
        rows.append([name, str(batch), *(_rate(results, column, base, batch) for column in columns)])
    return table(["script", "batch", *columns], rows)


def _rate(results: dict, column: str, base: str | None, batch: int) -> str:
    if column not in results:
        return "-"
    result = results[column]
    if result.failed or not result.seconds:
        return "does not start" if result.start is None else "failed"
    rate = f"{batch / statistics.median(result.seconds):.3g}"
    return rate if column == base or base is None else f"{rate} ({rates.speed_up(results[base], result):.2f}x)"


def flax_table(torch: rates.Result, flax: rates.Result, batch: int) -> str:
    """Both scripts at the same updates; of the Flax script also what compiling takes of its start."""
    header = ["script", "batch", "s an update", "images/s", "times torch's", "start to first update, s", "compiling, s"]
    rows = []
    for name, result in {"torch": torch, "Flax": flax}.items():
        if not result.seconds:
            rows.append([name, str(batch), result.failed or "does not start", *["-"] * 4])
            continue
        seconds = statistics.median(result.seconds)
        ratio = f"{rates.speed_up(torch, result):.2f}" if torch.seconds else "-"
        compiling = f"{result.compiling:.1f}" if result.compiling else "-"
        line = [name, str(batch), f"{seconds:.4g}", f"{batch / seconds:.3g}", ratio, f"{result.start:.1f}", compiling]
        rows.append(line)
    return table(header, rows)


def failures(measured: dict) -> str:
    lines = [
        f"* {name}, {variant}: `{result.failed}`"
        for name, results in measured.items()
        for variant, result in results.items()
        if result.failed
    ]
    return "\n".join(["What failed:", "", *lines]) if lines else ""


def start_table(bench: rates.Bench, measured: dict) -> str:
    columns = [rates.REFERENCE] * (bench.reference is not None) + list(bench.variants)
    columns = [c for c in columns if any(c in results for results in measured.values())]
    rows = []
    for name, results in measured.items():
        starts = [results[c].start if c in results else None for c in columns]
        cold, warm = results.get("cold"), results.get(rates.CACHED)
        known = cold and cold.start and warm.start
        caching = f"{(cold.caching - warm.caching) / bench.plan.pictures * 1000:.3g}" if known else "-"
        rows.append([name, *(f"{start:.1f}" if start else "-" for start in starts), caching])
    return table(["script", *columns, "caching, s per 1000 images"], rows)


def memory_table(bench: rates.Bench, measured: dict) -> str:
    columns = [rates.REFERENCE] * (bench.reference is not None) + list(bench.variants)
    columns = [c for c in columns if any(c in results for results in measured.values())]
    rows = []
    for name, results in measured.items():
        peaks = [results[c].peak if c in results else 0 for c in columns]
        rows.append([name, *(f"{peak / 2**30:.1f}" if peak else "-" for peak in peaks)])
    return table(["script", *columns], rows)


def utilisation_table(bench: rates.Bench, measured: dict, ceiling: float) -> str:
    """Arithmetic of the networks per second, as a share of what a large matrix product reaches."""
    rows = []
    for name, results in measured.items():
        frozen, trained = flops.per_image(name, bench.size)
        for variant, result in results.items():
            if result.seconds:
                cached = "--cache_encodings" in bench.variants.get(variant, [])
                work = (trained if cached else trained + frozen) * bench.plan.batch[name.removesuffix("_lora")]
                rate = work / statistics.median(result.seconds)
                rows.append([name, variant, f"{rate:.3g}", f"{rate / ceiling:.0%}"])
    return table(["script", "variant", "TFLOP/s", f"of {ceiling:.3g} TFLOP/s"], rows)


def cache_table(measured: dict[int, dict[str, float]]) -> str:
    rows = [
        [f"{count:,}", *(f"{seconds[kind]:.1f}" for kind in ("plain", "cold", "warm"))]
        for count, seconds in measured.items()
    ]
    return table(["pictures", "plain", "cached, cold", "cached, warm"], rows)
