"""A small web server around an exported model: a page to try it, and an HTTP endpoint.

It is Python's own server, with limits on size, pixels, time and concurrency. Uploads stay in
memory.
"""

import base64
import io
import json
import threading
import time
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from .runtime import ModelError, Prediction, Predictor, read_image

_CHUNK = 2**16  # bytes read at a time
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


class Limits(NamedTuple):
    """What the server accepts.

    Attributes:
        max_bytes: of an upload.
        max_pixels: of a photograph.
        max_waiting: requests that wait while one is predicted; more are refused at once.
        max_connections: open at a time; more are closed.
        seconds: to send an upload, and to wait for the model.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 40_000_000
    max_waiting: int = 8
    max_connections: int = 64
    seconds: float = 60.0


class RequestError(Exception):
    """A request that is answered with a status and one sentence."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class PredictionServer(ThreadingHTTPServer):
    """Serves the page at ``/`` and predictions at ``/predict``.

    Args:
        predictor: the model.
        host: address to bind; others than those of the loopback are reachable from the network.
        port: 0 chooses a free one.
        limits: what is accepted.
    """

    daemon_threads = True

    def __init__(
        self,
        predictor: Predictor,
        host: str = "127.0.0.1",
        port: int = 8000,
        limits: Limits | None = None,
    ) -> None:
        super().__init__((host, port), _Handler)
        self.predictor = predictor
        self.limits = limits = limits or Limits()
        self.is_local = host in _LOOPBACK
        self._model = threading.Lock()
        self._connections = threading.BoundedSemaphore(limits.max_connections)
        self._waiting = threading.BoundedSemaphore(limits.max_waiting + 1)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or close it if there are too many."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer the requests of one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about clients that disappear."""

    @cached_property
    def page(self) -> bytes:
        """The HTML page."""
        return files(__package__).joinpath("page.html").read_bytes()

    def predict(self, content: bytes, score_threshold: float | None) -> dict[str, Any]:
        """Predict one uploaded photograph.

        Raises:
            RequestError: it cannot be read, or too many requests are waiting.
        """
        try:
            image = read_image(io.BytesIO(content), self.limits.max_pixels)
        except ModelError as error:
            raise RequestError(HTTPStatus.BAD_REQUEST, str(error)) from error
        if not self._waiting.acquire(blocking=False):
            raise RequestError(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests; try again later")
        try:
            if not self._model.acquire(timeout=self.limits.seconds):
                raise RequestError(
                    HTTPStatus.SERVICE_UNAVAILABLE, "the model is busy; try again later"
                )
            try:
                prediction = self.predictor.predict(image, score_threshold=score_threshold)
            finally:
                self._model.release()
        finally:
            self._waiting.release()
        return answer_of(prediction)


def answer_of(prediction: Prediction) -> dict[str, Any]:
    """The answer of the endpoint: size, segments and, with masks, the COCO panoptic PNG."""
    height, width = prediction.image.shape[:2]
    colors = {entry["id"]: entry["color"] for entry in prediction.classes}
    segments = [{**entry, "color": colors[entry["category_id"]]} for entry in prediction.to_json()]
    answer = {"width": width, "height": height, "segments": segments, "segment_map": None}
    if prediction.segment_map is not None:
        png = io.BytesIO()
        prediction.id_image().save(png, "PNG")
        answer["segment_map"] = base64.b64encode(png.getvalue()).decode()
    return answer


class _Handler(BaseHTTPRequestHandler):
    server: PredictionServer
    server_version = "batchformer-panoptic"
    sys_version = ""
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        """Limit the time that a client may take to send its request."""
        self.timeout = self.server.limits.seconds  # type: ignore[misc]
        super().setup()

    def do_GET(self) -> None:
        """The page, its settings, and whether the server runs."""
        path = urlsplit(self.path).path
        if path == "/":
            self._send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif path == "/model":
            predictor = self.server.predictor
            self._send_json(
                HTTPStatus.OK,
                {"score_threshold": predictor.score_threshold, "classes": predictor.classes},
            )
        else:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": f"there is nothing at {path}"})

    def do_POST(self) -> None:
        """Predict the photograph in the body."""
        try:
            answer = self._predict()
        except RequestError as error:
            self.close_connection = True  # the rest of the body has not been read
            self._send_json(error.status, {"error": str(error)})
        except TimeoutError:
            self.close_connection = True
            self._send_json(HTTPStatus.REQUEST_TIMEOUT, {"error": "the upload took too long"})
        except ConnectionError:
            self.close_connection = True  # the client has left
        except Exception as error:  # the server must live
            self.close_connection = True
            self.log_error("%s: %s", type(error).__name__, error)
            self._send_json(
                HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "the photograph could not be predicted"}
            )
        else:
            self._send_json(HTTPStatus.OK, answer)

    def _predict(self) -> dict[str, Any]:
        url = urlsplit(self.path)
        if url.path != "/predict":
            raise RequestError(HTTPStatus.NOT_FOUND, f"there is nothing at {url.path}")
        self._check_origin()
        threshold = _threshold(parse_qs(url.query).get("score_threshold", []))
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RequestError(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        if int(length) > self.server.limits.max_bytes:
            raise RequestError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"the upload has {length} bytes, more than {self.server.limits.max_bytes}",
            )
        content = self._read_body(int(length))
        if not content:
            raise RequestError(HTTPStatus.BAD_REQUEST, "the upload is empty")
        if len(content) < int(length):
            raise RequestError(HTTPStatus.BAD_REQUEST, "the upload is cut off")
        return self.server.predict(content, threshold)

    def _read_body(self, length: int) -> bytes:
        """Read an upload, whose time is limited as a whole and not only for each packet."""
        end = time.monotonic() + self.server.limits.seconds
        parts: list[bytes] = []
        while length > 0 and (part := self.rfile.read1(min(length, _CHUNK))):
            parts.append(part)
            length -= len(part)
            if time.monotonic() > end:
                raise TimeoutError
        return b"".join(parts)

    def _check_origin(self) -> None:
        """Refuse pages of other sites, which a browser would let send photographs here."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        name = host.rsplit(":", 1)[0]
        if self.server.is_local and name not in _LOOPBACK:
            raise RequestError(HTTPStatus.FORBIDDEN, f"host {host} is not this machine")
        if origin is not None and urlsplit(origin).netloc != host:
            raise RequestError(HTTPStatus.FORBIDDEN, f"origin {origin} is another site")

    def _send_json(self, status: HTTPStatus, content: Any) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, content_type: str) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cache-Control", "no-store")
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            self.close_connection = True  # the client has left

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing about requests that were answered."""


def _threshold(values: list[str]) -> float | None:
    """The last score threshold of a query, or None."""
    if not values:
        return None
    try:
        threshold = float(values[-1])
    except ValueError:
        threshold = -1.0
    if not 0 <= threshold <= 1:
        raise RequestError(
            HTTPStatus.BAD_REQUEST, f"score_threshold is {values[-1]}; it must be from 0 to 1"
        )
    return threshold
