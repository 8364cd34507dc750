"""Settings of `orwcfm finetune` and `orwcfm sweep`; the defaults are those of the digits run."""

from typing import Any, Literal

from pydantic import field_validator

from orwcfm_fast.settings.declare import setting
from orwcfm_fast.settings.method import MethodGrid, OnlineMethod
from orwcfm_fast.settings.rewards import RewardsWithHoldout
from orwcfm_fast.settings.sampling import Sampling
from orwcfm_fast.settings.training import Training

Times = Literal["own", "uniform", "late"]
LoraKind = Literal["plain", "dora", "rslora"]
Graph = Literal["auto", "on", "off"]
Best = Literal["reward_mean", "reward_max", "ess", "diversity", "w2_coupled", "none"]


class Finetune(Training, Sampling, RewardsWithHoldout, OnlineMethod):
    """Settings of `orwcfm finetune`."""

    checkpoint: str = setting(
        "",
        panel="Model and data",
        help="pretrained model: a run, a checkpoint, a .pt file of torchcfm or a preset",
        default_text="the digits model, or the one of --data",
        metavar="MODEL",
    )
    model: str = setting(
        "",
        panel="Model and data",
        help="preset of a .pt file (orwcfm list models), or diffusers:FOLDER_OR_ID for a pipeline",
        default_text="the one of the checkpoint",
        metavar="NAME",
        complete="models",
    )
    data: str = setting(
        "",
        panel="Model and data",
        help="digits or mnist: start from the model that ships; else the data of a .pt file",
        default_text="the one of the checkpoint",
        metavar="NAME",
        complete="data",
    )
    coupling: Literal["independent", "ot"] = setting(
        "independent",
        panel="Method",
        help="how noise and samples are paired: independent, or ot, minibatch optimal transport",
    )
    target_w2: float | None = setting(
        None,
        panel="Method",
        help="choose α anew every round so that the coupled W2 reaches this value and stays there",
        gt=0,
        allow_inf_nan=False,
    )
    standardize_rewards: bool = setting(
        False,
        panel="Reward",
        help="standardise each reward over the round before they are added up",
    )
    rollout: int = setting(1536, panel="Sampling", help="number of samples drawn in a round", ge=2)
    steps_per_round: int = setting(112, panel="Training", help="number of gradient steps in a round", ge=1)
    cooldown: float = setting(
        0.5,
        panel="Training",
        help="share of the steps, at the end of each round, over which the learning rate falls to zero",
        ge=0,
        le=1,
    )
    times: Times = setting(
        "own",
        panel="Training",
        help="density of the times t of the draws: uniform, late (2t), or the method's own, late for orw-centred",
    )
    graph: Graph = setting(
        "off",
        panel="Training",
        help="on one GPU replay velocities and gradient steps as CUDA graphs: on, off, or auto, where that is measured "
        "to be faster (the time of a replayed step is reported under policy)",
    )
    compile: bool = setting(
        False,
        panel="Training",
        help="let torch.compile fuse the network; its first calls take seconds to minutes",
    )
    micro_batch: int = setting(
        0,
        panel="Training",
        help="number of samples that a gradient step holds in memory at once; halved when memory runs out",
        default_text="the whole batch",
        ge=0,
    )
    lora: int = setting(
        0,
        panel="Large models",
        help="rank of low-rank adapters",
        default_text="train all weights",
        ge=0,
    )
    lora_alpha: float | None = setting(
        None,
        panel="Large models",
        help="alpha of the adapters, whose scale is alpha over the rank, of rslora over its root",
        default_text="the rank",
        gt=0,
        allow_inf_nan=False,
    )
    lora_kind: LoraKind = setting(
        "plain",
        panel="Large models",
        help="form of the adapters: plain, dora (also trains the norm of each row of a weight) or rslora",
    )
    lora_targets: list[str] = setting(
        [],
        panel="Large models",
        help="layers to adapt, by the ends of their names, as in to_q,to_v, or all; may be repeated",
        default_text="attention and feed-forward layers of a pipeline, all layers of another model",
        metavar="NAMES",
    )
    lora_init: list[str] = setting(
        [],
        panel="Large models",
        help="safetensors file of a published LoRA of the pipeline, to continue from; one for each transformer",
        metavar="FILE",
    )
    gradient_checkpointing: bool = setting(
        False,
        panel="Large models",
        help="recompute activations in the backward pass, which saves memory and costs time",
    )
    shard: bool = setting(
        False,
        panel="Large models",
        help="torchrun: each rank holds a part of the weights, gradients and optimiser state, not all of them",
    )
    guard: Literal["warn", "stop", "rollback", "off"] = setting(
        "warn",
        panel="Safety",
        help="when a limit below is passed: warn, stop, or rollback to the last good checkpoint with a milder τ "
        "or α; a value that is not finite always stops the run or rolls it back",
    )
    guard_ess: float = setting(
        0.2, panel="Safety", help="least effective sample size, as a share of the rollout", ge=0, le=1
    )
    guard_w2: float | None = setting(
        None,
        panel="Safety",
        help="greatest coupled W2",
        default_text="0.7 of the mean distance of two reference samples",
        gt=0,
    )
    guard_velocity: float | None = setting(
        None,
        panel="Safety",
        help="greatest norm of the velocity as a multiple of the reference's, in any tenth of t from 0 to 1",
        default_text="1.05; none for samples of fewer than 64 values",
        gt=1,
        allow_inf_nan=False,
    )
    guard_diversity: float = setting(
        0.85, panel="Safety", help="least diversity, as a share of the diversity of the reference", ge=0
    )
    probe: int = setting(
        128,
        panel="Output",
        help="number of samples, from the same noise every round, on which W2 and the pictures are made; "
        "at least 1,024 with --target-w2",
        ge=2,
    )
    eval_prompts: str = setting(
        "",
        panel="Output",
        help="file of held-out prompts, as --prompts has them: after every round --probe samples are drawn for them "
        "and their reward is recorded; none is trained on",
        metavar="FILE",
    )
    drift_control: bool = setting(
        True,
        panel="Output",
        help="where the method moves with nothing to learn (orw), train again with τ = 0 and report what that does",
    )
    eval_n: int = setting(2048, panel="Output", help="number of held-out samples of the closing table", ge=4)
    save_every: int = setting(1, panel="Output", help="number of rounds between checkpoints", ge=1)
    keep: int = setting(2, panel="Output", help="number of newest checkpoints to keep", ge=1)
    best: Best = setting(
        "reward_mean", panel="Output", help="keep the checkpoint with the best value of this metric as well"
    )
    log: list[str] = setting(
        [],
        panel="Output",
        help="log to tensorboard, wandb or wandb:PROJECT as well; may be repeated",
        metavar="LOGGER",
    )

    @field_validator("graph", mode="before")
    @classmethod
    def _once_a_flag(cls, value: Any) -> Any:  # older runs hold true or false
        return ("on" if value else "off") if isinstance(value, bool) else value


class Sweep(MethodGrid, Finetune):  # type: ignore[misc]
    """Settings of `orwcfm sweep`: those of each run, with lists where the grid has several values."""

    set: list[str] = setting(
        [],
        panel="Method",
        help="values of any other setting, as in --set lr=1e-3,3e-4; may be repeated",
        metavar="KEY=V1,V2",
    )
