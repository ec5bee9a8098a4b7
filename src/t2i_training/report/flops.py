"""Counts the FLOPs of a training step, once; and the peak FLOP/s of known devices."""

import contextlib
import copy
import itertools

import torch
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..model.networks import uncompiled

# Dense TFLOP/s of matrix products with fp32 accumulation, in the order of PRECISIONS; vendors' figures "with sparsity"
# are halved. 0: not in hardware. Without TF32 hardware its column repeats fp32's, since the flag has no effect there.
PRECISIONS = ("fp16", "bf16", "tf32", "fp32")
PEAKS = {  # what torch.cuda.get_device_name says -> figures
    # nvidia.com: H200 and H100 Tensor Core GPU datasheets; H100 architecture whitepaper, table 3
    "NVIDIA H200": (989.4, 989.4, 494.7, 66.9),
    "NVIDIA H100 80GB HBM3": (989.4, 989.4, 494.7, 66.9),
    "NVIDIA H100 PCIe": (756.0, 756.0, 378.0, 51.2),
    # nvidia.com: A100, A40 and A10 datasheets
    "NVIDIA A100-SXM4-40GB": (312.0, 312.0, 156.0, 19.5),
    "NVIDIA A100-SXM4-80GB": (312.0, 312.0, 156.0, 19.5),
    "NVIDIA A100-PCIE-40GB": (312.0, 312.0, 156.0, 19.5),
    "NVIDIA A100 80GB PCIe": (312.0, 312.0, 156.0, 19.5),
    "NVIDIA A40": (149.7, 149.7, 74.8, 37.4),
    "NVIDIA A10": (125.0, 125.0, 62.5, 31.2),
    # nvidia.com: L40S, L40 and L4 datasheets
    "NVIDIA L40S": (362.05, 362.05, 183.0, 91.6),
    "NVIDIA L40": (181.05, 181.05, 90.5, 90.5),
    "NVIDIA L4": (121.0, 121.0, 60.0, 30.3),
    # nvidia.com: Ada and GA102 architecture whitepapers, appendix A; half the figure for fp16 accumulation
    "NVIDIA GeForce RTX 4090": (165.2, 165.2, 82.6, 82.6),
    "NVIDIA GeForce RTX 3090": (71.0, 71.0, 35.6, 35.6),
    # nvidia.com: V100 and T4 datasheets
    "Tesla V100-SXM2-16GB": (125.0, 0, 15.7, 15.7),
    "Tesla V100-SXM2-32GB": (125.0, 0, 15.7, 15.7),
    "Tesla V100-PCIE-16GB": (112.0, 0, 14.0, 14.0),
    "Tesla V100-PCIE-32GB": (112.0, 0, 14.0, 14.0),
    "Tesla T4": (65.0, 0, 8.1, 8.1),
}


def peak_tflops(device_name: str, mixed_precision: str, tf32: bool) -> float | None:
    """Dense TFLOP/s of a device in the precision of a run; None if the table does not know it.

    Without --allow_tf32 it is fp32's, although cuDNN computes convolutions in TF32 even then: such a run can exceed 1.
    """
    precision = mixed_precision if mixed_precision in PRECISIONS else "tf32" if tf32 else "fp32"
    return dict(zip(PRECISIONS, PEAKS.get(device_name, ()))).get(precision) or None


def count(objective, network, batch: dict[str, torch.Tensor]) -> int:
    """FLOPs of `objective(network, batch)`, a scalar, and of its gradient; a multiply-add is two.

    Counts what the objective asks for, not how it is computed: attention counts as matrix products, and recomputation
    by gradient checkpointing does not count. Runs on fake tensors, which have shapes but no values: weights, gradients,
    random generators and compiled code do not change, and the device does no work.
    """
    objective = copy.deepcopy(objective)  # a scheduler may move, and keep, a tensor of its own
    counter = FlopCounterMode(display=False)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes as fake, uncompiled(), _no_recomputation(), _plain_attention(), counter:
        tensors = itertools.chain(network.named_parameters(), network.named_buffers())
        weights = {name: fake.from_tensor(tensor) for name, tensor in tensors}
        samples = {name: fake.from_tensor(tensor) for name, tensor in batch.items()}

        def forward(*args, **kwargs):
            return torch.func.functional_call(network, weights, args, kwargs)

        objective(forward, samples).backward()
    return counter.get_total_flops()


def _plain_attention():
    """Replace fused attention: its backward pass computes the scores again, and its kernels differ between devices."""
    return sdpa_kernel(SDPBackend.MATH)


@contextlib.contextmanager
def _no_recomputation():
    checkpoint = torch.utils.checkpoint.checkpoint
    torch.utils.checkpoint.checkpoint = lambda function, *args, use_reentrant, **kwargs: function(*args, **kwargs)
    try:
        yield
    finally:
        torch.utils.checkpoint.checkpoint = checkpoint
