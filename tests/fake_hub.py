"""A Hub on 127.0.0.1 that keeps what is pushed to it: just the calls of a push and of a download."""

import base64
import json
import re
import threading
import zlib
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """Start it with `with FakeHub() as hub`.

    By repository, `hub.files` maps paths to their bytes and `hub.commits` lists summaries. `hub.requests` lists
    method, path and authorization. `hub.failures` maps a part of a path to what its next requests are answered:
    (status, headers) each.
    """

    def __enter__(self):
        self.files, self.commits = defaultdict(dict), defaultdict(list)
        self.objects, self.bodies, self.requests, self.failures = {}, [], [], {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def body(self):
                if self.headers.get("Transfer-Encoding") == "chunked":
                    parts = []
                    while size := int(self.rfile.readline(), 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    data = b"".join(parts)
                else:
                    data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.bodies.append(data)
                return data

            def answer(self, content, status=200):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def fails(self):
                hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
                planned = next(
                    (answers for part, answers in hub.failures.items() if part in self.path and answers), None
                )
                if planned is None:
                    return False
                status, headers = planned.pop(0)
                if self.command != "HEAD":
                    self.body()
                self.send_response(status)
                for name, value in {"Content-Length": "0", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                return True

            def repository(self):
                return "/".join(self.path.split("/")[3:5])  # of /api/models/me/mine/...

            def download(self):
                """Answer HEAD and GET of /me/mine/resolve/<revision>/<file>."""
                repository, _, rest = self.path.lstrip("/").partition("/resolve/")
                content = hub.files[repository].get(rest.partition("/")[2])
                found = {"X-Error-Code": "EntryNotFound"} if content is None else {"ETag": f'"{zlib.crc32(content)}"'}
                self.send_response(404 if content is None else 200)
                for name, value in {"X-Repo-Commit": "1" * 40, "Content-Length": len(content or b""), **found}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content or b"")

            def do_HEAD(self):
                if not self.fails():
                    self.download()

            def do_GET(self):
                if self.fails():
                    return None
                if "/resolve/" in self.path:
                    return self.download()
                if "/tree/" in self.path:
                    files = hub.files[self.repository()].items()
                    return self.answer(
                        [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files]
                    )
                return self.answer({"id": self.repository(), "siblings": [], "sha": "0" * 40, "private": False})

            def do_PUT(self):
                hub.objects[self.path.rsplit("/", 1)[-1]] = self.body()
                self.answer({})

            def do_POST(self):
                if self.fails():
                    return
                data = self.body()
                if self.path == "/api/repos/create":
                    asked = json.loads(data)
                    name = f"{asked['organization']}/{asked['name']}"
                    self.answer({"url": f"{hub.url}/{name}", "id": name})
                elif self.path == "/api/validate-yaml":
                    self.answer({"errors": [], "warnings": []})
                elif "/preupload/" in self.path:
                    names = [file["path"] for file in json.loads(data)["files"]]
                    mode = {True: "lfs", False: "regular"}
                    self.answer(
                        {
                            "files": [
                                {"path": n, "uploadMode": mode[n.endswith("safetensors")], "shouldIgnore": False}
                                for n in names
                            ]
                        }
                    )
                elif self.path.endswith("/info/lfs/objects/batch"):
                    objects = json.loads(data)["objects"]
                    for entry in objects:
                        entry["actions"] = {"upload": {"href": f"{hub.url}/objects/{entry['oid']}", "header": {}}}
                    self.answer({"transfer": "basic", "objects": objects})
                elif "/commit/" in self.path:
                    hub.commit(self.repository(), data)
                    url = f"{hub.url}/{self.repository()}/commit/1"
                    self.answer({"commitUrl": url, "commitOid": "1" * 40})
                else:
                    self.answer({})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *arguments):
        self.server.shutdown()

    def commit(self, repository, lines):
        files = self.files[repository]
        for line in map(json.loads, filter(None, lines.split(b"\n"))):
            value = line["value"]
            if line["key"] == "header":
                self.commits[repository].append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[re.sub("^sha256:", "", value["oid"])]
