"""Every setting, declared once: the command line's options, the TOML keys and the Python arguments."""

import math
import tomllib
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from orwcfm_fast.errors import UserError
from orwcfm_fast.files import read_small
from orwcfm_fast.registry import unknown

MAX_TOML_BYTES = 24 << 10  # tomllib takes time quadratic in a dotted key: seconds, at most
Weights = Literal["exp", "linear", "advantage"]
Coupling = Literal["independent", "ot"]
Best = Literal["reward_mean", "reward_max", "ess", "diversity", "w2_coupled", "none"]
Guarding = Literal["warn", "stop", "rollback", "off"]
Precision = Literal["auto", "fp32", "bf16"]
DATA_DIR = "where downloaded datasets lie; default under the cache"
FeatureChoice = Literal["auto", "classifier", "clip", "inception", "pixels"]
Against = Literal["auto", "data", "reference", "none"]


class Settings(BaseModel):
    """Base of all commands' settings; frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seed: int = Field(0, ge=-(2**63), lt=2**63, description="seed of all counted noise")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Precision = Field(
        "auto", description="of the network; auto is bf16 where the machine is fast at it"
    )


ASKING = {"reward_batch", "reward_timeout"}
"""Settings of how a reward is asked, not of which it is."""


class RewardOptions(Settings):
    """Which reward, and what some rewards need besides their name."""

    _of_prompts: bool = PrivateAttr(False)

    reward: list[str] = Field([], description="NAME[:ARG][=WEIGHT], file.py:f or module:f; repeat to add up")
    holdout_reward: list[str] = Field(
        [], description="measured each round, never trained on: shows reward hacking; repeat for several"
    )
    reward_batch: int = Field(
        0, ge=0, description="samples that a reward is asked of at once; halved where memory runs out; 0: all"
    )
    reward_timeout: float = Field(
        600.0, gt=0, allow_inf_nan=False, description="process: seconds to wait for its worker's answer"
    )
    prompt: list[str] = Field([], description="clip: what the image should show; repeat for several")
    negative: list[str] = Field([], description="clip: what it should not show; repeat for several")
    clip_score: Literal["probability", "cosine"] = Field(
        "probability", description="clip: probability of the prompts minus the negatives; or mean cosines"
    )
    clip_model: str = Field("ViT-B-32", description="clip: open_clip architecture, or local-dir:FOLDER")
    clip_weights: str = Field("openai", description="clip: open_clip pretrained tag, or a weights file")
    clip_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="clip: bf16 is faster on a GPU; features move by about 0.5 %"
    )
    data_dir: str = Field("", description=DATA_DIR)
    classifier_size: int = Field(
        0, ge=0, description="classifier: side that images are resized to; 0: the architecture's own"
    )
    classifier_pixels: Literal["own", "half", "unit"] = Field(
        "own", description="classifier: the architecture's own mean and deviation, or [-1, 1], or [0, 1]"
    )

    @property
    def prompted(self) -> bool:
        """Whether samples come with prompts of their own, that rewards may read."""
        return self._of_prompts or bool(getattr(self, "prompts", ""))

    def of_prompts(self) -> Self:
        """The same, of a model that has its prompts with it."""
        found = self.model_copy()
        found._of_prompts = True
        return found


class Conditioned(Settings):
    """What a text-to-image pipeline (--model diffusers:…) is asked for; unset: as its run has it, or it itself."""

    prompts: str = Field(
        "", description="pipeline: file of prompts, a line each, or JSON lines of prompt, weight, metadata"
    )
    guidance: float | None = Field(
        None,
        ge=1,
        allow_inf_nan=False,
        description="pipeline: classifier-free guidance of the policy, or what FLUX embeds; default 1: none",
    )
    group: int = Field(
        1,
        ge=1,
        description="pipeline: draws in a row that share a prompt; above 1 weights compare within a prompt",
    )
    image_size: int = Field(0, ge=0, description="pipeline: side in pixels; 0: the pipeline's own")
    prompt_tokens: int = Field(0, ge=0, description="pipeline: T5 tokens of a prompt; 0: the pipeline's own")
    vae_chunk: int = Field(4, ge=1, description="pipeline: latents decoded to images at once")


class Sampling(Conditioned):
    """How noise becomes samples."""

    solver: str = Field("abm4", description="ODE solver (orwcfm list solvers)")
    nfe: int = Field(14, ge=1, description="network evaluations a sample (dopri5 chooses its own)")
    grid: str = Field(
        "power:1.3",
        description="uniform; power:P for t = 1−(1−s)^P: finer near the data; own: the pipeline's",
    )


class Evaluation(Sampling, RewardOptions):
    """Held-out samples and what is measured on them."""

    n: int = Field(2048, ge=4, description="held-out samples; exact W2 uses at most 2,048")
    chunk: int = Field(512, ge=1, description="samples drawn at once")
    features: FeatureChoice = Field(
        "auto", description="of diversity and fidelity: classifier (digits), clip, inception, pixels"
    )
    against: Against = Field(
        "auto", description="fidelity against data, reference or none; auto: data that needs no download"
    )


class Predict(Sampling, RewardOptions):
    """Settings of `orwcfm predict`."""

    alpha: list[float] = Field([0.0, 0.1, 0.3, 1.0], description="W2 weights α; repeat for several")
    tau: list[float] = Field([0.5], description="temperatures τ; repeat for several")
    rounds: int = Field(8, ge=1, description="online rounds")
    weights: Weights = Field("exp", description="from reward to weight: exp(τ·r); r; exp(τ·standardised r)")
    normalize_weights: bool = Field(True, description="divide weights by their mean over the round")
    n: int = Field(1024, ge=2, description="samples of the model that the forecast rests on")
    scored: int = Field(4096, ge=2, description="samples for the mean reward that the forecast starts from")
    chunk: int = Field(512, ge=1, description="samples drawn at once")
    want_reward: float | None = Field(None, description="answer with the α that reaches this reward")
    want_w2: float | None = Field(None, description="answer with the α that ends at this coupled W2")


class Sample(Sampling):
    """Settings of `orwcfm sample`."""

    n: int = Field(64, ge=1, description="number of samples")
    chunk: int = Field(512, ge=1, description="samples drawn at once")
    precision: Precision = Field("fp32", description="of the network")


class Training(Settings):
    """What pretraining and fine-tuning share."""

    batch: int = Field(64, ge=1, description="samples a gradient step")
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False, description="learning rate (AdamW)")
    warmup: int = Field(50, ge=0, description="steps of linear learning-rate warm-up")
    grad_clip: float = Field(1.0, gt=0, description="largest gradient norm")


class Pretrain(Training):
    """Settings of `orwcfm pretrain`."""

    data: str = Field("digits", description="dataset (orwcfm list data); folder:PATH for a folder of images")
    data_dir: str = Field("", description=DATA_DIR)
    model: str = Field("", description="network preset (orwcfm list models); default: the data's")
    steps: int = Field(1000, ge=1, description="gradient steps")
    batch: int = Field(128, ge=1, description="samples a gradient step")
    lr: float = Field(2e-3, gt=0, allow_inf_nan=False, description="learning rate (AdamW)")
    ema: float = Field(0.998, ge=0, lt=1, description="decay of the weight average that is sampled from")
    cooldown: float = Field(
        0.4, ge=0, le=1, description="share of the steps over which the rate falls to zero"
    )
    flip: bool = Field(False, description="mirror images left to right, each other time by chance")
    save_every: int = Field(500, ge=1, description="steps between checkpoints")


class Finetune(Training, Sampling, RewardOptions):
    """Settings of `orwcfm finetune`; the defaults are those of the digits run."""

    checkpoint: str = Field("", description="pretrained model: run, checkpoint, foreign .pt or preset")
    model: str = Field(
        "", description="preset of a foreign .pt (orwcfm list models), or diffusers:PATH_OR_ID, a pipeline"
    )
    data: str = Field("", description="dataset that a foreign .pt was trained on")
    alpha: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="W2 weight α: higher stays nearer the reference"
    )
    tau: float = Field(
        0.5, allow_inf_nan=False, description="w = exp(τ·r); higher is sharper (an inverse temperature)"
    )
    weights: Weights = Field("exp", description="from reward to weight: exp(τ·r); r; exp(τ·standardised r)")
    normalize_weights: bool = Field(True, description="divide weights by their mean over the round")
    standardize_rewards: bool = Field(
        False, description="several rewards: each to mean 0, deviation 1 over the round before they add up"
    )
    coupling: Coupling = Field(
        "independent", description="of noise and sample; ot: minibatch optimal transport"
    )
    target_w2: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="choose α by round so that the coupled W2 comes to this and stays",
    )
    rounds: int = Field(8, ge=1, description="online rounds")
    steps_per_round: int = Field(112, ge=1, description="gradient steps a round")
    cooldown: float = Field(
        0.5, ge=0, le=1, description="share of each round's steps over which the rate falls to zero"
    )
    reference_passes: int = Field(
        1, ge=1, description="passes over a round's draws; the reference is evaluated in the first alone"
    )
    pair: bool = Field(
        False, description="policy and reference in one batched call a step; slower on every CPU measured"
    )
    graph: bool = Field(
        False, description="each gradient step as one CUDA graph, told as the policy's time; on one GPU"
    )
    rollout: int = Field(1536, ge=2, description="samples drawn a round")
    chunk: int = Field(512, ge=1, description="samples drawn at once")
    micro_batch: int = Field(0, ge=0, description="samples at once in a gradient step; 0: the whole batch")
    probe: int = Field(
        128, ge=2, description="fixed-noise samples that W2 and pictures follow through the rounds"
    )
    eval_n: int = Field(2048, ge=4, description="held-out samples of the closing table")
    save_every: int = Field(1, ge=1, description="rounds between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    best: Best = Field("reward_mean", description="metric whose best checkpoint is kept as well, or none")
    guard: Guarding = Field(
        "warn",
        description="at drift: warn, stop, rollback (to the last good checkpoint, milder τ or α) or off; "
        "values that are not finite stop the run, or roll it back",
    )
    guard_ess: float = Field(0.2, ge=0, le=1, description="least ESS, as a share of the rollout")
    guard_w2: float | None = Field(
        None,
        gt=0,
        description="largest coupled W2; default: 0.7 of the mean distance of two reference samples",
    )
    guard_diversity: float = Field(0.85, ge=0, description="least diversity, as a share of the reference's")
    lora: int = Field(0, ge=0, description="rank of low-rank adapters; 0 trains all weights")
    gradient_checkpointing: bool = Field(
        False, description="pipeline: compute activations again in the backward pass, for less memory"
    )
    log: list[str] = Field([], description="also log to tensorboard, wandb or wandb:PROJECT; repeat for both")

    @property
    def draws(self) -> int:
        """Minibatches drawn a round; its other gradient steps take them again."""
        return -(-self.steps_per_round // self.reference_passes)


class Sweep(Finetune):
    """Settings of `orwcfm sweep`: those of each run, with lists where the grid has several values."""

    alpha: list[float] = Field([0.0, 0.1, 0.3, 1.0], description="W2 weights α; repeat for several")  # type: ignore[assignment]
    tau: list[float] = Field([0.5], description="temperatures τ; repeat for several")  # type: ignore[assignment]
    set: list[str] = Field([], description="values of any other setting, KEY=V1,V2; repeat for several")


S = TypeVar("S", bound=BaseModel)


def build(kind: type[S], *layers: dict[str, Any], where: str = "") -> S:
    """Settings from layers of values, later ones winning.

    Raises:
        UserError: unknown key (the nearest known one), wrong type or a value out of bounds; one line.
    """
    values = {k: v for layer in layers for k, v in layer.items() if v is not None}
    for key in values:
        if key not in kind.model_fields:
            raise UserError(where + str(unknown("setting", key, kind.model_fields)))
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        field = kind.model_fields.get(name)
        means = f" ({field.description})" if field else ""
        wanted = first["msg"][0].lower() + first["msg"][1:]
        shown = repr(first["input"])
        shown = shown if len(shown) <= 80 else shown[:80] + "…"
        raise UserError(f"{where}{name} = {shown}: {wanted}{means}") from None


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file's keys, with - and _ alike.

    Raises:
        UserError: the file is missing or not TOML.
    """
    try:
        text = read_small(Path(path), MAX_TOML_BYTES).decode("utf-8")
        return {k.replace("-", "_"): v for k, v in tomllib.loads(text).items()}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # tomllib's own, of decoding, of numbers too long
        raise UserError(f"{path}: not a TOML file: {error}") from None


def to_toml(values: dict[str, Any]) -> str:
    """Flat settings as TOML; None is left out."""
    return "".join(f"{k} = {_toml(v)}\n" for k, v in values.items() if v is not None)


def _toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value) if math.isfinite(value) else str(value)
        case list() | tuple():
            return f"[{', '.join(map(_toml, value))}]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'
