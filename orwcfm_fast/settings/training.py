"""Settings that pretraining and fine-tuning share, and those of `orwcfm pretrain`."""

from orwcfm_fast.settings.declare import DataFolder, Settings, setting


class Training(Settings):
    """The optimiser and its minibatches."""

    batch: int = setting(64, panel="Training", help="minibatch size of a gradient step", ge=1)
    lr: float = setting(1e-3, panel="Training", help="learning rate of AdamW", gt=0, allow_inf_nan=False)
    warmup: int = setting(
        50, panel="Training", help="number of steps over which the learning rate rises to its value", ge=0
    )
    grad_clip: float = setting(1.0, panel="Training", help="maximum norm of the gradient", gt=0)


class Pretrain(Training, DataFolder):
    """Settings of `orwcfm pretrain`."""

    data: str = setting(
        "digits",
        panel="Model and data",
        help="dataset (orwcfm list data), or folder:PATH for a folder of images",
        metavar="NAME",
        complete="data",
    )
    model: str = setting(
        "",
        panel="Model and data",
        help="network preset (orwcfm list models)",
        default_text="the one of the data",
        metavar="NAME",
        complete="models",
    )
    steps: int = setting(1000, panel="Training", help="number of gradient steps", ge=1)
    batch: int = setting(128, panel="Training", help="minibatch size of a gradient step", ge=1)
    lr: float = setting(2e-3, panel="Training", help="learning rate of AdamW", gt=0, allow_inf_nan=False)
    ema: float = setting(
        0.998,
        panel="Training",
        help="decay of the moving average of the weights, from which samples are drawn",
        ge=0,
        lt=1,
    )
    cooldown: float = setting(
        0.4,
        panel="Training",
        help="share of the steps, at the end, over which the learning rate falls to zero",
        ge=0,
        le=1,
    )
    flip: bool = setting(False, panel="Training", help="mirror every image left to right with probability ½")
    save_every: int = setting(500, panel="Output", help="number of steps between checkpoints", ge=1)
