"""Shared by the tests of the manual."""

import shutil

import pytest
import torch


@pytest.fixture(scope="module")
def stand_ins(cache, tmp_path_factory):
    """A folder with a file as torchcfm writes it; and in the cache an untrained digits model, for this module."""
    from orwcfm_fast.method.pretrain import Pretrainer
    from orwcfm_fast.networks.policy import make_policy
    from orwcfm_fast.runs.trainer_state import save_pretrainer
    from orwcfm_fast.settings import Pretrain

    policy = make_policy("unet-digits", "digits", (1, 8, 8), torch.device("cpu"))
    path, kept = cache / "pretrained" / "unet-digits", cache / "kept"
    if path.exists():
        path.rename(kept)
    save_pretrainer(Pretrainer(policy, torch.zeros(1, 1, 8, 8), Pretrain()), path)
    folder = tmp_path_factory.mktemp("manual")
    weights = policy.network.state_dict()
    torch.save({"ema_model": weights, "net_model": weights}, folder / "cifar10_weights_step_400000.pt")
    yield folder
    shutil.rmtree(path)
    if kept.exists():
        kept.rename(path)
