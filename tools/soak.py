"""Many clients at once ask `dtf serve` for minutes; every answer is compared with what `generate` gives.

python -m tools.soak MODEL [--clients 32] [--seconds 600] [--out soak.json] [--url http://127.0.0.1:8000]

A server with continuous batching is started on the loopback address. One client asks, then sixteen, then --clients:
half of the answers are streamed, a fifth of the clients hang up half-way, a tenth ask what no server can answer, and a
tenth want a sample instead of the likeliest text. Then more ask at once than the server takes, and two signals end it.
Stdout gets a table, --out all figures; the exit status is 1 if a check failed. With --url the server runs already; what
it holds is not seen then.
"""

import argparse
import asyncio
import gc
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from dtfcli.loading.load import load_model_and_tokenizer, open_source
from dtfcli.serving.requests import Limits

NEAR = 1e-5
"""Two logits, or a routing score and its threshold, may change places if they are nearer than this."""
HANG_UP, WRONG, SAMPLED, STREAMED = 0.2, 0.1, 0.1, 0.5
AT_ONCE = Limits(1).requests
SHORT = 64
"""Tokens of the prompts by which one client is compared with sixteen."""


@dataclass(frozen=True)
class Question:
    """A prompt and its greedy answer, as tokens and as the text that a client reads."""

    prompt: str
    ids: list[int]
    answer: list[int]
    text: str


class Pool:
    """Questions of many lengths, the answers that the model gives alone, and what is wrong with another answer."""

    def __init__(self, model: Any, tokenizer: Any, text: str, given: argparse.Namespace) -> None:
        """`text` is cut into `given.questions` prompts of 1 to `given.longest` tokens."""
        self.model, self.tokenizer, self.positions = model, tokenizer, model.config.max_position_embeddings
        words, chance = text.split(), random.Random(0)
        longest = min(given.longest, self.positions - given.answers)
        self.questions: list[Question] = []
        for _ in range(given.questions):
            start, length = chance.randrange(len(words)), round(longest ** chance.random())
            ids = tokenizer(" ".join(words[start : start + length]))["input_ids"][:length]
            self.questions.append(self._question(tokenizer.decode(ids), chance.randint(1, given.answers)))

    def _question(self, prompt: str, tokens: int) -> Question:
        ids = self.tokenizer(prompt)["input_ids"]
        whole = self.model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0].tolist()
        answer = whole[len(ids) :]
        return Question(prompt, ids, answer, self.tokenizer.decode(answer, skip_special_tokens=True))

    def fault(self, question: Question, text: str, is_whole: bool) -> str:
        """What is wrong with an answer: nothing, "tie: …" if two equals changed places, or more."""
        ours, theirs = question.text.rstrip("�"), text.rstrip("�")
        if ours == theirs or (not is_whole and ours.startswith(theirs)):
            return ""
        same = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if len({*pair}) > 1), len(theirs))
        kept = [len(self.tokenizer.decode(question.answer[: i + 1])) <= same for i in range(len(question.answer))]
        place = f"{len(question.ids)} tokens asked, token {sum(kept)} of the answer"
        if tie := self._tie(question.ids + question.answer[: sum(kept)]):
            return f"tie: {place}: {tie}"
        if any(theirs == other.text for other in self.questions):
            return f"another's answer: {place}"
        return f"wrong: {place}: {theirs[same : same + 20]!r} for {ours[same : same + 20]!r}"

    @torch.no_grad()
    def _tie(self, ids: list[int]) -> str:
        rows = torch.tensor([ids])
        best, second = self.model(rows).logits[0, -1].topk(2).values.tolist()
        if best - second < NEAR * max(1.0, abs(best)):
            return f"two logits {best - second:.1e} apart"
        has_routing = hasattr(self.model, "set_routing")
        for layer, record in enumerate(self.model(rows, output_routing=True).routing if has_routing else ()):
            gap = float((record.scores - record.threshold).abs().min())
            if gap < NEAR * max(1.0, float(record.scores.abs().max())):
                return f"a score {gap:.1e} from the threshold of routed layer {layer}"
        return ""


@dataclass
class Tally:
    """What the clients saw."""

    seen: Counter[str] = field(default_factory=Counter)
    ties: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0

    def note(self, fault: str) -> None:
        if fault:
            (self.ties if fault.startswith("tie") else self.faults).append(fault)


class Clients:
    """They ask one server and note in a tally what they see."""

    def __init__(self, http: httpx.AsyncClient, pool: Pool, name: str) -> None:
        self.http, self.pool, self.name, self.tally = http, pool, name, Tally()
        good = self.body("a", 2)
        changes: list[tuple[dict[str, Any], str]] = [
            ({"model": "another"}, "one model"),
            ({"prompt": 7}, "prompt: should be"),
            ({"prompt": " a" * pool.positions}, f"at most {pool.positions} fit"),
            ({"max_tokens": "many"}, "max_tokens: should be"),
            ({"max_tokens": pool.positions + 1}, f"1 to {pool.positions}"),
            ({"picture": "a"}, "picture: no field"),
        ]
        self.wrong = [(b'{"prompt": ', "not JSON")] + [(json.dumps(good | more).encode(), w) for more, w in changes]

    def body(self, prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
        return {"model": self.name, "prompt": prompt, "max_tokens": tokens, "temperature": 0} | more

    async def ask(self, question: Question, stream: bool, leaves_after: int = 10**9, heat: float = 0) -> int:
        """Ask, read at most so many pieces of a stream, and compare if it is no sample. Returns the status."""
        begun, text, tokens = time.perf_counter(), "", 0
        body = self.body(question.prompt, len(question.answer), stream=stream, temperature=heat)
        async with self.http.stream("POST", "/completions", json=body) as answer:
            if answer.status_code != 200:
                self.tally.seen[str(answer.status_code)] += 1
                if (answer.status_code, "retry-after" in answer.headers) != (429, True):
                    self.tally.note(f"{answer.status_code}: {(await answer.aread())[:100]!r}")
                return answer.status_code
            pieces = 0
            async for line in answer.aiter_lines():
                if not line.startswith(("data: {", "{")):
                    continue
                piece = json.loads(line.removeprefix("data: "))
                text += piece["choices"][0].get("text") or ""
                tokens = (piece.get("usage") or {}).get("completion_tokens", 0)
                if stream and not pieces:
                    self.tally.first.append(time.perf_counter() - begun)
                if (pieces := pieces + 1) > leaves_after:
                    break
        is_left = not tokens and pieces > leaves_after
        self.tally.seen["left" if is_left else "sampled" if heat else "streamed" if stream else "whole"] += 1
        self.tally.note("" if heat else self.pool.fault(question, text, not is_left))
        if not is_left:
            self.tally.whole.append(time.perf_counter() - begun)
            self.tally.tokens += tokens
            if tokens != len(question.answer):
                self.tally.note(f"lost: {tokens} of {len(question.answer)} tokens")
        return 200

    async def ask_wrongly(self, body: bytes, word: str) -> None:
        answer = await self.http.post("/completions", content=body, headers={"content-type": "application/json"})
        self.tally.seen["refused with 400"] += 1
        if answer.status_code != 400 or word not in answer.text:
            self.tally.note(f"{body[:60]!r} gave {answer.status_code}, {answer.text[:100]}")

    async def go_on(self, until: float, chance: random.Random, questions: list[Question], is_kind: bool) -> None:
        """One request after another; a kind client neither leaves nor asks wrongly."""
        while time.perf_counter() < until:
            question, draw, stream = chance.choice(questions), chance.random(), chance.random() < STREAMED
            try:
                if is_kind or draw > HANG_UP + WRONG + SAMPLED:
                    await self.ask(question, stream)
                elif draw > HANG_UP + WRONG:
                    await self.ask(question, stream, heat=1.0)
                elif draw > HANG_UP:
                    await self.ask_wrongly(*chance.choice(self.wrong))
                elif stream:
                    await self.ask(question, True, leaves_after=len(question.answer) // 2)
                else:
                    async with asyncio.timeout(chance.random() * statistics.median(self.tally.whole or [0.1])):
                        await self.ask(question, False)
            except TimeoutError:
                self.tally.seen["left"] += 1
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.tally.note(f"{type(error).__name__}: {error}")

    async def all_ask(self, number: int, seconds: float, questions: list[Question], is_kind: bool = True) -> float:
        """So many ask for a time; returns the tokens that they got in a second."""
        self.tally, begun = Tally(), time.perf_counter()
        chances = [random.Random(number) for number in range(number)]
        await asyncio.gather(*(self.go_on(begun + seconds, chance, questions, is_kind) for chance in chances))
        return self.tally.tokens / (time.perf_counter() - begun)


class Report(list[tuple[str, str, str, bool]]):
    """Checks: a name, what was seen, what was wanted, and whether it is so."""

    def add(self, name: str, seen: object, wanted: str, is_so: bool) -> None:
        self.append((name, str(seen), wanted, is_so))

    def judge(self, name: str, tally: Tally) -> None:
        seen = f"{sum(tally.seen.values())} requests, {len(tally.ties)} ties, {len(tally.faults)} wrong"
        self.add(name, "; ".join([seen, *tally.ties[:3], *tally.faults[:3]]), "none wrong", not tally.faults)


class Server:
    """A server of our own, and what it holds."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log, self.memory = process, log, list[int]()
        self.inside = psutil.Process(process.pid)

    def says(self, pattern: str, after: int = 0) -> str:
        """The first such text of its log after so many characters."""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            if match := re.search(pattern, self.log.read_text()[after:]):
                return match[1]
            time.sleep(0.05)
        raise SystemExit(f"The server does not say {pattern}: {self.log.read_text()[-2000:]}")

    def holds(self) -> dict[str, int]:
        after = len(self.log.read_text())
        self.process.send_signal(signal.SIGUSR1)
        held: dict[str, int] = json.loads(self.says(r"soak: (.*)\n", after))
        return held | {"threads": self.inside.num_threads(), "files": self.inside.num_fds()}

    async def watch(self) -> None:
        while True:
            self.memory.append(self.inside.memory_info().rss)
            await asyncio.sleep(1)


def served() -> None:
    """`dtf serve` in this process, which says on SIGUSR1 what it holds."""

    def say(*_: Any) -> None:
        held = Counter(blocks=0, requests=0, handlers=0, unread=0)
        for thing in gc.get_objects():
            if type(thing).__name__ == "FIFOScheduler":
                held["blocks"] += sum(len(a.block_table) for a in thing.cache.cache_allocators.values())
                held["requests"] += len(thing.active_requests) + len(thing.waiting_requests)
            elif type(thing).__name__ == "OutputRouter":
                held["handlers"] += len(thing.result_handlers)
                held["unread"] += thing.output_queue.qsize()
        sys.stderr.write(f"soak: {json.dumps(held)}\n")

    from dtfcli.cli.app import main

    signal.signal(signal.SIGUSR1, say)
    main()


@contextmanager
def serving(model: str) -> Iterator[tuple[str, Server]]:
    """The address of a server, and the server."""
    command = [sys.executable, "-c", "from tools.soak import served; served()", "serve", model, "--continuous-batching"]
    command += ["--host", "127.0.0.1", "--port", "0", "--device", "cpu", "--dtype", "float32"]
    with tempfile.TemporaryDirectory() as folder, (log := Path(folder) / "log").open("w") as stderr:
        process = subprocess.Popen(command, stdout=stderr, stderr=stderr)
        try:
            server = Server(process, log)
            yield server.says(r"Uvicorn running on (http://[\d.:]+)"), server
        finally:
            process.kill()
            process.wait()


async def compare(clients: Clients, seconds: float, report: Report) -> dict[str, float]:
    """Tokens a second of one client and of sixteen, with short prompts and with all."""
    rates, questions = dict[str, float](), clients.pool.questions
    await clients.ask(questions[0], False, heat=0.7)  # the first request decides nothing for the others
    for kind, asked in (("short", [q for q in questions if len(q.ids) <= SHORT]), ("mixed", questions)):
        for number in (1, 16):
            name = f"{kind} prompts, {number} at once"
            rates[name] = await clients.all_ask(number, seconds, asked)
            report.judge(name, clients.tally)
        gain = rates[name] / rates[f"{kind} prompts, 1 at once"]
        report.add(f"{kind} prompts, tokens/s of 16 over 1", f"{gain:.2f}", "3 or more", gain >= 3)
    return rates


async def load(clients: Clients, server: Server | None, number: int, seconds: float, report: Report) -> dict[str, Any]:
    """All clients ask; returns figures."""
    before, watch = (server.holds(), asyncio.ensure_future(server.watch())) if server else ({}, None)
    rate = await clients.all_ask(number, seconds, clients.pool.questions, is_kind=False)
    tally = clients.tally
    report.judge(f"{number} clients", tally)
    figures: dict[str, Any] = {"tokens/s": rate, "seen": tally.seen}
    for name, times in (("first token", tally.first), ("whole answer", tally.whole)):
        figures[name] = {"median": statistics.median(times), "p99": statistics.quantiles(times, n=100)[98]}
    if server and watch:
        watch.cancel()
        await asyncio.sleep(1)
        figures["memory in MB"] = [size // 2**20 for size in server.memory]
        rest = server.memory[min(60, len(server.memory) // 4) :]
        low, high = min(rest) / rest[0], max(rest) / rest[0]
        report.add("memory after a minute", f"{low:.3f} to {high:.3f}", "0.95 to 1.05", low >= 0.95 and high <= 1.05)
        for name, left in server.holds().items():
            most = before[name] if name in ("threads", "files") else 0
            report.add(f"{name} left behind", left, f"{most} at most", left <= most)
    return figures


async def crowd(clients: Clients, report: Report) -> None:
    """More at once than the server takes: the others get 429, come again, and are answered."""

    async def insist(question: Question) -> None:
        while await clients.ask(question, False) == 429:
            await asyncio.sleep(1)

    clients.tally = Tally()
    await asyncio.gather(*(insist(random.choice(clients.pool.questions)) for _ in range(AT_ONCE + 16)))
    report.judge(f"{AT_ONCE + 16} at once", clients.tally)
    refused = clients.tally.seen["429"]
    report.add("refused with 429 meanwhile", refused, "16 or more", refused >= 16)


async def end(clients: Clients, server: Server, report: Report) -> None:
    """SIGTERM: running answers finish, new ones get 503; a second one ends the process at once."""
    clients.tally, long = Tally(), clients.body("a", clients.pool.positions - 8)
    endless = asyncio.ensure_future(clients.http.post("/completions", json=long))
    running = [asyncio.ensure_future(clients.ask(question, True)) for question in clients.pool.questions[:4]]
    await asyncio.sleep(0.2)
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    late = (await clients.http.post("/completions", json=long)).status_code
    report.add("a request after SIGTERM", late, "503", late == 503)
    await asyncio.gather(*running)
    report.judge("running answers after SIGTERM", clients.tally)
    server.process.send_signal(signal.SIGTERM)
    begun = time.perf_counter()
    while server.process.poll() is None and time.perf_counter() < begun + 30:
        await asyncio.sleep(0.05)
    took = time.perf_counter() - begun
    report.add("end after a second SIGTERM", f"{took:.1f} s", "3 s at most", took <= 3)
    await asyncio.gather(endless, return_exceptions=True)


async def soak(pool: Pool, url: str, server: Server | None, given: argparse.Namespace) -> dict[str, Any]:
    """All phases; figures, with `report` among them."""
    report, limits = Report(), httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=f"{url}/v1", timeout=600, limits=limits, trust_env=False) as http:
        clients = Clients(http, pool, given.model)
        rates = await compare(clients, max(1.0, given.seconds / 20), report)
        figures = await load(clients, server, given.clients, given.seconds, report)
        await crowd(clients, report)
        if server:
            await end(clients, server, report)
    return {"report": report, "one or sixteen, tokens/s": rates, **figures}


def main(arguments: list[str] | None = None) -> int:
    """Ask for `--seconds`; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--longest", type=int, default=2000, help="tokens of a prompt")
    parser.add_argument("--answers", type=int, default=64, help="tokens of an answer, at most")
    parser.add_argument("--text", type=Path, default=Path("docs/results.md"), help="a file to ask about")
    parser.add_argument("--url", help="of a server that runs, such as http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    model, tokenizer = load_model_and_tokenizer(open_source(given.model), device="cpu", dtype="float32")
    pool = Pool(model, tokenizer, given.text.read_text(encoding="utf-8"), given)
    if given.url:
        figures = asyncio.run(soak(pool, given.url, None, given))
    else:
        with serving(given.model) as (url, server):
            figures = asyncio.run(soak(pool, url, server, given))
    for name, seen, wanted, is_so in figures["report"]:
        sys.stdout.write(f"{'ok  ' if is_so else 'FAIL'} {name:36} {seen}  ({wanted})\n")
    shown = {name: value for name, value in figures.items() if name not in ("report", "memory in MB")}
    sys.stdout.write(f"{json.dumps(shown, indent=1)}\n")
    if given.out:
        given.out.write_text(json.dumps(figures, indent=1) + "\n")
    return int(not all(is_so for *_, is_so in figures["report"]))


if __name__ == "__main__":
    sys.exit(main())
