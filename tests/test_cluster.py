"""What the Slurm script does with its tasks' exit status, in a real shell; what the Dockerfile copies is there."""

import os
import subprocess

import pytest
from scripts import REPOSITORY

CLUSTER = REPOSITORY / "examples" / "cluster"
FAKES = {
    # Two tasks, as srun runs them; it returns the highest status.
    "srun": """#!/bin/bash
echo "srun $SLURM_CPUS_PER_TASK $MASTER_ADDR $MASTER_PORT $WORLD_SIZE $LOCAL_WORLD_SIZE" >> "$CALLS"
while [[ $1 == --* ]]; do shift; done
highest=0
for i in 0 1; do
    SLURM_PROCID=$i SLURM_LOCALID=0 "$@"
    status=$?
    [ $status -gt $highest ] && highest=$status
done
exit $highest
""",
    "python": '#!/bin/bash\necho "task $RANK $LOCAL_RANK $*" >> "$CALLS"\nexit "$STATUS"\n',
    "scontrol": """#!/bin/bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "scontrol $*" >> "$CALLS"; fi
""",
}


@pytest.fixture
def submit(tmp_path):
    """submit(status of a task, **environment): (the script's status, what it called, what it printed)."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": 41234, "JOB_NODELIST": "node[7-8]", "NTASKS": 2, "NNODES": 2, "CPUS_PER_TASK": 6}

    def run(status: int, *arguments, **environment):
        environment |= {f"SLURM_{name}": str(value) for name, value in slurm.items()}
        environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
        words = ["bash", str(CLUSTER / "train.sbatch"), *arguments]
        done = subprocess.run(
            words, env=os.environ | environment | {"STATUS": str(status)}, capture_output=True, text=True
        )
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done.returncode, calls, done.stdout + done.stderr

    return run


def test_stopped_run_is_requeued(submit):
    status, calls, printed = submit(138, "train.py", "--output_dir=a b", "--validation_prompts", "a 'red' $fox")
    flags = "train.py --output_dir=a b --validation_prompts a 'red' $fox --resume_from_checkpoint=latest"
    assert calls == [
        "srun 6 node7 21234 2 1", f"task 0 0 {flags}", f"task 1 0 {flags}", "scontrol requeue 41234",
    ]  # fmt: skip
    assert status == 138
    assert printed == "stopped (status 138), updates are left: requeueing job 41234\n"


@pytest.mark.parametrize("status", [0, 1, 143])
def test_complete_failed_and_cancelled_runs_are_not(submit, status):
    ended, calls, _ = submit(status, "train.py")
    assert ended == status
    assert not any(call.startswith("scontrol") for call in calls)


def test_run_that_never_gets_further_is_not_requeued_for_ever(submit):
    ended, calls, printed = submit(138, "train.py", SLURM_RESTART_COUNT="100")
    assert ended == 138
    assert not any(call.startswith("scontrol") for call in calls)
    assert "started 100 times again: not requeued" in printed


def test_without_a_script_nothing_is_started(submit):
    status, calls, printed = submit(0)
    assert status != 0
    assert calls == []
    assert "usage: sbatch" in printed


def test_signal_comes_in_time_and_the_job_may_be_requeued():
    options = [line for line in (CLUSTER / "train.sbatch").read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {"#SBATCH --signal=USR1@120", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(options)


def test_dockerfile_copies_what_is_there():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert {"requirements.txt", "setup.py", "src", "text_to_image", "kandinsky2_2"} <= set(copied)
    assert [name for name in copied if not (REPOSITORY / name).exists()] == []
    assert 'ENTRYPOINT ["python"]' in lines, "in exec form, or the shell keeps the signals"
