"""Images per second of a script in several variants, and of the reference, which take turns."""

import contextlib
import functools
import math
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import runs

REFERENCE, PLAIN, CACHED = "reference", "plain", "cached"
COMPILED = "compiled"
VARIANTS = {PLAIN: [], CACHED: ["--cache_encodings"], COMPILED: ["--cache_encodings", "--torch_compile"]}


@dataclass(frozen=True)
class Plan:
    """How much is measured. Rounds of `updates` weight updates of each variant, after `dropped` ones."""

    batch: dict[str, int]  # by base: sd, prior, decoder
    pictures: int
    dropped: int
    rounds: int
    updates: int


PLANS = {
    "tiny": Plan({"sd": 4, "prior": 4, "decoder": 4}, pictures=16, dropped=3, rounds=5, updates=5),
    "medium": Plan({"sd": 8, "prior": 8, "decoder": 8}, pictures=24, dropped=1, rounds=3, updates=2),
    "full": Plan({"sd": 16, "prior": 16, "decoder": 16}, pictures=1024, dropped=5, rounds=3, updates=10),
}


@dataclass
class Bench:
    """What all measurements share: where models, images and outputs are, and what is added to every command."""

    work: Path
    size: str
    plan: Plan
    pipelines: dict[str, Path]
    pictures: Path
    resolution: int
    reference: Path | None
    cuda: bool
    common: list[str]
    variants: dict[str, list[str]]
    together: bool = False  # on a GPU, which then holds all variants of a script but the compiled one at once
    deadline: float = math.inf  # of time.monotonic(), after which nothing is begun

    def output(self, name: str) -> Path:
        """An output folder that is not there."""
        folder = self.work / "outputs" / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def start(self, name: str, variant: str, script: Path, **changes) -> runs.Run:
        """A run of script `name` in a variant, which has made its first update."""
        given = {
            "train_batch_size": self.plan.batch[name.removesuffix("_lora")], "resolution": self.resolution,
            "output_dir": self.output(f"{name}-{variant}"), "train_data_dir": self.pictures,
        } | changes  # fmt: skip
        tokens = runs.training_flags(name, self.pipelines, **given) + self.common + self.variants.get(variant, [])
        if "--cache_encodings" in tokens and "encodings_dir" not in changes:
            tokens += ["--encodings_dir", str(self.encodings(name))]
        return runs.Run(script, tokens, self.work)

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def encodings(self, name: str) -> Path:
        return self.work / "encodings" / self.size / name


@dataclass
class Result:
    """One variant: seconds of an update in each round; of the start to the first update, and of caching in it; the GPU
    memory at the peak of the updates, in bytes."""

    seconds: list[float] = field(default_factory=list)
    start: float | None = None
    caching: float = 0.0
    compiling: float = 0.0
    peak: int = 0
    failed: str = ""  # the reason


@functools.cache
def known_flags(script: Path) -> set[str]:
    usage = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True).stdout
    return {word.rstrip(",") for word in usage.split() if word.startswith("--")}


def scripts_of(bench: Bench, name: str) -> dict[str, Path]:
    """The script of each variant; variants with a flag that the script has not are left out."""
    own, reference = runs.own_script(name), runs.reference_script(name, bench.reference)
    found = {REFERENCE: reference} if reference else {}
    for variant, flags in bench.variants.items():
        if {flag for flag in flags if flag.startswith("--")} <= known_flags(own):
            found[variant] = own
    return found


def stages(bench: Bench) -> list[list[str]]:
    """Variants, reference included, in the order in which all scripts are measured: compiling takes the longest."""
    everything = [REFERENCE, *bench.variants]
    if not bench.together or COMPILED not in everything:
        return [everything]
    return [[name for name in everything if name != COMPILED], [COMPILED]]


def measure(bench: Bench, name: str, chosen: list[str]) -> dict[str, Result]:
    """Those of the chosen variants that a script has. A start that caches all images is the result "cold"; `together`
    it is not told apart: the one cached run caches them, beside the starts of the others.
    """
    scripts = {variant: script for variant, script in scripts_of(bench, name).items() if variant in chosen}
    if not scripts:
        return {}
    results = {variant: Result() for variant in scripts}
    if CACHED in scripts:
        shutil.rmtree(bench.encodings(name), ignore_errors=True)
        if not bench.together:
            results["cold"] = Result()
            with _noting_failure(results["cold"]), bench.start(name, CACHED, scripts[CACHED]) as run:
                results["cold"].start, results["cold"].caching = run.started, run.caching
    alternate(bench, name, scripts, results)
    return results


def alternate(bench: Bench, name: str, scripts: dict[str, Path], results: dict[str, Result]) -> None:
    """Measure the variants of script `name` in turns; on a GPU one after the other, unless it holds them `together`."""
    alone = [[variant] for variant in scripts]
    for group in alone if bench.cuda and not bench.together else [list(scripts)]:
        _take_turns(bench, name, {variant: scripts[variant] for variant in group}, results)
    for variant in [variant for variant in scripts if bench.together and "memory" in results[variant].failed]:
        results[variant] = Result()
        _take_turns(bench, name, {variant: scripts[variant]}, results)


def _take_turns(bench: Bench, name: str, scripts: dict[str, Path], results: dict[str, Result]) -> None:
    plan, under_way = bench.plan, {}
    with contextlib.ExitStack() as stack:

        def begin(variant: str) -> None:
            with _noting_failure(results[variant]):
                run = stack.enter_context(bench.start(name, variant, scripts[variant]))
                results[variant].start, results[variant].caching = run.started, run.caching
                results[variant].compiling = run.compiling
                under_way[variant] = run

        with ThreadPoolExecutor(len(scripts) if bench.together else 1) as pool:
            list(pool.map(begin, scripts))
        for variant, run in list(under_way.items()):
            with _noting_failure(results[variant]):
                run.turn(plan.dropped)
        for _ in range(plan.rounds):
            for variant in [variant for variant in under_way if not results[variant].failed]:
                with _noting_failure(results[variant]):
                    updates = under_way[variant].turn(plan.updates)
                    average = statistics.mean if bench.cuda else statistics.median
                    results[variant].seconds.append(average(updates))
                    results[variant].peak = max(results[variant].peak, under_way[variant].peak)


@contextlib.contextmanager
def _noting_failure(result: Result):
    try:
        yield
    except runs.Failed as error:
        result.failed = str(error)


def speed_up(over: Result, result: Result) -> float:
    """How many times as fast: the median over the rounds, in each of which both met the same load of the machine."""
    return statistics.median(slow / fast for slow, fast in zip(over.seconds, result.seconds))
