"""Stock clients: a saved model is a model like any other to clients that have never heard of `dtfcli`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import PreTrainedTokenizerFast

from tests.tiny import ARCHITECTURES, EVERY_ARCHITECTURE, routed_model, tokens

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""

STOCK = """
import json, runpy, sys
sys.modules["dtfcli"] = None  # importing it fails
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["lm_eval", *arguments]
    runpy.run_module("lm_eval", run_name="__main__")
"""


@pytest.mark.slow
def test_stock_lm_eval_scores_batches_as_the_model_scores_rows(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Both architectures in one process of lm_eval, which takes long to import."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer.backend_tokenizer, eos_token="z")
    models: dict[str, Any] = {}
    for architecture in ARCHITECTURES:
        models[architecture] = routed_model("qwen2", architecture)
        models[architecture].config.eos_token_id = 25
        models[architecture].save_pretrained(tmp_path / architecture)
        tokenizer.save_pretrained(tmp_path / architecture)
    generator = torch.Generator().manual_seed(3)
    lines = []
    for n in range(24):  # questions of all lengths: in batches the harness pads them, and passes no mask
        words = torch.randint(0, 25, (3 + 2 * n,), generator=generator).tolist()
        question = " ".join(chr(ord("a") + word) for word in words)
        lines.append(json.dumps({"question": question, "choices": ["a b", "c", "d e f"], "answer": n % 3}))
    (tmp_path / "letters.jsonl").write_text("\n".join(lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "letters.yaml").write_text(TASK % (tmp_path / "letters.jsonl"))
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        "HF_HUB_OFFLINE": "1",
    }

    def arguments(architecture: str) -> list[str]:
        given = ["--model", "hf", "--model_args", f"pretrained={tmp_path / architecture},trust_remote_code=True"]
        given += ["--tasks", "letters", "--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--log_samples"]
        return [*given, "--batch_size", "8", "--output_path", str(tmp_path / f"{architecture}-scores")]

    def scores(architecture: str) -> list[list[float]]:
        (samples,) = (tmp_path / f"{architecture}-scores").rglob("samples_letters_*.jsonl")
        rows: list[Any] = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        return [[float(answer[0][0]) for answer in row["resps"]] for row in rows]

    command = [sys.executable, "-c", STOCK, json.dumps([arguments(architecture) for architecture in models])]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for architecture, model in models.items():
        expected = []
        for line in map(json.loads, lines):
            question = tokenizer(line["question"], return_tensors="pt")["input_ids"]
            rows = [
                tokenizer(f"{line['question']} {choice}", return_tensors="pt")["input_ids"]
                for choice in line["choices"]
            ]
            expected.append([log_probability(model, row, question.shape[1]) for row in rows])
        torch.testing.assert_close(torch.tensor(scores(architecture)), torch.tensor(expected), atol=1e-4, rtol=0)


@torch.no_grad()
def log_probability(model: Any, row: torch.Tensor, start: int) -> float:
    """Of the tokens of a row [1, T] from a place on, alone."""
    logits = model(row).logits[0, start - 1 : -1].log_softmax(-1)
    return float(logits.gather(1, row[0, start:].unsqueeze(1)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_weights_that_accelerate_keeps_elsewhere(architecture: str) -> None:
    """`cpu_offload` holds parameters on the meta device and brings each module's when it is called."""
    model = routed_model("llama", architecture)
    input_ids = tokens(2, 24)
    with torch.no_grad():
        expected = model(input_ids).logits
        found = cpu_offload(model, execution_device=torch.device("cpu"))(input_ids).logits
    assert torch.equal(found, expected)


@torch.no_grad()
def test_weights_that_are_there_only_while_their_module_runs() -> None:
    """As DeepSpeed's third stage does: everywhere else a parameter is an empty tensor."""
    model, input_ids = routed_model("llama", "dtf"), tokens(2, 12)
    expected = model(input_ids).logits
    for router in model.model.routers.values():
        whole = {name: parameter.data for name, parameter in router.named_parameters()}

        def gather(module: Any, _: Any, whole: dict[str, torch.Tensor] = whole) -> None:
            for name, parameter in module.named_parameters():
                parameter.data = whole[name]

        def release(module: Any, *_: Any) -> None:
            for parameter in module.parameters():
                parameter.data = parameter.new_empty(0)

        release(router)
        router.register_forward_pre_hook(gather)
        router.register_forward_hook(release)
    torch.testing.assert_close(model(input_ids).logits, expected)
