"""classifier and aesthetic: their values by another route, and files that do not fit."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from orwcfm_fast.errors import UserError
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.rewards.classifier import parse_classes
from orwcfm_fast.settings import RewardOptions


def pictures(n=3, channels=3, side=40):
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 4, 4, generator=g) * 2 - 1
    return F.interpolate(coarse, (side, side), mode="bilinear")


def as_pil(images):
    from PIL import Image

    levels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(p) for p in levels]


@pytest.fixture(scope="module")
def shufflenet(tmp_path_factory):
    """A random torchvision classifier of 10 classes that tells pictures apart, saved three ways."""
    import safetensors.torch
    from torchvision.models import get_model

    torch.manual_seed(0)
    network = get_model("shufflenet_v2_x0_5", weights=None, num_classes=10)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the statistics of what it sees once, so that pictures differ to it
    network.train()(pictures(16, 3, 64))
    folder = tmp_path_factory.mktemp("classifier")
    weights = {k: v.contiguous() for k, v in network.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3}, folder / "w.pt")
    return network.eval(), folder


@pytest.mark.parametrize("file", ["w.safetensors", "w.pt"])
def test_classifier_is_torchvisions_own_on_its_own_transform(shufflenet, file):
    from torchvision.models import get_model_weights

    network, folder = shufflenet
    transform = get_model_weights("shufflenet_v2_x0_5").DEFAULT.transforms()
    x = pictures()
    with torch.no_grad():
        p = network(torch.stack([transform(picture) for picture in as_pil(x)])).softmax(1)
    values = make_reward(f"classifier:shufflenet_v2_x0_5:{folder / file}:0,2,4-6")(x)
    assert torch.allclose(values, p[:, [0, 2, 4, 5, 6]].sum(1), atol=2e-3) and values.std() > 0.01


def test_classifier_takes_small_and_grey_images_as_they_are_where_told(shufflenet):
    network, folder = shufflenet
    x = pictures(4, 1, 64)
    options = RewardOptions(classifier_size=64, classifier_pixels="half")
    with torch.no_grad():
        levels = ((x + 1) * 127.5).round() / 127.5 - 1
        expected = network(levels.expand(-1, 3, -1, -1)).softmax(1)[:, 3]
    values = make_reward(f"classifier:shufflenet_v2_x0_5:{folder / 'w.pt'}:3", options)(x)
    assert torch.allclose(values, expected, atol=1e-4)


def test_classifier_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=5)
    torch.save(network.state_dict(), tmp_path / "t.pt")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    x = pictures(3, 3, 200)
    with torch.no_grad():
        p = network.eval()(torch.stack([transform(picture) for picture in as_pil(x)])).softmax(1)
    values = make_reward(f"classifier:test_resnet:{tmp_path / 't.pt'}:1,4")(x)
    assert torch.allclose(values, p[:, [1, 4]].sum(1), atol=2e-3)


def test_without_timm_its_architectures_are_said_to_need_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        make_reward("classifier:test_resnet:w.pt:1")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("classifier", "write classifier:ARCHITECTURE:FILE:CLASSES"),
        ("classifier:shufflenet_v2_x0_5:w.pt", "write classifier:ARCHITECTURE:FILE:CLASSES"),
        ("classifier:shufflenet_v2_x0_5:w.pt:3,12", "has 10 classes, 0 to 9; requested 12"),
        ("classifier:shufflenet_v2_x0_5:w.pt:even", "should be whole numbers"),
        ("classifier:shufflenet_v2_x0_5:w.pt:6-4", "none in it"),
        ("classifier:shufflenet_v2_x0_6:w.pt:3", "did you mean 'shufflenet_v2_x0_5'"),
        ("classifier:shufflenet_v2_x1_0:w.pt:3", "weights of another architecture"),
        ("classifier:resnet18:w.safetensors:3", "weights of another architecture"),
        ("classifier:resnet18:gone.pt:3", "classifier resnet18 gone.pt: No such file"),
        ("classifier:resnet18:code.pt:3", "refused, its pickle asks for more than tensors"),
        ("classifier:resnet18:cut.safetensors:3", "not a safetensors file"),
        ("aesthetic", "aesthetic:FOLDER/aesthetic-model.pth --clip-model ViT-L-14"),
        ("aesthetic:gone.pt", "aesthetic head gone.pt: No such file"),
        ("aesthetic:w.safetensors", "not linear layers that end in one number"),
    ],
)
def test_files_that_do_not_fit_are_one_line(shufflenet, tmp_path, monkeypatch, argument, message):
    _, folder = shufflenet
    for file in ("w.pt", "w.safetensors"):
        (tmp_path / file).symlink_to(folder / file)
    torch.save({"fc": print}, tmp_path / "code.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        make_reward(argument)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_classes_are_numbers_and_ranges():
    assert parse_classes("0, 2,4-6,5") == [0, 2, 4, 5, 6]


@pytest.fixture(scope="module")
def folder(clip_folder):
    return clip_folder(image_size=64)


def laion_like(width: int) -> nn.Sequential:
    """The layout of LAION's linearMSE head: linear layers with dropout between them, under "layers"."""
    sizes = [width, 24, 12, 8, 6, 1]
    linear = [nn.Linear(i, o) for i, o in pairwise(sizes)]
    drop = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
    return nn.Sequential(linear[0], drop[0], linear[1], drop[1], linear[2], drop[2], linear[3], linear[4])


def test_aesthetic_is_the_head_on_clip_features(folder, tmp_path):
    import safetensors.torch

    from orwcfm_fast.rewards.clip import clip_of

    torch.manual_seed(0)
    options = RewardOptions(clip_model=f"local-dir:{folder}")
    x = pictures(5)
    features = clip_of(options).image_features(x)
    head, plain = laion_like(32).eval(), nn.Linear(32, 1)
    torch.save({f"layers.{k}": v for k, v in head.state_dict().items()}, tmp_path / "mlp.pth")
    safetensors.torch.save_file(dict(plain.state_dict()), tmp_path / "plain.safetensors")
    for file, network in (("mlp.pth", head), ("plain.safetensors", plain)):
        values = make_reward(f"aesthetic:{tmp_path / file}", options)(x)
        assert torch.allclose(values, network(features)[:, 0].detach(), atol=1e-5) and values.std() > 1e-3


def test_a_head_for_another_clip_model_is_named(folder, tmp_path):
    torch.save(nn.Linear(768, 1).state_dict(), tmp_path / "h.pt")
    torch.save({"0.weight": torch.zeros(1, 4), "1.weight": torch.zeros(3, 9)}, tmp_path / "broken.pt")
    options = RewardOptions(clip_model=f"local-dir:{folder}")
    with pytest.raises(
        UserError, match=r"for 768 features, local-dir:.* gives 32; name its model with --clip-model"
    ):
        make_reward(f"aesthetic:{tmp_path / 'h.pt'}", options)
    with pytest.raises(UserError, match="not linear layers that end in one number"):
        make_reward(f"aesthetic:{tmp_path / 'broken.pt'}", options)
