"""Features in which samples are compared: of the digits classifier, CLIP or Inception, or the pixels themselves."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from orwcfm_fast.errors import UserError
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.settings import RewardOptions

CHUNK = 256
SIDE = 64  # larger images are averaged down to this side before their pixels are compared
FRAMES, SOUND = 8, 4096  # most frames of a video, and values of a channel of sound, that are compared


@dataclass(frozen=True)
class Features:
    """A map from decoded samples [B, …] to features [B, F], and its name."""

    name: str
    of: Callable[[Tensor], Tensor]

    def __call__(self, samples: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([self.of(part).float() for part in samples.split(CHUNK)])


def decoded_features(
    policy: Policy,
    features: Callable[[Tensor], Tensor],
    x: Tensor,
    chunk: int,
    condition: Tensor | None = None,
) -> Tensor:
    """Features [N, F] of samples x [N, *shape] of conditions [N], decoded `chunk` at a time."""
    parts = x.split(chunk)
    rows = [None] * len(parts) if condition is None else condition.split(chunk)
    return torch.cat([features(policy.decode(*part)) for part in zip(parts, rows, strict=True)])


def _pixels(x: Tensor) -> Tensor:
    """Vectors and small images as they are, larger images averaged down to SIDE pixels along each side.

    Of videos [B, F, C, H, W] so many frames, evenly spaced; sound is averaged down to SOUND values a channel.
    """
    if x.dim() == 5:
        frames = torch.linspace(0, x.shape[1] - 1, min(FRAMES, x.shape[1])).round().long()
        x = x[:, frames.to(x.device)].flatten(1, 2)
    if x.dim() == 3:
        return F.adaptive_avg_pool1d(x, min(SOUND, x.shape[2])).flatten(1)
    if x.dim() == 4 and max(x.shape[2:]) > SIDE:
        x = F.adaptive_avg_pool2d(x, (min(x.shape[2], SIDE), min(x.shape[3], SIDE)))
    return x.flatten(1)


def features_for(choice: str, data: str, options: RewardOptions | None = None) -> Features:
    """The features of that name; "auto" is the classifier's of the data, else the pixels.

    Args:
        data: the dataset that the samples resemble.
        options: with the architecture and weights of CLIP.

    Raises:
        UserError: this data has no such features, or their weights cannot be loaded.
    """
    from orwcfm_fast.rewards.digits import TRAINING, classifier_of

    if choice == "auto":
        choice = "classifier" if data.partition(":")[0] in TRAINING else "pixels"
    if choice == "pixels":
        return Features("pixels", _pixels)
    if choice == "classifier":
        classifier = classifier_of(data, options.data_dir if options else "")
        if classifier is None:
            raise UserError(
                f"features 'classifier': knows {' and '.join(TRAINING)}, not {data}; use clip or pixels"
            )
        return Features("classifier", classifier.features)
    if choice == "clip":
        return Features("clip", _clip(options or RewardOptions()))
    if choice == "inception":
        return Features("inception", _inception())
    raise UserError(f"features '{choice}': should be auto, classifier, clip, inception or pixels")


def _clip(options: RewardOptions) -> Callable[[Tensor], Tensor]:
    """open_clip's image embedding, not normalised."""
    from orwcfm_fast.rewards.clip import clip_of

    return clip_of(options).embedding


def _inception() -> Callable[[Tensor], Tensor]:
    """The 2,048 features of TensorFlow's Inception v3 that FID was defined in (Heusel et al., NeurIPS 2017)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"])
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"features 'inception': no weights in {torch.hub.get_dir()}/checkpoints and no download possible "
            f"({reason}); use clip, classifier or pixels"
        ) from None

    def features(images: Tensor) -> Tensor:
        pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return network.to(images.device)(pixels.expand(-1, 3, -1, -1))[0]

    return features
