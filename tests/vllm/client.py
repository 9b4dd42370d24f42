"""vLLM, in an environment where dtf is not installed: `python client.py JOB.json RESULT.json`, for `test_vllm.py`.

The job says what is done: "texts" with one folder, or "times" with several that take turns.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

assert importlib.util.find_spec("dtfcli") is None, "the folder alone has to be enough"
from vllm import LLM, SamplingParams  # noqa: E402  # takes seconds


def opened(folder: str, **options: Any) -> Any:
    """The model of a folder, as `vllm serve FOLDER --trust-remote-code --model-impl transformers --enforce-eager`."""
    return LLM(model=folder, trust_remote_code=True, model_impl="transformers", enforce_eager=True, **options)


def generated(model: Any, prompts: list[list[int]], length: int) -> list[Any]:
    """Greedy continuations of token ids, with the log-probabilities of their tokens."""
    sampling = SamplingParams(temperature=0, max_tokens=length, min_tokens=length, ignore_eos=True, logprobs=1)
    return model.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)


def texts(folder: str, prompts: list[list[int]], length: int, **options: Any) -> dict[str, Any]:
    """Each prompt alone, then all at once; how many prompt tokens came from the prefix cache, at most."""
    model = opened(folder, **options)
    alone = [generated(model, [prompt], length)[0] for prompt in prompts]
    at_once = generated(model, prompts, length)

    def plain(answers: list[Any]) -> list[dict[str, Any]]:
        outputs = [answer.outputs[0] for answer in answers]
        return [
            {
                "tokens": list(output.token_ids),
                "logprobs": [
                    place[token].logprob for token, place in zip(output.token_ids, output.logprobs, strict=True)
                ],
            }
            for output in outputs
        ]

    cached = max(answer.num_cached_tokens for answer in alone)
    return {"alone": plain(alone), "at_once": plain(at_once), "cached": cached}


def times(folders: list[str], prompts: list[list[int]], length: int, rounds: int, **options: Any) -> dict[str, Any]:
    """Seconds of prefill, and of decoding for one request and for sixteen, of each folder in each round, in turns."""
    models = [opened(folder, **options) for folder in folders]
    work = {
        "prefill": (prompts, 1),
        "decoding": ([prompts[0][:16]], length),
        "decoding for 16": ([prompt[n : n + 16] for prompt in prompts for n in range(0, 64, 16)], length),
    }
    seconds: dict[str, list[list[float]]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, (given, count) in work.items():
            row = []
            for model in models if turn % 2 else reversed(models):
                start = time.perf_counter()
                generated(model, given, count)
                row.append(time.perf_counter() - start)
            if turn:  # the first one compiles
                seconds[name].append(row if turn % 2 else row[::-1])
    return seconds


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    do: Any = {"texts": texts, "times": times}[job.pop("do")]
    result = do(**job)
    Path(sys.argv[2]).write_text(json.dumps(result))
