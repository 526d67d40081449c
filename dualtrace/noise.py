"""Null noise, version 1: the same normal numbers on every machine and in every language.

A tensor's numbers depend on its stream only, and a stream is named by (seed, name): the name is the PEFT parameter name
without prefix and adapter, as "model.layers.0.self_attn.q_proj.lora_A.weight". For a tensor of n numbers:

    1. bytes     SHAKE-128 of the UTF-8 bytes of "dualtrace.noise.v1", NUL, the seed in decimal, NUL, the name;
                 8 * n bytes of output, read as n unsigned 64-bit words, little-endian
    2. uniform   u = ((word >> 12) + 0.5) * 2**-52, exact in float64 and never 0 or 1
    3. normal    z = the quantile of the standard normal distribution at u, by algorithm AS 241 (PPND16, Wichura) in
                 float64: Horner's rule without fused multiply-add (CPython's `statistics.NormalDist().inv_cdf` is it)
    4. value     float32(z * deviation), rounded to nearest; the tensor is filled row by row

    deviation = init_scale * sqrt(rank_scale), or init_scale * sqrt(sqrt(rank_scale)) when variance_faithful

85 of 100 numbers need no more than + - * /, so they are equal to the bit wherever float64 is IEEE; the others take one
logarithm, whose last bit may differ and then moves a float32 by one step about once in 10**8 numbers.

It knows names, seeds and numbers. It must not know adapters or engines.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from dualtrace.views import Noise

VERSION = "dualtrace.noise.v1"
BLOCK_NUMBERS = 1 << 18  # bounds the float64 temporaries to a few MB

Floats = npt.NDArray[np.float64]

# AS 241, numerator and denominator of each region, highest power first
CENTRE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
NEAR_TAIL = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
FAR_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
)  # fmt: skip


def deviation(noise: Noise) -> float:
    """The standard deviation of every number of a null adapter."""
    scale = math.sqrt(noise.rank_scale)
    return noise.init_scale * (math.sqrt(scale) if noise.variance_faithful else scale)


def draw(noise: Noise, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The numbers of one tensor, float32 of that shape."""
    words = np.frombuffer(_stream(noise.seed, name, math.prod(shape)), dtype="<u8")
    values = np.empty(words.size, np.float32)
    scale = deviation(noise)
    with np.errstate(over="ignore"):  # an absurd scale gives infinities, and they are found in the logits
        for start in range(0, words.size, BLOCK_NUMBERS):
            part = slice(start, start + BLOCK_NUMBERS)
            values[part] = quantile(uniform(words[part])) * scale
    return values.reshape(shape)


def _stream(seed: int, name: str, count: int) -> bytes:
    return hashlib.shake_128(f"{VERSION}\0{seed}\0{name}".encode()).digest(8 * count)


def uniform(words: npt.NDArray[np.uint64]) -> Floats:
    """[n] words -> [n] in (0, 1)"""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def quantile(uniforms: Floats) -> Floats:
    """The standard normal quantile of each, [n] in (0, 1) -> [n]."""
    offsets = uniforms - 0.5
    squares = 0.180625 - offsets * offsets
    result = offsets * _horner(CENTRE[0], squares) / _horner(CENTRE[1], squares)
    outer = np.abs(offsets) > 0.425
    tails = uniforms[outer]
    distance = np.sqrt(-np.log(np.where(offsets[outer] < 0, tails, 1.0 - tails)))
    near = _horner(NEAR_TAIL[0], distance - 1.6) / _horner(NEAR_TAIL[1], distance - 1.6)
    far = _horner(FAR_TAIL[0], distance - 5.0) / _horner(FAR_TAIL[1], distance - 5.0)
    result[outer] = np.copysign(np.where(distance <= 5.0, near, far), offsets[outer])
    return result


def _horner(coefficients: tuple[float, ...], at: Floats) -> Floats:
    total = np.full_like(at, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * at + coefficient
    return total
