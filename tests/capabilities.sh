#!/usr/bin/env bash
# Runs the tests that compare numbers under each setting that lets this processor compute as others do, and says at the
# end which of them passed. Arguments go to pytest. That is seven times most of the suite; tests/run.sh makes the
# environment, or PYTHON names the interpreter of one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
settings=(
    OMP_NUM_THREADS=2                      # sums in parts
    ATEN_CPU_CAPABILITY=default            # torch without vector instructions; pictures are resized by Pillow
    ATEN_CPU_CAPABILITY=avx2
    ONEDNN_MAX_CPU_ISA=AVX2                # convolutions
    ONEDNN_MAX_CPU_ISA=SSE41
    MKL_CBWR=COMPATIBLE                    # matrix products
    XLA_FLAGS=--xla_cpu_max_isa=SSE4_2     # JAX
)
failed=0
for setting in "${settings[@]}"; do
    env "$setting" "$python" -m pytest --all --numprocesses 2 --dist loadfile --no-loadscope-reorder \
        tests/test_contract_*.py tests/test_learning.py tests/test_loss_falls.py tests/test_flax_*.py tests/test_train_*.py tests/test_kandinsky_*.py \
        tests/test_images.py tests/test_losses.py tests/test_ema.py tests/test_compile.py tests/test_networks.py "$@"
    status=$?
    ((status)) && failed=1
    results+=("$setting: $( ((status)) && echo failed || echo passed )")
done
printf '%s\n' "${results[@]}"
exit $failed
