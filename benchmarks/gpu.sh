#!/usr/bin/env bash
# For a GPU that is there for ten minutes: the tests marked gpu, and the speed of the seven scripts at 512 px, plain,
# cached and compiled, beside the published scripts. What is known when the time is over stands in the table.
#
#   bash benchmarks/gpu.sh DIR        # DIR holds the published scripts; without it, rates are beside the plain run's
#   SIZE=tiny MINUTES=60 bash benchmarks/gpu.sh
#
# MINUTES (10)   after which nothing begins; what is under way is given a minute more
# SIZE (full)    of the networks: full needs 31 GB in WORK, and 80 GB of GPU memory for three runs at once
# SCRIPTS        those to measure, the most wanted first; also BATCH (8), IMAGES (320: one epoch)
# WORK           a folder for models and images; by default one that is removed, in memory if there is room
# OUTPUT         the file that the tables are added to (benchmarks/RESULTS.md)
# PYTHON (python), TEST_PROCESSES (8), TESTS (an expression for pytest's -k)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false XLA_PYTHON_CLIENT_PREALLOCATE=false
python=${PYTHON:-python} size=${SIZE:-full} output=${OUTPUT:-benchmarks/RESULTS.md} end=$((SECONDS + 60 * ${MINUTES:-10}))
read -ra scripts <<<"${SCRIPTS:-sd sd_lora decoder prior decoder_lora prior_lora}"
left() { echo "$((end > SECONDS ? end - SECONDS : 0))"; }

if [[ -z ${WORK:-} ]]; then
  parent=${TMPDIR:-/tmp}
  [[ $(df --output=avail -B 1G /dev/shm 2>/dev/null | tail -1) -ge 40 ]] && parent=/dev/shm
  WORK=$(mktemp -d "$parent/t2i-gpu-XXXX")
  trap 'rm -rf "$WORK"' EXIT
fi
mkdir -p "$WORK"
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

# The tests run while the models are built, which takes little of the GPU.
timeout "$(($(left) + 60))" "$python" -m pytest -m gpu -k "${TESTS:-test}" -rfE --tb=short \
  --numprocesses "${TEST_PROCESSES:-8}" --dist load &>"$WORK/tests.log" &
tests=$!
mapfile -t bases < <(printf '%s\n' "${scripts[@]%_lora}" | sort -u)
"$python" benchmarks/models.py "$WORK/models" "$size" "${bases[@]}" || exit 1
wait "$tests"
tests=$?
echo "tests and models: $((SECONDS)) s; the tests ended with status $tests"

rates() { # PARTS FLAGS...: what is left of the time goes to it
  timeout "$(($(left) + 60))" "$python" benchmarks/run.py --size "$size" --work "$WORK" --together --append \
    --output "$output" --seconds "$(left)" --parts "$@"
}
measure=(--variants plain cached compiled --batch "${BATCH:-8}" --images "${IMAGES:-320}")
[[ $size != full ]] && measure+=(--flags=--mixed_precision=bf16)
rates rate "${measure[@]}" --scripts "${scripts[@]}" ${1:+--reference_scripts "$1"}
rates flax "${measure[@]}" --scripts sd

{
  printf '\n### Tests marked gpu\n\n    %s\n\n' "$(grep -E '(passed|failed|errors?|skipped|no tests ran)' "$WORK/tests.log" | tail -1)"
  grep -E '^(FAILED|ERROR)' "$WORK/tests.log" | sed 's/^/    /'
  [[ $tests -ge 124 ]] && echo "    not ended in time"
} >>"$output"
grep -E '^(FAILED|ERROR|E  )' "$WORK/tests.log"
echo "all: $((SECONDS)) s"
exit "$tests"
