"""What long_run.py says of runs: of those that hold on to something, and of those that do not."""

import random

import long_run
import pytest


def looks(leaks=None, noise=3.0, updates=5000):
    """What is seen of a run, once every ten updates. `leaks`: {column: more of it in 1000 updates}."""
    rng, leaks = random.Random(0), leaks or {}
    base = {"rss_mib": 990, "workers_mib": 1800, "tree_mib": 690, "handles": 31, "threads": 9, "processes": 3}
    swing = {"threads": 0, "processes": 0, "handles": 3}
    return [
        {"step": step, "seconds": step / 10}
        | {
            name: round(value + leaks.get(name, 0) * step / 1000 + rng.uniform(-1, 1) * swing.get(name, noise))
            + (step < 1000) * swing.get(name, 1) * rng.randint(-9, 0)  # the warm-up is let off
            for name, value in base.items()
        }
        for step in range(10, updates, 10)
    ]


def judge(*arguments, **options) -> tuple[list[str], bool]:
    told, flat = long_run.verdict(long_run.summary(looks(*arguments, **options), 5000), 5000)
    return [line for line in told if "FAULT" in line], flat


def test_a_run_that_holds_on_to_nothing():
    assert judge() == ([], True)


@pytest.mark.parametrize(
    ("column", "rise"), [("rss_mib", 5), ("workers_mib", 5), ("tree_mib", 9), ("handles", 2.5), ("threads", 2)]
)
def test_a_planted_leak_is_found(column, rise):
    """Five KiB an update, a handle every four hundred updates, a thread every five hundred."""
    faults, flat = judge({column: rise})
    assert not flat
    assert [line.split()[0] for line in faults] == [column]
    assert "grows" in faults[0] or column == "threads"


def test_what_cannot_be_told_is_no_pass():
    faults, flat = judge(noise=100.0)
    assert not flat
    assert all("too restless to tell" in line for line in faults)
    assert long_run.verdict([], 5000) == (["FAULT: too short to tell: more --updates"], False)


def test_a_slope_and_its_error():
    """Of 0, 3, 3: half of 3, and the root of a half of (0.5, 1, 0.5) squared over 2."""
    lines = [{"step": 1000 * i, "rss_mib": value} for i, value in enumerate((0, 3, 3))]
    assert long_run.slope(lines, "rss_mib") == pytest.approx((1.5, 0.75**0.5))
