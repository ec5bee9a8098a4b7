"""Kill the training scripts at random moments, resume them, and compare with runs that nobody disturbed.

    python tests/faults/campaign.py --kills 200 --seed 0

A trial runs one script on a tiny model and kills it, repeats the same command, kills that as well, up to five times,
until a run ends by itself. Half of the trials use --cache_encodings. Three kinds of kill take turns: at a random moment
of the run; in a given phase; and at a given operation on files, before it or in its midst. Phases that saw fewer
kills come first. The signal is SIGKILL for two in three, else SIGTERM or SIGINT.

After each kill the folder must be readable: every checkpoint verifies, and whatever else is there is whole. After the
end weights, averages, optimizer, metrics, export, card and images must be equal, bit for bit, to those of a run that
was not disturbed; no temporary file and no surplus checkpoint may be left; and every fourth finished run is run once
more, which must change nothing. Exits with status 1 if anything was wrong, and keeps those folders.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked run has none of the threads that its parent's pool counts on

import remains  # noqa: E402
import victims  # noqa: E402
from victims import KEPT, PHASES, STEPS, Kill, Victim  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WRONG = ("differing", "unreadable", "leftovers", "failed")


class Tally:
    """What happened, by script."""

    def __init__(self):
        self.kills, self.signals = collections.Counter(), collections.Counter()
        self.counts, self.faults = collections.Counter(), []

    def killed(self, script: str, phase: str, number: int) -> None:
        self.kills[script, phase] += 1
        self.signals[signal.Signals(number).name] += 1

    def fault(self, script: str, kind: str, what: str) -> None:
        self.counts[script, kind] += 1
        self.faults.append(f"{kind}: {what}")

    def table(self, scripts: list[str]) -> str:
        """Kills by phase, then what came of them, a line for each script."""
        columns = [*PHASES, "kills", "resumes", "trials", *WRONG]
        lines = [["script", *columns]]
        for script in [*scripts, "all"]:
            counts = collections.Counter()
            for (name, column), number in (self.kills + self.counts).items():
                counts[column] += number * (script in (name, "all"))
            counts["kills"] = sum(counts[phase] for phase in PHASES)
            lines.append([script, *(str(counts[column]) for column in columns)])
        widths = [max(map(len, column)) for column in zip(*lines)]
        signals = ", ".join(f"{number} {name}" for name, number in sorted(self.signals.items()))
        rows = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
        return "\n".join([*rows, f"signals: {signals}", *self.faults])


class Campaign:
    """The trials, one after another."""

    def __init__(self, folder: Path, seed: int, scripts: list[str], chain: int = 5, cached: tuple = (False, True)):
        self.folder, self.random, self.scripts, self.chain = folder, random.Random(seed), scripts, chain
        victims.load(scripts, folder / "programs")
        self.models, self.tally = victims.make_models(folder / "models"), Tally()
        self.cached, self._undisturbed, self._trials = cached, {}, 0

    def undisturbed(self, script: str, cached: bool):
        """(what it leaves, its board) of a run that nobody disturbs."""
        if (script, cached) not in self._undisturbed:
            place = self.folder / f"{script}-{'cached' if cached else 'plain'}"
            out = place / "out"
            place.mkdir()
            began = time.monotonic()
            run = Victim(script, self._command(script, out, cached, 0), out, place / "log")
            assert run.wait() == 0, run.log.read_text()
            duration = time.monotonic() - began
            found = [*remains.unreadable(out, False), *remains.leftovers(out, KEPT)]
            assert not found, found
            self._undisturbed[script, cached] = remains.left(out, STEPS, script), run.board, duration
        return self._undisturbed[script, cached]

    def _command(self, script: str, out: Path, cached: bool, workers: int) -> list[str]:
        return victims.command(script, self.models, out, cache_encodings=cached, dataloader_num_workers=workers)

    def plan(self, script: str, cached: bool, out: Path) -> Kill:
        """The next kill of a run that starts now."""
        _, board, duration = self.undisturbed(script, cached)
        number, chance = self.random.choice(SIGNALS), self.random.random()
        if chance < 0.25:
            return Kill(number, self.random.uniform(0, 0.9 * duration))
        done = max((int(place.name.partition("-")[2]) for place in out.glob("checkpoint-?")), default=0)
        left_out = {"restoring"} if not done else {"step", "checkpoint", "rotation"} if done == STEPS else set()
        phases = [phase for phase, entries in zip(PHASES, board.entries) if entries and phase not in left_out]
        fewest = min(self.tally.kills[script, phase] for phase in phases)
        phase = self.random.choice([phase for phase in phases if self.tally.kills[script, phase] == fewest])
        i = PHASES.index(phase)
        share = 1 - done / STEPS if phase in ("step", "checkpoint", "rotation") else 1
        if chance < 0.6 and board.changes[i]:
            count = self.random.randint(1, max(1, int(board.changes[i] * share)))
            return Kill(number, self.random.choice((0, self.random.uniform(1e-4, 3e-3))), phase, count, True)
        count = self.random.randint(1, max(1, int(board.entries[i] * share)))
        return Kill(number, self.random.uniform(0, board.seconds[i] / board.entries[i]), phase, count)

    def trial(self, kills: Iterable[Kill] | None = None) -> int:
        """One run, killed up to `chain` times, or as `kills` say, each of which must fall into its phase.

        Returns how often it was killed.
        """
        script, cached = self.scripts[self._trials % len(self.scripts)], self.random.choice(self.cached)
        self._trials += 1
        self.undisturbed(script, cached)
        place = self.folder / f"trial-{self._trials}"
        place.mkdir()
        story, killed, before = [], 0, len(self.tally.faults)
        planned = iter(kills) if kills is not None else None
        name = f"trial {self._trials}, {script}{', cached' if cached else ''}"
        while True:
            if planned is not None:
                kill = next(planned, None)
            else:
                kill = self.plan(script, cached, place / "out") if killed < self.chain else None
            run = self._run(script, cached, place, kill)
            if planned is not None and kill is not None and (run is None or run.killed_in != kill.phase):
                self.tally.fault(script, "failed", f"{name}: {kill} fell into {run and run.killed_in}")
            if run is None:
                break
            killed += 1
            story.append(f"{run.killed_in} ({kill})")
            if run.status == 0:
                break
            for fault in run.faults:
                self.tally.fault(script, "unreadable", f"{name}, after {'; '.join(story)}: {fault}")
        self._finish(script, cached, place, f"{name}, after {'; '.join(story)}")
        good = len(self.tally.faults) == before
        print(f"{name}: {'ok' if good else 'WRONG'}: {'; '.join(story)}", flush=True)
        if good:
            shutil.rmtree(place)
        return killed

    def _run(self, script: str, cached: bool, place: Path, kill: Kill | None) -> Victim | None:
        """A run that got its kill, or None: it ended before, well or not. Near its end a signal does not stop it."""
        out, log = place / "out", place / f"{len(list(place.glob('*.log')))}.log"
        had = bool(list(out.glob("checkpoint-*")))
        run = Victim(script, self._command(script, out, cached, self.random.randint(0, 1)), out, log, kill)
        status = run.wait()
        self.tally.counts[script, "resumes"] += had
        if status == victims.HUNG:
            self.tally.fault(script, "failed", f"it hangs ({kill}), see {log}")
        elif status == 0 and run.killed_in in PHASES[: PHASES.index("step")]:
            self.tally.fault(script, "failed", f"it passed over {kill} in {run.killed_in}, see {log}")
        elif run.killed_in and status in (-kill.number, 128 + kill.number, 0):
            self.tally.killed(script, run.killed_in, kill.number)
            run.faults = remains.unreadable(out, had)
            return run
        elif status:
            last = run.log.read_text(errors="replace").strip().splitlines()[-1:]
            self.tally.fault(script, "failed", f"{log}: status {status} ({kill}): {last}")
        return None

    def _finish(self, script: str, cached: bool, place: Path, story: str) -> None:
        self.tally.counts[script, "trials"] += 1
        for again in range(1 + (self.random.random() < 0.25)):
            if again:
                self._run(script, cached, place, None)
            out, wanted = place / "out", self.undisturbed(script, cached)[0]
            try:
                found = remains.difference(remains.left(out, STEPS, script), wanted)
            except (OSError, ValueError, AssertionError) as error:
                found = [repr(error)]
            if found:
                self.tally.fault(script, "differing", f"{story}{', run again' * again}: {', '.join(found)} in {out}")
            if found := [*remains.unreadable(out, True), *remains.leftovers(out, KEPT)]:
                self.tally.fault(script, "leftovers", f"{story}{', run again' * again}: {', '.join(found)} in {out}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scripts", nargs="+", default=victims.runnable(), choices=victims.runnable())
    parser.add_argument("--chain", type=int, default=5, help="most kills of one run")
    args = parser.parse_args(argv)
    folder, began = Path(tempfile.mkdtemp(prefix="faults-")), time.monotonic()
    campaign = Campaign(folder, args.seed, args.scripts, args.chain)
    done = 0
    while done < args.kills:
        done += campaign.trial()
    print(campaign.tally.table(args.scripts))
    print(f"{done} kills in {(time.monotonic() - began) / 60:.1f} minutes, seed {args.seed}")
    if campaign.tally.faults:
        print(f"what was wrong is kept in {folder}")
    else:
        shutil.rmtree(folder)
    return bool(campaign.tally.faults)


if __name__ == "__main__":
    sys.exit(main())
