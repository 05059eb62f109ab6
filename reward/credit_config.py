"""Configuration of dense credit: which judge says how much each token of a response counts.

Imports nothing heavier than pydantic, so that a wrong setting is reported before torch is loaded.
"""

from typing import Literal

from pydantic import Field, model_validator

from actors.config import Config


class CreditConfig(Config):
    """Spreads the score over a response's tokens, instead of giving all of it to the last one."""

    component: str
    """Name of the judge whose opinion is spread; `attention` needs one with a `model`, an ensemble gives its mean."""
    kind: Literal["attention", "potential"]
    """attention: shares of the score by the reward model's attention (ABC); potential: differences of the judge's raw
    scores of the response's prefixes, one judgement per token."""
    coef: float = Field(default=1.0, ge=0)
    """attention: part of the score that is spread, 0 to 1; potential: factor of the judge's raw score."""

    @model_validator(mode="after")
    def _a_part_is_at_most_the_whole(self) -> "CreditConfig":
        if self.kind == "attention" and self.coef > 1:
            raise ValueError(
                f"coef must be at most 1 with kind attention, got {self.coef}; it is the part of the score that is "
                "spread over the tokens"
            )
        return self
