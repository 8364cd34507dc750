"""Every recipe from pretraining to the closing table, at reduced size, on files of the true format."""

import hashlib
import inspect
import json
import pickle
import re
import struct
import tomllib
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from orwcfm_fast.benchmarks.published import MODELS
from orwcfm_fast.runs.recipe import FOLDER, RECIPES
from orwcfm_fast.settings import Finetune, Pretrain, build

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
FEW = ("--steps", 2, "--batch", 2, "--quiet")
SMALL = (
    "--rounds",
    1,
    "--rollout",
    4,
    "--batch",
    2,
    "--steps-per-round",
    2,
    "--nfe",
    4,
    "--eval-n",
    4,
    "--probe",
    2,
)
SMALL += ("--quiet",)


@pytest.fixture
def small_cifar_network():
    """A preset of CIFAR's shape that costs nothing; the full one has its own test on the main path."""
    from orwcfm_fast.networks.models import MODELS, _unet

    MODELS.register("unet-cifar10-tiny")(
        lambda shape: _unet(
            "unet-cifar10-tiny", (3, 32, 32), shape,
            num_channels=32, num_res_blocks=1, channel_mult=(1, 1, 1), attention_resolutions="4",
        )
    )  # fmt: skip
    yield "unet-cifar10-tiny"
    MODELS._entries.pop("unet-cifar10-tiny")


@pytest.fixture
def mnist(tmp_path) -> Path:
    """idx files of scikit-learn's digits enlarged to 28×28, so that a classifier can learn them."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.as_tensor(found.data, dtype=torch.float32).view(-1, 1, 8, 8) * 255 / 16
    pixels = F.interpolate(x, (28, 28), mode="bilinear").byte().numpy().tobytes() * 2
    labels = found.target.astype(np.uint8).tobytes() * 2
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, len(labels), 28, 28) + pixels
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + labels)
    return tmp_path / "data"


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Path:
    """CIFAR-10's pickled batches, with torchvision told the md5 of these."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def write(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    batches = [
        write(name, {"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [3, 5, 0, 9]})
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    ]
    meta = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", batches[:5])
    monkeypatch.setattr(CIFAR10, "test_list", batches[5:])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return tmp_path / "data"


def finished(run: str) -> dict:
    metrics = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 1
    return tomllib.loads(Path(run, "config.toml").read_text()) | json.loads(
        Path(run, "summary.json").read_text()
    )


def test_every_recipe_is_tested_listed_and_made_of_known_settings(run_cli):
    of_the_paper = {"mnist-even", "cifar10-compress", "cifar10-clip"}
    assert set(RECIPES.names()) == {*of_the_paper, "mnist-small", *MODELS}
    listed = run_cli("list", "recipes").out
    for name in of_the_paper:
        recipe = RECIPES.get(name)
        assert not build(Finetune, recipe.finetune).normalize_weights, "raw weights, as in the paper"
        assert build(Pretrain, recipe.pretrain).data == recipe.finetune["data"]
        assert name in listed and recipe.title in listed and recipe.sweep["alpha"][0] == 0
        assert "paper's figure shows" in (FOLDER / f"{name}.toml").read_text()
    clip = RECIPES.get("cifar10-clip")
    assert clip.pretrain == RECIPES.get("cifar10-compress").pretrain
    torchcfm = {"steps": 400001, "batch": 128, "lr": 2e-4, "warmup": 5000, "ema": 0.9999, "grad_clip": 1.0}
    assert torchcfm.items() <= clip.pretrain.items() and clip.pretrain["flip"]


@pytest.mark.parametrize("name", MODELS)
def test_recipes_of_published_pipelines_have_the_defaults_of_their_calls(name, run_cli):
    recipe, text = RECIPES.get(name), (FOLDER / f"{name}.toml").read_text()
    s = build(Finetune, recipe.finetune)
    assert recipe.title in run_cli("list", "recipes").out and "Nothing is claimed" in text
    named = re.search(r"default.* of (\w+Pipeline) in diffusers", text).group(1)
    call = inspect.signature(inspect.unwrap(getattr(diffusers, named).__call__)).parameters
    assert s.nfe == call["num_inference_steps"].default and (s.solver, s.grid) == ("euler", "own")
    if "guidance" in recipe.finetune:
        assert s.guidance == call["guidance_scale"].default
    for command in re.findall(r"^#   orwcfm (.*)$", text, re.M):
        assert f"--recipe {name}" in command
    refused = run_cli("pretrain", "--recipe", name)
    assert refused.code == 2 and "nothing is pretrained" in refused.err and refused.err.count("\n") == 1


def test_a_recipe_of_a_published_pipeline_trains_and_is_planned(run_cli, pipeline_folder, prompts_file):
    tiny = ("--model", f"diffusers:{pipeline_folder('sd3')}", "--image-size", 8, "--prompt-tokens", 6)
    recipe = ("--recipe", "sd35-medium", *tiny, "--prompts", prompts_file, "--lora", 4, "--nfe", 3)
    planned = run_cli("doctor", "--plan", "--gpu-gib", 24, *recipe)
    assert planned.code == 0 and "adapters of rank 4" in planned.out, planned.err
    cheap = (
        "--rounds", 1, "--steps-per-round", 1, "--rollout", 8, "--probe", 2, "--eval-n", 4, "--precision", "fp32",
        "--quiet",
    )  # fmt: skip
    made = run_cli("finetune", *recipe, *cheap, "--reward", "brightness", "--out", "run")
    assert made.code == 0, made.err
    config = tomllib.loads(Path("run/config.toml").read_text())
    assert (config["guidance"], config["group"], config["weights"]) == (7.0, 8, "advantage")


@pytest.mark.slow
def test_mnist_even(run_cli, mnist, cache):
    made = run_cli("pretrain", "--recipe", "mnist-even", "--data-dir", mnist, *FEW)
    assert made.code == 0, made.err
    made = run_cli("finetune", "--recipe", "mnist-even", "--alpha", 0.2, "--data-dir", mnist, *SMALL)
    assert made.code == 0, made.err
    found = finished("runs/mnist-even-digits-a0.2-t0.5-001")
    assert found["model"] == "unet-mnist" and found["lr"] == 2e-4 and found["normalize_weights"] is False
    assert found["checkpoint"] == "runs/pretrain-mnist-001" and found["alpha"] == 0.2
    assert 0 <= found["after"]["reward"]["mean"] <= 1
    assert not (cache / "mnist-classifier").exists(), "the classifier ships"


@pytest.mark.slow
def test_mnist_on_a_laptop(run_cli, mnist):
    for recipe in ("mnist-small", "mnist-even"):  # the newest run is of the other recipe's network
        made = run_cli("pretrain", "--recipe", recipe, "--data-dir", mnist, *FEW)
        assert made.code == 0, made.err
    made = run_cli("finetune", "--recipe", "mnist-small", *SMALL)
    assert made.code == 0, made.err
    found = finished("runs/mnist-even-digits-a1-t1-001")
    assert found["model"] == "unet-mnist-small" and found["method"] == "orw-centred"
    assert 0 < found["after"]["confidence"] <= 1, "by the classifier of MNIST"


@pytest.mark.slow
def test_the_classifier_of_mnist_is_trained_from_files_of_its_format(mnist):
    from orwcfm_fast.rewards.digits import TRAINING, train_classifier

    assert train_classifier(TRAINING["mnist"].network(), "mnist", str(mnist)) > 0.95


def test_the_mnist_model_ships_and_starts_without_data(run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("ORWCFM_CACHE", str(tmp_path / "empty"))
    made = run_cli("finetune", "--data", "mnist", *SMALL)
    assert made.code == 0, made.err
    found = finished("runs/mnist-even-digits-a1-t0.5-001")
    assert found["model"] == "unet-mnist-small" and found["before"]["confidence"] > 0.8
    kept = json.loads((RESULTS / "mnist-model.json").read_text())
    assert kept["confidence"] > 0.95 and kept["megabytes"][0] < 8
    assert not (tmp_path / "empty").exists(), "nothing is made, nothing is looked for"


def test_the_classifier_of_mnist_ships(cache):
    from orwcfm_fast.rewards.digits import digit_classifier

    classifier = digit_classifier("mnist")
    assert classifier.accuracy > 0.99 and classifier.shape == (1, 28, 28)
    assert torch.allclose(classifier.probabilities(torch.zeros(2, 1, 28, 28)).sum(1), torch.ones(2))
    assert not (cache / "mnist-classifier").exists()


@pytest.mark.slow
def test_cifar10_compress_and_clip(run_cli, cifar, clip_folder, small_cifar_network):
    pretrain = (
        "pretrain",
        "--recipe",
        "cifar10-compress",
        "--data-dir",
        cifar,
        "--model",
        small_cifar_network,
    )
    made = run_cli(*pretrain, *FEW)
    assert made.code == 0, made.err
    assert "flip = true" in Path("runs/pretrain-cifar10-001/config.toml").read_text()
    other = run_cli("finetune", "--recipe", "cifar10-compress", *SMALL)
    assert other.code == 2 and "no pretrained model under ./runs" in other.err, "that run has another network"
    own = ("--checkpoint", "runs/pretrain-cifar10-001")
    made = run_cli("finetune", "--recipe", "cifar10-compress", *own, *SMALL)
    assert made.code == 0, made.err
    assert finished("runs/cifar10-jpeg-compressibility-a1-t0.5-001")["after"]["reward"]["mean"] < -0.6
    Path("mine.toml").write_text("tau = 2.0\nalpha = 0.3\n")
    clip = ("--clip-model", f"local-dir:{clip_folder()}", "--config", "mine.toml", "--alpha", 0.1)
    made = run_cli("finetune", "--recipe", "cifar10-clip", *own, *clip, *SMALL)
    assert made.code == 0, made.err
    found = finished("runs/cifar10-clip-a0.1-t2-001")
    assert found["prompt"] == ["An image of dog"] and found["negative"] == ["Not an image of dog"]
    assert (found["tau"], found["alpha"], found["warmup"]) == (2.0, 0.1, 500), (
        "flags > config > recipe > defaults"
    )


def test_recipes_that_cannot_run_are_one_line_and_nothing_is_written(run_cli):
    for args, message in (
        (("finetune", "--recipe", "cifar-clip"), "did you mean 'cifar10-clip'? (orwcfm list recipes)"),
        (("pretrain", "--recipe", "mnist"), "did you mean 'mnist-even'"),
        (("finetune", "--recipe", "mnist-even"), "first orwcfm pretrain --recipe mnist-even"),
        (
            ("finetune", "--recipe", "mnist-even", "--resume", "x"),
            "leave out --config, --out, --overwrite, --recipe",
        ),
        (("pretrain", "--data", "moons", "--flip"), "mirrors images; 'moons' has vectors"),
    ):
        result = run_cli(*args)
        assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err
        assert not any(Path().iterdir())


def test_half_of_the_images_are_mirrored_the_same_ones_again(monkeypatch):
    from orwcfm_fast.method import pretrain as module
    from orwcfm_fast.networks.policy import make_policy

    seen = []
    real = module.interpolate_at_random_times
    monkeypatch.setattr(
        module, "interpolate_at_random_times", lambda x1, *rest: seen.append(x1.clone()) or real(x1, *rest)
    )
    image = torch.linspace(-1, 1, 8).expand(1, 1, 8, 8)
    policy = make_policy("unet-digits", "digits", (1, 8, 8), torch.device("cpu"))
    for _ in range(2):
        module.Pretrainer(policy, image, Pretrain(flip=True, batch=256, steps=1)).step()
    rising = seen[0][:, 0, 0, 7] > 0
    assert 96 <= int(rising.sum()) <= 160 and torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0][~rising][0], image[0].flip(-1))
