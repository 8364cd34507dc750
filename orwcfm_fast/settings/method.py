"""Settings of the method itself: how strongly the reward pulls, and how strongly the reference holds."""

from typing import Literal

from orwcfm_fast.settings.declare import Settings, setting

Weights = Literal["exp", "linear", "advantage"]


class OnlineMethod(Settings):
    """The weighting of rewards and the anchor of the online rounds."""

    method: str = setting(
        "orw-centred",
        panel="Method",
        help="objective of the gradient steps (orwcfm list methods)",
        metavar="NAME",
        complete="methods",
    )
    alpha: float = setting(
        1.0,
        panel="Method",
        help="weight α of the W2 penalty; higher stays nearer the reference",
        ge=0,
        allow_inf_nan=False,
    )
    tau: float = setting(
        0.5,
        panel="Method",
        help="τ in w = exp(τ·r); higher is sharper (an inverse temperature)",
        allow_inf_nan=False,
    )
    weights: Weights = setting(
        "exp",
        panel="Method",
        help="how a reward r becomes a weight: exp(τ·r), linear (r itself), or advantage (exp(τ·r) of the "
        "rewards standardised over the round)",
    )
    normalize_weights: bool = setting(
        True, panel="Method", help="divide the weights by their mean over the round"
    )
    adrpo_beta0: float = setting(
        1.0,
        panel="Method",
        help="adrpo: strength β₀ of the anchor at an advantage of 0",
        gt=0,
        allow_inf_nan=False,
    )
    ram_m: float = setting(
        0.1, panel="Method", help="ram: multiplier m of the advantage", ge=0, allow_inf_nan=False
    )
    raft_best_of: int = setting(
        4, panel="Method", help="raft: number of samples in a row of which the best is kept", ge=2
    )
    nft_beta: float = setting(
        1.0, panel="Method", help="nft: step β of the two branches", gt=0, allow_inf_nan=False
    )
    kl: float = setting(
        0.001,
        panel="Method",
        help="nft, awm: weight of the term with the reference",
        ge=0,
        allow_inf_nan=False,
    )
    rounds: int = setting(
        8, panel="Method", help="online rounds; each draws samples, scores them and trains on them", ge=1
    )


class MethodGrid(OnlineMethod):
    """The same with several values of α and τ."""

    alpha: list[float] = setting(  # type: ignore[assignment]
        [0.0, 0.1, 0.3, 1.0],
        panel="Method",
        help="weight α of the W2 penalty; higher stays nearer the reference; may be repeated",
    )
    tau: list[float] = setting(  # type: ignore[assignment]
        [0.5],
        panel="Method",
        help="τ in w = exp(τ·r); higher is sharper (an inverse temperature); may be repeated",
    )
