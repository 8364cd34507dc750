"""A reward that another machine computes: orwcfm finetune --reward docs/http_reward.py:score

The server gets a POST with the samples [B, …] as a .npy file and answers a JSON list of B numbers.
"""

import io
import json
import os
import time
import urllib.request

import numpy as np

TRIES = 4


def score(samples, timeout=60.0):
    file = io.BytesIO()
    np.save(file, samples.cpu().numpy())
    url = os.environ.get("REWARD_URL", "http://127.0.0.1:8000/score")
    for attempt in range(1, TRIES + 1):
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, file.getvalue()), timeout=timeout
            ) as answer:
                return json.load(answer)
        except OSError as error:  # no connection, no answer in time, an HTTP status of failure
            if attempt == TRIES or getattr(error, "code", 500) < 500:  # a 4xx would only be said again
                raise
            time.sleep(0.25 * 2**attempt)
