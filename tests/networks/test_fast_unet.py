"""FastUNet computes what torchcfm's UNetModelWrapper computes, from the same weights."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from orwcfm_fast.networks.fast_unet import FastUNet

DIGITS = dict(
    dim=(1, 8, 8), num_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions="4"
)
MNIST = dict(dim=(1, 28, 28), num_channels=32, num_res_blocks=1)
CIFAR10 = dict(
    dim=(3, 32, 32),
    num_res_blocks=2,
    num_channels=128,
    channel_mult=[1, 2, 2, 2],
    num_heads=4,
    num_head_channels=64,
    attention_resolutions="16",
    dropout=0.1,
)
CONFIGS = {
    "digits": DIGITS,
    "mnist": MNIST,
    "cifar10": CIFAR10,
    "class-conditional": DIGITS | dict(class_cond=True, num_classes=10),
    "scale-shift": DIGITS | dict(use_scale_shift_norm=True),
    "resblock-updown": DIGITS | dict(resblock_updown=True, num_heads=2, num_heads_upsample=4),
    "new-attention-order": DIGITS | dict(use_new_attention_order=True, num_heads=4),
    "learn-sigma": DIGITS | dict(learn_sigma=True, use_checkpoint=True),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny maps on busy cores wait for threads, not for work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise_zeros(model: nn.Module) -> None:
    """Zero layers would hide whatever comes before them."""
    torch.manual_seed(1)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def pair(request):
    """(torchcfm's model, ours with its weights, arguments of forward)."""
    from torchcfm.models.unet.unet import UNetModelWrapper

    config = CONFIGS[request.param]
    torch.manual_seed(0)
    theirs = UNetModelWrapper(**config)
    randomise_zeros(theirs)
    ours = FastUNet(**config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(3, *config["dim"])
    y = torch.tensor([3, 0, 9]) if config.get("class_cond") else None
    return theirs.eval(), ours.eval(), torch.rand(3), x, y


def deviation(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


def test_output_equals_torchcfms(pair):
    theirs, ours, t, x, y = pair
    with torch.no_grad():
        expected = theirs(t, x, y)
        assert expected.std() > 0.01
        assert deviation(ours(t, x, y), expected) < 1e-5
        assert deviation(ours(t, x.to(memory_format=torch.channels_last), y), expected) < 1e-5


def test_one_time_for_the_batch_equals_repeated_times(pair):
    theirs, ours, _, x, y = pair
    with torch.no_grad():
        expected = theirs(torch.tensor(0.3), x, y)
        for t in (0.3, torch.tensor(0.3), torch.full((3,), 0.3)):
            assert deviation(ours(t, x, y), expected) < 1e-5


def test_gradients_equal_torchcfms(pair):
    theirs, ours, t, x, y = pair
    gradients = []
    for model in (theirs, ours):
        model.zero_grad()
        out = model(t, x, y)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(g is not None for g in gradients[1].values())
    # the keys' bias has no gradient in exact arithmetic, so compare with the largest one
    scale = max(g.abs().max() for g in gradients[0].values())
    for name, g in gradients[0].items():
        assert (gradients[1][name] - g).abs().max() < 5e-5 * scale, name


def test_same_seed_gives_torchcfms_initial_weights():
    from torchcfm.models.unet.unet import UNetModelWrapper

    states = []
    for model in (UNetModelWrapper, FastUNet):
        torch.manual_seed(7)
        states.append(model(**CONFIGS["class-conditional"]).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_output_has_the_memory_format_of_x():
    model = FastUNet(**(DIGITS | dict(dim=(3, 8, 8))))
    x = torch.randn(2, 3, 8, 8)
    assert model(0.5, x).is_contiguous()
    assert model(0.5, x.to(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("cast", ["autocast", "weights"])
def test_bf16_stays_near_float32(cast):
    torch.manual_seed(0)
    model = FastUNet(**DIGITS).eval()
    randomise_zeros(model)
    x, t = torch.randn(16, 1, 8, 8), torch.rand(16)
    with torch.no_grad():
        expected = model(t, x)
        if cast == "weights":
            out = model.bfloat16()(t, x)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(t, x)
    assert out.dtype == torch.bfloat16
    assert (out - expected).square().mean().sqrt() < 0.02 * expected.std()


def test_bf16_autocast_gradients_stay_near_float32():
    torch.manual_seed(0)
    model = FastUNet(**(DIGITS | dict(num_channels=64))).eval()
    randomise_zeros(model)
    x, t = torch.randn(16, 1, 8, 8), torch.rand(16)
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            v = model(t, x)
        (v.float() - x).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999
    assert gradients[1].norm() / gradients[0].norm() == pytest.approx(1, abs=0.02)


def test_dropout_sits_where_torchcfms_does(pair):
    theirs, ours, t, x, y = pair
    handles = [
        module.register_forward_hook(lambda *call: 1.5 * call[-1])
        for model in (theirs, ours)
        for module in model.modules()
        if isinstance(module, nn.Dropout)
    ]
    with torch.no_grad():
        assert deviation(ours(t, x, y), theirs(t, x, y)) < 1e-5
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert len(handles) > 10
        assert [m.p for m in ours.modules() if isinstance(m, nn.Dropout)] == [
            m.p for m in theirs.modules() if isinstance(m, nn.Dropout)
        ]


def test_dropout_acts_in_train_mode_alone_and_follows_the_seed():
    torch.manual_seed(0)
    model = FastUNet(**(DIGITS | dict(dropout=0.5)))
    randomise_zeros(model)
    x = torch.randn(4, 1, 8, 8)

    def draw(seed):
        torch.manual_seed(seed)
        return model(0.5, x)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    model.eval()
    assert torch.equal(draw(1), draw(2))


def test_importing_it_leaves_torchcfm_unimported():
    code = "import sys, orwcfm_fast.networks.fast_unet; sys.exit('torchcfm' in sys.modules or 'ot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(use_fp16=True), "autocast"),
        (dict(channel_mult=None), "channel_mult"),
        (dict(num_head_channels=48), "num_head_channels"),
    ],
)
def test_wrong_arguments_name_themselves(change, words):
    with pytest.raises(ValueError, match=words):
        FastUNet(**(DIGITS | change))


def test_labels_are_needed_if_and_only_if_class_conditional():
    with pytest.raises(ValueError, match="labels"):
        FastUNet(**DIGITS)(0.5, torch.randn(1, 1, 8, 8), torch.tensor([1]))
    with pytest.raises(ValueError, match="labels"):
        FastUNet(**CONFIGS["class-conditional"])(0.5, torch.randn(1, 1, 8, 8))
