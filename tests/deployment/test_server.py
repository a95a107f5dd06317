"""The server around an exported model: answers, hostile uploads, limits, the page in a browser."""

import base64
import http.client
import io
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from batchformer_panoptic.deployment.runtime import PredictedSegment, Prediction
from batchformer_panoptic.deployment.server import Limits, PredictionServer

CLASSES = [
    {"id": 10, "name": "disc", "isthing": 1, "color": [220, 20, 60]},
    {"id": 11, "name": "grass", "isthing": 0, "color": [40, 160, 60]},
]
LIMITS = Limits(max_bytes=100_000, max_pixels=10_000, max_waiting=1, max_connections=8, seconds=1.5)


class LeftAndRight:
    """Predicts a thing on the left half and stuff on the right one; may take its time."""

    classes = CLASSES
    score_threshold = 0.5

    def __init__(self) -> None:
        self.thresholds: list[float | None] = []
        self.seconds = 0.0

    def predict(self, image: Image.Image, *, score_threshold: float | None = None) -> Prediction:
        self.thresholds.append(score_threshold)
        time.sleep(self.seconds)
        pixels = np.asarray(image)
        height, width = pixels.shape[:2]
        if width == 13:
            raise RuntimeError("of the model")
        half = width // 2
        segment_map = np.full((height, width), 2, np.int32)
        segment_map[:, :half] = 1
        segments = [
            PredictedSegment(1, 0, "disc", True, 0.9, height * half, (0, 0, half, height)),
            PredictedSegment(2, 1, "grass", False, 0.8, height * half, (half, 0, half, height)),
        ]
        return Prediction(pixels, segment_map, segments, CLASSES)


@pytest.fixture(name="model")
def _model() -> LeftAndRight:
    return LeftAndRight()


@pytest.fixture(name="server")
def _server(model: LeftAndRight) -> Iterator[PredictionServer]:
    with PredictionServer(model, port=0, limits=LIMITS) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def encoded(width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 150)).save(file, kind)
    return file.getvalue()


def request(
    server: PredictionServer,
    body: bytes | None,
    path: str = "/predict",
    headers: dict[str, str] | None = None,
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        response = connection.getresponse()
        content = response.read()
        is_json = response.getheader("Content-Type") == "application/json"
        return response.status, json.loads(content) if is_json else content
    finally:
        connection.close()


def test_a_photograph_is_answered_with_its_segments(server: PredictionServer) -> None:
    status, answer = request(server, encoded(kind="JPEG"))
    assert status == 200
    assert (answer["width"], answer["height"]) == (40, 30)
    assert [s["category_name"] for s in answer["segments"]] == ["disc", "grass"]
    assert answer["segments"][0]["color"] == [220, 20, 60]
    ids = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["segment_map"]))))
    assert (ids[:, :20, 0] == 1).all()
    assert (ids[:, 20:, 0] == 2).all()


def test_the_threshold_reaches_the_model(server: PredictionServer, model: LeftAndRight) -> None:
    assert request(server, encoded(), "/predict?score_threshold=0.25")[0] == 200
    assert request(server, encoded())[0] == 200
    assert model.thresholds == [0.25, None]
    for value in ("2", "nan", "x", "-0.1"):
        status, answer = request(server, encoded(), f"/predict?score_threshold={value}")
        assert status == 400
        assert answer["error"] == f"score_threshold is {value}; it must be from 0 to 1"


def bomb() -> bytes:
    """A PNG that claims 60000 x 60000 pixels."""
    content = bytearray(encoded())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    return bytes(content)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the upload is empty"),
        (b"GIF89a", 400, "cannot be read"),
        (b"<html>not an image</html>", 400, "unknown image format"),
        (encoded()[:60], 400, "cannot be read"),
        (encoded(kind="JPEG")[:200], 400, "cannot be read"),
        (bytes(range(256)) * 40, 400, "unknown image format"),
        (encoded(120, 100), 400, "120 x 100 pixels, more than 10000"),
        (bomb(), 400, "the image"),
        (b"x" * 200_000, 413, "more than 100000"),
        (encoded(13, 13), 500, "could not be predicted"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_hostile_upload_gets_an_answer(
    server: PredictionServer, body: bytes, status: int, message: str
) -> None:
    try:
        found, answer = request(server, body)
    except ConnectionError:
        assert status == 413  # closed while the client was still sending
    else:
        assert found == status
        assert message in answer["error"]
    assert request(server, encoded())[0] == 200  # it lives


def test_other_paths_and_methods(server: PredictionServer) -> None:
    assert request(server, None, "/other")[0] == 404
    assert request(server, encoded(), "/other")[0] == 404
    status, page = request(server, None, "/")
    assert status == 200
    assert page.startswith(b"<!doctype html>")
    assert request(server, None, "/model")[1]["score_threshold"] == 0.5
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])
    connection.request("DELETE", "/predict")
    assert connection.getresponse().status == 501
    connection.close()


def test_pages_of_other_sites_are_refused(server: PredictionServer) -> None:
    port = server.server_address[1]
    assert request(server, encoded(), headers={"Origin": "http://evil.example"})[0] == 403
    assert request(server, encoded(), headers={"Host": f"evil.example:{port}"})[0] == 403
    assert request(server, encoded(), headers={"Origin": f"http://127.0.0.1:{port}"})[0] == 200


def test_a_slow_upload_ends(server: PredictionServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n")
        start = time.monotonic()
        while time.monotonic() - start < 5:
            try:
                client.sendall(b"x")
            except ConnectionError:
                break
            time.sleep(0.2)
        assert time.monotonic() - start < 4
    assert request(server, encoded())[0] == 200


def test_too_many_requests_are_refused(server: PredictionServer, model: LeftAndRight) -> None:
    model.seconds = 0.7
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(request(server, encoded())[0]))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [200, 200, 503, 503, 503]
    model.seconds = 0.0
    assert request(server, encoded())[0] == 200


# Chooses a photograph, waits for its segments, and points at the left one.
VISITOR = """
<script>
addEventListener("load", async () => {
  const photo = await (await fetch("photo.png")).blob();
  await choose(new File([photo], "photo.png"));
  const box = canvas.getBoundingClientRect();
  const where = {clientX: box.left + box.width / 4, clientY: box.top + box.height / 2};
  canvas.dispatchEvent(new MouseEvent("mousemove", where));
});
</script>
"""


def test_the_page_in_a_browser(
    server: PredictionServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    server.page = server.page.replace(b"</html>", VISITOR.encode() + b"</html>")
    handler = server.RequestHandlerClass
    answer = handler.do_GET

    def with_photo(self: Any) -> None:
        if self.path == "/photo.png":
            self._send(200, encoded(100, 80), "image/png")
        else:
            answer(self)

    monkeypatch.setattr(handler, "do_GET", with_photo)
    picture = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,1000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
    command += [f"http://127.0.0.1:{server.server_address[1]}/"]
    shown = subprocess.run(
        [*command, "--dump-dom"], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert "2 segments" in shown
    legend = shown.partition('<ul id="legend">')[2].partition("</ul>")[0]
    assert legend.count("<li") == 2
    assert "disc" in legend
    assert '<li data-id="1" class="active">' in legend
    assert "disc 90 %" in shown.partition('id="tip"')[2].partition("</div>")[0]
    subprocess.run([*command, f"--screenshot={picture}"], check=True, timeout=120)
    left, right = (cv2.imread(str(picture))[500, x].astype(int) for x in (150, 700))
    assert left[2] > left[1] + 30  # BGR: the disc is red
    assert right[1] > right[2] + 30  # the grass is green
