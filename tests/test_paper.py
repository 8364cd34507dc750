"""The paper's API runs as its README prints it."""

import os

import pytest
import torch

from orwcfm_fast import paper
from orwcfm_fast.errors import UserError
from orwcfm_fast.paper import settings_from

CONFIG = {
    "learning_rate": 2e-4, "warmup_steps": 2, "w2_coefficient": 1.0, "temperature": 0.5, "grad_clip": 1.0,
    "batch_size": 4, "text_prompts": ["An image of dog", "Not an image of dog"], "use_wandb": False,
    "wandb_project": "orw", "run_name": "first", "savedir": "./runs", "ref_path": "ref.pt",
}  # fmt: skip


@pytest.fixture
def network():
    from torchcfm.models.unet.unet import UNetModelWrapper

    torch.manual_seed(0)
    return UNetModelWrapper(
        dim=(1, 8, 8), num_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions="4"
    )


def test_the_papers_usage_runs_whole(network, tmp_path, monkeypatch):
    from orwcfm import ORWCFMTrainer

    monkeypatch.chdir(tmp_path)
    torch.save({"net_model": network.state_dict(), "ema_model": network.state_dict(), "step": 1}, "ref.pt")
    config = CONFIG | {"reward": lambda x: x.flatten(1).mean(1)}
    trainer = ORWCFMTrainer(network, config, torch.device("cpu"))
    trainer.load_pretrained(config["ref_path"])
    before = {k: v.clone() for k, v in network.state_dict().items()}
    history = trainer.train(num_epochs=2, steps_per_epoch=3)
    assert [r["round"] for r in history] == [1, 2]
    trainer.save_checkpoint("./checkpoints/orw_cfm_w2.pt")
    found = torch.load("checkpoints/orw_cfm_w2.pt", weights_only=True)
    assert set(found) == {"net_model", "last_policy", "optim", "sched", "config"}
    assert any(not torch.equal(found["net_model"][k], before[k]) for k in before), "nothing was learned"
    again = ORWCFMTrainer(network, config, "cpu")
    again.load_pretrained("checkpoints/orw_cfm_w2.pt")


def test_the_dict_means_the_papers_raw_weights_and_names():
    s = settings_from(CONFIG)
    assert (s.lr, s.alpha, s.tau, s.batch, s.warmup) == (2e-4, 1.0, 0.5, 4, 2)
    assert not s.normalize_weights and s.reward == ["clip"]
    assert s.prompt == ["An image of dog"] and s.negative == ["Not an image of dog"]
    assert settings_from({"reward": "brightness", "nfe": 20}).nfe == 20


@pytest.mark.parametrize("installed", [True, False])
def test_use_wandb_logs_where_it_is_installed_and_warns_in_one_line_elsewhere(monkeypatch, capsys, installed):
    monkeypatch.setattr(paper, "find_spec", lambda name: installed or None)
    assert settings_from(CONFIG | {"use_wandb": True}).log == (["wandb:orw"] if installed else [])
    warned = capsys.readouterr().err
    assert (warned == "") if installed else ("wandb is not installed" in warned and warned.count("\n") == 1)
    assert settings_from(CONFIG).log == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temprature": 1}, "unknown key 'temprature'; did you mean 'temperature'"),
        ({"w2_coefficient": -1.0}, "alpha"),
        ({"text_prompts": ["one"]}, "should be two"),
    ],
)
def test_a_wrong_config_is_one_clear_line(change, message):
    with pytest.raises(UserError, match=message):
        settings_from(CONFIG | change)


def test_no_reward_at_all_is_said_so(network):
    from orwcfm import ORWCFMTrainer

    with pytest.raises(UserError, match="text_prompts"):
        ORWCFMTrainer(network, {k: v for k, v in CONFIG.items() if k != "text_prompts"}, "cpu")


def test_a_checkpoint_of_another_network_is_refused(network, tmp_path):
    from orwcfm import ORWCFMTrainer

    torch.save({"net_model": {"w": torch.zeros(2)}}, tmp_path / "x.pt")
    trainer = ORWCFMTrainer(network, {"reward": "brightness"}, "cpu")
    with pytest.raises(UserError, match="another architecture"):
        trainer.load_pretrained(tmp_path / "x.pt")
    with pytest.raises(UserError, match="call train first"):
        trainer.save_checkpoint("x.pt")
    assert os.listdir(tmp_path) == ["x.pt"]
