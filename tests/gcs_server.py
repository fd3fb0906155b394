"""A stand-in of Google Cloud Storage: enough of its JSON API for gcsfs, google-cloud-storage and tensorstore.

It answers some requests with 429 and 503 on demand, before or after having done what they ask for.
`python -m tests.gcs_server PORT` serves on its own.
"""

import base64
import hashlib
import json
import pathlib
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.local_server import listening

API = "/storage/v1"


class Blob(NamedTuple):
    """The content of an object, and the generation that each write of it makes anew."""

    content: bytes
    generation: int
    updated: float


class Bucket:
    """Objects in memory: name -> Blob; every request is counted.

    `failing` is the share of requests that are answered by 429 or 503; half of them are carried out all the same.
    """

    def __init__(self, name: str = "bucket", failing: float = 0.0, seed: int = 0):
        self.name, self.failing = name, failing
        self.blobs: dict[str, Blob] = {}
        self.requests = self.failed = 0
        self.lock = threading.RLock()
        self.endpoint = ""
        self._uploads: dict[str, tuple[dict, dict, bytearray]] = {}
        self._generation = 1_000
        self._random = random.Random(seed)

    def put_folder(self, name: str, folder: pathlib.Path) -> None:
        """Write all files below a folder."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(folder)}", path.read_bytes())

    def put(self, name: str, content: bytes, query: dict[str, str] | None = None) -> dict:
        """Write an object and return its resource. Raises Answer where a precondition does not hold."""
        with self.lock:
            self.check(name, query or {})
            self._generation += 1
            self.blobs[name] = Blob(bytes(content), self._generation, time.time())
            return self.resource(name)

    def check(self, name: str, query: dict[str, str]) -> None:
        generation = self.blobs[name].generation if name in self.blobs else 0
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            raise Answer(412, "conditionNotMet")
        if query.get("ifGenerationNotMatch") == str(generation):
            raise Answer(304, "notModified")

    def found(self, name: str) -> Blob:
        if name not in self.blobs:
            raise Answer(404, f"No such object: {self.name}/{name}")
        return self.blobs[name]

    def resource(self, name: str) -> dict:
        blob = self.found(name)
        updated = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(blob.updated)) + f".{int(blob.updated % 1 * 1000):03}Z"
        return {
            "kind": "storage#object",
            "id": f"{self.name}/{name}/{blob.generation}",
            "name": name,
            "bucket": self.name,
            "generation": str(blob.generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "storageClass": "STANDARD",
            "size": str(len(blob.content)),
            "timeCreated": updated,
            "updated": updated,
            "etag": str(blob.generation),
            "md5Hash": base64.b64encode(hashlib.md5(blob.content).digest()).decode(),
            "mediaLink": f"{self.endpoint}/download{API}/b/{self.name}/o/{quote(name, safe='')}?alt=media",
        }

    def fault(self) -> tuple[int, bool]:
        """Return (status, whether the request is carried out all the same) of the next request; 0 is no fault."""
        with self.lock:
            self.requests += 1
            if self._random.random() >= self.failing:
                return 0, True
            self.failed += 1
            return self._random.choice((429, 503)), self._random.random() < 0.5


class Answer(Exception):
    """What ends a request early: a status and what it says."""

    def __init__(self, status: int, message: str):
        self.status = status
        said = {"error": {"code": status, "message": message, "errors": [{"reason": message, "message": message}]}}
        self.content = b"" if status == 304 else json.dumps(said).encode()


class Request(NamedTuple):
    """What a client asks for; `query` holds the last value of each key."""

    verb: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


Reply = tuple[int, dict[str, str], bytes]


@contextmanager
def serving(bucket: Bucket, port: int = 0) -> Iterator[Bucket]:
    """Answer requests at `bucket.endpoint` until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # otherwise every answer of two packets takes 40 ms
        wbufsize = 1 << 16

        def log_message(self, *_: object) -> None:
            pass

        def handle_one(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, url.path, query, headers, body)
            status, is_done = bucket.fault()
            try:
                reply = respond(bucket, request) if is_done else None
                if status:
                    raise Answer(status, "try again later")
                status, headers, content = reply
            except Answer as answer:
                status, headers, content = answer.status, {}, answer.content
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content if self.command != "HEAD" else b"")

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = handle_one

    with listening(Handler, port) as bucket.endpoint:
        yield bucket


def environment(bucket: Bucket) -> dict[str, str]:
    """Return the variables that lead gcsfs, google-cloud-storage and tensorstore to the stand-in."""
    return {
        "STORAGE_EMULATOR_HOST": bucket.endpoint,
        "TENSORSTORE_GCS_HTTP_URL": bucket.endpoint,
        # There is no gRPC here, over which gcsfs asks of which kind a bucket is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GOOGLE_CLOUD_PROJECT": "test",
    }


def respond(bucket: Bucket, request: Request) -> Reply:
    """Return (status, headers, content). Raises Answer for what is wrong."""
    own = rf"{API}/b/{re.escape(bucket.name)}"
    if request.path == f"/upload{own}/o":
        return upload(bucket, request)
    if request.path == own:
        return reply({"kind": "storage#bucket", "id": bucket.name, "name": bucket.name, "location": "US"})
    if request.path == f"{own}/o":
        return reply(listing(bucket, request.query))
    if match := re.fullmatch(
        rf"{own}/o/([^/]+)/(?:rewriteTo|copyTo)/b/{re.escape(bucket.name)}/o/([^/]+)", request.path
    ):
        made = bucket.put(unquote(match[2]), bucket.found(unquote(match[1])).content, request.query)
        size = made["size"]
        return reply({"done": True, "objectSize": size, "totalBytesRewritten": size, "resource": made})
    if match := re.fullmatch(rf"(?:/download)?{own}/o/([^/]+)", request.path):
        return one(bucket, unquote(match[1]), request)
    raise Answer(404, f"{request.verb} {request.path} is not known here")


def reply(content: dict) -> Reply:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def one(bucket: Bucket, name: str, request: Request) -> Reply:
    """Read an object, its metadata, or delete it."""
    with bucket.lock:
        blob = bucket.found(name)
        bucket.check(name, request.query)
        if request.verb == "DELETE":
            del bucket.blobs[name]
            return 204, {}, b""
        if request.query.get("alt") != "media":
            return reply(bucket.resource(name))
    headers, size = (
        {"x-goog-generation": str(blob.generation), "Content-Type": "application/octet-stream"},
        len(blob.content),
    )
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if wanted is None:
        return 200, headers, blob.content
    start = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
    stop = min(size, int(wanted[2]) + 1) if wanted[1] and wanted[2] else size
    if start >= size:
        raise Answer(416, "requested range not satisfiable")
    return 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}, blob.content[start:stop]


def listing(bucket: Bucket, query: dict[str, str]) -> dict:
    """List the objects with a prefix; with a delimiter, folders in place of what lies in them."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    items, prefixes = [], set()
    with bucket.lock:
        names = sorted(name for name in bucket.blobs if name.startswith(prefix))
        names = [name for name in names if name >= query.get("startOffset", "")]
        names = [name for name in names if "endOffset" not in query or name < query["endOffset"]]
        for name in names:
            rest = name.removeprefix(prefix)
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
            else:
                items.append(bucket.resource(name))
    found = dict.fromkeys(prefixes) | {item["name"]: item for item in items}
    both = [(name, found[name]) for name in sorted(found)]
    start, most = int(query.get("pageToken") or 0), int(query.get("maxResults") or 1000)
    page = both[start : start + most]
    answer = {
        "kind": "storage#objects",
        "items": [item for _, item in page if item],
        "prefixes": [name for name, item in page if item is None],
    }
    return answer | ({"nextPageToken": str(start + most)} if start + most < len(both) else {})


def upload(bucket: Bucket, request: Request) -> Reply:
    """Take an object in one request, in a multipart one, or in the chunks of a resumable upload."""
    query, kind = request.query, request.query.get("uploadType")
    if "upload_id" in query:
        return chunk(bucket, request)
    if kind == "media":
        return reply(bucket.put(query["name"], request.body, query))
    if kind == "multipart":
        about, content = parts(request.headers["content-type"], request.body)
        return reply(bucket.put(json.loads(about)["name"], content, query))
    about = json.loads(request.body or b"{}") | ({"name": query["name"]} if "name" in query else {})
    with bucket.lock:
        upload_id = str(len(bucket._uploads))
        bucket._uploads[upload_id] = (about, query, bytearray())
    path = f"{bucket.endpoint}{request.path}?uploadType=resumable&upload_id={upload_id}"
    return 200, {"Location": path, "X-GUploader-UploadID": upload_id}, b""


def chunk(bucket: Bucket, request: Request) -> Reply:
    """Take a chunk; one that is sent twice is there once."""
    about, query, content = bucket._uploads[request.query["upload_id"]]
    sent = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", request.headers.get("content-range", "bytes */*"))
    with bucket.lock:
        if sent[1] and int(sent[1]) <= len(content):
            content[int(sent[1]) :] = request.body
        elif "content-range" not in request.headers:
            content[:] = request.body
        if "content-range" in request.headers and (sent[2] == "*" or len(content) < int(sent[2])):
            return 308, {"Range": f"bytes=0-{len(content) - 1}"} if content else {}, b""
        return reply(bucket.put(about["name"], content, query))


def parts(content_type: str, body: bytes) -> list[bytes]:
    """Return the content of each part of a multipart body, to the byte."""
    boundary = re.search(r'boundary="?([^";]+)"?', content_type)[1].encode()
    found = body.split(b"--" + boundary)[1:-1]
    return [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1].removesuffix(b"\n").removesuffix(b"\r") for part in found]


if __name__ == "__main__":
    with serving(Bucket(failing=float(sys.argv[2]) if len(sys.argv) > 2 else 0.0), int(sys.argv[1])):
        threading.Event().wait()
