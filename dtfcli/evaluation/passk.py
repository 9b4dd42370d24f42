"""The functions that the task files of the code benchmarks (`tasks/*.yaml`) call.

lm-eval's own humaneval and mbpp load a metric from the Hub when their files are read. Ours use the same prompts and
stop sequences, and run the candidates in `sandbox`.
"""

from collections.abc import Sequence
from typing import Any

from dtfcli.evaluation import sandbox

_MBPP_EXAMPLES = (2, 3, 4)


def humaneval_programs(responses: list[list[str]], docs: Any) -> list[list[str]]:
    """A filter that puts the prompt before each answer."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(responses, docs, strict=True)]


def humaneval_results(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """pass@1 of one HumanEval problem."""
    return _results(results[0], f"{doc['test']}\ncheck({doc['entry_point']})")


def all_answers(responses: list[list[str]], docs: Any) -> list[list[str]]:
    """A filter that keeps every answer as it is."""
    return [list(texts) for texts in responses]


def mbpp_results(doc: dict[str, Any], results: list[list[str]]) -> dict[str, float]:
    """pass@1 of one MBPP problem."""
    return _results(results[0], "\n".join(doc["test_list"]))


def mbpp_examples(docs: Any) -> Any:
    """The examples of MBPP's authors, from its split `prompt`."""
    chosen = [doc for doc in docs if doc["task_id"] in _MBPP_EXAMPLES]
    return [{**doc, "is_fewshot": True} for doc in chosen]


def _results(programs: Sequence[str], tests: str) -> dict[str, float]:
    """pass@1: the share of the programs that pass."""
    passed = [sandbox.run(f"{program}\n{tests}\n") is not None for program in programs]
    return {"pass@1": sum(passed) / len(programs)}
