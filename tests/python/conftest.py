"""A real server per test module, on a free port, ended when its tests are over."""

import collections
import os
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
PATIENCE_S = 60.0


class Server:
    """The binary named by MOESAIC_BIN over a golden checkpoint."""

    def __init__(self, model: str, *args: str):
        # The server refuses MOESAIC_* variables that it does not know.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MOESAIC_")}
        binary = os.environ["MOESAIC_BIN"]
        # Answers are computed: what came from the output cache would prove nothing about the engine.
        small = ["--port", "0", "--threads", "1", "--kv-cache-memory", "32MiB", "--kv-cache-dtype", "f32", "--output-cache", "off"]
        self.model = model
        self.output: collections.deque[str] = collections.deque(maxlen=1000)
        self.process = subprocess.Popen(
            [binary, "serve", str(GOLDEN / model), *small, *args],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._capture, daemon=True).start()
        try:
            self.url = self.poll("an address", self._printed_url)
            self.poll("readiness", lambda: self._get("/ready")[0] == 200)
        except BaseException:
            self.stop()
            raise

    def _capture(self):
        for line in self.process.stdout:
            self.output.append(line)

    def _printed_url(self) -> str | None:
        match = re.search(r"on (http://\S+)\n", "".join(list(self.output)))
        return match and match[1]

    def _get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=PATIENCE_S) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""

    def poll(self, what: str, probe):
        """Looks until `probe` gives something true."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            value = probe()
            if value:
                return value
            assert self.process.poll() is None, "the server ended:\n" + "".join(self.output)
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S} s\n" + "".join(self.output)
            time.sleep(0.005)

    def metric(self, name: str, label: str = "") -> float:
        lines = self._get("/metrics")[1].splitlines()
        samples = [line for line in lines if re.match(re.escape(name) + r"[{ ]", line) and label in line]
        assert samples, f"{name} is not in /metrics"
        return sum(float(line.rsplit(" ", 1)[1]) for line in samples)

    def wait_idle(self):
        names = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]
        self.poll("an idle server", lambda: all(self.metric(name) == 0 for name in names))

    def options(self, key: str = "none") -> dict:
        return {"base_url": self.url + "/v1", "api_key": key, "max_retries": 0, "timeout": PATIENCE_S}

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(**self.options(key))

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@pytest.fixture
def start():
    """Starts servers that end with the test."""
    servers = []

    def start_one(*args: str) -> Server:
        servers.append(Server("mixtral-base", *args))
        return servers[-1]

    yield start_one
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server():
    """One server for the tests of a module, which must leave it idle and end with code 0."""
    server = Server("mixtral-base")
    yield server
    server.wait_idle()
    assert server.stop() == 0, "".join(server.output)


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client
