"""Settings of the reward, and of the rewards that need more than a name."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr

from orwcfm_fast.settings.declare import DataFolder, setting


class RewardOptions(DataFolder):
    """Which reward, and what some rewards need besides their name."""

    _with_prompts: bool = PrivateAttr(False)

    reward: list[str] = setting(
        [],
        panel="Reward",
        help="reward to raise: NAME[:ARGUMENT][=WEIGHT], file.py:function or package.module:function; "
        "repeat the option to add several up",
        default_text="the one of the data",
        metavar="NAME",
        complete="rewards",
    )
    reward_batch: int = setting(
        0,
        panel="Reward",
        help="maximum batch size of a reward call; halved when memory runs out",
        default_text="all samples at once",
        ge=0,
    )
    reward_timeout: float = setting(
        600.0,
        panel="Reward",
        help="process, judge and http rewards: seconds to wait for an answer of the worker process or server",
        gt=0,
        allow_inf_nan=False,
    )
    reward_requests: int = setting(
        16, panel="Reward", help="judge and http rewards: requests in flight at once", ge=1, le=1024
    )
    question: str = setting(
        "Does this image show: {prompt}?",
        panel="Reward",
        help="judge reward: what the model is asked about each image; {prompt} is the image's own prompt",
    )
    judge_answer: Literal["yes", "rating"] = setting(
        "yes",
        panel="Reward",
        help="judge reward: yes is P(yes) from log-probabilities, rating a number from 0 to 10 in the answer, over 10",
    )
    judge_rate: float = setting(
        0.0,
        panel="Reward",
        help="judge reward: at most so many requests a second",
        default_text="no limit",
        ge=0,
        allow_inf_nan=False,
    )
    judge_dry_run: bool = setting(
        False, panel="Reward", help="judge reward: print one request and send none; every score is 0"
    )
    prompt: list[str] = setting(
        [],
        panel="Reward",
        help="text that images should match, in place of their own prompts; clip takes several",
    )
    negative: list[str] = setting(
        [], panel="Reward", help="clip reward: text that the image should not match; may be repeated"
    )
    clip_score: Literal["probability", "cosine"] = setting(
        "probability",
        panel="Reward",
        help="clip reward: probability of the prompts minus that of the negatives, or the mean cosine similarity",
    )
    clip_model: str = setting(
        "ViT-B-32",
        panel="Reward",
        help="clip reward: architecture of open_clip, or local-dir:FOLDER",
        metavar="NAME",
    )
    clip_weights: str = setting(
        "openai",
        panel="Reward",
        help="clip reward: pretrained weights of open_clip by name, or a file",
        metavar="NAME",
    )
    clip_precision: Literal["fp32", "bf16"] = setting(
        "fp32",
        panel="Reward",
        help="clip reward: number format; bf16 is faster on a GPU and changes features by about 0.5 %",
    )
    classifier_size: int = setting(
        0,
        panel="Reward",
        help="classifier reward: side in pixels to which images are resized",
        default_text="the architecture's own",
        ge=0,
    )
    classifier_pixels: Literal["own", "half", "unit"] = setting(
        "own",
        panel="Reward",
        help="classifier reward: range of the pixels: own is the architecture's own mean and deviation, "
        "half is [-1, 1], unit is [0, 1]",
    )

    @property
    def has_prompts(self) -> bool:
        """Whether the samples have prompts of their own, which rewards may read."""
        return self._with_prompts or bool(getattr(self, "prompts", ""))

    def with_prompts(self) -> Self:
        """The same settings for a model that brings its prompts with it."""
        changed = self.model_copy()
        changed._with_prompts = True
        return changed


class RewardsWithHoldout(RewardOptions):
    """The same with rewards that are measured and never trained on."""

    holdout_reward: list[str] = setting(
        [],
        panel="Reward",
        help="reward that is measured every round and never trained on, to show reward hacking; may be repeated",
        metavar="NAME",
        complete="rewards",
    )


class Serve(BaseModel):
    """How `orwcfm rewards serve` listens."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    host: str = setting(
        "127.0.0.1",
        panel="Machine",
        help="address to listen on; one that other machines reach needs $ORWCFM_REWARD_TOKEN",
        metavar="ADDRESS",
    )
    port: int = setting(8400, panel="Machine", help="port to listen on; 0 takes a free one", ge=0, le=65535)
    max_mib: int = setting(64, panel="Machine", help="largest body of a request, in MiB", ge=1, le=4096)
