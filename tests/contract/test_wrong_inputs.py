"""What a user can get wrong: exit code 2, the field or file and the remedy in one or two lines, no traceback.

A row is a command and what its message must contain. `{model}` is a small model folder, `{dense}` a dense one;
the other names are files that `workplace` makes. Nothing that was there may be changed by a failing command.
"""

import copy
import hashlib
import importlib.util
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import PreTrainedTokenizerFast

from tests.conftest import Outcome
from tests.tiny import dense_model, routed_model

SOURCES = "data.sources='[{path=\"%s\"}]'"


def _sources(*entries: str) -> str:
    """An override with these entries of `data.sources`, as a shell takes it."""
    return f"data.sources='[{', '.join(f'{{{entry}}}' for entry in entries)}]'"


PRESETS = [
    ("presets show quickstrat", ["quickstrat", "Did you mean 'quickstart'"]),
    ("presets show nothing-like-it", ["nothing-like-it", "dtf presets list"]),
    ("presets copy quickstart taken.toml", ["taken.toml", "not overwritten", "another name"]),
    ("presets copy quickstart nowhere/my.toml", ["nowhere", "does not exist", "Make it first"]),
    ("presets copy quickstrat my.toml", ["quickstrat", "Did you mean 'quickstart'"]),
    ("presets validate missing.toml", ["missing.toml", "no such file", "dtf presets copy"]),
    ("presets validate broken.toml", ["broken.toml", "not valid TOML", "line 1"]),
    ("presets validate binary.toml", ["binary.toml", "not UTF-8", "give a TOML file"]),
    ("presets validate folder", ["folder", "cannot be read", "give a TOML file"]),
    ("presets validate wrong.toml", ["training.max_stpes", "in wrong.toml", "Did you mean 'training.max_steps'"]),
    ("presets shwo quickstart", ["shwo", "Did you mean 'show'"]),
    ("presets show", ["NAME", "--help"]),
]

TRAIN = [
    ("train quickstrat", ["quickstrat", "Did you mean 'quickstart'"]),
    ("train taken.toml", ["taken.toml", "--config taken.toml"]),
    ("train --config missing.toml", ["missing.toml", "no such file"]),
    ("train quickstart --config wrong.toml", ["training.max_stpes", "in wrong.toml", "training.max_steps"]),
    ("train quickstart training.max_steps", ["'training.max_steps' is not KEY=VALUE"]),
    ("train quickstart =3", ["'=3' is not KEY=VALUE"]),
    ("train quickstart training.max_stpes=3", ["training.max_stpes", "Did you mean 'training.max_steps'"]),
    ("train quickstart max_steps=3", ["max_steps", "Did you mean 'training.max_steps'"]),
    ("train quickstart trainng.max_steps=3", ["trainng", "Did you mean 'training'"]),
    ("train quickstart training.max_steps=many", ['training.max_steps = "many"', "a whole number"]),
    ("train quickstart training.max_steps=-1", ["training.max_steps = -1", "at least 0"]),
    ("train quickstart training.max_steps=1.5", ["training.max_steps = 1.5", "a whole number"]),
    ("train quickstart training.max_steps=true", ["training.max_steps = true", "a whole number"]),
    ("train quickstart training=3", ["training = 3", "a table"]),
    ("train quickstart model=modd", ["model.architecture", "modd", "Did you mean 'mod'"]),
    ("train quickstart model.capacity=1.5", ["model.capacity = 1.5", "at most at 1"]),
    ("train quickstart model.capacity=0", ["model.capacity = 0", "above 0"]),
    ("train quickstart 'model.capacity=[0.5]'", ["model.capacity = [0.5]", "one share for each of the"]),
    ("train quickstart model.gate=hard", ["model.gate = 'hard'", "straight_through"]),
    ("train quickstart model.o_ce_init=-1", ["model.o_ce_init = -1", "positive"]),
    ("train quickstart model.dense_edges=9", ["model.dense_edges = 9", "lower dense_edges"]),
    ("train quickstart 'model.routed_layers=[0]'", ["model.routed_layers = [0]", "leave out layer 0"]),
    ("train quickstart 'model.routed_layers=[1,99]'", ["model.routed_layers", "from 0 to"]),
    (
        "train quickstart model=mod model.prior_factor=0.1",
        ["model.prior_factor = 0.1", "nothing reads it", "Leave it out"],
    ),
    ("train quickstart model=dense model.capacity=0.5", ["model.capacity = 0.5", "nothing reads it", "dense"]),
    ("train quickstart model.scratch.num_attention_heads=5", ["model.scratch", "multiple of 10"]),
    ("train quickstart model.scratch.num_key_value_heads=3", ["num_key_value_heads = 3", "must divide"]),
    ("train quickstart data.seq_len=100000", ["data.seq_len = 100000", "max_position_embeddings"]),
    ("train quickstart training.tokens_per_update=1000", ["training.tokens_per_update = 1000", "multiple of"]),
    ("train quickstart training.learning_rates.base=-1", ["learning_rates.base = -1", "at least 0"]),
    ("train quickstart training.learning_rates.base=nan", ["training.learning_rates.base", "finite"]),
    ("train quickstart training.schedule=cosin", ["training.schedule", "Did you mean 'cosine'"]),
    ("train quickstart run.name=a/b", ["run.name", "it becomes a folder"]),
    ("train quickstart run.device=gpu", ["run.device", "cuda:0"]),
    ("train quickstart run.device=cuda:99", ["cuda:99"]),
    ("train quickstart run.dtype=fp16", ["run.dtype", "float16"]),
    ("train quickstart run.device=cpu run.dtype=float16", ["run.dtype = 'float16'"]),
    ("train quickstart data.tokenizer=./none", ["./none: no such file or folder"]),
    ("train quickstart run.seed=-1", ["run.seed = -1", "at least 0"]),
    ("train quickstart data.sources=novels.parquet", ["data.sources", "a list of tables", "Write for example"]),
    ("train quickstart 'data.sources=[]'", ["data.sources = []", "must not be empty"]),
    ("train quickstart 'data.sources=[{pth=\"a\"}]'", ["data.sources[0].path: missing"]),
    ("train quickstart 'data.sources=[{path=\"a\",ratio=2}]'", ["data.sources[0].ratio = 2", "at most 1"]),
    ("train quickstart data.validation_fraction=1", ["data.validation_fraction = 1", "less than 1"]),
    ("train quickstart training.max_steps=3 training.epochs=1", ["training.epochs", "nothing reads it"]),
    ("train quickstart --training.max_steps=3", ["Settings are written without dashes"]),
    ("train quickstart --dryrun", ["--dryrun", "Did you mean '--dry-run'"]),
    ("train quickstart model.base=nowhere/at/all", ["nowhere/at/all: no such file or folder"]),
    ("train dtf-smollm2-135m model.base=missing.gguf", ["missing.gguf", "no such file"]),
    ("train dtf-smollm2-135m model.base=notes.gguf", ["notes.gguf", "not a GGUF file"]),
    ("train dtf-smollm2-135m model.base=folder", ["folder", "empty folder"]),
    (f"train quickstart {SOURCES % 'missing.txt'}", ["missing.txt"]),
    (f"train quickstart {SOURCES % 'empty.txt'}", ["empty.txt"]),
    ("train quickstart lora.enabled=true", ["lora.enabled = true", "random weights", "model.base"]),
    ("train quickstart distill.enabled=true", ["distill.enabled = true", "no dense parent", "model.base"]),
    ("train quickstart lora.r=8", ["lora.r = 8", "nothing reads it", "lora.enabled is false"]),
    ("train quickstart distill.temperature=2", ["distill.temperature = 2", "nothing reads it"]),
    ("train quickstart lora.quantize=nf4", ['lora.quantize = "nf4"', "nothing reads it", "lora.enabled is false"]),
    ("train dtf-qwen2.5-0.5b-lora lora.quantize=int4", ["lora.quantize", "int4", "none, nf4"]),
    (
        "train dtf-qwen2.5-0.5b-lora lora.quantize=nf4 training.sharding=fsdp2",
        ['lora.quantize = "nf4"', "fsdp2 cannot", "training.sharding at ddp"],
    ),
    ("train dtf-qwen2.5-0.5b-lora lora.r=0", ["lora.r = 0", "at least 1"]),
    ("train dtf-qwen2.5-0.5b-lora lora.dropout=1", ["lora.dropout = 1", "less than 1"]),
    ("train dtf-qwen2.5-0.5b-lora 'lora.targets=[\"w_in\"]'", ["lora.targets", "not a projection", "gate_proj"]),
    ("train dtf-qwen2.5-0.5b-lora 'lora.targets=[]'", ["lora.targets = []", "must not be empty", "q_proj"]),
    ("train dtf-qwen2.5-0.5b distill.enabled=true distill.temperature=0", ["distill.temperature", "greater than 0"]),
    ("train quickstart training.capacity_schedule=step", ["training.capacity_schedule", "linear, cosine"]),
    (
        "train quickstart training.capacity_fraction=0.5",
        ["training.capacity_fraction", "capacity_schedule is constant"],
    ),
    (
        "train quickstart training.capacity_schedule=cosine training.threshold_fraction=0.8",
        ["training.capacity_fraction", "threshold_fraction = 0.8", "at most 0.2"],
    ),
    ("train quickstart training.router_warmup_steps=5", ["training.router_warmup_steps", "is gone", "Leave it out"]),
    ("train quickstart model.flops_share=0.8", ["model.flops_share", "is gone", "--sensitivity"]),
    ("train quickstart model.routed_layers=auto", ["model.routed_layers = 'auto'", "'alternate', 'inner' or a list"]),
    ("train --resume nowhere", ["nowhere: no run to resume"]),
    ("train --resume", ["outputs: no run to resume (there are none)"]),
    ("train --resume a b", ["--resume takes one run folder"]),
    ("train --resume --dry-run", ["--dry-run: a resumed run"]),
    ("train --resume training.max_steps=9", ["training.max_steps=9: a resumed run keeps the settings"]),
    ("train --resume=nowhere", ["nowhere"]),
    ("train --resume= --num-processes 2", ["outputs"]),
    ("train quickstart --num-processes 0", ["'--num-processes'", "0"]),
    ("train quickstart --num-processes many", ["'--num-processes'", "many"]),
    (
        "train quickstart --num-processes 3 training.tokens_per_update=4096",
        ["training.tokens_per_update = 4096", "× processes", "the smallest is 6144"],
    ),
    ("train dtf-qwen2.5-0.5b --num-processes 3 --dry-run", ["training.tokens_per_update = 1048576", "× processes"]),
    ("train quickstart run.device=cuda:1 --num-processes 2", ["cuda:1"]),
    ("train quickstart training.sharding=fsdp2", ["training.sharding = 'fsdp2'", "--num-processes N"]),
    ("train quickstart training.sharding=fsdp", ["training.sharding", "fsdp2"]),
    (
        "train quickstart training.kernels=liger run.device=cpu",
        ["training.kernels = 'liger'", "run on GPUs", "'torch'"],
    ),
    (
        "train quickstart training.kernels=liger training.compile=true",
        ['training.kernels = "liger"', "compile", "choose one"],
    ),
    ("train quickstart training.kernels=triton", ["training.kernels", "triton", "torch", "liger"]),
    ("train quickstart training.gradient_checkpointing=some", ["training.gradient_checkpointing", "some", "selective"]),
    ("bench quickstart --phases trian", ["--phases trian", "train, prefill, decode", "Did you mean 'train'?"]),
    ("bench quickstart --phases prefill --stock --device cpu", ["--stock"]),
    ("bench quickstart --dtype float16 --device cpu", ["--dtype float16"]),
    (
        "bench quickstart training.kernels=liger --device cpu --phases train",
        ["training.kernels = 'liger'", "run on GPUs"],
    ),
]

DATA = [
    (
        "train quickstart " + _sources('path="rows.jsonl",streaming=true') + " training.max_steps=3",
        ["data.tokenizer", "stream"],
    ),
    (
        "train dtf-smollm2-135m " + _sources('path="rows.jsonl",streaming=true') + " training.epochs=1",
        ["training.epochs", "data.sources stream, which has no end"],
    ),
    (
        "train --config model.toml " + _sources('path="a",streaming=true'),
        ["training.max_steps = unset", "no end", "1000"],
    ),
    (
        "train quickstart " + _sources('path="a",streaming=true', 'path="b"'),
        ["data.sources[1].streaming = false", "all do or none"],
    ),
    (
        "train quickstart " + _sources('path="a",streaming=true,weight=2', 'path="b",streaming=true'),
        ["data.sources[1].weight = unset", "every source one, or none"],
    ),
    ("train quickstart " + _sources('path="a",weight=2'), ["data.sources[0].weight = 2", "only streaming reads it"]),
    (
        "train quickstart " + _sources('path="a",streaming=true,weight=0'),
        ["data.sources[0].weight = 0", "greater than 0"],
    ),
    ("train quickstart " + _sources('path="a",streaming="yes"'), ["data.sources[0].streaming", "true or false"]),
    (
        "train quickstart " + _sources('path="a",streaming=true') + " data.max_documents=9",
        ["data.max_documents = 9", "data.sources stream"],
    ),
    ("train quickstart data.shuffle_buffer=9", ["data.shuffle_buffer = 9", "nothing reads it", "streaming = true"]),
    (
        "train quickstart " + _sources('path="a",messages_field="chat",text_field="b"'),
        ["data.sources[0].text_field", "messages_field = chat", "leave one of them out"],
    ),
    (
        "train quickstart " + _sources('path="rows.jsonl",messages_field="chat"'),
        ["messages_field = 'chat'", "data.tokenizer"],
    ),
    (
        "train quickstart data.tokenizer={scored} " + _sources('path="rows.jsonl",messages_field="chat"'),
        ["messages_field = 'chat'", "no chat template"],
    ),
    (
        "train quickstart data.tokenizer={chat} " + _sources('path="rows.jsonl",messages_field="chat"'),
        ["messages_field = 'chat'", "no such column", "columns: body"],
    ),
    (
        "train quickstart data.tokenizer={chat} " + _sources('path="rows.jsonl",messages_field="body"'),
        ["messages_field = 'body'", "no lists of", "text_field"],
    ),
    (
        "train quickstart data.tokenizer={chat} " + _sources('path="prompts.txt",messages_field="chat"'),
        ["data.sources[0].messages_field = 'chat' is not read", "one text"],
    ),
    (
        "train quickstart data.tokenizer={chat} " + _sources('path="rows.jsonl",text_field="body",streaming=true'),
        ["data.seq_len", "too little", "add text"],
    ),
    (
        "train quickstart data.tokenizer={chat} " + _sources('path="missing.jsonl",streaming=true'),
        ["missing.jsonl", "no such file"],
    ),
    ("train quickstart logging.wandb.project=cats", ["logging.wandb.project", "logging.wandb.enabled is false"]),
    ("train quickstart logging.wandb=true", ["logging.wandb = true", "a table"]),
    ("train quickstart logging.wandb.enabld=true", ["logging.wandb.enabld", "Did you mean 'logging.wandb.enabled'"]),
    ("train quickstart logging.wandb.enabled=true", ["logging.wandb.enabled", "pip install 'dtfcli[wandb]'"]),
    ("train quickstart logging.tensorboard.enabled=true", ["tensorboard", "pip install 'dtfcli[tensorboard]'"]),
    ("train dtf-qwen2.5-0.5b-lora lora.quantize=nf4", ["lora.quantize = 'nf4'", "pip install 'dtfcli[qlora]'"]),
    ("train quickstart logging.trackio.enabled=true", ["trackio", "pip install 'dtfcli[trackio]'"]),
]

GENERATE = [
    ("generate", ["MODEL", "--help"]),
    ("generate folder x", ["folder", "empty folder"]),
    ("generate taken.toml x", ["taken.toml", "not a model"]),
    ("generate nowhere/at/all x", ["nowhere/at/all", "no such file or folder"]),
    ("generate notes.gguf x", ["notes.gguf", "not a GGUF file"]),
    ("generate {orphan} x", ["{orphan}", "base model of this adapter", "gone/base: no such file"]),
    ("generate {unnamed} x", ["{unnamed}", "names no base model", "Hub id"]),
    ("generate {hollow} x", ["{hollow}", "adapter without adapter_model.safetensors"]),
    ("generate {model} ''", ["prompt"]),
    ("generate {model} a --max-new-tokens 0", ["max", "0"]),
    ("generate {model} a --max-new-tokens many", ["max-new-tokens", "many"]),
    ("generate {model} a --temperature -1", ["temperature", "-1"]),
    ("generate {model} a --top-p 2", ["top", "2"]),
    ("generate {model} a --capacity 2", ["capacity", "2"]),
    ("generate {model} a --routing predict", ["routing", "predict", "threshold"]),
    ("generate {dense} a --routing threshold", ["routing", "dense"]),
    ("generate {dense} a --capacity 0.5", ["capacity", "dense"]),
    ("generate {model} a --device gpu", ["device", "gpu", "cuda"]),
    ("generate {model} a --device cuda:99", ["device", "cuda:99"]),
    ("generate {model} a --dtype fp16", ["dtype", "fp16", "float16"]),
    ("generate {model} a --revision main", ["revision", "main"]),
    ("generate {model} a --prompts prompts.txt", ["PROMPT and --prompts"]),
    ("generate {model} --prompts missing.txt --output out.jsonl", ["missing.txt", "no such file"]),
    ("generate {model} --prompts empty.txt --output out.jsonl", ["empty.txt", "one on each line"]),
    ("generate {model} --prompts prompts.txt --output taken.toml", ["taken.toml", "exists already"]),
    ("generate {model} --prompts prompts.txt", ["--output FILE.jsonl"]),
    ("generate {model} --prompts prompts.txt --output out.jsonl --batch-size 0", ["--batch-size 0", "at least 1"]),
    ("generate {model} a --chat", ["chat"]),
    ("generate {model} a --quantize int3", ["--quantize", "int3", "int8"]),
    ("generate {model} a --max_new_token 3", ["Did you mean '--max-new-tokens'"]),
]

SERVE = [
    ("serve", ["MODEL", "--help"]),
    ("serve nowhere/at/all --port 0", ["nowhere/at/all", "no such file or folder"]),
    ("serve folder --port 0", ["folder", "empty folder", "model folder"]),
    ("serve {model} --port 0 --routing topk", ["topk", "--routing threshold"]),
    ("serve {dense} --port 0 --routing threshold", ["routing", "dense"]),
    ("serve {model} --port 0 --capacity 2", ["capacity", "2"]),
    ("serve {model} --port 0 --device gpu", ["device", "gpu", "cuda"]),
    ("serve {model} --port many", ["--port", "many"]),
    ("serve {model} --port 70000", ["--port", "70000", "65535"]),
    ("serve {model} --host not.an.address.invalid --port 0", ["--host not.an.address.invalid", "localhost"]),
    ("serve {model} --host 192.0.2.1 --port 0", ["--host 192.0.2.1", "not an address of this machine", "localhost"]),
    ("serve {model} --host 0.0.0.0 --port 0", ["--host 0.0.0.0", "DTF_API_KEY", "--no-api-key", "localhost"]),
    ("serve {model} --port 0 --api-key K --no-api-key", ["--no-api-key", "leave one of them out"]),
    ("serve {model} --port 0 --api-key 'my key'", ["--api-key", "without spaces"]),
    ("demo", ["MODEL", "--help"]),
    ("demo nowhere/at/all --port 0", ["nowhere/at/all", "no such file or folder"]),
    ("demo {model} --port 0 --routing topk", ["topk", "--routing threshold"]),
    ("demo {model} --host not.an.address.invalid --port 0", ["--host not.an.address.invalid", "localhost"]),
    ("demo {model} --host 0.0.0.0 --port 0", ["--host 0.0.0.0", "DTF_API_KEY", "--no-api-key", "localhost"]),
    ("demo {model} --port 70000", ["--port", "70000", "65535"]),
    ("serve {model} --continuous-batching", ["--continuous-batching", "paged cache", "Leave it out"]),
]

INSPECT = [
    ("inspect-routing", ["MODEL", "--help"]),
    ("inspect-routing {dense} a", ["dense", "no routing to show"]),
    ("inspect-routing {model} ''", ["empty", "TEXT or --file"]),
    ("inspect-routing {model} a --file prompts.txt", ["TEXT and --file"]),
    ("inspect-routing {model} --file promts.txt", ["promts.txt", "no such file", "Did you mean 'prompts.txt'"]),
    ("inspect-routing {model} --file binary.toml", ["binary.toml", "UTF-8"]),
    ("inspect-routing {model} --file folder", ["--file", "folder", "it is empty"]),
    ("inspect-routing {model} --file rows.jsonl", ["rows.jsonl", "--text-field", "body"]),
    ("inspect-routing {model} --file rows.jsonl --text-field bdy", ["--text-field", "bdy", "Did you mean 'body'"]),
    ("inspect-routing {model} --file rows.jsonl --limit 0", ["--limit 0", "at least 1"]),
    ("inspect-routing {model} a --limit 3", ["--limit", "leave it out"]),
    ("inspect-routing {model} a --text-field body", ["--text-field", "leave it out"]),
    ("inspect-routing {model} a --output taken.toml", ["--output taken.toml", "exists already"]),
    ("inspect-routing {model} a --html page.txt", ["--html page.txt", ".html"]),
    ("inspect-routing {model} a --png picture.jpg", ["--png picture.jpg", ".png"]),
    ("inspect-routing {model} a --sensitivity --against-oracle", ["--against-oracle: --sensitivity leaves out layers"]),
    ("inspect-routing {model} a --sensitivity --html page.html", ["--html: --sensitivity leaves out layers"]),
    ("inspect-routing {model} a --html nowhere/page.html", ["nowhere", "does not exist"]),
    ("inspect-routing {model} a --output folder", ["--output folder", "name a file"]),
    ("inspect-routing {model} a --output x.png --png x.png", ["x.png", "twice"]),
    ("inspect-routing {model} a --capacity 2", ["capacity", "2"]),
]

EVAL = [
    ("eval", ["MODEL", "--help"]),
    ("eval folder", ["folder", "empty folder"]),
    ("eval nowhere/at/all", ["nowhere/at/all", "no such file or folder"]),
    ("eval notes.gguf", ["notes.gguf", "not a GGUF file"]),
    ("eval {model} --tasks arc_esay", ["arc_esay", "Did you mean 'arc_easy'"]),
    ("eval {model} --tasks ,", ["--tasks", "names no task"]),
    ("eval {model} --tasks quick_test,general", ["arc_challenge", "quick_test and general"]),
    ("eval {model} --limit 0", ["--limit 0", "at least 1"]),
    ("eval {model} --limit some", ["limit", "some"]),
    ("eval {model} --num-fewshot -1", ["--num-fewshot -1", "at least 0"]),
    ("eval {model} --batch-size 0", ["--batch-size 0", "or auto"]),
    ("eval {model} --batch-size big", ["--batch-size big", "or auto"]),
    ("eval {model} --data-dir missing", ["--data-dir missing", "no such folder"]),
    ("eval {model} --data-dir prompts.txt", ["--data-dir prompts.txt", "no such folder"]),
    ("eval {model} --data-dir folder", ["tokenizer has no end-of-text token"]),
    ("eval {scored} --data-dir folder", ["arc_challenge", "allenai/ai2_arc", "--data-dir"]),
    ("eval {model} --include-path missing", ["--include-path missing", "no such folder"]),
    ("eval {model} --include-path folder", ["--include-path folder", "no .yaml task files"]),
    ("eval {model} --output taken.toml", ["taken.toml", "exists already"]),
    ("eval {model} --output nowhere/all.json", ["nowhere", "does not exist"]),
    ("eval {model} --tasks code", ["humaneval", "--confirm-run-unsafe-code"]),
    ("eval {model} --tasks mbpp", ["mbpp", "--confirm-run-unsafe-code"]),
    ("eval {scored} --routing topk --tasks gsm8k", ["topk", "gsm8k", "--routing threshold"]),
    ("eval {model} --routing predict", ["routing", "predict", "threshold"]),
    ("eval {model} --capacity 2", ["capacity", "2"]),
    ("eval {dense} --routing threshold", ["routing", "dense"]),
    ("eval {dense} --capacity 0.5", ["capacity", "dense"]),
    ("eval {model} {model}", ["named twice"]),
    ("eval {model} --quantize nf4", ["--quantize", "nf4", "int8"]),
    ("eval {model} --device gpu", ["device", "gpu", "cuda"]),
    ("eval {model} --task general", ["--task", "Did you mean '--tasks'"]),
    ("eval {scored} --tasks validation_text", ["validation_text", "no run folder"]),
    ("train quickstart eval.after=generl", ["eval.after", "generl", "Did you mean 'general'"]),
    ("train quickstart eval.limit=3", ["eval.limit = 3", "nothing reads it", "eval.after is empty"]),
    ("train quickstart eval.after=code", ["eval.after = 'code'", "dtf eval", "--confirm-run-unsafe-code"]),
]

PUSH = [
    ("push", ["MODEL", "--help"]),
    ("push {model}", ["REPO", "--help"]),
    ("push {model} a/b/c", ["REPO 'a/b/c'", "owner/name"]),
    ("push {model} 'not good'", ["REPO 'not good'", "owner/name"]),
    ("push {model} /new", ["REPO '/new'", "owner/name"]),
    ("push {model} me/new --space page", ["--space 'page'", "OWNER/NAME"]),
    ("push {model} me/new --space a/b/c", ["--space 'a/b/c'", "OWNER/NAME"]),
    ("push {model} me/new --hf-username other", ["REPO 'me/new'", "--hf-username says other", "give one"]),
    ("push {model} me/new --revision 'a b'", ["--revision 'a b'", "branch"]),
    ("push {model} me/new --revision ../x", ["--revision '../x'", "branch"]),
    ("push {model} me/new --commit-message ''", ["--commit-message", "empty"]),
    ("push {model} me/new --commit_mesage x", ["Did you mean '--commit-message'"]),
    ("push {model} me/new", ["not logged in", "hf auth login"]),
    ("push {model} me/new --merge --dry-run out", ["--merge", "is not an adapter", "leave it out"]),
    ("push {hollow} me/new --dry-run out", ["adapter without adapter_model.safetensors"]),
    ("push {orphan} me/new --merge --dry-run out", ["base model of this adapter", "gone/base: no such file"]),
    ("push {model} me/new --dry-run full", ["--dry-run full", "not empty", "another folder"]),
    ("push {model} me/new --dry-run taken.toml", ["--dry-run taken.toml", "another folder"]),
    ("push nowhere/at/all me/new --dry-run out", ["nowhere/at/all", "no such file or folder"]),
    ("push no/where me/new --dry-run out", ["no/where", "not on this machine", "model or run folder"]),
    ("push Qwen/Qwen2.5-0.5B me/new --dry-run out", ["Qwen/Qwen2.5-0.5B", "is there already"]),
    ("push folder me/new --dry-run out", ["folder", "empty folder"]),
    ("push notes.gguf me/new --dry-run out", ["notes.gguf", "not a GGUF file"]),
    ("push base.gguf me/new --dry-run out", ["base.gguf", "dense base model", "train it first"]),
    ("push pickled me/new --dry-run out", ["pytorch_model.bin", "never uploaded", "save_pretrained"]),
    ("push {model} me/new --dry-run out --eval-results missing.json", ["missing.json", "no such file", "dtf eval"]),
    (
        "push {model} me/new --dry-run out --eval-results taken.toml",
        ["taken.toml", "read as JSON", "dtf eval"],
    ),
    ("push {model} me/new --dry-run out --eval-results folder", ["folder", "cannot be read"]),
    ("push {model} me/new --dry-run out --eval-results other.json", ["other.json", "other weights", "dtf eval"]),
    ("push {model} me/new --dry-run out --eval-results fewer.json", ["fewer.json", "int8", "without --quantize"]),
    ("push {model} me/new --dry-run out --eval-results empty.json", ["empty.json", "hold no figure"]),
]

STRANGERS = [
    ("generate six.gguf x", ["six.gguf", "damaged or cut off", "download the GGUF file again"]),
    ("train dtf-smollm2-135m model.base=six.gguf", ["six.gguf", "cut off", "download the GGUF file again"]),
    ("inspect-routing listed x", ["config.json", "cannot be read", "save or download the model again"]),
    ("generate text x", ["config.json", "'hidden_size'", "expected int", "again"]),
    (
        "generate kernel x",
        ["config.json", "attn_implementation = 'some/kernel'", "code on the Hub", "take the entry out"],
    ),
    ("generate code x", ["code/config.json", "runs code that comes with it", "--trust-remote-code"]),
    ("generate linked x", ["tokenizer.json", "a link out of its folder", "copy the file there"]),
    ("generate indexed x", ["model.safetensors.index.json", "names files outside its folder", "again"]),
    ("generate cut x", ["cut/model.safetensors", "not a safetensors file", "save or download the model again"]),
    ("generate words x", ["the tokenizer cannot be loaded", "again"]),
    ("push called me/new --dry-run out", ["auto_map", "'../mine'", "no file of its folder", "save the model again"]),
    ("push linked me/new --dry-run out", ["tokenizer.json", "a link out of its folder", "copy the file there"]),
    ("push indexed me/new --dry-run out", ["model.safetensors.index.json", "names files outside its folder", "again"]),
    ("push nested me/new --dry-run out", ["config.json", "nested too deeply", "save the model again"]),
    ("eval {scored} --tasks x --include-path tasks", ["broken.yaml", "cannot be read", "mend the task file"]),
    (
        "eval {scored} --tasks x --include-path coded",
        ["coded/x.yaml: process_docs = !function y.z", "names Python code", "take it out", "--trust-remote-code"],
    ),
    ("train --config deep.toml", ["deep.toml", "not valid TOML", "give a TOML file"]),
]
"""Files of others: damaged, made to look like what they are not, or leading out of their folder."""


TABLE = [*PRESETS, *TRAIN, *DATA, *GENERATE, *SERVE, *INSPECT, *EVAL, *PUSH, *STRANGERS]
MISSING = ("wandb", "tensorboard", "trackio", "bitsandbytes")
"""Packages that are not there, as far as the commands can see."""
PROGRESS = ("hashing the weights", "merging the adapter into its base", "checking for secrets and local paths")
MODELS = ("model", "dense", "scored", "orphan", "unnamed", "hollow")


def _make_models(root: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Routed and dense models, one with an end-of-text token; adapters that lack things."""
    for name, model in (("model", routed_model()), ("dense", dense_model()), ("scored", routed_model())):
        model.save_pretrained(root / name)
        its = copy.deepcopy(tokenizer)
        its.eos_token = "z" if name == "scored" else None
        its.save_pretrained(root / name)
    for name, base in (("orphan", "./gone/base"), ("unnamed", None), ("hollow", "dense")):
        (root / name).mkdir()
        shutil.copy(root / "model" / "config.json", root / name)
        adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
        (root / name / "adapter_config.json").write_text(json.dumps(adapter))
        if name != "hollow":
            (root / name / "adapter_model.safetensors").write_bytes(b"")
    its = PreTrainedTokenizerFast.from_pretrained(root / "scored")
    its.chat_template = "{{ messages[0].content }}"
    its.save_pretrained(root.parent / "chat")


def _make_files(folder: Path) -> None:
    """Files that are not what they should be."""
    score = {"x": {"metrics": {"acc": {"value": 0.5}}}}
    files: dict[str, str | bytes] = {
        "taken.toml": "# mine\n",
        "broken.toml": "[training\n",
        "binary.toml": b"\xff\xfe\x00x",
        "wrong.toml": "[training]\nmax_stpes = 3\n",
        "model.toml": '[model]\nbase = "folder"\n',
        "deep.toml": "a = " + "[" * 10_000,
        "notes.gguf": "not a model",
        "base.gguf": "GGUF....",
        "six.gguf": b"GGUF\3\0",
        "empty.txt": "",
        "prompts.txt": "a b\n",
        "rows.jsonl": '{"body": "a b"}\n',
        "full/mine.txt": "mine",
        "pickled/config.json": "{}",
        "pickled/pytorch_model.bin": b"PK",
        "other.json": json.dumps({"model_hash": "a" * 64, "results": score}),
        "fewer.json": json.dumps({"quantize": "int8", "results": score}),
        "empty.json": '{"results": {}}',
        "tasks/broken.yaml": "task: [",
        "coded/x.yaml": "task: x\nprocess_docs: !function y.z\n",
    }
    (folder / "folder").mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def _make_strangers_models(folder: Path, model: Path) -> None:
    """Copies of a model, each with something wrong."""
    changes: dict[str, Any] = {
        "text": {"hidden_size": "wide"},
        "kernel": {"attn_implementation": "some/kernel"},
        "code": {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}},
        "called": {"auto_map": {"AutoConfig": "../mine.Config"}},
    }
    for name in (*changes, "listed", "linked", "indexed", "cut", "words", "nested"):
        config = Path(shutil.copytree(model, folder / name)) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes.get(name, {})))
    (folder / "listed/config.json").write_text("[]")
    (folder / "nested/config.json").write_text("[" * 100_000)
    (folder / "linked/tokenizer.json").unlink()
    (folder / "linked/tokenizer.json").symlink_to(model / "tokenizer.json")
    (folder / "indexed/model.safetensors").rename(folder / "indexed/model-00001-of-00001.safetensors")
    (folder / "indexed/model.safetensors.index.json").write_text('{"weight_map": {"x": "../model.safetensors"}}')
    (folder / "cut/model.safetensors").write_bytes(b"\xff" * 20)
    (folder / "words/tokenizer.json").write_text('{"model": 3}')


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder that the commands run in. No command changes it, so one is enough."""
    folder = tmp_path_factory.mktemp("work")
    _make_files(folder)
    _make_models(folder / "models", word_tokenizer)
    _make_strangers_models(folder, folder / "models" / "dense")
    return folder


@pytest.fixture(scope="module")
def before(workplace: Path) -> dict[str, str]:
    """What the files hold."""
    return _contents(workplace)


def _contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _check(result: Outcome, expected: list[str]) -> None:
    lines = [line for line in result.stderr.splitlines() if not line.rstrip().endswith(" …")]
    message = "\n".join(line for line in lines if line.strip() not in PROGRESS)
    assert result.code == 2, result
    for text in expected:
        assert text in message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 2, message


@pytest.mark.parametrize(("command", "expected"), TABLE, ids=[row[0] for row in TABLE])
def test_wrong_input(
    dtf: Callable[..., Outcome],
    workplace: Path,
    before: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    expected: list[str],
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name in MISSING else find_spec(name, *_))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(workplace / "no-token"))
    monkeypatch.setenv("DTF_DATA__CACHE_DIR", str(workplace / "cache"))
    monkeypatch.chdir(workplace)

    def named(text: str) -> str:
        for name in MODELS:
            text = text.replace(f"{{{name}}}", f"{workplace}/models/{name}")
        return text.replace("{chat}", "chat")

    _check(dtf(*shlex.split(named(command))), [named(text) for text in expected])
    assert _contents(workplace) == before
    assert not (workplace / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("DTF_TRAINING__MAX_STEPS", "many", ["training.max_steps", "DTF_TRAINING__MAX_STEPS", "a whole number"]),
        ("DTF_TRAINING__MAXSTEPS", "3", ["DTF_TRAINING__MAXSTEPS", "Did you mean 'training.max_steps'"]),
        ("DTF_MAX_STEPS", "3", ["max_steps: unknown key (from DTF_MAX_STEPS)", "Did you mean 'training.max_steps'"]),
    ],
)
def test_environment(
    dtf: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: list[str]
) -> None:
    monkeypatch.setenv(name, value)
    _check(dtf("train", "quickstart", "--dry-run"), expected)
