"""A hub of datasets on loopback, as far as the real client speaks to one: no client code is replaced.

Paths, status codes and bodies are those that huggingface_hub 2.4 sends and reads: repos/create, validate-yaml,
preupload, the LFS batch (basic and multipart) with verification, commit as NDJSON, info, tree with pages,
paths-info, resolve. With HF_HUB_DISABLE_XET=1 the client sends blobs by LFS, which the hub sees and checks; else by
Xet, whose own storage can be a folder (`xet_folder`): then only their names, the sha256 that the client's Xet library
made, come to the hub.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# From the .gitattributes that the hub puts into every new dataset repository.
LFS_SUFFIXES = (".png", ".npy", ".parquet", ".jpg")
MAX_REGULAR = 10_000_000
MULTIPART_FROM = 4000
PART = 1500
PAGE = 5


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, message: str, files: dict[str, bytes]) -> str:
        content = json.dumps([message, len(self.commits), sorted(files)]).encode()
        self.commits.append((hashlib.sha1(content).hexdigest(), message, files))
        return self.head

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        found = [files for oid, _, files in self.commits if revision in ("main", oid)]
        return found[-1] if found else None


@dataclass
class Fault:
    pattern: re.Pattern[str]
    times: int
    status: int
    headers: dict[str, str]
    body: bytes
    after: int
    lost_answer: bool


class Hub:
    """State, counters and injected faults.

    Attributes:
        requests: (method, path without query, status); status 0 is a connection that was cut.
        received: sha256 of blobs that arrived, once per arrival.
        xet_folder: for the blobs of clients with Xet.
        by_xet: contents that may be committed by their sha256 alone.
    """

    def __init__(self, token: str, namespace: str):
        self.token, self.namespace = token, namespace
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.received: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.url = ""
        self.xet_folder = ""
        self.by_xet: dict[str, bytes] = {}

    def fail(self, pattern, status, times=10**9, headers=None, body=b"<html>", after=0, lost_answer=False):
        """Answers matching requests ("METHOD path") with a status; 0 resets the connection in the middle of the body.

        `after` requests pass first; with `lost_answer` the request is carried out and only its answer is lost.
        """
        fault = Fault(re.compile(pattern), times, status, headers or {}, body, after, lost_answer)
        self.faults.append(fault)
        return fault

    def count(self, pattern, status=None):
        return sum(
            bool(re.search(pattern, f"{method} {path}")) and status in (None, code)
            for method, path, code in self.requests
        )

    def fault_for(self, name):
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.pattern.search(name):
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > MAX_REGULAR)


class Reply(Exception):  # noqa: N818
    def __init__(self, status, body, headers=None):
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers or {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes; the second would wait 40 ms

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length", 0))
        content = self.rfile.read(length)
        if len(content) != length:
            raise ConnectionError("the client went away")
        return content

    def cut(self):
        # A closing with zero linger sends RST: what a broken line looks like to the client.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RD)
        self.wfile.close = lambda: None
        self.connection.close()

    def handle_any(self):
        hub, url = self.hub, urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        name = f"{self.command} {path}"
        fault = hub.fault_for(name)
        try:
            if fault is not None and fault.status == 0 and not fault.lost_answer:
                self.rfile.read(min(100, int(self.headers.get("Content-Length", 0)) // 2))
                hub.requests.append((self.command, path, 0))
                self.cut()
                return
            body = self.body()
            if fault is not None and not fault.lost_answer:
                raise Reply(fault.status, fault.body, fault.headers)
            with hub.lock:
                status, answer, headers = self.route(name, body)
            if fault is not None:
                raise Reply(fault.status, fault.body, fault.headers)
        except Reply as reply:
            status, answer, headers = reply.status, reply.body, reply.headers
        except (ConnectionError, ValueError):
            self.close_connection = True
            return
        hub.requests.append((self.command, path, status))
        if status == 0:
            self.cut()
            return
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def authorized(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {self.hub.token}"):
            message = "Invalid credentials in Authorization header"
            raise Reply(401, {"error": message}, {"X-Error-Message": message})
        return given is not None

    def need_token(self):
        if not self.authorized():
            raise Reply(401, {"error": "Invalid username or password."})

    def repo(self, repo_id) -> Repo:
        repo = self.hub.repos.get(repo_id)
        authorized = self.authorized()
        if repo is None or (repo.private and not authorized):
            status = 404 if authorized else 401
            raise Reply(status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repo

    def files(self, repo, revision):
        files = repo.files(revision)
        if files is None:
            raise Reply(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        return files

    def route(self, name, body):
        hub = self.hub
        if name == "GET /api/whoami-v2":
            self.need_token()
            return 200, {"type": "user", "name": hub.namespace, "orgs": []}, {}
        if name == "POST /api/repos/create":
            return self.create(json.loads(body))
        if name == "POST /api/validate-yaml":
            return self.validate(json.loads(body))
        repo = r"/(?P<repo>[^/]+/[^/]+?)"
        for pattern, method in (
            (rf"POST /api/datasets{repo}/preupload/main$", self.preupload),
            (rf"POST /datasets{repo}\.git/info/lfs/objects/batch$", self.batch),
            (r"PUT /storage/(?P<oid>[0-9a-f]{64})$", self.put),
            (r"PUT /storage/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)$", self.put_part),
            (r"POST /api/complete/(?P<oid>[0-9a-f]{64})$", self.complete),
            (r"POST /api/verify/(?P<oid>[0-9a-f]{64})$", self.verify),
            (rf"GET /api/datasets{repo}/xet-write-token/main$", self.xet_token),
            (rf"POST /api/datasets{repo}/commit/main$", self.commit),
            (rf"GET /api/datasets{repo}(/revision/(?P<revision>[^/]+))?$", self.info),
            (rf"GET /api/datasets{repo}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?$", self.tree),
            (rf"POST /api/datasets{repo}/paths-info/(?P<revision>[^/]+)$", self.paths_info),
            (rf"(GET|HEAD) /datasets{repo}/resolve/(?P<revision>[^/]+)/(?P<path>.+)$", self.resolve),
        ):
            if match := re.match(pattern, name):
                return method(body=body, **match.groupdict())
        return 404, {"error": f"no route for {name}"}, {"X-Error-Code": "EntryNotFound"}

    def create(self, asked):
        self.need_token()
        if asked["organization"] != self.hub.namespace:
            message = f"You don't have the rights to create a dataset under the namespace {asked['organization']!r}"
            raise Reply(403, {"error": message}, {"X-Error-Message": message})
        assert asked["type"] == "dataset"
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.url}/datasets/{repo_id}"}
        if repo_id in self.hub.repos:
            return 409, {"error": "You already created this dataset repo", **url}, {}
        self.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        self.hub.repos[repo_id].commit("initial commit", {".gitattributes": b"*.png filter=lfs\n"})
        return 200, url, {}

    def validate(self, asked):
        self.authorized()
        match = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else None
            errors = [] if isinstance(data, dict) else [{"message": "no metadata"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        return 400 if errors else 200, {"errors": errors, "warnings": []}, {}

    def preupload(self, body, repo):
        self.need_token()
        files = self.repo(repo).files()
        answer = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            lfs = is_lfs(path, asked["size"])
            old = files.get(path)
            answer.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            if old is not None:
                answer[-1]["oid"] = hashlib.sha256(old).hexdigest() if is_lfs(path, len(old)) else git_oid(old)
        return 200, {"files": answer}, {}

    def batch(self, body, repo):
        self.need_token()
        self.repo(repo)
        objects = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            objects.append({"oid": oid, "size": size})
            if oid in self.hub.blobs:
                continue
            storage, verify = f"{self.hub.url}/storage/{oid}", f"{self.hub.url}/api/verify/{oid}"
            if size >= MULTIPART_FROM:
                header = {str(k + 1): f"{storage}/{k + 1}" for k in range(-(-size // PART))}
                upload = {"href": f"{self.hub.url}/api/complete/{oid}", "header": {"chunk_size": str(PART), **header}}
            else:
                upload = {"href": storage}
            objects[-1]["actions"] = {"upload": upload, "verify": {"href": verify}}
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def store(self, oid, content):
        if hashlib.sha256(content).hexdigest() != oid:
            raise Reply(400, {"error": "the content does not have the promised sha256"})
        self.hub.blobs[oid] = content
        self.hub.received.append(oid)

    def put(self, body, oid):
        # Storage addresses are signed; the hub's token must not go there.
        if "Authorization" in self.headers:
            raise Reply(400, {"error": "the token was sent to the storage"})
        self.store(oid, body)
        return 200, b"", {}

    def put_part(self, body, oid, part):
        self.hub.parts.setdefault(oid, {})[int(part)] = body
        return 200, b"", {"ETag": hashlib.md5(body).hexdigest()}

    def complete(self, body, oid):
        parts = self.hub.parts.pop(oid)
        for asked in json.loads(body)["parts"]:
            assert hashlib.md5(parts[asked["partNumber"]]).hexdigest() == asked["etag"]
        self.store(oid, b"".join(parts[k] for k in sorted(parts)))
        return 200, {}, {}

    def verify(self, body, oid):
        self.need_token()
        if len(self.hub.blobs.get(oid, b"")) != json.loads(body)["size"]:
            raise Reply(400, {"error": "not uploaded"})
        return 200, {}, {}

    def xet_token(self, body, repo):
        self.need_token()
        expires = int(time.time()) + 3600
        return 200, {"casUrl": f"local://{self.hub.xet_folder}", "accessToken": "xet", "exp": expires}, {}

    def commit(self, body, repo):
        self.need_token()
        found = self.repo(repo)
        files = dict(found.files())
        header, *operations = [json.loads(line) for line in body.splitlines()]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs | self.hub.by_xet:
                    raise Reply(400, {"error": f"LFS pointer to a missing object: {value['path']}"})
                files[value["path"]] = (self.hub.blobs | self.hub.by_xet)[value["oid"]]
            else:
                raise Reply(400, {"error": f"not in use: {operation['key']}"})
        oid = found.commit(header["value"]["summary"], files)
        url = f"{self.hub.url}/datasets/{repo}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": None}, {}

    def info(self, body, repo, revision):
        found = self.repo(repo)
        files = self.files(found, revision or "main")
        oid = found.head if revision in (None, "main") else revision
        siblings = [{"rfilename": path} for path in files]
        return 200, {"id": repo, "sha": oid, "private": found.private, "siblings": siblings, "tags": []}, {}

    def entry(self, path, content):
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if is_lfs(path, len(content)):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 130}
        return entry

    def tree(self, body, repo, revision, path):
        files = self.files(self.repo(repo), revision)
        prefix = f"{path}/" if path else ""
        inside = {name: content for name, content in files.items() if name.startswith(prefix)}
        if path and not inside:
            raise Reply(404, {"error": f"{path} does not exist on {revision}"}, {"X-Error-Code": "EntryNotFound"})
        recursive = self.query.get("recursive", ["False"])[0].lower() == "true"
        entries = []
        for name in sorted(inside):
            folders = name[len(prefix) :].split("/")[:-1]
            for depth in range(1, 1 + len(folders)):
                folder = prefix + "/".join(folders[:depth])
                entry = {
                    "type": "directory",
                    "path": folder,
                    "size": 0,
                    "oid": hashlib.sha1(folder.encode()).hexdigest(),
                }
                if (depth == 1 or recursive) and entry not in entries:
                    entries.append(entry)
            if recursive or not folders:
                entries.append(self.entry(name, inside[name]))
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            following = f"{self.hub.url}{urlsplit(self.path).path}?recursive={recursive}&cursor={start + PAGE}"
            headers["Link"] = f'<{following}>; rel="next"'
        return 200, entries[start : start + PAGE], headers

    def paths_info(self, body, repo, revision):
        files = self.files(self.repo(repo), revision)
        asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        answer = []
        for path in asked["paths"]:
            if path in files:
                answer.append(self.entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                answer.append({"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())})
        return 200, answer, {}

    def resolve(self, body, repo, revision, path):
        found = self.repo(repo)
        files = self.files(found, revision)
        if path not in files:
            raise Reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        content = files[path]
        lfs = is_lfs(path, len(content))
        etag = hashlib.sha256(content).hexdigest() if lfs else git_oid(content)
        commit = found.head if revision == "main" else revision
        return 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "X-Linked-Size": str(len(content))}


@contextmanager
def running_hub(token: str, namespace: str):
    """A hub that listens on a free port of loopback."""
    hub = Hub(token, namespace)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.hub = hub
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
