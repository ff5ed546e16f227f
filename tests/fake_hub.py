"""A Hub on 127.0.0.1 that keeps what is pushed to it: just the calls that a push makes."""

import base64
import json
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """Start it with `with FakeHub() as hub`.

    By repository, `hub.files` maps paths to their bytes and `hub.commits` lists summaries.
    """

    def __enter__(self):
        self.files, self.commits = defaultdict(dict), defaultdict(list)
        self.objects, self.bodies = {}, []
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

            def repository(self):
                return "/".join(self.path.split("/")[3:5])  # of /api/models/me/mine/...

            def do_GET(self):
                self.answer({"id": self.repository(), "siblings": [], "sha": "0" * 40, "private": False})

            def do_PUT(self):
                hub.objects[self.path.rsplit("/", 1)[-1]] = self.body()
                self.answer({})

            def do_POST(self):
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
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
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
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[re.sub("^sha256:", "", value["oid"])]
