"""A small device-management server: devices enrol, check in, and are told what to do.

One process, one SQLite file, the standard library only. Every write is committed with `synchronous=FULL` before it is answered, so an
answered write is on the sprite's disk.

    POST /devices                 {"serial": "C02...", "model": "..."}      -> 201 {"id": 1, ...}; the same serial again -> 200, the same device
    POST /devices/1/checkins      {"battery": 80}                           -> 201 {"seq": 1, "commands": [...]}
    POST /devices/1/commands      {"command": "lock"}                       -> 201
    GET  /devices, /devices/1, /health, /
"""

import argparse
import html
import json
import os
import re
import sqlite3
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SCHEMA = """
CREATE TABLE IF NOT EXISTS devices (
    id INTEGER PRIMARY KEY, serial TEXT NOT NULL UNIQUE, model TEXT NOT NULL, enrolled TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
CREATE TABLE IF NOT EXISTS checkins (
    device INTEGER NOT NULL REFERENCES devices(id), seq INTEGER NOT NULL, report TEXT NOT NULL,
    at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, PRIMARY KEY (device, seq));
CREATE TABLE IF NOT EXISTS commands (
    id INTEGER PRIMARY KEY, device INTEGER NOT NULL REFERENCES devices(id), command TEXT NOT NULL, delivered TEXT);
"""
BODY_BYTES_MAX = 64 * 1024


class Store:
    """The database. One connection, one writer at a time."""

    def __init__(self, path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self.lock = threading.Lock()
        self.db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self.db.row_factory = sqlite3.Row
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.executescript(SCHEMA)

    def enrol(self, serial, model):
        """Returns the device and whether it is new. Idempotent by serial."""
        with self.lock:
            known = self.db.execute("SELECT * FROM devices WHERE serial = ?", (serial,)).fetchone()
            if known:
                return dict(known), False
            row = self.db.execute("INSERT INTO devices (serial, model) VALUES (?, ?) RETURNING *", (serial, model)).fetchone()
            return dict(row), True

    def check_in(self, device, report):
        """Records a report and hands out the commands that wait. None when the device is unknown."""
        with self.lock:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                if not self.db.execute("SELECT 1 FROM devices WHERE id = ?", (device,)).fetchone():
                    self.db.execute("ROLLBACK")
                    return None
                seq = self.db.execute("SELECT COALESCE(MAX(seq), 0) + 1 FROM checkins WHERE device = ?", (device,)).fetchone()[0]
                self.db.execute("INSERT INTO checkins (device, seq, report) VALUES (?, ?, ?)", (device, seq, json.dumps(report)))
                waiting = self.db.execute(
                    "UPDATE commands SET delivered = CURRENT_TIMESTAMP WHERE device = ? AND delivered IS NULL RETURNING command",
                    (device,),
                ).fetchall()
                self.db.execute("COMMIT")
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            return {"seq": seq, "commands": [row["command"] for row in waiting]}

    def command(self, device, command):
        with self.lock:
            if not self.db.execute("SELECT 1 FROM devices WHERE id = ?", (device,)).fetchone():
                return None
            row = self.db.execute("INSERT INTO commands (device, command) VALUES (?, ?) RETURNING *", (device, command)).fetchone()
            return dict(row)

    def devices(self):
        with self.lock:
            rows = self.db.execute(
                "SELECT devices.*, COUNT(seq) AS checkins, MAX(at) AS last_seen FROM devices"
                " LEFT JOIN checkins ON checkins.device = devices.id GROUP BY devices.id ORDER BY devices.id"
            ).fetchall()
            return [dict(row) for row in rows]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store = None

    def do_GET(self):
        if self.path == "/health":
            return self.answer(200, {"ok": True})
        if self.path == "/":
            return self.page()
        if self.path == "/devices":
            return self.answer(200, self.store.devices())
        match = re.fullmatch(r"/devices/(\d+)", self.path)
        if match:
            for device in self.store.devices():
                if device["id"] == int(match[1]):
                    return self.answer(200, device)
        self.answer(404, {"error": "not found"})

    def do_POST(self):
        body = self.body()
        if body is None:
            return self.answer(400, {"error": "the body has to be a JSON object of at most 64 KiB"})
        if self.path == "/devices":
            if not isinstance(body.get("serial"), str) or not body["serial"]:
                return self.answer(400, {"error": "serial is required"})
            device, new = self.store.enrol(body["serial"], str(body.get("model", "")))
            return self.answer(201 if new else 200, device)
        match = re.fullmatch(r"/devices/(\d+)/(checkins|commands)", self.path)
        if match:
            if match[2] == "checkins":
                done = self.store.check_in(int(match[1]), body)
            else:
                done = self.store.command(int(match[1]), str(body.get("command", "")))
            if done is not None:
                return self.answer(201, done)
        self.answer(404, {"error": "not found"})

    def body(self):
        try:
            length = int(self.headers.get("Content-Length", "0"))
            if not 0 <= length <= BODY_BYTES_MAX:
                self.close_connection = True
                return None
            body = json.loads(self.rfile.read(length) or b"{}")
        except ValueError:
            return None
        return body if isinstance(body, dict) else None

    def answer(self, status, value, content_type="application/json"):
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def page(self):
        cells = ("id", "serial", "model", "checkins", "last_seen")
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(device[cell]))}</td>" for cell in cells) + "</tr>" for device in self.store.devices()
        )
        head = "".join(f"<th>{cell}</th>" for cell in cells)
        self.answer(200, f"<!doctype html><title>Devices</title><h1>Devices</h1><table><tr>{head}</tr>{rows}</table>", "text/html; charset=utf-8")

    def log_message(self, *_):
        pass


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--port", type=int, default=8080)
    arguments.add_argument("--database", default=os.path.expanduser("~/mdm.sqlite"))
    settings = arguments.parse_args()
    Handler.store = Store(settings.database)
    print(f"mdm listens on port {settings.port}, database {settings.database}", flush=True)
    ThreadingHTTPServer(("0.0.0.0", settings.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
