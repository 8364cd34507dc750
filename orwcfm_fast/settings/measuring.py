"""Settings of the commands that measure or forecast: `orwcfm evaluate` and `orwcfm predict`."""

from typing import Literal

from orwcfm_fast.settings.declare import setting
from orwcfm_fast.settings.method import MethodGrid
from orwcfm_fast.settings.rewards import RewardOptions, RewardsWithHoldout
from orwcfm_fast.settings.sampling import Sampling


class Evaluation(Sampling, RewardsWithHoldout):
    """Settings of `orwcfm evaluate`."""

    n: int = setting(
        2048, panel="Sampling", help="number of held-out samples; exact W2 uses at most 2,048 of them", ge=4
    )
    features: Literal["auto", "classifier", "clip", "inception", "pixels"] = setting(
        "auto",
        panel="Measures",
        help="feature space of diversity and fidelity; classifier is the one of digits",
    )
    against: Literal["auto", "data", "reference", "none"] = setting(
        "auto",
        panel="Measures",
        help="what fidelity compares the samples with; auto is the data, if it needs no download",
    )


class Predict(Sampling, RewardOptions, MethodGrid):
    """Settings of `orwcfm predict`."""

    want_reward: float | None = setting(
        None, panel="Method", help="answer with the α that reaches this mean reward"
    )
    want_w2: float | None = setting(
        None, panel="Method", help="answer with the α that ends at this coupled W2"
    )
    n: int = setting(1024, panel="Sampling", help="number of samples that carry the forecast", ge=2)
    scored: int = setting(
        4096,
        panel="Sampling",
        help="number of samples that are scored for the mean reward before training",
        ge=2,
    )
