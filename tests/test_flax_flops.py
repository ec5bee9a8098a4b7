"""FLOPs of the Flax script's step: those that are counted of the torch script's."""

import pytest
from conftest import load_script

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
pytest.importorskip("optax")

import jax.numpy as jnp

from t2i_training.report import flops, throughput
from t2i_training.sd_flax import flops as flax_flops
from t2i_training.sd_flax import train_state


def test_products_that_depend_on_the_state():
    """2 * 4 * 3 * 5 forward and as many for the weight, in each of seven turns; not those of x alone."""

    def step(weight, x):
        def turn(total, x):
            return total + jax.grad(lambda w: jnp.square(((x @ x.T) @ x) @ w).sum())(weight), None

        return jax.lax.scan(turn, jnp.zeros_like(weight), x)[0]

    assert flax_flops.count(step, jnp.ones((3, 5)), jnp.ones((7, 4, 3))) == 7 * 2 * (2 * 4 * 3 * 5)


@pytest.mark.parametrize("stride", [1, 2])
def test_of_a_convolution(stride):
    """Forward and both gradients are equal: every weight meets every place."""

    def step(kernel, pictures):
        def loss(kernel):
            pictures_of_it = pictures * kernel.sum()
            numbers = ("NHWC", "HWIO", "NHWC")
            output = jax.lax.conv_general_dilated(
                pictures_of_it, kernel, (stride, stride), [(1, 1)] * 2, dimension_numbers=numbers
            )
            return jnp.square(output).sum()

        return jax.grad(loss)(kernel)

    side = 8 // stride
    assert flax_flops.count(step, jnp.ones((3, 3, 2, 5)), jnp.ones((4, 8, 8, 2))) == 3 * 2 * 4 * side**2 * 5 * 9 * 2


class Counted(BaseException):
    """The end of a run of which no more is wanted."""


@pytest.fixture
def count(command, small_model, monkeypatch, count_flops_once):
    """count(script, **changes): FLOPs of a sample, as a run of the script counts them."""

    def in_torch(_, batch, count=throughput.DeviceStats.flops):
        raise Counted(count(_, batch))

    def in_jax(trained, *inputs):  # before anything is compiled
        shape_of = lambda array: jax.ShapeDtypeStruct(jnp.shape(array), jnp.result_type(array))  # noqa: E731
        trained._inputs = jax.tree.map(shape_of, (trained.state, *inputs, 0.0))
        raise Counted(trained.sample_flops())

    def of_a_run(script, **changes):
        with pytest.raises(Counted) as counted:
            load_script(script).main(command(script, pretrained_model_name_or_path=small_model, **changes))
        return counted.value.args[0]

    monkeypatch.setattr(flops, "count", count_flops_once)
    monkeypatch.setattr(throughput.DeviceStats, "flops", in_torch)
    monkeypatch.setattr(train_state.TrainState, "step", in_jax)
    return of_a_run


def test_as_many_as_in_torch(count):
    """Also over several micro-batches, of cached encodings, and when activations are computed again."""
    wanted = count("sd")
    assert wanted > 1e7
    plain = count("sd_flax")
    assert plain == pytest.approx(wanted, rel=0.01)
    options = {"gradient_accumulation_steps": 3, "cache_encodings": True, "center_crop": True}
    assert count("sd_flax", **options, gradient_checkpointing=True) == plain


@pytest.mark.slow(
    "8 s of tracing: the passes are counted as in the test above, and test_flops.py counts DREAM's in torch"
)
def test_forward_pass_of_dream_counts(count):
    assert count("sd_flax", dream_training=True) == pytest.approx(count("sd", dream_training=True), rel=0.01)
