"""Random numbers of the estimators: pure functions of (seed, sample, position), whatever the batch or the worker."""

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64

_U64 = npt.NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(
    seed: int, sample_index: Int64[np.ndarray, " n"], position: Int64[np.ndarray, " n"], *, draws: int
) -> Float64[np.ndarray, "n {draws}"]:
    """`draws` uniform numbers in [0, 1) for each token, by hashing (splitmix64; Steele, Lea and Flood 2014)."""
    state = np.full(len(position), np.uint64(seed % 2**64))
    for coordinate in (sample_index, position):
        state = _mix(state + _GOLDEN) ^ coordinate.astype(np.uint64)
    state = _mix(state + _GOLDEN)
    streams = state[:, None] + _GOLDEN * np.arange(1, draws + 1, dtype=np.uint64)
    return (_mix(streams) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: _U64) -> _U64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
