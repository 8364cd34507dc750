"""A vision-language model as judge, behind any server with OpenAI's interface (vLLM, SGLang, a hosted one)."""

import base64
import functools
import io
import math
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orwcfm_fast.errors import RewardError, UserError
from orwcfm_fast.registry import unknown
from orwcfm_fast.rewards.library import library
from orwcfm_fast.rewards.parallel import in_flight
from orwcfm_fast.rewards.pixels import check_images, to_levels
from orwcfm_fast.rewards.registry import Reward, reward_factory
from orwcfm_fast.settings import RewardOptions

FORM = "write judge:URL#MODEL, e.g. judge:http://127.0.0.1:8000/v1#Qwen/Qwen2.5-VL-7B-Instruct"
RETRIES = 5
"""How often the client repeats a request after no answer, 408, 409, 429 or 5xx; it waits 0.5 s, 1 s, … up to 8 s."""
RATED_TO = 10.0
RATING = re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10(?:\.0+)?)?(?![\w])")
ENDINGS = {"yes": "Answer yes or no.", "rating": "Answer with one number from 0 to 10."}
WRONG = {"yes": "neither yes nor no by their log-probabilities", "rating": "not one number from 0 to 10"}


class WrongAnswer(Exception):
    """What a model said in place of an answer."""


def yes_share(top: Sequence[Any], said: str) -> float:
    """P(yes) / (P(yes) + P(no)) of the first token's alternatives, each with `token` and `logprob`.

    Raises:
        WrongAnswer: neither is among them.
    """
    shares = {"yes": 0.0, "no": 0.0}
    for choice in top:
        word = choice.token.strip(" \n\t.,!\"'▁Ġ").casefold()
        if word in shares:
            shares[word] += math.exp(choice.logprob)
    total = sum(shares.values())
    if not total > 0:
        raise WrongAnswer(said)
    return shares["yes"] / total


def rating(said: str) -> float:
    """The one number of an answer, e.g. "Rating: 7/10", over 10, in [0, 1].

    Raises:
        WrongAnswer: it holds none, several, or one outside of 0 to 10.
    """
    found = [float(text) for text in RATING.findall(said)]
    if len(found) != 1 or not 0 <= found[0] <= RATED_TO:
        raise WrongAnswer(said)
    return found[0] / RATED_TO


def picture_url(image: Tensor) -> str:
    """A picture [1 or 3, H, W] in [-1, 1] as the data: URL of a PNG file."""
    from PIL import Image

    levels = to_levels(image).to(torch.uint8).permute(1, 2, 0).cpu().contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class JudgeReward:
    """Asks a model one question about each picture.

    Args:
        url, model: of the server, and which of its models.
        options: question, kind of answer, requests in flight and per second, dry run.
    """

    concurrent = True

    def __init__(self, url: str, model: str, options: RewardOptions) -> None:
        self.url, self.model, self.options = url, model, options
        self.client = _client(url, options.reward_timeout)
        self._lock, self._next, self._shown = threading.Lock(), 0.0, False
        question = options.question
        strange = set(re.findall(r"\{\w*\}", question)) - {"{prompt}"}
        if strange:
            raise UserError(f"--question: knows {{prompt}}, not {', '.join(sorted(strange))}")

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """A question about {prompt} needs prompts.

        Raises:
            UserError: there are none.
        """
        if "{prompt}" in self.options.question and not prompts:
            raise UserError(
                "reward 'judge': --question asks for {prompt}, and the model has no prompts; write a question without"
            )

    def check_model(self) -> None:
        """Ask the server for its models; without #MODEL its only one is taken.

        Raises:
            UserError: no answer, none that is understood, or no such model.
        """
        openai = library("openai", "judge")
        try:
            known = [found.id for found in self.client.models.list()]
        except openai.APIStatusError as error:
            raise UserError(f"reward 'judge': {self.url}: {_status(error)}") from None
        except openai.APIConnectionError as error:
            raise UserError(f"reward 'judge': {self.url}: no answer ({_reason(error)})") from None
        except (AttributeError, TypeError, ValueError):
            raise UserError(
                f"reward 'judge': {self.url}: not an OpenAI-compatible server (its list of models is no JSON)"
            ) from None
        if not self.model and len(known) == 1:
            self.model = known[0]
        elif not self.model:
            raise UserError(f"reward 'judge': {self.url} serves {', '.join(known)}; {FORM}")
        elif self.model not in known:
            raise unknown("model of the judge", self.model, known, self.url)

    def __call__(self, images: Tensor, prompts: list[str] | None = None) -> Tensor:
        """Images [B, 1 or 3, H, W] in [-1, 1] → P(yes) or the rating / 10, [B] in [0, 1].

        Raises:
            RewardError: no answer after all repeats, an answer that is no JSON, or answers of another form, with
                how many of how many.
        """
        check_images(images)
        texts = prompts or [""] * len(images)
        questions = [f"{self.options.question.replace('{prompt}', text)} {self._ending}" for text in texts]
        if self.options.judge_dry_run:
            return self._dry_run(images, questions)
        images = images.cpu()
        found = in_flight(self._ask, list(zip(images, questions, strict=True)), self.options.reward_requests)
        wrong = [answer for answer in found if isinstance(answer, WrongAnswer)]
        if wrong:
            raise RewardError(
                f"{len(wrong)} of {len(found)} answers are {WRONG[self.options.judge_answer]}, "
                f"e.g. {str(wrong[0])[:60]!r}"
            )
        return torch.tensor(found, dtype=torch.float64)

    @property
    def _ending(self) -> str:
        return ENDINGS[self.options.judge_answer]

    def _dry_run(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        if not self._shown:
            self._shown, size = True, len(picture_url(images[0])) // 1024 + 1
            print(
                f"judge, dry run: no request is sent and every score is 0; one of {len(images)} requests: model "
                f"{self.model or 'the only one'} at {self.url}, a PNG file of {size} KiB and the text {questions[0]!r}",
                file=sys.stderr,
            )
        return torch.zeros(len(images))

    def _ask(self, case: tuple[Tensor, str]) -> float | WrongAnswer:
        """The score of one picture, or the answer that is none."""
        image, question = case
        self._wait_for_turn()
        by_words = self.options.judge_answer == "rating"
        how: dict[str, Any] = {"max_tokens": 64} if by_words else {
            "max_tokens": 1, "logprobs": True, "top_logprobs": 20,
        }  # fmt: skip
        content = [
            {"type": "image_url", "image_url": {"url": picture_url(image)}},
            {"type": "text", "text": question},
        ]
        openai = library("openai", "judge")
        try:
            answer = self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": content}], temperature=0, **how
            )
            choice = answer.choices[0]
            said = choice.message.content or ""
            if by_words:
                return rating(said)
            first = choice.logprobs.content if choice.logprobs else None
            return yes_share(first[0].top_logprobs if first else [], said)
        except WrongAnswer as wrong:
            return wrong
        except openai.APIStatusError as error:
            raise RewardError(f"{self.url}: {_status(error)}") from None
        except openai.APIConnectionError as error:
            raise RewardError(f"{self.url}: no answer in {RETRIES + 1} attempts ({_reason(error)})") from None
        except (AttributeError, IndexError, TypeError, ValueError):
            raise RewardError(f"{self.url}: the answer is not the JSON of a chat completion") from None

    def _wait_for_turn(self) -> None:
        """At most --judge-rate requests a second are begun."""
        if self.options.judge_rate:
            with self._lock:
                begin = max(self._next, time.monotonic())
                self._next = begin + 1 / self.options.judge_rate
            time.sleep(max(0.0, begin - time.monotonic()))


@functools.lru_cache(maxsize=4)
def _client(url: str, timeout: float) -> Any:
    """OpenAI's client; its key is that of $OPENAI_API_KEY, which a server of one's own may ignore."""
    key = os.environ.get("OPENAI_API_KEY", "none")
    return library("openai", "judge").OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=RETRIES)


def _reason(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:120]


def _status(error: Any) -> str:
    """HTTP status and the server's own message, where it is no page."""
    body = error.body
    message = body.get("message") if isinstance(body, dict) else body
    if not isinstance(message, str) or message.lstrip().startswith("<"):
        message = ""
    hint = {
        401: "set OPENAI_API_KEY",
        429: f"too many requests in {RETRIES + 1} attempts; lower --judge-rate",
    }
    told = " ".join((message or hint.get(error.status_code, error.response.reason_phrase)).split())[:160]
    return f"HTTP {error.status_code} ({told})"


@reward_factory("judge")
def judge(argument: str, options: RewardOptions) -> Reward:
    """judge:URL#MODEL, a vision-language model's P(yes) or rating for --question; URL as http://HOST:8000/v1"""
    url, _, model = argument.partition("#")
    if not re.match(r"https?://[^/\s]+", url):
        raise UserError(f"reward 'judge:{argument}': {FORM}")
    found = JudgeReward(url, model, options)
    if not options.judge_dry_run:
        found.check_model()
    return found
