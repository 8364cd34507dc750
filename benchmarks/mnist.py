"""How the MNIST model and classifier that ship are made, and what they are worth: `make mnist DATA=FOLDER`.

    python -m orwcfm_fast.benchmarks.mnist classifier --data-dir FOLDER
    orwcfm pretrain --recipe mnist-small --data-dir FOLDER --out RUN
    python -m orwcfm_fast.benchmarks.mnist model RUN --data-dir FOLDER --out FILE.json

The first and the last replace what lies under orwcfm_fast/shipped. Weights are kept in half precision, and what the
last prints is measured with them as they are kept.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import MNIST

from orwcfm_fast.checkpoints import checkpoint
from orwcfm_fast.checkpoints.shipped import FOLDER
from orwcfm_fast.device import device_name
from orwcfm_fast.evaluation.features import features_for
from orwcfm_fast.evaluation.fidelity import fidelity
from orwcfm_fast.method import noise
from orwcfm_fast.method.rollout import sample, start_noise
from orwcfm_fast.rewards.digits import TRAINING, digit_classifier, save_classifier, train_classifier
from orwcfm_fast.runs.load import Loader
from orwcfm_fast.settings import Sampling

CPU = torch.device("cpu")
NAME = "unet-mnist-small"
SAMPLES = 4096


def held_out_digits(data_dir: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The 10,000 test images of MNIST in [-1, 1], and their labels."""
    found = MNIST(data_dir, train=False, download=not Path(data_dir, "MNIST/raw").is_dir())
    return found.data[:, None].float() / 127.5 - 1, found.targets


def make_classifier(data_dir: str) -> None:
    """Train the classifier and keep it in the package."""
    network = TRAINING["mnist"].network()
    accuracy = train_classifier(network, "mnist", data_dir)
    save_classifier(FOLDER / "mnist-classifier", network.half(), accuracy)
    digit_classifier.cache_clear()


def keep_model(run: Path) -> None:
    """The averaged weights of a pretraining run, in the package."""
    policy = Loader(CPU, "fp32").load(str(run)).policy
    state = {"kind": "pretrained", "model": policy.model, "data": policy.data, "shape": list(policy.shape)}
    checkpoint.save(FOLDER / NAME, state, model=policy.network.half().state_dict())


def worth(data_dir: str) -> dict[str, Any]:
    """Of the classifier its accuracy on the test set; of the model's samples what the classifier says of them."""
    images, labels = held_out_digits(data_dir)
    classifier = digit_classifier("mnist")
    with torch.inference_mode():
        right = torch.cat([classifier.probabilities(part).argmax(1) for part in images.split(500)]) == labels
        policy = Loader(CPU, "fp32").load(str(FOLDER / NAME)).policy
        x = policy.decode(sample(policy, start_noise(policy, SAMPLES, 0, noise.HELD_OUT), Sampling(), 512))
        found = torch.cat([classifier.probabilities(part) for part in x.split(500)])
        features = features_for("classifier", "mnist")
        near = fidelity(features(x), features(images), "test digits")
    assert near.fid is not None
    shares = found.argmax(1).bincount(minlength=10) / len(x)
    files = FOLDER / NAME / "model.safetensors", FOLDER / "mnist-classifier" / "model.safetensors"
    return {
        "classifier_on_test_digits": float(right.float().mean()),
        "confidence": float(found.max(1).values.mean()),
        "class_shares": [round(float(share), 4) for share in shares],
        "fid_in_classifier_features": [near.fid.mean, near.fid.low, near.fid.high],
        "precision": near.precision.mean, "recall": near.recall.mean,
        "samples": SAMPLES, "megabytes": [round(file.stat().st_size / 1e6, 2) for file in files],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["classifier", "model"])
    parser.add_argument("run", nargs="?", type=Path, help="of model: the pretraining run to keep")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.what == "classifier":
        make_classifier(given.data_dir)
        return
    if given.run:
        keep_model(given.run)
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(CPU),
        "versions": checkpoint.versions(),
        **worth(given.data_dir),
    }
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
