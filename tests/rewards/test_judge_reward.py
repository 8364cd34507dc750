"""The reward judge against a real local HTTP server, through OpenAI's own client."""

import json
import os

import pytest
import torch
from judge_server import chat, level

from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.networks.prompts import Prompt
from orwcfm_fast.rewards import judge, make_reward
from orwcfm_fast.settings import RewardOptions


def pictures(n: int = 12) -> torch.Tensor:
    return (
        torch.rand(n, 3, 6, 5, generator=torch.Generator().manual_seed(0))
        * torch.linspace(0.5, 2, n)[:, None, None, None].clamp(max=2)
        - 1
    )


def expected(images: torch.Tensor) -> torch.Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).flatten(1).mean(1) / 255


def asked(judge_server, **options):
    return make_reward(f"judge:{judge_server.url}#eye", RewardOptions(question="Is it bright?", **options))


def test_p_yes_comes_from_log_probabilities_in_order_and_many_at_once(judge_server):
    x = pictures(40)
    reward = asked(judge_server, reward_requests=4)
    assert torch.allclose(reward(x), expected(x), atol=1e-5)
    assert 2 <= judge_server.most <= 4 and len(judge_server.requests) == 40
    _, request, key = judge_server.requests[0]
    assert request["messages"][0]["content"][1]["text"] == "Is it bright? Answer yes or no."
    assert (request["max_tokens"], request["logprobs"], request["temperature"]) == (1, True, 0)
    assert key == "Bearer none"
    one_by_one = torch.cat([reward(x[k : k + 1]) for k in range(3)])
    assert torch.equal(one_by_one, reward(x)[:3])


def test_other_first_tokens_do_not_count_and_the_key_comes_from_the_environment(judge_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge._client.cache_clear()
    judge_server.answer = lambda request: chat("Yes", {"Yes": 0.3, " yes": 0.1, "No": 0.2, "Maybe": 0.4})
    assert asked(judge_server)(pictures(2)).tolist() == pytest.approx([2 / 3] * 2)
    assert judge_server.requests[0][2] == "Bearer secret"


def test_each_question_has_its_own_prompt_and_braces_in_a_prompt_are_text(judge_server):
    reward = make_reward(f"judge:{judge_server.url}", RewardOptions(question="Is it {prompt}?"))
    reward.scores(pictures(2), prompts=[Prompt("a {cat}"), Prompt("{prompt}")])
    texts = {request["messages"][0]["content"][1]["text"] for _, request, _ in judge_server.requests}
    assert texts == {"Is it a {cat}? Answer yes or no.", "Is it {prompt}? Answer yes or no."}


@pytest.mark.parametrize(
    ("said", "value"),
    [("7", 0.7), ("Rating: 7/10.", 0.7), ("8.5 out of 10", 0.85), ("I give it a 0", 0.0), ("**10**", 1.0)],
)
def test_a_rating_is_the_one_number_of_the_answer(said, value):
    assert judge.rating(said) == pytest.approx(value)


@pytest.mark.parametrize("said", ["", "good", "11", "-1", "nan", "between 3 and 5", "1e5", "v2.0.1"])
def test_another_answer_is_no_rating(said):
    with pytest.raises(judge.WrongAnswer):
        judge.rating(said)


def test_ratings_are_read_from_the_answers(judge_server):
    judge_server.answer = lambda request: chat(f"Rating: {10 * level(request):.3f}/10")
    x = pictures()
    assert torch.allclose(asked(judge_server, judge_answer="rating")(x), expected(x), atol=1e-3)
    assert "logprobs" not in judge_server.requests[0][1]


def test_wrong_answers_are_counted(judge_server):
    x = pictures(32)
    judge_server.plan = [chat("It depends.", {"It": 1.0})] * 7
    with pytest.raises(RewardError) as error:
        asked(judge_server).scores(x, "round 3")
    text = "7 of 32 answers are neither yes nor no by their log-probabilities, e.g. 'It depends.'"
    assert str(error.value) == f"reward judge:{judge_server.url}#eye, round 3: {text}"
    judge_server.plan = [chat("It depends.")] * 3
    with pytest.raises(
        RewardError, match=r"3 of 32 answers are not one number from 0 to 10, e.g. 'It depends.'"
    ):
        judge_server.answer = lambda request: chat("5")
        asked(judge_server, judge_answer="rating")(x)


def test_failures_are_repeated(judge_server):
    x = pictures(3)
    judge_server.plan = [(500, b"{}"), (429, b"{}"), (503, b"{}"), (500, b"{}")]
    assert torch.allclose(asked(judge_server)(x), expected(x), atol=1e-5)
    assert len(judge_server.requests) == 7


@pytest.mark.parametrize(
    ("answer", "message", "count"),
    [
        ((500, b'{"error": {"message": "CUDA error"}}'), r"HTTP 500 \(CUDA error\)", 6),
        ((429, b"{}"), r"HTTP 429 \(too many requests in 6 attempts; lower --judge-rate\)", 6),
        ((401, b"{}"), r"HTTP 401 \(set OPENAI_API_KEY\)", 1),
        ((400, b'{"error": {"message": "no\\nimages"}}'), r"HTTP 400 \(no images\)", 1),
        ((502, b"<html><body>Bad Gateway</body></html>"), r"HTTP 502 \(Bad Gateway\)", 6),
        ((200, b"<html>hello</html>"), "the answer is not the JSON of a chat completion", 1),
        ((200, b"{"), "the answer is not the JSON of a chat completion", 1),
        ((200, b'{"choices": []}'), "the answer is not the JSON of a chat completion", 1),
        ((200, b"[1, 2]"), "the answer is not the JSON of a chat completion", 1),
    ],
)
def test_a_server_that_fails_for_good_is_one_line(judge_server, answer, message, count):
    judge_server.answer = lambda request: answer
    with pytest.raises(RewardError, match=message) as error:
        asked(judge_server)(pictures(1))
    assert "\n" not in str(error.value) and len(judge_server.requests) == count


def test_probabilities_that_are_no_numbers_count_as_wrong_answers(judge_server):
    body = (
        json.dumps(chat("Yes", {"Yes": 1.0, "No": 1.0})).replace('"logprob": 0.0', '"logprob": NaN').encode()
    )
    judge_server.answer = lambda request: (200, body)
    with pytest.raises(RewardError, match="2 of 2 answers are neither yes nor no"):
        asked(judge_server)(pictures(2))


def test_the_rate_is_kept(judge_server):
    asked(judge_server, judge_rate=20)(pictures(7))
    begun = sorted(at for at, _, _ in judge_server.requests)
    assert begun[-1] - begun[0] >= 6 / 20 - 0.02


def test_a_dry_run_sends_nothing(capfd, monkeypatch):
    monkeypatch.setattr(judge, "_client", lambda *args: None)
    reward = make_reward(
        "judge:http://127.0.0.1:9/v1#eye", RewardOptions(question="Red?", judge_dry_run=True)
    )
    assert reward(pictures(5)).tolist() == [0.0] * 5 and reward(pictures(5)).tolist() == [0.0] * 5
    told = capfd.readouterr().err
    assert told.count("dry run: no request is sent") == 1 and told.count("\n") == 1
    assert (
        "one of 5 requests: model eye at http://127.0.0.1:9/v1" in told and "'Red? Answer yes or no.'" in told
    )


def models(*names: str) -> dict:
    return {
        "object": "list",
        "data": [{"id": n, "object": "model", "created": 1, "owned_by": "t"} for n in names],
    }


@pytest.mark.parametrize(
    ("spec", "known", "message"),
    [
        ("#eyes", models("eye"), "unknown model of the judge 'eyes'; did you mean 'eye'?"),
        ("", models("a", "b"), "serves a, b; write judge:URL#MODEL"),
        (
            "#eye",
            (200, b"<html>welcome</html>"),
            "not an OpenAI-compatible server (its list of models is no JSON)",
        ),
        ("#eye", (404, b"<html>gone</html>"), "HTTP 404 (Not Found)"),
        ("#eye", (401, b"{}"), "HTTP 401 (set OPENAI_API_KEY)"),
    ],
)
def test_what_the_server_does_not_have_ends_the_command_before_it_begins(
    judge_server, run_cli, tiny_run, spec, known, message
):
    judge_server.models = known
    result = run_cli(
        "finetune", "--checkpoint", "base", "--reward", f"judge:{judge_server.url}{spec}", "--out", "o"
    )
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err
    assert not os.path.exists("o") and not judge_server.requests


@pytest.mark.parametrize(
    ("spec", "more", "message"),
    [
        ("judge", {}, "write judge:URL#MODEL"),
        ("judge:127.0.0.1:8000", {}, "write judge:URL#MODEL"),
        ("judge:ftp://h/v1#m", {}, "write judge:URL#MODEL"),
        ("judge:http://h/v1#m", {"question": "Is {it} {prompt}?"}, "--question: knows {prompt}, not {it}"),
        (
            "judge:http://127.0.0.1:9/v1#m",
            {},
            "http://127.0.0.1:9/v1: no answer ([Errno 111] Connection refused)",
        ),
    ],
)
def test_what_judge_cannot_use_is_one_line(monkeypatch, spec, more, message):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(judge, "RETRIES", 0)
    judge._client.cache_clear()
    with pytest.raises(UserError) as error:
        make_reward(spec, RewardOptions(**more))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_question_about_the_prompt_needs_prompts(judge_server, run_cli, tiny_run):
    result = run_cli(
        "finetune", "--checkpoint", "base", "--reward", f"judge:{judge_server.url}#eye", "--out", "o"
    )
    assert result.code == 2 and "--question asks for {prompt}, and the model has no prompts" in result.err
    assert not os.path.exists("o")
