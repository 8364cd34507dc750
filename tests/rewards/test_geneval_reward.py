"""Objects are counted as the detector counts them, and numbers and colours score as they say."""

import pytest
import torch

from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.networks.prompts import Prompt
from orwcfm_fast.rewards import make_reward
from orwcfm_fast.rewards.geneval import COLOURS, Found, Wanted, detect, requirements, satisfaction
from orwcfm_fast.settings import RewardOptions


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A random detector of two classes that finds some of its ten objects, saved as transformers saves it."""
    import transformers as t

    folder = tmp_path_factory.mktemp("detector")
    config = t.YolosConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[32, 32],
        patch_size=8, num_detection_tokens=10, id2label={0: "dog", 1: "cat"}, label2id={"dog": 0, "cat": 1},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = t.YolosForObjectDetection(config)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        network.class_labels_classifier.layers[-1].bias[2] -= 100.0  # "no object" is never the answer
    network.save_pretrained(folder)
    t.YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def ask(detector, images, metadata, **options):
    reward = make_reward(f"geneval:{detector}", RewardOptions(**options).with_prompts())
    return reward.scores(images, prompts=[Prompt("", metadata=m) for m in metadata]).total


def test_objects_are_counted_as_the_detectors_own_library_counts_them(detector):
    import transformers as t

    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    levels = ((images + 1) * 127.5).round().to(torch.uint8)
    network = t.YolosForObjectDetection.from_pretrained(detector).eval()
    processor = t.YolosImageProcessor.from_pretrained(detector)
    found = detect(str(detector), levels)
    dogs = []
    for image, ours in zip(levels, found, strict=True):
        with torch.no_grad():
            outputs = network(**processor(images=image, return_tensors="pt"))
        (theirs,) = processor.post_process_object_detection(outputs, 0.3, [(32, 32)])
        assert len(ours) == len(theirs["labels"])
        dogs.append(int((theirs["labels"] == 0).sum()))
        assert dogs[-1] == sum(f.name == "dog" for f in ours)
    assert max(dogs) > 0 and sum(dogs) < 50, "both classes are found"
    wanted = [{"include": [{"class": "dog", "count": max(dogs)}]}] * 5
    expected = [max(0.0, 1 - abs(n - max(dogs)) / max(dogs)) for n in dogs]
    assert ask(detector, images, wanted).tolist() == pytest.approx(expected)
    none = ask(detector, images, [{"exclude": [{"class": "dog", "count": 1}]}] * 5)
    assert none.tolist() == [float(n == 0) for n in dogs]


def test_number_and_colour_make_the_score():
    objects = [Found("dog", (0, 0, 8, 8))] * 3
    assert satisfaction(Wanted("dog", 3), objects, []) == 1.0
    assert satisfaction(Wanted("dog", 2), objects, []) == 0.5
    assert satisfaction(Wanted("dog", 1), objects, []) == 0.0
    assert satisfaction(Wanted("dog", 3, "red"), objects, [True, False, True]) == pytest.approx(2 / 3)
    assert satisfaction(Wanted("dog", 2, "red"), [], []) == 0.0


def test_a_colour_is_asked_of_clip_on_the_objects_box(detector, clip_folder):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clip = {"clip_model": f"local-dir:{clip_folder()}"}
    total = sum(
        ask(detector, images, [{"include": [{"class": "dog", "count": 1, "color": colour}]}] * 3, **clip)
        for colour in COLOURS
    )
    without = ask(detector, images, [{"include": [{"class": "dog", "count": 1}]}] * 3)
    assert torch.allclose(total, without), "each object has one of the colours"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"include": [{"class": "dgo"}]}, "unknown class 'dgo'; did you mean 'dog'"),
        ({"include": [{"class": "dog", "count": 0}]}, "write it as"),
        ({"include": [{"class": "dog", "color": "rde"}]}, "did you mean 'red'"),
        ({"include": "dog"}, "write it as"),
        ({"exclude": [3]}, "write it as"),
    ],
)
def test_metadata_that_asks_for_nothing_known_is_one_line(metadata, message):
    with pytest.raises(UserError, match=message) as error:
        requirements(metadata, "include", ["dog", "cat"]), requirements(metadata, "exclude", ["dog", "cat"])
    assert "\n" not in str(error.value)


def test_what_is_missing_is_one_line(detector, run_cli):
    with pytest.raises(RewardError, match="write it as"):
        ask(detector, torch.zeros(1, 3, 32, 32), [{}])
    with pytest.raises(UserError, match="no/such is neither on this machine nor reached on the Hub"):
        make_reward("geneval:no/such", RewardOptions().with_prompts())
    for argument, message in (
        ("geneval", "write geneval:DETECTOR"),
        (f"geneval:{detector}", "the model has no prompts"),
    ):
        made = run_cli("finetune", "--reward", argument)
        assert made.code == 2 and message in made.err and made.err.count("\n") == 1
