"""FLOPs: of what the objective asks for, whatever carries it out; and what a device could do at best."""

import copy
from functools import partial

import pytest
import torch
from conftest import load_script
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from t2i_training.report import flops, throughput
from t2i_training.run import lifecycle


@pytest.fixture(autouse=True)
def counted_each_time(count_flops_once, monkeypatch):
    monkeypatch.setattr(flops, "count", count_flops_once)


def linear(network, batch):
    return network(batch["x"]).square().mean()


def test_of_a_linear_layer():
    """Forward 2 * 4 * 3 * 5 and as many for the weight; the input wants no gradient. Biases, activations: nothing."""
    network = torch.nn.Linear(3, 5)
    assert flops.count(linear, network, {"x": torch.ones(4, 3)}) == 2 * (2 * 4 * 3 * 5)
    two = torch.nn.Sequential(network, torch.nn.ReLU(), torch.nn.Linear(5, 7))
    assert flops.count(linear, two, {"x": torch.ones(4, 3)}) == 2 * (2 * 4 * 3 * 5) + 3 * (2 * 4 * 5 * 7)


def test_of_a_frozen_layer():
    """Below the first trained weight there is no gradient to compute, above it one of the activations alone."""
    network = torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(3)])
    for layer in (network[0], network[2]):
        layer.requires_grad_(False)
    assert flops.count(linear, network, {"x": torch.ones(4, 3)}) == (1 + 2 + 2) * (2 * 4 * 3 * 3)


def test_of_a_convolution():
    """A product for each of 6 * 6 places, 2 * 9 inputs and 5 outputs; twice, forward and for the weight."""
    network = torch.nn.Conv2d(2, 5, 3)
    assert flops.count(linear, network, {"x": torch.ones(1, 2, 8, 8)}) == 2 * (2 * 36 * 18 * 5)


def test_of_attention():
    """Scores and mixture, (2 * 8 * 8 * 4) each, forward once and backward twice; no kernel's recomputation."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.nn.Parameter(torch.randn(1, 1, 8, 4))

        def forward(self, _):
            return torch.nn.functional.scaled_dot_product_attention(self.x, self.x, self.x)

    assert flops.count(linear, Attention(), {"x": torch.ones(1)}) == 3 * 2 * (2 * 8 * 8 * 4)


@pytest.fixture(scope="module")
def counted_run(command, count_flops_once):
    """counted_run(script, **changes): (FLOPs as a run counts them, those of the same micro-batch done for real)."""
    runs = {}

    def run(script: str, **changes):
        seen = []

        def spy(objective, network, batch):
            parameters, state = [p.detach().clone() for p in network.parameters()], torch.get_rng_state()
            gradients = [None if p.grad is None else p.grad.clone() for p in network.parameters()]
            scheduler = copy.deepcopy(objective.keywords["noise_scheduler"].__dict__)
            seen.append(count_flops_once(objective, network, batch))
            assert all(map(torch.equal, parameters, network.parameters()))
            for before, parameter in zip(gradients, network.parameters(), strict=True):
                assert parameter.grad is None if before is None else torch.equal(before, parameter.grad)
            assert torch.equal(state, torch.get_rng_state())
            assert scheduler.keys() == objective.keywords["noise_scheduler"].__dict__.keys()
            twin = copy.deepcopy(network)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                objective(twin, batch).backward()
            seen.append(counter.get_total_flops())
            return seen[0]

        key = repr((script, changes))
        if key not in runs:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(flops, "count", spy)
                load_script(script).main(command(script, max_train_steps=1, **changes))
            runs[key] = tuple(seen)
        return runs[key]

    return run


@pytest.mark.parametrize("script", ["sd", "sd_lora", "prior", "prior_lora", "decoder", "decoder_lora"])
def test_of_a_run_equals_those_done_for_real(counted_run, script):
    counted, done = counted_run(script)
    assert counted == done > 0


@pytest.mark.parametrize("script", ["sd", "sd_lora", "prior"])
def test_recomputation_does_not_count(counted_run, script):
    plain, _ = counted_run(script)
    counted, done = counted_run(script, gradient_checkpointing=True)
    assert counted == plain
    assert done > plain, "it recomputes"


@pytest.mark.slow("6 s of emulated bfloat16: a product is counted by its shapes, which dtypes do not change")
def test_half_precision_is_counted(counted_run):
    counted, done = counted_run("sd_lora", mixed_precision="bf16")
    assert counted == done == counted_run("sd_lora")[0]


def test_compiled_blocks_count(counted_run, monkeypatch):
    """They are opaque to a counter, and are run as they are written."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_(*args, **options, backend="eager"))
    assert counted_run("prior", torch_compile=True)[0] == counted_run("prior")[0]


def test_literal(counted_run):
    """The tiny UNet, two samples of 4 x 16 x 16: full, with the forward pass that DREAM adds, and adapters alone."""
    full, dream = counted_run("sd")[0], counted_run("sd", dream_training=True)[0]
    assert full == 70063104
    assert counted_run("sd", train_batch_size=1)[0] == full / 2
    assert 0.32 < dream / full - 1 < 0.35, "a forward pass is a third"
    assert 0.6 < counted_run("sd_lora")[0] / full < 0.75, "gradients of activations, and hardly of weights"


@pytest.mark.slow("9 s: the literals of tiny networks are by hand")
def test_stable_diffusion_1_5():
    """0.803 TFLOP an image of 512 x 512 forward, a known number; thrice that with the gradient."""
    from diffusers import UNet2DConditionModel

    def objective(network, batch):
        return network(batch["latents"], batch["timesteps"], batch["text_states"], return_dict=False)[0].mean()

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        batch = {"latents": torch.ones(1, 4, 64, 64), "timesteps": torch.ones(1), "text_states": torch.ones(1, 77, 768)}
    assert flops.count(objective, unet, batch) == 2406773063680


def test_peaks():
    """From the makers' tables, without sparsity."""
    peak = partial(flops.peak_tflops, "NVIDIA A100-SXM4-80GB")
    assert (peak("bf16", False), peak("fp16", True), peak("no", True), peak("no", False)) == (312.0, 312.0, 156.0, 19.5)
    assert flops.peak_tflops("NVIDIA H200", "bf16", False) == 989.4
    assert flops.peak_tflops("Tesla T4", "fp16", False) == 65.0
    assert flops.peak_tflops("Tesla T4", "bf16", False) is None, "emulated"
    assert flops.peak_tflops("Tesla T4", "no", True) == 8.1
    assert flops.peak_tflops("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16", False) is None, "a part of the device"
    assert flops.peak_tflops("Another GPU", "bf16", False) is None


def test_mfu_by_hand(sd_flags, monkeypatch):
    """60 FLOPs a sample, 10 samples in 2 s: 3e-10 TFLOP/s, of a device that could do 1e-9."""
    args = load_script("sd").parse_args(sd_flags())
    accelerator = lifecycle.start(args)
    meter = throughput.Throughput(throughput.DeviceStats(torch.nn.Linear(3, 5), linear, args, accelerator), accelerator)
    meter.stats.peak = 1e-9
    now = iter([0.0, 5.0, 5.0, 2.0, 2.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(now))
    meter.restart(0)
    meter.count({"x": torch.ones(4, 3), "index": torch.arange(4)})
    row = meter.row(10, 5)
    assert (row["tflops_per_second"], row["mfu"]) == (3e-10, 0.3)
    assert (row["images_per_second"], row["seconds_per_step"]) == (5.0, 1.0)
