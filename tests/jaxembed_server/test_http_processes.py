"""HTTP processes before the engine process: everything that one process promises, and what can befall several."""

import concurrent.futures
import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from fakes import vector
from servers import Server

from jaxembed import Embedder

HERE = Path(__file__).parent


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A text that begins with w waits until this file exists."""
    return tmp_path / "gate"


@pytest.fixture
def begin(gate: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers with two HTTP processes and an engine that does as it is told; ends those that are left."""
    servers = []

    def start(*flags: str, processes: int = 2, **environment: str) -> Server:
        path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        given = ("--http-processes", str(processes), "--refine-after", "0", *flags)
        environment |= {"PYTHONPATH": path, "FAKE_GATE": str(gate)}
        servers.append(Server(*given, module="fake_server", **environment))
        return servers[-1]

    yield start
    for server in servers:
        server.stop(signal.SIGKILL)


def post(server: Server, *, timeout: float = 60, **body: object) -> requests.Response:
    """Over a connection of its own, which the kernel gives to one process or the other."""
    return requests.post(f"{server.url}/v1/embeddings", json=body, timeout=timeout)


def ids(text: str) -> list[int]:
    return [1, *(ord(letter) - ord("a") + 3 for letter in text), 2]


def metric(server: Server, name: str) -> float:
    found = [line for line in server.get("/metrics").decode().splitlines() if line.startswith(name + " ")]
    return float(found[0].split()[1]) if found else 0.0


def children(server: Server) -> list[int]:
    listed = Path(f"/proc/{server.process.pid}/task")
    return [int(pid) for task in listed.iterdir() for pid in (task / "children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def waiting(server: Server, gate: Path) -> None:
    """Until the engine waits at the gate."""
    server.wait_until(Path(f"{gate}.waiting").exists)


def test_many_clients_each_get_their_own_vectors(begin: Callable[..., Server]) -> None:
    server = begin().wait_until_ready()
    texts = [chr(ord("a") + n % 20) * (1 + n % 30) for n in range(200)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda text: post(server, input=[text, "ab"], dimensions=3), texts))
    for text, answer in zip(texts, answers, strict=True):
        assert answer.status_code == 200, answer.text
        got = [one["embedding"] for one in answer.json()["data"]]
        np.testing.assert_array_equal(got, [vector(ids(text))[:3], vector(ids("ab"))[:3]])
        assert answer.json()["usage"]["prompt_tokens"] == len(text) + 2 + 4


def test_the_real_model_through_http_processes(start: Callable[..., Server], minilm: Embedder) -> None:
    sizes = ("--max-length", "128", "--max-batch-tokens", "128")
    server = start("--http-processes", "2", "--refine-after", "0", *sizes).wait_until_ready()
    texts = [f"Text number {n}, naïve 東京 " + "word " * (n % 60) for n in range(32)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: post(server, input=text), texts))
    got = [answer.json()["data"][0]["embedding"] for answer in answers]
    np.testing.assert_allclose(got, minilm.encode(texts), rtol=0, atol=2e-6)
    assert server.stop() == 0


def test_connections_go_to_every_process_and_none_imports_jax(begin: Callable[..., Server]) -> None:
    server = begin().wait_until_ready()
    sockets = {pid: open_sockets(pid) for pid in children(server)}
    assert len(sockets) == 2
    host, port = server.url.removeprefix("http://").split(":")
    # Of 64 connections all to one process: once in 2**63 runs.
    connections = [socket.create_connection((host, int(port)), timeout=10) for _ in range(64)]
    try:
        server.wait_until(lambda: sum(open_sockets(pid) - before for pid, before in sockets.items()) >= 64)
        assert all(open_sockets(pid) > before for pid, before in sockets.items())
    finally:
        for connection in connections:
            connection.close()
    for pid in sockets:
        mapped = Path(f"/proc/{pid}/maps").read_text()
        assert "tokenizers" in mapped
        assert "jaxlib" not in mapped


def open_sockets(pid: int) -> int:
    return sum(os.readlink(file).startswith("socket:") for file in Path(f"/proc/{pid}/fd").iterdir())


def test_every_process_tells_the_state_of_the_engine(begin: Callable[..., Server], tmp_path: Path) -> None:
    loading = tmp_path / "loading"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = begin("--port", str(port), "--served-model-name", "mine", FAKE_LOADING=str(loading))
    url = f"http://127.0.0.1:{port}"
    server.wait_until(Path(f"{loading}.waiting").exists)
    for _ in range(8):
        answer = requests.get(f"{url}/ready", timeout=60)
        if answer.json()["status"] != "loading":
            assert (answer.status_code, answer.json()) == (503, {"status": "warming", "warmed": 1, "of": 2})
            assert answer.headers["Retry-After"] == "1"
        assert requests.get(f"{url}/health", timeout=10).status_code == 200
        assert requests.get(f"{url}/v1/models", timeout=10).status_code == 503
        assert requests.post(f"{url}/v1/embeddings", json={"input": "a"}, timeout=10).status_code == 503
        assert "jaxembed_ready 0.0" in requests.get(f"{url}/metrics", timeout=10).text
    loading.touch()
    server.wait_until_ready()
    for _ in range(8):
        assert json.loads(server.get("/ready")) == {"status": "ready", "warmed": 2, "of": 2}
        (card,) = json.loads(server.get("/v1/models"))["data"]
        assert (card["id"], card["embedding_dimension"], card["max_model_len"]) == ("mine", 4, 64)
        assert metric(server, "jaxembed_ready") == 1
        assert metric(server, "jaxembed_compiled_buckets") == 1


def test_a_failed_batch_fails_its_request_alone(begin: Callable[..., Server]) -> None:
    server = begin().wait_until_ready()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: post(server, input=text), ["xa", "ab"] * 16))
    assert [answer.status_code for answer in answers] == [500, 200] * 16
    assert {answer.json()["error"]["code"] for answer in answers[::2]} == {"internal_error"}
    assert "begins with x" in server.output
    assert "begins with x" not in "".join(answer.text for answer in answers)


def test_what_the_client_did_wrong_is_told_as_ever(begin: Callable[..., Server]) -> None:
    server = begin("--api-key", "secret").wait_until_ready()
    headers = {"Authorization": "Bearer secret"}
    for body, code in (
        ({"input": "a" * 63}, "context_length_exceeded"),
        ({"input": [[1, 99]]}, "invalid_token_id"),
        ({"input": "a", "dimensions": 1}, "invalid_dimensions"),
        ({"input": "a", "prompt_name": "nobody's"}, "invalid_value"),
    ):
        answer = requests.post(f"{server.url}/v1/embeddings", json=body, headers=headers, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert post(server, input="a").status_code == 401
    answer = requests.post(
        f"{server.url}/v1/embeddings", json={"input": "a", "prompt_name": "query"}, headers=headers, timeout=60
    )
    np.testing.assert_array_equal(answer.json()["data"][0]["embedding"], vector([1, 19, 0, 3, 2]))


def test_a_full_queue_is_refused_with_when_to_come_again(begin: Callable[..., Server], gate: Path) -> None:
    server = begin("--max-queue-tokens", "20").wait_until_ready()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, server, input="waaaaaaaaaaaaa")
        waiting(server, gate)
        # Whichever process it comes to, the engine process has admitted 16 tokens of 20.
        for _ in range(8):
            answer = post(server, input="abcdef")
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
            assert "16 tokens are waiting, 20 may" in answer.json()["error"]["message"]
            assert int(answer.headers["Retry-After"]) >= 1
        gate.touch()
        assert first.result().status_code == 200


def test_a_deadline_gives_up_and_drops_the_rows(begin: Callable[..., Server], gate: Path) -> None:
    server = begin("--request-timeout", "0.5").wait_until_ready()
    answer = post(server, input=["wa"] + ["ab"] * 50)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    server.wait_until(lambda: metric(server, "jaxembed_queue_tokens") == 0)
    gate.touch()
    assert post(server, input="ab").status_code == 200
    # Of the rows that had not been started none was run: one of the first request at most, and the last one.
    server.wait_until(lambda: metric(server, "jaxembed_batch_rows_count") >= 2)
    assert metric(server, "jaxembed_batch_rows_count") <= 3


def test_clients_that_go_away_are_dropped(begin: Callable[..., Server], gate: Path) -> None:
    server = begin().wait_until_ready()
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"input": ["wa"] + ["ab"] * 50}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connections = [socket.create_connection((host, int(port)), timeout=10) for _ in range(8)]
    for connection in connections:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
    server.wait_until(lambda: metric(server, "jaxembed_queue_tokens") == 8 * 51 * 4)
    for connection in connections:
        connection.close()
    server.wait_until(lambda: metric(server, "jaxembed_queue_tokens") == 0)
    gate.touch()
    assert post(server, input="ab").status_code == 200


def test_one_scrape_tells_of_all_processes(begin: Callable[..., Server]) -> None:
    server = begin().wait_until_ready()
    for _ in range(40):
        assert post(server, input="ab").status_code == 200
    name = 'jaxembed_requests_total{route="/v1/embeddings",status="200"}'
    server.wait_until(lambda: metric(server, name) == 40)
    # Through whichever process it is asked.
    assert [metric(server, name) for _ in range(16)] == [40.0] * 16
    assert metric(server, 'jaxembed_request_seconds_count{route="/v1/embeddings"}') == 40


def test_a_killed_process_is_replaced_and_its_requests_dropped(begin: Callable[..., Server], gate: Path) -> None:
    server = begin().wait_until_ready()
    before = children(server)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(post, server, input=["wa", "ab"]) for _ in range(8)]
        server.wait_until(lambda: metric(server, "jaxembed_queue_tokens") == 8 * 8)
        os.kill(before[0], signal.SIGKILL)
        server.wait_until(lambda: len(children(server)) == 2 and before[0] not in children(server))
        # Connections that wait for the new process are not refused: the socket has stayed open.
        for _ in range(16):
            assert json.loads(server.get("/health")) == {"status": "ok"}
        # The other process's requests are still in, and no other.
        lost = sum(isinstance(future.exception(), requests.ConnectionError) for future in running if future.done())
        server.wait_until(lambda: metric(server, "jaxembed_queue_tokens") == (8 - ended(running)) * 8)
        gate.touch()
        outcomes = [future.exception() or future.result().status_code for future in running]
    assert outcomes.count(200) == 8 - lost
    assert "an HTTP process ended with -9; starting another" in server.output
    server.wait_until(lambda: all(json.loads(server.get("/ready"))["status"] == "ready" for _ in range(16)))
    assert post(server, input="ab").status_code == 200
    assert server.stop() == 0


def ended(running: "list[concurrent.futures.Future[requests.Response]]") -> int:
    return sum(future.done() for future in running)


def test_when_the_engine_process_dies_the_others_end_and_say_so(begin: Callable[..., Server]) -> None:
    server = begin().wait_until_ready()
    running = children(server)
    server.stop(signal.SIGKILL)
    server.wait_until(lambda: not any(alive(pid) for pid in running))
    assert server.output.count("the engine process is gone: this HTTP process ends too") == 2
    assert "Traceback" not in server.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_the_work_in_flight(begin: Callable[..., Server], gate: Path, number: int) -> None:
    server = begin().wait_until_ready()
    running = children(server)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(post, server, input=["wa", "ab"]) for _ in range(8)]
        server.wait_until(lambda: metric(server, "jaxembed_queue_tokens") == 8 * 8)
        # A service manager signals all of them.
        for pid in (*running, server.process.pid):
            os.kill(pid, number)
        server.wait_until(lambda: requests.get(f"{server.url}/ready", timeout=10).json()["status"] == "draining")
        refused = post(server, input="ab")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        gate.touch()
        assert [future.result().status_code for future in answers] == [200] * 8
    assert server.process.wait(30) == 0
    assert not any(alive(pid) for pid in running)
    assert "Traceback" not in server.output


def test_what_is_not_finished_in_time_is_refused(begin: Callable[..., Server], gate: Path) -> None:
    server = begin("--drain-timeout", "0.5").wait_until_ready()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, server, input=["wa", "ab"])
        waiting(server, gate)
        assert server.stop() == 0
        assert (answer.result().status_code, answer.result().json()["error"]["code"]) == (503, "not_ready")


def test_a_process_that_hangs_does_not_keep_the_server_from_ending(begin: Callable[..., Server]) -> None:
    server = begin(processes=1).wait_until_ready()
    (child,) = children(server)
    os.kill(child, signal.SIGSTOP)
    assert server.stop() == 0
    assert not alive(child)
    assert "did not end by itself" in server.output


def test_a_stop_while_loading_is_a_stop(begin: Callable[..., Server], tmp_path: Path) -> None:
    server = begin(FAKE_LOADING=str(tmp_path / "never"))
    server.wait_until(Path(tmp_path / "never.waiting").exists)
    server.wait_until(lambda: len(children(server)) == 2)
    running = children(server)
    assert server.stop() == 0
    assert not any(alive(pid) for pid in running)
    assert "Traceback" not in server.output


def test_a_port_that_is_taken_is_said(begin: Callable[..., Server]) -> None:
    server = begin().wait_until_ready()
    second = begin("--port", server.url.rpartition(":")[2])
    assert second.process.wait(60) == 1
    second.stop()
    assert "cannot listen on 127.0.0.1" in second.output
    assert "Traceback" not in second.output


def test_what_reaches_the_port_while_a_process_is_replaced_waits(begin: Callable[..., Server]) -> None:
    server = begin(processes=1).wait_until_ready()
    for _ in range(3):
        (child,) = children(server)
        os.kill(child, signal.SIGKILL)
        # Taken from the socket's queue by the next process; 503 until that has been told that the model is ready.
        server.wait_until(lambda: requests.get(f"{server.url}/ready", timeout=30).status_code == 200)
        assert post(server, input="ab").status_code == 200
    assert server.stop() == 0


@pytest.mark.parametrize("processes", [0, 2])
def test_the_access_log_is_whole(begin: Callable[..., Server], processes: int) -> None:
    """A thread of its own writes it, down to the last line before the end, and each line once."""
    server = begin("--access-log", processes=processes).wait_until_ready()
    for _ in range(20):
        assert post(server, input="a").status_code == 200
    assert requests.get(f"{server.url}/nothing", timeout=60).status_code == 404
    assert server.stop() == 0
    lines = re.findall(r"INFO jaxembed_server\.access: (\S+ \S+ \d+) \d+\.\d ms\n", server.output)
    assert lines.count("POST /v1/embeddings 200") == 20
    assert len([line for line in lines if line.endswith(" 404")]) == 1
