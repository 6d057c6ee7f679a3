"""A stand-in for the Hugging Face hub: the few addresses that downloads and uploads of small files use, on
this machine.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Hub(ThreadingHTTPServer):
    """Repositories are dictionaries of bytes: `hub.repos["owner/name"]["config.json"]`.

    `hub.asked` lists the requests.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, value, status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(self.path.split("?")[0]).strip("/")
        self.server.asked.append(f"{self.command} {path}")
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.server.repos:
                return self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
            files = self.server.repos[name]
            if "tree" in parts:
                return self.answer(
                    [
                        {"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                        for f, b in files.items()
                    ]
                )
            return self.answer(
                {
                    "id": name,
                    "sha": "a" * 40,
                    "siblings": [{"rfilename": f} for f in files],
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                }
            )
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        body = self.server.repos.get(name, {}).get(file)
        if body is None:
            return self.answer(
                {"error": "not found"},
                404,
                **{"X-Error-Code": "EntryNotFound" if name in self.server.repos else "RepoNotFound"},
            )
        self.answer(body, **{"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": "a" * 40})

    do_HEAD = do_GET

    def do_POST(self):
        path = unquote(self.path.split("?")[0]).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(f"POST {path}")
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repos.setdefault(name, {})
            return self.answer({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        if path.startswith("api/validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(path.split("/")[2:4])
        if "preupload" in path:
            return self.answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in json.loads(body)["files"]
                    ]
                }
            )
        if "commit" in path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.repos[name][entry["value"]["path"]] = base64.b64decode(
                        entry["value"]["content"]
                    )
            return self.answer(
                {
                    "success": True,
                    "commitOid": "b" * 40,
                    "commitUrl": f"{self.server.address}/{name}/commit/{'b' * 40}",
                    "hookOutput": "",
                }
            )
        self.answer({"error": f"not part of the stand-in: {path}"}, 501)
