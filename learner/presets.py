"""The registry of algorithms: what each name stands for, where it comes from, and what proves it right.

A preset is data: settings of `AlgorithmConfig` (online) or of `concord offline` that give the parts the paper's form.
`docs/algorithms.md` is generated from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One algorithm."""

    kind: Literal["online", "offline"]
    title: str
    formula: str
    """TeX, without the dollars."""
    source: str
    differs: str = ""
    """What differs from the source."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Nested like the configuration section."""
    proof: tuple[str, str, str]
    """Test file, check and planted bug: `FILE::test_check[CHECK]` compares the algorithm with an exact answer, and
    `FILE::test_check[CHECK/BUG]` shows that the check fails on the bug."""


_REINFORCE: Mapping[str, Any] = {
    "advantage": "returns",
    "policy_loss": "policy_gradient",
    "aggregation": "sequence_mean_token_sum",
    "whiten_advantages": False,
}
_GROUP: Mapping[str, Any] = {"advantage": "group", "whiten_advantages": False}
_VALUES_OF_REINFORCE = r"-\mathbb{E}\left[\sum_t (G_t - b) \log \pi_\theta(a_t | s_t)\right]"

PRESETS: Mapping[str, Preset] = {
    "ppo": Preset(
        kind="online",
        title="PPO",
        formula=r"-\mathbb{E}\left[\min(r_t A_t,\ \mathrm{clip}(r_t, 1 - \varepsilon, 1 + \varepsilon) A_t)\right],"
        r"\quad A_t = \sum_l (\gamma \lambda)^l \delta_{t+l}",
        source="Schulman et al. 2017 (1707.06347), Eq. 7; GAE: Schulman et al. 2015 (1506.02438), Eq. 16",
        differs="advantages are whitened over the batch; the value function is clipped as in OpenAI's code; dual clip, "
        "clip-higher and a stop at target_kl are settings",
        proof=("tests/test_checks_vectors.py", "11a-ppo-clip", "ratio-upside-down"),
    ),
    "a2c": Preset(
        kind="online",
        title="A2C",
        formula=r"-\mathbb{E}\left[A_t \log \pi_\theta(a_t | s_t)\right],"
        r"\quad A_t = \sum_l (\gamma \lambda)^l \delta_{t+l}",
        source="Mnih et al. 2016 (1602.01783), Algorithm S3; PPO with one update: Huang et al. 2022 (2205.09123)",
        differs="the synchronous form; entropy_coef is 0 by default; advantage n_step gives the n-step return, and "
        "with n_step 1 the temporal difference",
        settings={"policy_loss": "policy_gradient", "whiten_advantages": False, "value_clip_range": None},
        proof=("tests/test_learner_a2c.py", "C12-local", "two-epochs"),
    ),
    "reinforce": Preset(
        kind="online",
        title="REINFORCE",
        formula=_VALUES_OF_REINFORCE + r",\quad b = 0",
        source="Williams 1992, sections 4 and 5",
        settings=_REINFORCE,
        proof=("tests/test_checks_gradient.py", "C3-reinforce", "own-reward-only"),
    ),
    "reinforce_batch_mean": Preset(
        kind="online",
        title="REINFORCE, batch-mean baseline",
        formula=_VALUES_OF_REINFORCE + r",\quad b = \frac{1}{B} \sum_j R_j",
        source="Williams 1992, section 4 (reinforcement baseline)",
        differs="the mean includes the sample itself, which scales the expected gradient by (B - 1) / B",
        settings={**_REINFORCE, "baseline": "batch_mean"},
        proof=("tests/test_checks_gradient.py", "C3-variance", "mean-over-prompts"),
    ),
    "reinforce_ema": Preset(
        kind="online",
        title="REINFORCE, moving-average baseline",
        formula=_VALUES_OF_REINFORCE + r",\quad b \leftarrow \alpha b + (1 - \alpha) \bar{R}",
        source="Williams 1992, section 4 (reinforcement baseline)",
        differs="the average is of earlier steps only, so it does not depend on the sample",
        settings={**_REINFORCE, "baseline": "ema"},
        proof=("tests/test_learner_experience.py", "ema", "own-step"),
    ),
    "reinforce_value": Preset(
        kind="online",
        title="REINFORCE, value baseline",
        formula=_VALUES_OF_REINFORCE + r",\quad b = V_\phi(s_t)",
        source="Sutton and Barto 2018, section 13.4",
        settings={**_REINFORCE, "advantage": "gae", "gae_lambda": 1.0, "value_clip_range": None},
        proof=("tests/test_checks_gradient.py", "C3-reinforce-value-baseline", "baseline-knows-the-token"),
    ),
    "rloo": Preset(
        kind="online",
        title="RLOO",
        formula=r"-\mathbb{E}\left[\min(r A,\ \mathrm{clip}(r) A)\right],\quad "
        r"A_i = R_i - \frac{1}{K - 1} \sum_{j \ne i} R_j,\quad r = \frac{\pi_\theta(y|x)}{\pi_{old}(y|x)}",
        source="Kool et al. 2019; Ahmadian et al. 2024 (2402.14740)",
        differs="with several updates a step the ratio of whole responses is clipped, as TRL's trainer does; with one "
        "it is the paper's REINFORCE",
        settings={
            "advantage": "leave_one_out",
            "ratio": "sequence",
            "aggregation": "sequence_mean_token_sum",
            "whiten_advantages": False,
        },
        proof=("tests/test_trl_parity.py", "rloo", "token-ratio"),
    ),
    "reinforce_plus_plus": Preset(
        kind="online",
        title="REINFORCE++",
        formula=r"-\mathbb{E}\left[\min(r_t A_t,\ \mathrm{clip}(r_t) A_t)\right],\quad "
        r"A_t = \mathrm{whiten}_{batch}\left(R - \beta \sum_{i \ge t} KL_i\right)",
        source="Hu 2025 (2501.03262)",
        settings={"advantage": "returns"},
        proof=("tests/test_learner_experience.py", "reinforce-plus-plus", "over-responses"),
    ),
    "reinforce_plus_plus_baseline": Preset(
        kind="online",
        title="REINFORCE++-baseline",
        formula=r"-\mathbb{E}\left[\min(r_t A_t,\ \mathrm{clip}(r_t) A_t)\right] + \beta k_2,\quad "
        r"A_t = \mathrm{whiten}_{batch}(R - \bar{R}_{group})",
        source="Hu 2025 (2501.03262)",
        settings={
            "advantage": "returns",
            "baseline": "group_mean",
            "kl": {"placement": "loss", "estimator": "k2"},
        },
        proof=("tests/test_learner_experience.py", "reinforce-plus-plus-baseline", "mean-of-the-batch"),
    ),
    "grpo": Preset(
        kind="online",
        title="GRPO",
        formula=r"-\frac{1}{G} \sum_i \frac{1}{|y_i|} \sum_t \min(r_{i,t} A_i,\ \mathrm{clip}(r_{i,t}) A_i) "
        r"+ \beta k_3,\quad A_i = \frac{R_i - \mathrm{mean}(R)}{\mathrm{std}(R)}",
        source="Shao et al. 2024 (2402.03300), Eq. 3",
        differs="the standard deviation is the sample's, plus 1e-6; k3 in the loss is kept for parity: its gradient is "
        "that of KL(reference || policy), and estimator k2 has that of KL(policy || reference)",
        settings={
            **_GROUP,
            "aggregation": "sequence_mean_token_mean",
            "kl": {"placement": "loss", "estimator": "k3", "coef": 0.04},
        },
        proof=("tests/test_trl_parity.py", "grpo-k3", "old-for-reference"),
    ),
    "dr_grpo": Preset(
        kind="online",
        title="Dr. GRPO",
        formula=r"-\frac{1}{G L_{max}} \sum_i \sum_t \min(r_{i,t} A_i,\ \mathrm{clip}(r_{i,t}) A_i),\quad "
        r"A_i = R_i - \mathrm{mean}(R)",
        source="Liu et al. 2025 (2503.20783), section 3.2",
        settings={
            **_GROUP,
            "scale_by_std": False,
            "aggregation": "sequence_mean_token_sum_norm",
            "kl": {"coef": 0.0},
        },
        proof=("tests/test_trl_parity.py", "dr-grpo", "not-normed"),
    ),
    "dapo": Preset(
        kind="online",
        title="DAPO",
        formula=r"-\frac{1}{\sum_i |y_i|} \sum_i \sum_t \min(r_{i,t} A_i,\ "
        r"\mathrm{clip}(r_{i,t}, 1 - \varepsilon_{low}, 1 + \varepsilon_{high}) A_i),"
        r"\quad 0 < |\{i: y_i \text{ right}\}| < G",
        source="Yu et al. 2025 (2503.14476), Eq. 8, 11 and 13",
        differs="a group has contrast when its judges' raw values differ, not when some answers are right; groups "
        "without it are replaced in at most three waves of prompts a step, then trained on; the buffer is a share of "
        "max_new_tokens",
        settings={
            **_GROUP,
            "clip_range_high": 0.28,
            "kl": {"coef": 0.0},
            "dynamic_sampling": {},
            "overlong_buffer": 0.2,
        },
        proof=("tests/test_trl_parity.py", "dapo", "one-clip"),
    ),
    "gspo": Preset(
        kind="online",
        title="GSPO",
        formula=r"-\frac{1}{G} \sum_i \min(s_i A_i,\ \mathrm{clip}(s_i) A_i),\quad "
        r"s_i = \left(\frac{\pi_\theta(y_i|x)}{\pi_{old}(y_i|x)}\right)^{1/|y_i|}",
        source="Zheng et al. 2025 (2507.18071), Eq. 5 and 7",
        settings={
            **_GROUP,
            "ratio": "sequence_mean",
            "clip_range": 3e-4,
            "clip_range_high": 4e-4,
            "aggregation": "sequence_mean_token_mean",
            "kl": {"coef": 0.0},
        },
        proof=("tests/test_trl_parity.py", "gspo", "product"),
    ),
    "cispo": Preset(
        kind="online",
        title="CISPO",
        formula=r"-\frac{1}{\sum_i |y_i|} \sum_i \sum_t \mathrm{sg}\left[\mathrm{clip}(r_{i,t}, 1 - \varepsilon_{low}, "
        r"1 + \varepsilon_{high})\right] A_i \log \pi_\theta(a_t | s_t)",
        source="MiniMax 2025 (2506.13585), Eq. 4 and 5",
        differs="the lower clip is off (clip_range 1), as in the paper; the upper one, which it does not give, is 4",
        settings={**_GROUP, "policy_loss": "cispo", "clip_range": 1.0, "clip_range_high": 4.0, "kl": {"coef": 0.0}},
        proof=("tests/test_trl_parity.py", "cispo", "lower-clip"),
    ),
    "dpo": Preset(
        kind="offline",
        title="DPO",
        formula=r"-\log \sigma\left(\beta \log \frac{\pi_\theta(y_w)}{\pi_{ref}(y_w)} - "
        r"\beta \log \frac{\pi_\theta(y_l)}{\pi_{ref}(y_l)}\right)",
        source="Rafailov et al. 2023 (2305.18290), Eq. 7; label smoothing: Mitchell 2023 (cDPO)",
        differs="settings label_smoothing and sft_coef (-log p(chosen) per token, Pang et al. 2024, 2404.19733) are 0 "
        "by default; RandomWalks sets sft_coef 1",
        proof=("tests/test_trl_parity.py", "dpo-model", "sides-swapped"),
    ),
    "ilql": Preset(
        kind="offline",
        title="ILQL",
        formula=r"L_V = \mathbb{E}[L_2^\tau(\hat{Q} - V)],\quad L_Q = \mathbb{E}[(r + \gamma V(s') - Q)^2],\quad "
        r"\pi \propto \pi_\beta \exp(\beta (\hat{Q} - V))",
        source="Snell et al. 2022 (2206.11871), section 4; CQL: Kumar et al. 2020 (2006.04779)",
        differs="one trunk bears the policy and all heads, as in trlx; the paper has three transformers",
        proof=("tests/test_learner_value_learning.py", "C6-expectiles", "turned"),
    ),
    "q_learning": Preset(
        kind="offline",
        title="Token Q-learning",
        formula=r"L_Q = \mathbb{E}[(r + \gamma \max_a \hat{Q}(s', a) - Q(s, a))^2],\quad "
        r"\pi \propto \pi_\beta \exp(\beta (\hat{Q} - \max_a \hat{Q}))",
        source="Watkins and Dayan 1992; Jaques et al. 2019 (1907.00456)",
        proof=("tests/test_learner_value_learning.py", "C6-value-iteration", "bootstraps-past-the-end"),
    ),
}
"""By the name in the configuration."""

ONLINE = {name: preset for name, preset in PRESETS.items() if preset.kind == "online"}
"""What `algorithm:` of a training run may name."""
OFFLINE = {name: preset for name, preset in PRESETS.items() if preset.kind == "offline"}
"""What `algorithm:` of `concord offline` may name."""
