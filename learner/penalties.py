"""Penalties on a response's form, subtracted from its score whatever the judges said.

limit 10 tokens, buffer 4, overlong_coef 1, length_coef 0.01, missing_eos 0.5
tokens       5      6      7      8     10 (ended)   10 (cut off)
overlong     0      0    .25     .5      1             1
length     .05    .06    .07    .08     .1            .1
cut off      0      0      0      0      0            .5
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from learner.algorithm_config import AlgorithmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """What a response loses for its length."""

    missing_eos: float = 0.0
    """For hitting the length limit."""
    length_coef: float = 0.0
    """For each response token."""
    overlong_coef: float = 0.0
    """At the length limit, growing from 0 at the beginning of the buffer."""
    overlong_from: float = 0.0
    """Response tokens at which the buffer begins."""
    overlong_buffer: float = 1.0
    """Tokens from there to the limit."""

    @classmethod
    def of(cls, algorithm: "AlgorithmConfig", *, max_new_tokens: int) -> "Penalties":
        """Return the penalties that a run is configured with; `max_new_tokens` is the length limit."""
        plain = {"missing_eos": algorithm.missing_eos_penalty or 0.0, "length_coef": algorithm.length_coef}
        if algorithm.overlong_buffer is None:
            return cls(**plain)
        buffer = algorithm.overlong_buffer * max_new_tokens
        return cls(
            **plain,
            overlong_coef=algorithm.overlong_coef,
            overlong_from=max_new_tokens - buffer,
            overlong_buffer=buffer,
        )

    def of_samples(self, samples: pa.Table) -> np.ndarray:
        """Return the sum of all penalties, [B] float64, not negative.

        The overlong part is clip((|y| - overlong_from) / overlong_buffer, 0, 1) * overlong_coef, for |y| up to the
        limit the soft punishment with its sign turned.

        Args:
            samples: SAMPLES.

        Source:
            DAPO (Yu et al. 2025, 2503.14476), Eq. 13.
        """
        is_cut_off = np.array([reason == "length" for reason in samples["finish_reason"].to_pylist()], dtype=bool)
        lengths = samples["num_response_tokens"].to_numpy().astype(np.float64)
        overlong = np.clip((lengths - self.overlong_from) / self.overlong_buffer, 0.0, 1.0)
        return self.missing_eos * is_cut_off + self.overlong_coef * overlong + self.length_coef * lengths
