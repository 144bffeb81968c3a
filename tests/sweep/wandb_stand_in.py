"""A stand-in for a W&B server on 127.0.0.1, for the unmodified client.

It hands out the points of a grid sweep as the real one does: a heartbeat of the agent is answered
with one `run` command, whose arguments are {key: {value: ...}}. Nested parameters are one argument
with a mapping as its value.
"""

import contextlib
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

ENTITY, PROJECT = "somebody", "tq"
HOME = {"id": "p1", "name": PROJECT, "entity": {"id": "e1", "name": ENTITY}}
VIEWER = {
    "id": "u1",
    "entity": ENTITY,
    "username": ENTITY,
    "name": ENTITY,
    "email": "",
    "admin": False,
    "flags": "{}",
    "teams": {"edges": []},
    "apiKeys": {"edges": []},
}


class WandbStandIn:
    """The server's state: `asked` (operations), `sent` (points), `runs` (by name), `uploads`."""

    def __init__(self):
        self.asked, self.runs, self.uploads, self.sweeps, self.sent = [], {}, {}, {}, []
        self.lock = threading.Lock()
        state = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def handle(self):
                with contextlib.suppress(
                    ConnectionError
                ):  # the client closes the connection without notice when it ends
                    super().handle()

            def reply(self, value):
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def body(self):
                if self.headers.get("Transfer-Encoding") == "chunked":
                    parts = []
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def do_GET(self):
                self.reply({})

            def do_PUT(self):
                body = self.body()
                with state.lock:
                    state.uploads[self.path.removeprefix("/upload/")] = body
                self.reply({})

            def do_POST(self):
                body = self.body()
                with state.lock:
                    if self.path.endswith("/graphql"):
                        asked = json.loads(body)
                        data = state.answer(asked["query"], asked.get("variables") or {})
                        # the client handles an error, but not null data
                        self.reply(
                            {"errors": [{"message": "not known here"}], "data": None}
                            if data is None
                            else {"data": data}
                        )
                    elif stream := re.search(r"/files/\w+/\w+/(\w+)/file_stream", self.path):
                        state.stream(stream[1], json.loads(body))
                        self.reply({"exitcode": None, "limits": {}})
                    else:
                        self.reply({})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, query, given):
        name = re.search(r"(?:query|mutation)\s+(\w+)", query)
        operation = name[1] if name else "anonymous"
        self.asked.append(operation)
        if operation == "UpsertSweep":
            sweep = f"sweep{len(self.sweeps)}"
            config = yaml.safe_load(given["config"])
            self.sweeps[sweep] = {"config": given["config"], "points": points(config["parameters"])}
            return {
                "upsertSweep": {
                    "sweep": {"name": sweep, "project": HOME},
                    "configValidationWarnings": [],
                }
            }
        if operation == "SweepWithRuns":
            found = self.sweeps[given["sweep"]]
            sweep = {
                "id": given["sweep"],
                "name": given["sweep"],
                "method": "grid",
                "state": "RUNNING",
                "config": found["config"],
            }
            return {"project": {"sweep": sweep | {"runs": {"edges": []}}}}
        if operation == "CreateAgent":
            self.sweep = self.sweeps[given["sweep"]]
            return {"createAgent": {"agent": {"id": "agent0"}}}
        if operation == "Heartbeat":
            return {
                "agentHeartbeat": {
                    "agent": {"id": "agent0"},
                    "commands": json.dumps(self.next_run(json.loads(given["runState"]))),
                }
            }
        if operation == "UpsertBucket":
            return {"upsertBucket": self.upsert_run(given)}
        if operation == "CreateRunFiles":
            files = [
                {"name": f, "uploadUrl": f"{self.url}/upload/{given['run']}/{f}"}
                for f in given["files"]
            ]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "RunResumeStatus":
            return {"model": HOME | {"bucket": None}}
        if operation == "CreateArtifact":  # "I have these files already", so that none are sent
            return {
                "createArtifact": {
                    "artifact": {
                        "id": "a1",
                        "state": "COMMITTED",
                        "artifactSequence": {"latestArtifact": {"id": "a1"}},
                    }
                }
            }
        return {"viewer": VIEWER} if operation == "Viewer" else None

    def next_run(self, states):
        if states or not self.sweep["points"]:
            return []
        point = self.sweep["points"].pop(0)
        arguments = {key: {"value": value} for key, value in point.items()}
        run = f"run{len(self.sent)}"
        self.sent.append(point)
        return [
            {
                "id": run,
                "type": "run",
                "run_id": run,
                "program": None,
                "args": arguments,
                "logs": [],
            }
        ]

    def upsert_run(self, given):
        run = self.runs.setdefault(
            given["name"], {"config": {}, "history": [], "summary": {}, "sweep": given.get("sweep")}
        )
        run["config"] |= json.loads(given.get("config") or "{}")
        bucket = {
            "id": given["name"],
            "name": given["name"],
            "displayName": given.get("displayName") or given["name"],
            "description": None,
            "config": "{}",
            "sweepName": given.get("sweep"),
            "project": HOME,
            "historyLineCount": 0,
        }
        return {"bucket": bucket, "inserted": True}

    def stream(self, run, sent):
        kept = self.runs.setdefault(
            run, {"config": {}, "history": [], "summary": {}, "sweep": None}
        )
        for name, file in (sent.get("files") or {}).items():
            lines = [json.loads(line) for line in file["content"] if line.startswith("{")]
            if name == "wandb-history.jsonl":
                kept["history"] += lines
            if name == "wandb-summary.json" and lines:
                kept["summary"] = lines[-1]
        if "exitcode" in sent:
            kept["exitcode"] = sent["exitcode"]


def points(parameters):
    """Return the points of a grid, with a mapping for each nested parameter."""
    axes = {}
    for key, entry in parameters.items():
        if "parameters" in entry:
            axes[key] = points(entry["parameters"])
        else:
            axes[key] = entry["values"] if "values" in entry else [entry["value"]]
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
