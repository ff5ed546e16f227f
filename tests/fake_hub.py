"""A Hub on 127.0.0.1 that keeps what is pushed to it: just the calls that a push makes."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """Start it with `with FakeHub() as hub`; `hub.files` maps repository paths to their bytes."""

    def __enter__(self):
        self.files, self.objects, self.commits, self.bodies = {}, {}, [], []
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

            def do_GET(self):
                self.answer({"id": "me/aligned", "siblings": [], "sha": "0" * 40, "private": False})

            def do_PUT(self):
                hub.objects[self.path.rsplit("/", 1)[-1]] = self.body()
                self.answer({})

            def do_POST(self):
                data = self.body()
                if self.path == "/api/repos/create":
                    self.answer({"url": f"{hub.url}/me/aligned", "id": "me/aligned"})
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
                    hub.commit(data)
                    self.answer({"commitUrl": f"{hub.url}/me/aligned/commit/1", "commitOid": "1" * 40})
                else:
                    self.answer({})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *arguments):
        self.server.shutdown()

    def commit(self, lines):
        for line in map(json.loads, filter(None, lines.split(b"\n"))):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[re.sub("^sha256:", "", value["oid"])]
