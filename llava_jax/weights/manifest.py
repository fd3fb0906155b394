"""The manifest of a checkpoint, STEP/manifest/files.json: the MD5 of each of its files, compared before any is read.

It is written before the step takes its name. MD5 is what a bucket's listing says of an object, so that nothing there is
read twice, and a workdir that is copied from one to the other can still be checked.
"""

import base64
import errno
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

from llava_jax import buckets
from llava_jax.io import is_bucket, opened
from llava_jax.types import InputError

ITEM, FILE = "manifest", "files.json"
THREADS = 8
NONE = "no manifest"
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
FAILED = tuple(os.strerror(number) for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT))


def hashes(folder: str, items: list[str]) -> dict[str, str]:
    """Return the MD5 of every file below the `items` of a step's folder, by its name there.

    Raises InputError for one that cannot be read at a second attempt either.
    """
    found: dict[str, str] = {}
    for item in items:
        root = os.path.join(folder, item)
        if is_bucket(folder):
            about = buckets.listed(root)
            names, known = sorted(about), {name: _listed_hash(of) for name, of in about.items()}
        else:
            paths = [os.path.join(parent, name) for parent, _, files in os.walk(root) for name in files]
            names, known = sorted(os.path.relpath(path, root) for path in paths), {}
        with ThreadPoolExecutor(THREADS) as pool:
            digests = pool.map(lambda name, root=root, known=known: known.get(name) or md5(f"{root}/{name}"), names)
            found |= {f"{item}/{name}": digest for name, digest in zip(names, digests, strict=True)}
    return found


def _listed_hash(about: dict) -> str:
    """Return the MD5 that a bucket's listing gives; "" for an object that was joined from several."""
    return base64.b64decode(about.get("md5Hash", "")).hex()


def md5(path: str) -> str:
    """Return the MD5 of a file; one that the disk or the network fails to give is read once more."""
    for is_last in (False, True):
        try:
            with opened(path) as file:
                return hashlib.file_digest(file, "md5").hexdigest()  # ty: ignore[no-matching-overload]
        except ABSENT:
            raise
        except OSError as error:
            if is_last:
                raise unread(path, error) from error
            time.sleep(0.2)
    raise AssertionError


def is_transient(error: BaseException) -> bool:
    """Return whether an error says that the disk or the network failed, and nothing about what a file holds."""
    is_absent = isinstance(error, ABSENT)
    return (isinstance(error, OSError) and not is_absent) or any(reason in str(error) for reason in FAILED)


def unread(path: str, error: BaseException) -> InputError:
    """Return what to say of a file that may be whole but does not come."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return InputError(
        f"{path}: cannot be read ({reason}), which does not mean that it is damaged: check the disk or the network and "
        "your rights to it, and run again"
    )


def damage(folder: str) -> str:
    """Return what is wrong with the files of a step, "" where they are those written, NONE where it has no manifest.

    Raises InputError where one cannot be read, which is not damage.
    """
    path = os.path.join(folder, ITEM, FILE)
    try:
        with opened(path) as file:
            written = json.load(file)
    except FileNotFoundError:
        return NONE
    except ValueError:
        return f"its {ITEM}/{FILE} is no JSON"
    except OSError as error:
        raise unread(path, error) from error
    if not isinstance(written, dict) or not written:
        return f"its {ITEM}/{FILE} names no files"
    found = hashes(folder, sorted({name.partition("/")[0] for name in written}))
    for name, digest in written.items():
        if found.get(name) != digest:
            return f"{name} is {'not what was written' if name in found else 'missing'}"
    return ""
