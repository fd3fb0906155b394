"""Files in buckets, gs://BUCKET/PATH: read, written, copied to this machine; the lock and the small files of a run.

gcsfs reaches them, with its variables and credentials (STORAGE_EMULATOR_HOST, GOOGLE_APPLICATION_CREDENTIALS, `gcloud
auth application-default login`); it repeats what the network or the service lost. An object is there whole or not at
all, and cannot be appended to.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llava_jax.types import InputError

SCHEME = "gs://"
# Seconds between renewals of a lock, and after which one that was not renewed is that of a process that is gone.
RENEWED, EXPIRED = 5.0, 30.0
UPLOADED = 30.0  # seconds between uploads of a run's small files
AT_ONCE = 8  # files that are copied at a time


@functools.cache
def _storage() -> Any:
    try:
        import gcsfs
        from fsspec import config
    except ImportError as error:
        raise InputError(f"{SCHEME}… needs the package gcsfs: pip install 'llava-jax[gcs]'") from error
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # tracebacks of errors that it raises as well
    # Other processes write and delete what an earlier listing shows. The same holds for orbax, which comes here through
    # etils.epath.
    config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return gcsfs.GCSFileSystem()


@contextlib.contextmanager
def reached(path: str) -> Iterator[None]:
    """Raise InputError in place of what the libraries raise over `path`; a full disk of this machine passes."""
    _storage()
    from aiohttp import ClientError
    from gcsfs.retry import HttpError
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (OSError, ValueError, ClientError, HttpError, GoogleAPIError, GoogleAuthError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise InputError(
            f"{path}: cannot be read or written ({type(error).__name__}: {said}); check its name, your rights to the "
            "bucket (`gcloud auth application-default login`) and the network"
        ) from error


def read(path: str) -> bytes | None:
    """Return the content of an object, None where there is none. Raises InputError."""
    with reached(path):
        try:
            return _storage().cat_file(path)
        except FileNotFoundError:
            return None


def write(path: str, content: bytes) -> None:
    """Write an object, in place of the one of that name. Raises InputError."""
    with reached(path):
        _storage().pipe_file(path, content)


def exists(path: str) -> bool:
    """Return whether there is an object or a folder. Raises InputError."""
    with reached(path):
        return _storage().exists(path)


def listed(folder: str) -> dict[str, dict[str, Any]]:
    """Return what is known of each object below a folder (size, generation), by its name there. Raises InputError."""
    start = len(folder.rstrip("/")) + 1 - len(SCHEME)
    with reached(folder):
        return {name[start:]: about for name, about in _storage().find(folder, detail=True).items()}


def names(folder: str) -> frozenset[str]:
    """Return the names of all objects below a folder, of which there may be millions. Raises InputError."""
    import tensorstore

    with reached(folder):
        found = tensorstore.KvStore.open(f"{folder.rstrip('/')}/").result().list().result()
        return frozenset(name.decode() for name in found)


def fetch(path: str, into: str, choose: Callable[[list[str]], Sequence[str]]) -> str:
    """Return a copy, in the folder `into`, of the object at `path`, or of a folder with those objects that are chosen.

    `choose` is given the names of all objects below the folder. A copy is kept under path and generations: what changes
    in the bucket is copied again, what is here is not. Of several processes of a host one copies, and the others wait.
    Returns `path` where there is nothing. Raises InputError.
    """
    path = path.rstrip("/")
    found = listed(path)
    if not found:
        return path
    is_object = list(found) == [""]
    facts = sorted((name, about["generation"]) for name, about in found.items())
    folder = os.path.join(into, hashlib.sha256(json.dumps([path, facts]).encode()).hexdigest()[:32])
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        chosen = [""] if is_object else choose(list(found))
        files = {name: os.path.join(folder, name or os.path.basename(path)) for name in chosen}
        missing = [name for name, file in files.items() if not os.path.exists(file)]
        if missing:
            size = sum(found[name]["size"] for name in missing)
            print(f"copying {len(missing)} files ({size / 1e9:.2f} GB) of {path} to {folder}", flush=True)
        with reached(path), ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda name: _copy(f"{path}/{name}" if name else path, files[name]), missing))
    return files[""] if is_object else folder


def _copy(path: str, file: str) -> None:
    os.makedirs(os.path.dirname(file), exist_ok=True)
    partial = f"{file}.partial"
    _storage().get_file(path, partial)
    os.replace(partial, file)


# ---- the small files of a run ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def mirrored(folder: str, *resumed: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield (a folder to write small files in, a function that uploads what is new there).

    The folder is one of this machine, with the files `resumed` from before; what is new is uploaded every UPLOADED
    seconds and at the end as well. Raises InputError.
    """
    folder = folder.rstrip("/")
    with tempfile.TemporaryDirectory() as here:
        sent: dict[str, tuple[int, int]] = {}
        uploading, ended = threading.Lock(), threading.Event()

        def upload() -> None:
            with uploading:
                for name in _names(here):
                    facts = os.stat(os.path.join(here, name))
                    if sent.get(name) != (facts.st_size, facts.st_mtime_ns):
                        with open(os.path.join(here, name), "rb") as file:
                            write(f"{folder}/{name}", file.read())
                        sent[name] = facts.st_size, facts.st_mtime_ns

        def upload_regularly() -> None:
            while not ended.wait(UPLOADED):
                # What does not reach the bucket now does with the next checkpoint, or that one stops the run.
                with contextlib.suppress(InputError):
                    upload()

        for name in resumed:
            content = read(f"{folder}/{name}")
            if content is not None:
                with open(os.path.join(here, name), "wb") as file:
                    file.write(content)
        thread = threading.Thread(target=upload_regularly, daemon=True)
        thread.start()
        try:
            yield here, upload
            upload()
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(InputError):  # what ended the run is what is said
                upload()


def _names(folder: str) -> list[str]:
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return sorted(os.path.relpath(path, folder) for path in paths)


# ---- one process at a time ------------------------------------------------------------------------------------------


class Lock:
    """An object that one process writes and renews, so that no other works in its place.

    Every write is conditional: it counts only while the object is the one that this process saw last. One that nobody
    renews for EXPIRED seconds is taken over, by this process's clock alone; its owner, if it is alive after all, ends.
    """

    def __init__(self, path: str):
        import tensorstore

        self._path = path
        self._owner = f"{socket.gethostname()}, process {os.getpid()} ({secrets.token_hex(8)})".encode()
        self._store = tensorstore.KvStore.open(path).result()
        self._generation = b""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def take(self) -> Iterator[bool]:
        """Make the object: yield True once it is ours, False each second until that of a process that is gone expires.

        Raises InputError where another process is at work.
        """
        found = self._store.read("").result()
        if found.state == "value":
            print(f"{self._path} is there: waiting {EXPIRED:.0f} s for a sign of its owner", flush=True)
        end = time.monotonic() + EXPIRED
        while found.state == "value" and time.monotonic() < end:
            time.sleep(1.0)
            yield False
            before, found = found, self._store.read("").result()
            if found.state == "value" and found.stamp.generation != before.stamp.generation:
                raise InputError(f"{self._path} is held by {found.value.decode(errors='replace')}")
        self._generation = self._write(found.stamp.generation)
        if not self._generation:
            raise InputError(f"{self._path} was taken by another process at the same time")
        self._thread.start()
        yield True

    def release(self) -> None:
        """Delete the object."""
        self._ended.set()
        self._thread.join()
        self._store.write("", None, if_equal=self._generation).result()

    def _write(self, before: bytes) -> bytes:
        """Write the object if it is still the one of generation `before`; return the new one, b"" where it is not."""
        written = self._store.write("", self._owner, if_equal=before).result().generation
        if written:
            return written
        # A write that was carried out and then answered by an error is repeated, and refused.
        found = self._store.read("").result()
        return found.stamp.generation if found.value == self._owner else b""

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED):
            with contextlib.suppress(ValueError):  # out of reach, after many attempts: once more
                self._generation = self._write(self._generation)
                if not self._generation:
                    print(f"error: {self._path} was taken over, it had not been renewed in time", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(2)
