"""The Hugging Face hub's HTTP interface as far as our calls go: repositories of commits in memory, on a local port."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Self
from urllib.parse import unquote, urlsplit

TOKEN = "hf_SecretTokenOfTheTests"
MAIN = "main"
REGULAR_BYTES = 4096  # what is larger goes through LFS


@dataclass
class Repository:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content

    def commit(self, files: dict[str, bytes], branch: str = MAIN) -> str:
        new = hashlib.sha1(f"{len(self.commits)}{branch}".encode()).hexdigest()
        self.commits[new], self.branches[branch] = files, new
        return new

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class HubServer:
    """`with HubServer() as hub`: hub.url, hub.repositories, and hub.requests, each as "METHOD path"."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cards: list[str] = []
        hub = self

        class Bound(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def head(self, name: str, branch: str = MAIN) -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/validate-yaml":
            hub.cards.append(json.loads(body)["content"])
            return self._json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            hub.blobs[found[1]] = body
            return self._json({})
        if self.command == "POST" and not known:
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self._json({"transfer": "basic", "objects": [self._upload(o) for o in json.loads(body)["objects"]]})
        found = re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+)(?:/(\w+)/([^/]+)(?:/(.+))?)?", path)
        repository = hub.repositories.get(found[1]) if found else None
        if found is None or repository is None or (repository.private and not known):
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        what, revision = found[2] or "revision", found[3] or MAIN
        return self._in_repository(found[1], what, revision, found[4] or "", body)

    def _in_repository(self, name: str, what: str, revision: str, path: str, body: bytes) -> None:
        repository = self.server_hub.repositories[name]
        if what == "branch":
            repository.branches.setdefault(revision, repository.branches[MAIN])
            return self._json({})
        snapshot = repository.at(revision)
        if snapshot is None:
            return self._json({"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        commit, files = snapshot
        if what == "revision":
            return self._json({"id": name, "sha": commit, "private": repository.private, "siblings": []})
        if what == "tree":
            return self._json([self._entry(name, content) for name, content in files.items()])
        if what == "resolve":
            if path not in files:
                return self._json({"error": "no entry"}, 404, {"X-Error-Code": "EntryNotFound"})
            etag = hashlib.sha256(files[path]).hexdigest()
            return self._send(files[path], 200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})
        if what == "preupload":
            listed = json.loads(body)["files"]
            mode = {file["path"]: "lfs" if file["size"] > REGULAR_BYTES else "regular" for file in listed}
            return self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in mode.items()]})
        return self._commit(name, revision, dict(files), body)

    def _create(self, asked: dict[str, Any]) -> None:
        name, hub = f"{asked['organization']}/{asked['name']}", self.server_hub
        if asked["organization"] == "stranger":
            return self._json({"error": "You don't have the rights to create a model there"}, 403)
        if name in hub.repositories:
            return self._json({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
        hub.repositories[name] = repository = Repository(asked.get("visibility") == "private")
        repository.commit({".gitattributes": b""})
        return self._json({"url": f"{hub.url}/{name}"})

    def _commit(self, name: str, branch: str, files: dict[str, bytes], body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server_hub.blobs[value["oid"]]
        commit = self.server_hub.repositories[name].commit(files, branch)
        url = f"{self.server_hub.url}/{name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

    def _upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.server_hub.url}/lfs/{asked['oid']}", "header": {}}
        return {"oid": asked["oid"], "size": asked["size"], "actions": {"upload": upload}}

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
