"""Counts the FLOPs of a training step in JAX from its jaxpr, by the rules of `report.flops`."""

import math

import jax
from jax.extend import core

from .networks import layers


def count(train_step, state, *inputs) -> int:
    """FLOPs of all products in `train_step(state, *inputs)` that depend on `state`; a multiply-add is two.

    So frozen networks do not count, nor does what gradient checkpointing computes again; attention counts as matrix
    products, whatever carries it out. Only shapes and types of the arguments are looked at.
    """
    with layers.as_written():
        jaxpr = jax.make_jaxpr(train_step)(state, *inputs).jaxpr
    known = len(jax.tree.leaves(state))
    return _count(jaxpr, [i < known for i in range(len(jaxpr.invars))])[0]


def _count(jaxpr, depends: list[bool]) -> tuple[int, list[bool]]:
    """(FLOPs, which outputs depend on the state) of a jaxpr, given which inputs depend on it."""
    dependent, total = {variable for variable, is_one in zip(jaxpr.invars, depends, strict=True) if is_one}, 0
    for line in jaxpr.eqns:
        inputs = [not isinstance(variable, core.Literal) and variable in dependent for variable in line.invars]
        if not any(inputs):
            continue
        outputs = [True] * len(line.outvars)
        if line.primitive.name in PRODUCTS:
            total += PRODUCTS[line.primitive.name](line)
        for inner in filter(None, map(_program, line.params.values())):
            if line.primitive.name == "scan":  # the carry may depend on the state after an iteration
                carried = range(line.params["num_consts"], line.params["num_consts"] + line.params["num_carry"])
                inputs = [is_one or i in carried for i, is_one in enumerate(inputs)]
            flops, outputs = _count(inner, inputs)
            total += line.params.get("length", 1) * flops
        dependent.update(variable for variable, is_one in zip(line.outvars, outputs, strict=True) if is_one)
    return total, [not isinstance(variable, core.Literal) and variable in dependent for variable in jaxpr.outvars]


def _program(value):
    return value.jaxpr if isinstance(value, core.ClosedJaxpr) else value if isinstance(value, core.Jaxpr) else None


def _matrices(line) -> int:
    (contracted, _), _ = line.params["dimension_numbers"]
    return 2 * math.prod(line.outvars[0].aval.shape) * math.prod(line.invars[0].aval.shape[i] for i in contracted)


def _convolution(line) -> int:
    image, kernel = (variable.aval.shape for variable in line.invars)
    numbers, output = line.params["dimension_numbers"], line.outvars[0].aval.shape
    # The gradient of a strided convolution dilates the image with zeros, which do not count.
    spread = max(line.params["lhs_dilation"]) > 1
    places = [image[i] for i in numbers.lhs_spec[2:]] if spread else [output[i] for i in numbers.out_spec[2:]]
    per_place = output[numbers.out_spec[0]] * output[numbers.out_spec[1]] * math.prod(kernel)
    return 2 * math.prod(places) * per_place // kernel[numbers.rhs_spec[0]]


PRODUCTS = {"dot_general": _matrices, "conv_general_dilated": _convolution}
