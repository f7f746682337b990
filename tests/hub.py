"""A small Hub on this machine: the requests that huggingface_hub makes to look who one is, to make a repository, and
to commit files to it (by Git LFS, or by Xet where that is installed), and faults where a test asks for them."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_mayWrite"
BINARY = (".safetensors", ".mp4", ".png")  # what the .gitattributes of a new repository name, and pictures


def read_xorb(data: bytes) -> list[bytes]:
    """The chunks of a Xet upload. Each has 8 bytes before it: version, length, compression, length of the content."""
    import lz4.frame

    chunks, position = [], 0
    while position < len(data):
        length, how = int.from_bytes(data[position + 1 : position + 4], "little"), data[position + 4]
        chunk = data[position + 8 : position + 8 + length]
        chunk = lz4.frame.decompress(chunk) if how else chunk
        if how == 2:  # grouped: all first bytes of four, all second ones, …
            ordered, start = bytearray(len(chunk)), 0
            for offset in range(4):
                size = len(ordered[offset::4])
                ordered[offset::4] = chunk[start : start + size]
                start += size
            chunk = bytes(ordered)
        chunks.append(chunk)
        position += 8 + length
    return chunks


class Repository:
    def __init__(self, private: bool = False, writers: tuple = ("me",)):
        self.private, self.writers, self.commits, self.files = private, writers, [], {}


class Hub:
    """Serves until `close`. `faults`: pairs of a pattern for "METHOD /path" and what the request gets in place of an
    answer, each used once: an HTTP status, "drop" (the connection, half-way through what is sent), or "lose" (it is
    done, and the connection ends without an answer)."""

    def __init__(self):
        self.repositories, self.objects, self.faults = {}, {}, []
        self.chunks: list[bytes] = []  # of Xet uploads
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault(self, request: str):
        for fault in self.faults:
            if re.search(fault[0], request):
                self.faults.remove(fault)
                return fault[1]
        return None



class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, content: dict | bytes = b"") -> None:
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status >= 400:
            self.send_header("X-Error-Message", f"the Hub says {status}")
        self.end_headers()
        self.wfile.write(content)

    def handle_request(self) -> None:
        request = f"{self.command} {self.path}"
        fault, size = self.hub.fault(request), int(self.headers.get("Content-Length") or 0)
        if fault == "drop":
            self.rfile.read(size // 2)
            self.close_connection = True
            return self.connection.close()
        content = self.rfile.read(size)
        if isinstance(fault, int):
            return self.answer(fault, {"error": f"the Hub says {fault}"})
        for method, pattern, action, asks_token in ROUTES:
            match = re.fullmatch(pattern, self.path.split("?")[0])
            if method == self.command and match:
                if asks_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(401, {"error": "Invalid username or password."})
                status, said = action(self, *match.groups(), content)
                if fault == "lose":
                    self.close_connection = True
                    return self.connection.close()
                return self.answer(status, said)
        return self.answer(404, {"error": f"no {request} here"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def whoami(self, _) -> tuple:
        return 200, {"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token"}}

    def create(self, content: bytes) -> tuple:
        asked = json.loads(content)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        said = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repositories:
            return 409, said | {"error": "You already created this model repo"}
        if not name.startswith("me/"):
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private" or asked.get("private", False))
        return 200, said

    def auth_check(self, name: str, _) -> tuple:
        writers = self.hub.repositories[name].writers
        return (200, {}) if "me" in writers else (403, {"error": "You have read access only"})

    def info(self, name: str, _) -> tuple:
        if name not in self.hub.repositories:
            return 404, {"error": "Repository not found"}
        repository = self.hub.repositories[name]
        about = {"_id": "1", "id": name, "private": repository.private, "sha": "0" * 40, "tags": [], "downloads": 0}
        return 200, about | {"siblings": [{"rfilename": path} for path in repository.files]}

    def validate_yaml(self, content: bytes) -> tuple:
        card = json.loads(content)["content"]
        front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
        base, errors = front.get("base_model"), []
        if base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            errors.append({"message": f'"base_model" with value "{base}" is not valid'})
        if front.get("license") not in ("apache-2.0", "other"):
            errors.append({"message": '"license" must be one of the known ones'})
        return (400 if errors else 200), {"errors": errors, "warnings": []}

    def preupload(self, name: str, content: bytes) -> tuple:
        there, files = self.hub.repositories[name].files, []
        for file in json.loads(content)["files"]:
            mode = "lfs" if file["path"].endswith(BINARY) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if file["path"] in there:
                data = there[file["path"]]
                blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                files[-1]["oid"] = hashlib.sha256(data).hexdigest() if mode == "lfs" else blob
        return 200, {"files": files}

    def lfs_batch(self, _name: str, content: bytes) -> tuple:
        objects = []
        for wanted in json.loads(content)["objects"]:
            url = f"{self.hub.url}/lfs/{wanted['oid']}"
            actions = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            objects.append(wanted | ({} if wanted["oid"] in self.hub.objects else {"actions": actions}))
        return 200, {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str, content: bytes) -> tuple:
        if hashlib.sha256(content).hexdigest() != oid:
            return 400, {"error": "not what was announced"}
        self.hub.objects[oid] = content
        return 200, {}

    def lfs_verify(self, oid: str, content: bytes) -> tuple:
        return (200, {}) if json.loads(content)["size"] == len(self.hub.objects.get(oid, b"")) else (404, {})

    def xet_token(self, _name: str, _) -> tuple:
        return 200, {"accessToken": "xet", "exp": int(time.time()) + 3600, "casUrl": f"{self.hub.url}/cas"}

    def xorb(self, content: bytes) -> tuple:
        self.hub.chunks += read_xorb(content)
        return 200, {"was_inserted": True}

    def shard(self, _) -> tuple:
        return 200, {"result": 1}

    def commit(self, name: str, content: bytes) -> tuple:
        repository, changed = self.hub.repositories[name], {}
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.find_object(value["oid"], value["size"])
        if None in changed.values():
            return 400, {"error": "an object was not uploaded"}
        repository.files |= changed
        repository.commits.append(sorted(changed))
        url = f"{self.hub.url}/{name}/commit/{len(repository.commits):040}"
        return 200, {"commitUrl": url, "commitOid": f"{len(repository.commits):040}"}

    def find_object(self, oid: str, size: int) -> bytes | None:
        """What was uploaded with this checksum; in a Xet upload, a file is some chunks in a row."""
        if oid in self.hub.objects:
            return self.hub.objects[oid]
        for first in range(len(self.hub.chunks)):
            content = b""
            for chunk in self.hub.chunks[first:]:
                content += chunk
                if len(content) == size and hashlib.sha256(content).hexdigest() == oid:
                    return content
        return None


ROUTES: list[tuple[str, str, Callable, bool]] = [
    ("GET", "/api/whoami-v2", Handler.whoami, True),
    ("POST", "/api/repos/create", Handler.create, True),
    ("GET", r"/api/models/([\w-]+/[\w-]+)/auth-check/write", Handler.auth_check, True),
    ("GET", r"/api/models/([\w-]+/[\w-]+)(?:/revision/main)?", Handler.info, True),
    ("POST", "/api/validate-yaml", Handler.validate_yaml, False),
    ("POST", r"/api/models/([\w-]+/[\w-]+)/preupload/main", Handler.preupload, True),
    ("POST", r"/([\w-]+/[\w-]+)\.git/info/lfs/objects/batch", Handler.lfs_batch, True),
    ("PUT", r"/lfs/(\w+)", Handler.lfs_put, False),
    ("POST", r"/lfs/(\w+)/verify", Handler.lfs_verify, True),
    ("GET", r"/api/models/([\w-]+/[\w-]+)/xet-write-token/main", Handler.xet_token, True),
    ("POST", r"/cas/v1/xorbs/default/\w+", Handler.xorb, False),
    ("POST", "/cas/v1/shards", Handler.shard, False),
    ("POST", r"/api/models/([\w-]+/[\w-]+)/commit/main", Handler.commit, True),
]
