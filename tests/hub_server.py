"""A small Hub for tests: enough of the protocol for the real `huggingface_hub` client, on the loopback.

Repositories of all three types with branches, tags and commits; tokens that may write, read, or nothing; private and
gated repositories; large files through the LFS protocol; and switches that break it in the middle.
Everything is in memory. Start it with `with Hub() as hub:` and give `hub.environment()` to a new process: the client
reads its settings when it is imported.
"""

import base64
import hashlib
import http.server
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

WRITE, READ, STRANGER = "hf_writewritewrite", "hf_readreadread", "hf_strangerstranger"
LARGE = (".safetensors", ".arrow", ".png", ".bin")
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class Repository:
    """Branches and tags point to commits; a commit is `{path: content}`."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str, message: str = "") -> str:
        seed = f"{message}{len(self.commits)}{sorted((p, hashlib.sha1(c).hexdigest()) for p, c in files.items())}"
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        revision = unquote(revision)
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The server; `repositories` maps `(type, name)` to [`Repository`]."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.lock = threading.Lock()
        self.break_at: str | None = None  # requests whose path holds this fail ...
        self.break_how: str | int = "asked"  # ... when asked, when "answered" (all is done by then), or with a status
        self.cut_after: int | None = None  # a file of more bytes is cut off there
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, cache, token: str | None = WRITE, **more: str) -> dict[str, str]:
        """Environment of a new process: this Hub, its own cache, nothing of ours importable."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "PYTHONPATH"}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        own.update(
            {
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_OFFLINE": "0",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            }
        )
        return {**kept, **own, **({"HF_TOKEN": token} if token else {}), **more}

    def use_here(self, monkeypatch, token: str = WRITE) -> None:
        """Let this process talk to this Hub, though the client has read its settings already."""
        import transformers
        from huggingface_hub import constants

        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made once, with the address of that time
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """What a repository holds."""
        repository = self.repositories[kind, name]
        return repository.commits[repository.find(revision)]

    def add(self, name: str, folder, kind: str = "model", **properties) -> str:
        """Make a repository from a folder; its commit."""
        files = {}
        for base, _, names in os.walk(folder):
            for each in names:
                path = os.path.join(base, each)
                with open(path, "rb") as file:
                    files[os.path.relpath(path, folder)] = file.read()
        self.repositories[kind, name] = Repository(**properties)
        return self.repositories[kind, name].commit(files, "main")


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    # ---------------------------------------------------------------- answers

    def reset(self) -> None:
        self.hub.requests.append((self.command, self.path, 0))
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def answer(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        if self.breaks() and self.hub.break_how == "answered":
            return self.reset()
        if not isinstance(body, bytes):
            body, headers["Content_Type"] = json.dumps(body).encode(), "application/json"
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str, message: str = "") -> None:
        self.answer(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message or code)

    def breaks(self) -> bool:
        return bool(self.hub.break_at) and self.hub.break_at in self.path

    def handle_any(self) -> None:
        length, cut = int(self.headers.get("Content-Length") or 0), self.hub.cut_after
        if cut is not None and self.command == "PUT" and length > cut:
            self.rfile.read(cut)
            return self.reset()
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        parts = urlsplit(self.path)
        path, query = parts.path, parse_qs(parts.query)
        if self.breaks() and self.hub.break_how == "asked":
            return self.reset()
        if self.breaks() and isinstance(self.hub.break_how, int):
            return self.fail(self.hub.break_how, "ServerError", "the server has lost its head")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.token, self.body, self.query = token, body, query
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, path):
                getattr(self, method)(*match.groups())
                return
        self.fail(404, "NotFound", f"no route for {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    # ---------------------------------------------------------------- who may do what

    def repository(self, kind: str, name: str, write: bool = False) -> Repository | None:
        """The repository, or None after an error was sent: a private one does not exist for strangers."""
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.private and self.token not in (WRITE, READ)):
            self.fail(401 if not self.token else 404, "RepoNotFound", "Repository not found")
            return None
        return found if not write or self.may_write() else None

    def may_write(self) -> bool:
        if self.token == WRITE:
            return True
        if self.token:
            self.fail(403, "Forbidden", "you must use a write token to upload to a repository")
        else:
            self.fail(401, "Unauthorized", "Invalid credentials in Authorization header")
        return False

    # ---------------------------------------------------------------- routes

    def whoami(self) -> None:
        if self.token not in (WRITE, READ, STRANGER):
            return self.fail(401, "Unauthorized", "Invalid credentials in Authorization header")
        role = "write" if self.token == WRITE else "read"
        user = "stranger" if self.token == STRANGER else "me"
        self.answer(200, {"name": user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self) -> None:
        if not self.may_write():
            return
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        kind = asked.get("type") or "model"
        url = self.hub.url + ("" if kind == "model" else f"/{kind}s") + f"/{name}"
        if (kind, name) in self.hub.repositories:
            return self.answer(409, {"error": "You already created this repo", "url": url}, X_Error_Message="exists")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[kind, name] = Repository(private=bool(private))
        self.hub.repositories[kind, name].commit({".gitattributes": b""}, "main", "initial commit")
        self.answer(200, {"url": url, "name": name, "id": name})

    def validate_yaml(self) -> None:
        """The Hub's own rules that matter here: metadata is a YAML mapping whose known fields have their types."""
        import yaml

        content = json.loads(self.body)["content"]
        match = re.match(r"\s*---\s*\n(.*?)\n---", content, re.DOTALL)
        try:
            errors = wrong_fields(yaml.safe_load(match[1])) if match else []
        except yaml.YAMLError as error:
            errors = [str(error)]
        self.answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def info(self, kinds: str, name: str, revision: str | None = None) -> None:
        kind = KINDS[kinds]
        if not (repository := self.repository(kind, name)):
            return
        sha = repository.find(revision or "main")
        if sha is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[sha]
        answer = {"_id": name, "id": name, "modelId": name, "sha": sha, "private": repository.private, "downloads": 0}
        answer.update({"tags": [], "siblings": [{"rfilename": path} for path in files], "gated": False})
        head = re.match(r"---\n.*?^pipeline_tag: (\S+)$.*?^---", files.get("README.md", b"").decode(), re.DOTALL | re.M)
        self.answer(200, {**answer, **({"pipeline_tag": head[1]} if head else {}), "library_name": "transformers"})

    def tree(self, kinds: str, name: str, revision: str, inside: str | None = None) -> None:
        if not (repository := self.repository(KINDS[kinds], name)):
            return
        sha = repository.find(revision)
        if sha is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        prefix = f"{unquote(inside)}/" if inside else ""
        files = {path: c for path, c in repository.commits[sha].items() if path.startswith(prefix)}
        if inside and not files:
            return self.fail(404, "EntryNotFound", f"{inside} does not exist")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        items, folders = [], set()
        for path, content in files.items():
            rest = path[len(prefix) :]
            for depth in range(1, rest.count("/") + 1):
                folders.add(prefix + "/".join(rest.split("/")[:depth]))
            if recursive or "/" not in rest:
                items.append(self.entry(path, content))
        kept = [f for f in sorted(folders) if recursive or "/" not in f[len(prefix) :]]
        self.answer(200, [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in kept] + items)

    @staticmethod
    def entry(path: str, content: bytes) -> dict:
        item = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if path.endswith(LARGE):
            item["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return item

    def paths_info(self, kinds: str, name: str, revision: str) -> None:
        if not (repository := self.repository(KINDS[kinds], name)):
            return
        sha = repository.find(revision)
        if sha is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if "json" in (self.headers.get("Content-Type") or ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode())["paths"]
        files = repository.commits[sha]
        found = [self.entry(path, files[path]) for path in paths if path in files]
        inside = [p for p in paths if p not in files and any(f.startswith(p + "/") for f in files)]
        self.answer(200, found + [{"type": "directory", "path": p, "oid": "0" * 40, "size": 0} for p in inside])

    def refs(self, kinds: str, name: str) -> None:
        if repository := self.repository(KINDS[kinds], name):
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repository.refs.items()]
            self.answer(200, {"branches": branches, "converts": [], "tags": []})

    def branch(self, kinds: str, name: str, branch: str) -> None:
        if repository := self.repository(KINDS[kinds], name, write=True):
            branch = unquote(branch)
            if branch in repository.refs:
                return self.fail(409, "Conflict", "Reference already exists")
            start = (json.loads(self.body or b"{}") or {}).get("startingPoint") or "main"
            repository.refs[branch] = repository.find(start)
            self.answer(200, {})

    def preupload(self, kinds: str, name: str, revision: str) -> None:
        if not (repository := self.repository(KINDS[kinds], name, write=True)):
            return
        if repository.find(revision) is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[repository.find(revision)]
        answer = []
        for item in json.loads(self.body)["files"]:
            path = item["path"]
            oid = self.entry(path, files[path]) if path in files else {}
            mode = "lfs" if path.endswith(LARGE) else "regular"
            known = (oid.get("lfs", {}) if mode == "lfs" else oid).get("oid")
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self.answer(200, {"files": answer})

    def lfs_batch(self, name: str) -> None:
        if not self.may_write():
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
            objects.append(answer)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.fail(400, "BadObject", "checksum")
        self.hub.objects[oid] = self.body
        self.answer(200)

    def commit(self, kinds: str, name: str, revision: str) -> None:
        with self.hub.lock:
            self.commit_alone(kinds, name, revision)

    def commit_alone(self, kinds: str, name: str, revision: str) -> None:
        if not (repository := self.repository(KINDS[kinds], name, write=True)):
            return
        sha = repository.find(revision)
        if sha is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, message = dict(repository.commits[sha]), ""

        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.fail(400, "BadObject", f"no such object: {value['oid']}")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                files.pop(value["path"], None)
            elif key == "deletedFolder":
                files = {p: c for p, c in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
        commit = repository.commit(files, unquote(revision), message)
        prefix = "" if kinds == "models" else f"/{kinds}"
        url = f"{self.hub.url}{prefix}/{name}/commit/{commit}"
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def resolve(self, prefix: str | None, name: str, revision: str, path: str) -> None:
        kind = KINDS[prefix.rstrip("/")] if prefix else "model"
        if not (repository := self.repository(kind, name)):
            return
        if repository.gated and self.token != WRITE:
            return self.fail(403 if self.token else 401, "GatedRepo", "Access to this resource is restricted")
        sha = repository.find(revision)
        if sha is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repository.commits[sha].get(unquote(path))
        if content is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        etag = hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else git_hash(content)
        self.answer(200, content, X_Repo_Commit=sha, ETag=f'"{etag}"')


def git_hash(content: bytes) -> str:
    """By which the client knows that a small file has not changed."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def wrong_fields(fields) -> list[str]:
    """What the Hub would refuse in a card's metadata."""
    if not isinstance(fields, dict):
        return ["metadata is not a mapping"]
    wrong = []
    for name in ("license", "pipeline_tag", "library_name", "base_model_relation"):
        if not isinstance(fields.get(name, ""), str):
            wrong.append(f"{name} must be a string")
    for name in ("base_model", "datasets", "models", "tags"):
        given = fields.get(name, [])
        if not all(isinstance(x, str) and x for x in (given if isinstance(given, list) else [given])):
            wrong.append(f"{name} must be strings")
    for name in ("base_model", "datasets"):
        given = fields.get(name, [])
        wrong += [f"{name}: {x} is no repository" for x in given if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(x))]
    for item in fields.get("widget", []):
        if not isinstance(item, dict) or not all(isinstance(x, str) for x in item.values()):
            wrong.append("widget must be a list of mappings of strings")
    for model in fields.get("model-index", []):
        for result in model["results"]:
            values = [result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]]
            values += [metric["type"] for metric in result["metrics"]]
            if not all(isinstance(x, str) and x for x in values):
                wrong.append("model-index: task, dataset and metrics need their types")
    return wrong


NAME = r"([\w.-]+/[\w.-]+)"
API = rf"/api/(models|datasets|spaces)/{NAME}"
ROUTES = [
    (r"/api/whoami-v2", "whoami"),
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate_yaml"),
    (rf"{API}", "info"),
    (rf"{API}/revision/(.+)", "info"),
    (rf"{API}/tree/([^/]+)(?:/(.+))?", "tree"),
    (rf"{API}/paths-info/(.+)", "paths_info"),
    (rf"{API}/refs", "refs"),
    (rf"{API}/branch/(.+)", "branch"),
    (rf"{API}/preupload/(.+)", "preupload"),
    (rf"{API}/commit/(.+)", "commit"),
    (rf"/(?:datasets/|spaces/)?{NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"/lfs/([0-9a-f]{64})", "lfs_put"),
    (rf"/(datasets/|spaces/)?{NAME}/resolve/([^/]+)/(.+)", "resolve"),
]
