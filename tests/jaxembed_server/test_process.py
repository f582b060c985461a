"""The server as a process: start, stop, and everything that can be thrown at a socket."""

import asyncio
import base64
import concurrent.futures
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openai
import pytest
import requests
from servers import Server

from jaxembed import Embedder


def post(server: Server, *, timeout: float = 60, **body: object) -> requests.Response:
    return requests.post(f"{server.url}/v1/embeddings", json=body, timeout=timeout)


def queued_tokens(server: Server) -> float:
    line = next(line for line in server.get("/metrics").splitlines() if line.startswith(b"jaxembed_queue_tokens "))
    return float(line.split()[1])


def address(server: Server) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def test_the_printed_curl_line_works(server: Server) -> None:
    command = server.output[server.output.index("curl http") :].split("\n\n")[0].replace("\\\n", " ")
    done = subprocess.run(shlex.split(command), capture_output=True, check=True, timeout=60)
    assert len(json.loads(done.stdout)["data"][0]["embedding"]) == 384


def test_health_and_readiness(server: Server) -> None:
    assert json.loads(server.get("/health")) == {"status": "ok"}
    ready = json.loads(server.get("/ready"))
    assert ready["status"] == "ready"
    assert ready["warmed"] == ready["of"] > 0


def test_many_clients_each_get_their_own_vectors(server: Server, minilm: Embedder) -> None:
    texts = [f"text number {n} " + "word " * (n % 60) for n in range(64)]
    expected = minilm.encode(texts)

    async def main() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
            answers = await asyncio.gather(*(client.embeddings.create(model="", input=text) for text in texts))
        return [answer.data[0].embedding for answer in answers]

    np.testing.assert_allclose(asyncio.run(main()), expected, rtol=0, atol=2e-6)


def test_the_largest_request_that_is_allowed(server: Server, minilm: Embedder) -> None:
    texts = [f"{n} " * (1 + n % 20) for n in range(2048)]
    answer = post(server, input=texts, encoding_format="base64", timeout=240)
    assert answer.status_code == 200
    data = answer.json()["data"]
    assert [one["index"] for one in data] == list(range(2048))
    for n in (0, 19, 1000, 2047):
        vector = np.frombuffer(base64.b64decode(data[n]["embedding"]), "<f4")
        np.testing.assert_allclose(vector, minilm.encode(texts[n]), rtol=0, atol=2e-6)


def test_a_hundred_thousand_items_are_refused(server: Server) -> None:
    answer = post(server, input=["a"] * 100_000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "array_above_max_length")
    answer = post(server, input=[1] * 100_000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_body_that_is_too_large_is_refused(server: Server) -> None:
    try:
        answer = requests.post(
            f"{server.url}/v1/embeddings",
            data=b" " * (16 * 2**20 + 1),
            headers={"Content-Type": "application/json"},
            timeout=60,
        )
    except requests.ConnectionError:
        # The server answers and closes without reading it all; the client may be cut off while it still writes.
        pass
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
    assert post(server, input="still there").status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x01\x02\xff" * 100,
        b"GET /health HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\nContent-Length: 20\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
    ],
)
def test_garbage_on_the_socket_does_no_harm(server: Server, sent: bytes) -> None:
    with socket.create_connection(address(server), timeout=10) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(10)
        answer = b""
        try:
            while chunk := connection.recv(65536):
                answer += chunk
        except ConnectionError:
            pass
    assert not answer.startswith(b"HTTP/1.1 2")
    assert b"Traceback" not in answer
    assert post(server, input="still there").status_code == 200


def test_clients_that_go_away_are_dropped(server: Server) -> None:
    body = json.dumps({"input": ["word " * 200] * 500}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connections = []
    for _ in range(4):
        connection = socket.create_connection(address(server), timeout=10)
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        connections.append(connection)
    server.wait_until(lambda: queued_tokens(server) > 200_000)
    for connection in connections:
        connection.close()
    server.wait_until(lambda: queued_tokens(server) == 0, seconds=10)
    assert post(server, input="still there").status_code == 200


def test_sigterm_finishes_the_work_in_flight(start: Callable[..., Server]) -> None:
    server = start().wait_until_ready()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(post, server, input=["word " * 100] * 100) for _ in range(4)]
        # All four are in: each has 100 texts of 102 tokens.
        server.wait_until(lambda: queued_tokens(server) > 3 * 100 * 102)
        server.process.send_signal(signal.SIGTERM)
        answers = [future.result() for future in running]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert all(len(answer.json()["data"]) == 100 for answer in answers)
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.output


def test_a_stop_while_shapes_come_is_a_stop(server: Server, start: Callable[..., Server]) -> None:
    """With the cache filled, most shapes are loaded after the server is ready."""
    assert start().wait_until_ready().stop() == 0


def test_a_stop_while_loading_is_a_stop(start: Callable[..., Server]) -> None:
    server = start("--max-batch-tokens", "777")
    server.wait_until(lambda: "loading" in server.output)
    assert server.stop(signal.SIGINT) in (0, -signal.SIGINT)
    assert "Traceback" not in server.output


def test_a_model_that_is_not_there_ends_the_server(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(str(tmp_path / "nowhere"))
    assert server.process.wait(60) == 1
    server.stop()
    assert "cannot find the checkpoint" in server.output
    assert "Traceback" not in server.output


def test_a_pickled_checkpoint_ends_the_server(
    start: Callable[..., Server], minilm_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in minilm_folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_bytes((minilm_folder / "1_Pooling" / "config.json").read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    server = start(str(folder))
    assert server.process.wait(60) == 1
    server.stop()
    assert "save_pretrained" in server.output
    assert "Traceback" not in server.output


def test_a_port_that_is_taken_is_said(server: Server) -> None:
    _, port = address(server)
    second = subprocess.run(
        [sys.executable, "-m", "jaxembed_server", "--port", str(port)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in second.stderr
    assert "Traceback" not in second.stderr


def test_settings_come_from_the_environment_too(start: Callable[..., Server]) -> None:
    server = start(JAXEMBED_API_KEY="secret", JAXEMBED_SERVED_MODEL_NAME="mine").wait_until_ready()
    assert requests.get(f"{server.url}/v1/models", timeout=10).status_code == 401
    with server.client("secret") as client:
        assert [model.id for model in client.models.list()] == ["mine"]
    with server.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        client.embeddings.create(model="mine", input="a")


def test_the_server_imports_no_torch() -> None:
    code = "import sys, jaxembed_server.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=60, check=False).returncode == 0
