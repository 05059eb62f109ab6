"""Dynamic sampling: a step's places go to groups whose samples differ, and prompts are drawn for them in waves.

Samples that are all judged alike have no advantage over each other, so their group teaches nothing.  When a wave is
wholly done, such groups lose their places, and the next wave draws as many prompts as places are free.  After the last
wave the places that are still free go back to the earliest of these groups, so that a batch is always full.

Pure, and blind to the order in which answers come: a group is judged at the end of its wave, never when it arrives,
and places go by the order in which prompts were drawn.

Source: DAPO (Yu et al. 2025, 2503.14476), section 3.2 and the constraint of Eq. 11.  Differs from it:
- "alike" is equality of the judges' raw values, not all right or all wrong;
- the number of waves is limited, and the learner may see groups without contrast where the prompts offer no others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from learner.algorithm_config import DynamicSamplingConfig

NO_CONTRAST = "no contrast between its samples"
"""Why the groups without a place are dropped."""


@dataclass(slots=True, kw_only=True)
class Waves:
    """The waves of one step.

    Example: 3 places and at most 2 waves.  Wave 1 is a, b, c, of which a and c are alike: wave 2 draws two prompts, d
    and e.  If only e differs, b and e have places of their own, the third one goes back to a, and c and d are dropped.
    """

    config: DynamicSamplingConfig
    num_places: int
    num_begun: int = 1
    _differs: dict[str, bool] = field(default_factory=dict)
    """Group of a wave that is done -> whether its samples differ."""

    def next_wave(self, samples: Mapping[str, pa.Table]) -> int:
        """Judge the groups of a wave that is wholly done; return how many prompts the next wave draws, 0 = none.

        Args:
            samples: SAMPLES of every group that is done so far, by group.
        """
        for group_id, rows in samples.items():
            if group_id not in self._differs:
                self._differs[group_id] = has_contrast(rows, self.config.component)
        num_free = self.num_places - sum(self._differs.values())
        if num_free == 0 or self.num_begun == self.config.max_waves:
            return 0
        self.num_begun += 1
        return num_free

    def choose(self, drawn: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the groups that have places, and those that are dropped, both in the order of the draw.

        Args:
            drawn: all groups of the step in the order of their prompts; those that have no answer are passed over.
        """
        judged = [group_id for group_id in drawn if group_id in self._differs]
        alike = [group_id for group_id in judged if not self._differs[group_id]]
        dropped = alike[self.num_places - (len(judged) - len(alike)) :]
        return [group_id for group_id in judged if group_id not in set(dropped)], dropped


def has_contrast(samples: pa.Table, component: str | None) -> bool:
    """Return whether one group's samples differ in a judge's raw value, or in any judge's where none is named.

    That a judge does not apply to a sample is a value as well: 1.0 and absent differ, absent and absent do not.

    Args:
        samples: SAMPLES, the rows of one group.
        component: name of the judge; None = any.
    """
    judged = [dict(values) for values in samples["components"].to_pylist()]
    if component is not None:
        judged = [{name: value for name, value in values.items() if name == component} for values in judged]
    return any(values != judged[0] for values in judged)
