# SPDX-License-Identifier: Apache-2.0
"""A stand-in of the Hub, in memory, for the few requests that pushing and pulling make with huggingface_hub itself."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_test"


def dare(hub, folder, *arguments, token=TOKEN):
    """The command in a process of its own: huggingface_hub reads its environment when it is imported."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "no_proxy": "*"}  # fmt: skip
    env |= {"HF_TOKEN": token} if token else {}
    done = subprocess.run(
        [sys.executable, "-m", "darekit", *map(str, arguments)], env=env, cwd=folder, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


class Hub:
    """A server at `url`; `repositories`: org/name -> name of a file -> content; `sent`: bytes of all answers."""

    def __init__(self):
        self.repositories, self.private, self.messages, self.validated = {}, {}, [], []
        self.sent = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repository):
        names = sorted((name, content) for name, content in self.repositories[repository].items())
        return hashlib.sha1(repr(names).encode()).hexdigest()

    def _handler(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, status, body=b"", **headers):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", headers.pop("length", str(len(data))))
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    hub.sent += len(data)
                    self.wfile.write(data)

            def body(self):
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data

            def missing(self, code, text):
                self.answer(404, {"error": text}, X_Error_Code=code, X_Error_Message=text)

            def do_POST(self):
                body = self.body()
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(401, {"error": "Invalid username or password."})
                if self.path == "/api/validate-yaml":
                    hub.validated.append(json.loads(body)["content"])
                    return self.answer(200, {"errors": [], "warnings": []})
                if self.path == "/api/repos/create":
                    wanted = json.loads(body)
                    name = f"{wanted['organization']}/{wanted['name']}"
                    if name in hub.repositories:
                        return self.answer(409, {"error": "exists", "url": f"{hub.url}/{name}"})
                    hub.repositories[name], hub.private[name] = (
                        {},
                        wanted.get("visibility") == "private" or wanted.get("private"),
                    )
                    return self.answer(200, {"url": f"{hub.url}/{name}"})
                if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
                    files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                             for f in json.loads(body)["files"]]  # fmt: skip
                    return self.answer(200, {"files": files})
                if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
                    for line in map(json.loads, body.splitlines()):
                        if line["key"] == "header":
                            hub.messages.append(line["value"]["summary"])
                        if line["key"] == "file":
                            content = base64.b64decode(line["value"]["content"])
                            hub.repositories[match[1]][line["value"]["path"]] = content
                    oid = hub.commit(match[1])
                    address = f"{hub.url}/{match[1]}/commit/{oid}"
                    return self.answer(200, {"commitUrl": address, "commitOid": oid, "pullRequestUrl": None})
                return self.missing("EntryNotFound", self.path)

            def do_GET(self):
                if match := re.fullmatch(r"/api/models/([^/]+/[^/?]+)(?:/revision/([^/?]+))?(?:\?.*)?", self.path):
                    files = hub.repositories.get(match[1])
                    if files is None:
                        return self.missing("RepoNotFound", "Repository not found")
                    if match[2] not in (None, "main", hub.commit(match[1])):
                        return self.missing("RevisionNotFound", "Invalid rev id")
                    listed = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                    return self.answer(200, {"id": match[1], "sha": hub.commit(match[1]), "siblings": listed})
                if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^?]+(?:\?.*)?", self.path):
                    files = hub.repositories.get(match[1], {})
                    return self.answer(200, [
                        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for name, content in files.items()
                    ])  # fmt: skip
                if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
                    files, name = hub.repositories.get(match[1]), unquote(match[3])
                    if files is None:
                        return self.missing("RepoNotFound", "Repository not found")
                    if name not in files:
                        return self.missing("EntryNotFound", "Entry not found")
                    content = files[name]
                    headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": hub.commit(match[1])}
                    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                    if wanted:
                        begin, end = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
                        told = f"bytes {begin}-{min(end, len(content)) - 1}/{len(content)}"
                        return self.answer(206, content[begin:end], Content_Range=told, **headers)
                    return self.answer(200, content, **headers)
                return self.missing("EntryNotFound", self.path)

            do_HEAD = do_GET

        return Handler
