"""A stand-in of the Hugging Face Hub: enough of its protocol for huggingface_hub to fetch, and to upload models.

A data set is a repository datasets/OWNER/NAME.
"""

import base64
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

from tests.local_server import listening

REPO = r"(?P<repo>(?:datasets/)?[^/]+/[^/]+)"


def point(monkeypatch, endpoint: str) -> None:
    """What HF_ENDPOINT does when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


class Hub:
    """Repositories in memory: name -> {commit: {path: bytes}}, the newest last; every request is recorded."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.tokens = {"hf_reader": "reader"}
        self.requests: list[tuple[str, str]] = []
        self.endpoint = ""

    def push(self, repo: str, files: pathlib.Path | dict[str, bytes], branch: str = "main") -> str:
        """Add a commit of these files (of a folder) to a branch and return it."""
        if isinstance(files, pathlib.Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {str(path.relative_to(files)): path.read_bytes() for path in paths}
        commits = self.commits.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[commit] = files
        self.refs.setdefault(repo, {})[branch] = commit
        return commit

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return self.commits[repo].get(self.refs[repo].get(revision, revision), {})

    def fetched(self, repo: str) -> list[str]:
        """Return the files that were downloaded from a repository, in order."""
        found = (re.fullmatch(rf"/{repo}/resolve/[^/]+/(.+)", path) for verb, path in self.requests if verb == "GET")
        return [match[1] for match in found if match]


class Answer(Exception):
    """What ends a request early: a status, the name of the error that huggingface_hub looks for, and the content."""

    def __init__(self, status: int, code: str, message: str = "", content: bytes = b"{}"):
        self.status, self.content = status, content
        self.headers = {"X-Error-Code": code, "X-Error-Message": message}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Answer requests at `hub.endpoint` until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.handle_one()

        do_HEAD = do_POST = do_GET

        def handle_one(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            path, body = unquote(urlsplit(self.path).path), self.rfile.read(length)
            hub.requests.append((self.command, path))
            try:
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                headers, content = respond(hub, self.command, path, body, hub.tokens.get(token, ""))
                status = 200
            except Answer as answer:
                status, headers, content = answer.status, answer.headers, answer.content
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    with listening(Handler) as hub.endpoint:
        yield hub


def respond(hub: Hub, verb: str, path: str, body: bytes, user: str) -> tuple[dict[str, str], bytes]:
    """Return (headers, content). Raises Answer for anything but 200."""
    if path == "/api/validate-yaml":
        return {}, json.dumps({"errors": [], "warnings": []}).encode()
    if path == "/api/repos/create":
        return {}, create(hub, json.loads(body), user)
    if match := re.fullmatch(rf"/api/models/{REPO}/(?P<what>preupload|commit)/main", path):
        return {}, written(hub, match["repo"], match["what"], body, user)
    if match := re.fullmatch(rf"/api/(?:models/)?{REPO}(?:/(?P<what>revision|tree)/(?P<revision>.+))?", path):
        commit = found(hub, match["repo"], match["revision"] or "main", user)
        files = hub.commits[match["repo"]].get(commit, {})
        if match["what"] == "tree":
            tree = [{"type": "file", "path": name, "size": len(files[name]), "oid": oid(files[name])} for name in files]
            return {}, json.dumps(tree).encode()
        siblings = [{"rfilename": name} for name in files]
        return {}, json.dumps({"id": match["repo"], "sha": commit, "siblings": siblings}).encode()
    if match := re.fullmatch(rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path):
        commit = found(hub, match["repo"], match["revision"], user)
        if match["repo"] in hub.gated and not user:
            raise Answer(401, "GatedRepo", "Access to this model is restricted")
        files = hub.commits[match["repo"]][commit]
        if match["file"] not in files:
            raise Answer(404, "EntryNotFound")
        content = files[match["file"]]
        return {"ETag": f'"{oid(content)}"', "X-Repo-Commit": commit}, content
    raise Answer(404, "EntryNotFound", f"{verb} {path} is not known here")


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def found(hub: Hub, repo: str, revision: str, user: str) -> str:
    """Return the commit of a revision."""
    if repo not in hub.commits or (repo in hub.private and not user):
        raise Answer(404 if user else 401, "RepoNotFound")
    commit = hub.refs[repo].get(revision, revision)
    if commit not in hub.commits[repo] and hub.commits[repo]:
        raise Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return commit


def create(hub: Hub, asked: dict, user: str) -> bytes:
    repo = f"{asked.get('organization') or user}/{asked['name']}"
    if not user:
        raise Answer(401, "", "Invalid username or password.")
    if not repo.startswith(f"{user}/"):
        raise Answer(403, "", f"You don't have the rights to create a model under the namespace {repo.split('/')[0]!r}")
    made = json.dumps({"url": f"{hub.endpoint}/{repo}", "id": repo, "name": repo}).encode()
    if repo in hub.commits:
        raise Answer(409, "", "You already created this model repo", made)
    hub.push(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
    if asked.get("visibility") == "private" or asked.get("private"):
        hub.private.add(repo)
    return made


def written(hub: Hub, repo: str, what: str, body: bytes, user: str) -> bytes:
    """Answer how files are to be sent (all of them in the commit itself), or take the commit."""
    if not repo.startswith(f"{user}/") or not user:
        raise Answer(403, "", f"no right to write {repo}")
    if what == "preupload":
        asked = json.loads(body)["files"]
        modes = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]
        return json.dumps({"files": modes}).encode()
    lines = [json.loads(line) for line in body.splitlines()]
    sent = [line["value"] for line in lines if line["key"] == "file"]
    files = {each["path"]: base64.b64decode(each["content"]) for each in sent}
    commit = hub.push(repo, hub.files(repo) | files)
    return json.dumps({"commitUrl": f"{hub.endpoint}/{repo}/commit/{commit}", "commitOid": commit}).encode()
