#!/usr/bin/env python3
"""Sprites against the floor of bare QEMU, in one run: `./dev bench vm`.

The floor (`vm_floor.py`, none of our code) starts, suspends and resumes a VM with a busybox agent and a local qcow2. We do the same through the
public API of a running cluster, as a client would: TLS, token, REST. Every line is a ratio of medians in this run; nothing here is a test.

usage: vm.py FLOOR_SCRIPT WORK_DIR [--rounds N] [--burst N] [--asleep N] [--cluster DATA PID] [--json FILE]        (environment as `./dev env` prints it)
"""

import argparse
import concurrent.futures
import http.client
import json
import os
import pathlib
import re
import ssl
import statistics
import subprocess
import sys
import time
import urllib.parse

API = urllib.parse.urlsplit(os.environ["SPRITES_API_URL"])
TLS = ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE"))
HEADERS = {"Authorization": "Bearer " + os.environ["SPRITE_TOKEN"]}
FLOOR_LINE = re.compile(r"^(.+?)\s+median ([\d.]+) s", re.M)
DEADLINE_S = 180


def call(method, path, body=None, host=None, raw=False):
    """One request on a new connection, as the first one of a client is."""
    connection = http.client.HTTPSConnection(host or API.hostname, API.port, timeout=DEADLINE_S, context=TLS)
    headers = dict(HEADERS)
    data = body
    if isinstance(body, dict):
        data = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
    connection.request(method, path, body=data, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    if answer.status >= 400:
        raise RuntimeError(f"{method} {path}: {answer.status} {content[:300]!r}")
    return content if raw else json.loads(content or b"null")


def create(name, **settings):
    return call("POST", "/v1/sprites", {"name": name, "idle_timeout": "never", **settings})


def destroy(name):
    call("DELETE", f"/v1/sprites/{name}", raw=True)


def run(name, *argv):
    """Runs a command over HTTP and returns its output; checks that it ended with 0."""
    query = urllib.parse.urlencode([("cmd", word) for word in argv] + [("path", argv[0])])
    frames = call("POST", f"/v1/sprites/{name}/exec?{query}", b"", raw=True)
    if frames[-2:] != b"\x03\x00":
        raise RuntimeError(f"{argv} ended with {frames[-200:]!r}")
    return frames[:-2]


def checkpoint(name):
    lines = call("POST", f"/v1/sprites/{name}/checkpoint", {}, raw=True).decode().splitlines()
    return json.loads(lines[-1])


def timed(work, *arguments):
    begun = time.monotonic()
    work(*arguments)
    return time.monotonic() - begun


def floor(script, folder):
    """Runs the floor and returns its medians in seconds, by name."""
    print("# floor: bare QEMU", file=sys.stderr)
    out = subprocess.run([sys.executable, script, folder], check=True, stdout=subprocess.PIPE, text=True).stdout
    print(out, file=sys.stderr)
    return {name.strip(): float(seconds) for name, seconds in FLOOR_LINE.findall(out)}


def wait_for_pool():
    """A calm machine: the pool refills within seconds of the last create."""
    time.sleep(12)


def busy_seconds():
    """CPU seconds of the whole machine so far, idle and waiting not counted."""
    with open("/proc/stat", encoding="ascii") as stat:
        ticks = [int(word) for word in stat.readline().split()[1:]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def bench_create(rounds):
    """Create call to first output, from the pool and without it; and CPU seconds of one without it, with what goes on behind it."""
    pool, cold, cpu = [], [], []
    for number in range(rounds):
        wait_for_pool()
        taken = time.monotonic()
        create(f"bench-p{number}")
        run(f"bench-p{number}", "/bin/bash", "-c", "echo ready")
        pool.append(time.monotonic() - taken)
        begun, busy = time.monotonic(), busy_seconds()
        create(f"bench-c{number}")
        run(f"bench-c{number}", "/bin/bash", "-c", "echo ready")
        cold.append(time.monotonic() - begun)
        # Until the pool is filled again, 2 s after an entry was taken; the new sprite makes its SSH key meanwhile.
        time.sleep(max(0, taken + 1.95 - time.monotonic()))
        cpu.append(busy_seconds() - busy)
        destroy(f"bench-p{number}")
        destroy(f"bench-c{number}")
    return pool, cold, cpu


# Also what node-agent/tests/vm.rs runs.
WRITER = (pathlib.Path(__file__).parent / "writer.py").read_text(encoding="utf-8")


def bench_pause(name, rounds):
    """Longest gap a writer inside sees around a checkpoint, less what it sees without one; and the pause the API reports."""
    gaps, reported = [], []
    run(name, "/bin/sh", "-c", f"cat > /tmp/w.py <<'E'\n{WRITER}\nE")
    with concurrent.futures.ThreadPoolExecutor() as threads:
        for _ in range(rounds):
            writer = threads.submit(run, name, "/usr/bin/python3", "/tmp/w.py", "3")
            time.sleep(1.5)
            reported.append(checkpoint(name).get("pause_us", 0) / 1e6)
            gaps.append(float(writer.result().split()[-1]) / 1000)
    return gaps, reported


def bench_restore(name, rounds):
    times = []
    checkpoint_id = re.search(r"Checkpoint (\S+) created", checkpoint(name)["data"])[1]
    for _ in range(rounds):
        begun = time.monotonic()
        call("POST", f"/v1/sprites/{name}/checkpoints/{checkpoint_id}/restore", {}, raw=True)
        run(name, "/bin/bash", "-c", "echo back")
        times.append(time.monotonic() - begun)
    return times


def bench_sleep(name, rounds):
    frozen, local, bucket, wake = [], [], [], []
    for _ in range(rounds):
        answer = call("POST", f"/v1/sprites/{name}/sleep", {"to": "suspended"})
        frozen.append(answer["frozen_ms"] / 1000)
        local.append(answer["local_ms"] / 1000)
        bucket.append(answer["bucket_ms"] / 1000)
        wake.append(timed(run, name, "/bin/true"))
    return frozen, local, bucket, wake


def bench_paused_http(name, rounds):
    server = "cd /tmp && setsid python3 -m http.server 8080 >/dev/null 2>&1 </dev/null &"
    run(name, "/bin/bash", "-c", f"{server} timeout {DEADLINE_S} bash -c 'until : </dev/tcp/127.0.0.1/8080; do sleep 0.1; done' 2>/dev/null")
    host = urllib.parse.urlsplit(call("GET", f"/v1/sprites/{name}")["url"]).hostname
    call("GET", "/", host=host, raw=True)
    awake, paused = [], []
    for _ in range(rounds):
        awake.append(timed(lambda: call("GET", "/", host=host, raw=True)))
        call("POST", f"/v1/sprites/{name}/sleep", {"to": "paused"})
        paused.append(timed(lambda: call("GET", "/", host=host, raw=True)))
    return awake, paused


def bench_burst(count):
    """`count` creates at once, each with a command; wall seconds."""
    names = [f"bench-b{number}" for number in range(count)]

    def one(name):
        create(name)
        return run(name, "/bin/cat", "/proc/sys/kernel/random/boot_id")

    begun = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        ids = set(threads.map(one, names))
    seconds = time.monotonic() - begun
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(destroy, names))
    if len(ids) != count:
        raise RuntimeError(f"{count} sprites have only {len(ids)} boot ids")
    return seconds


def vm_processes(data):
    """QEMU processes of the cluster whose data folder is `data`."""
    found = 0
    for folder in os.scandir("/proc"):
        if folder.name.isdigit():
            try:
                with open(f"/proc/{folder.name}/cmdline", "rb") as file:
                    words = file.read().split(b"\0")
            except OSError:
                continue
            found += b"qemu-system" in words[0] and any(data.encode() in word for word in words)
    return found


def resident_bytes(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        return int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1]) << 10


def bench_asleep(count, data, pid):
    """`count` cold sprites: how many VM processes and how much of sprited's memory they cost, and an exec that wakes one of them."""
    names = [f"bench-s{number}" for number in range(count)]
    before_vms, before_bytes = vm_processes(data), resident_bytes(pid)
    for name in names:
        create(name)
        call("POST", f"/v1/sprites/{name}/sleep", {"to": "cold"})
    vms, grown = vm_processes(data) - before_vms, resident_bytes(pid) - before_bytes
    wake = timed(run, names[-1], "/bin/true")
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(destroy, names))
    return vms, grown / count, wake


class Table:
    def __init__(self):
        self.rows = []

    def add(self, what, ours, base_name, base, goal):
        ratio = ours / base if base else None
        met = "" if ratio is None else ("met" if ratio <= goal else "MISSED")
        self.rows.append({"what": what, "seconds": ours, "against": base_name, "base_seconds": base, "ratio": ratio, "goal": goal, "goal_met": met})

    def limit(self, what, ours, limit):
        self.rows.append({"what": what, "seconds": ours, "against": f"≤ {limit} s", "base_seconds": limit, "ratio": ours / limit, "goal": 1.0, "goal_met": "met" if ours <= limit else "MISSED"})

    def note(self, what, ours):
        self.rows.append({"what": what, "seconds": ours, "against": "", "base_seconds": None, "ratio": None, "goal": None, "goal_met": ""})

    def markdown(self):
        lines = ["| what | ours | against | ratio | goal | |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            goal = "" if row["goal"] is None else f"≤ {row['goal']}"
            base = f"{row['against']} {row['base_seconds']:.3f} s" if row["base_seconds"] else row["against"]
            lines.append(f"| {row['what']} | {row['seconds']:.3f} s | {base} | {ratio} | {goal} | {row['goal_met']} |")
        return "\n".join(lines)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("floor_script")
    arguments.add_argument("work_dir")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--burst", type=int, default=20)
    arguments.add_argument("--asleep", type=int, default=100)
    arguments.add_argument("--cluster", nargs=2, metavar=("DATA", "PID"), help="the cluster's data folder and the process of its sprited")
    arguments.add_argument("--json")
    settings = arguments.parse_args()
    median = statistics.median
    base = floor(settings.floor_script, settings.work_dir)
    table = Table()
    pool, cold, cpu = bench_create(settings.rounds)
    table.add("create → first output, cold", median(cold), "floor first bash", base["first bash"], 1.3)
    table.add("create → first output, from the pool", median(pool), "floor first bash", base["first bash"], 0.3)
    wait_for_pool()
    create("bench-main")
    gaps, reported = bench_pause("bench-main", settings.rounds)
    table.limit("checkpoint pause, as a writer inside sees it", median(gaps), 0.030)
    table.limit("checkpoint pause, as the guest agent measures it", median(reported), 0.030)
    mount_and_bash = base["first bash"] - base["first answer"]
    table.add("restore → next exec", median(bench_restore("bench-main", settings.rounds)), "floor mount + bash", mount_and_bash, 1.3)
    frozen, local, bucket, wake = bench_sleep("bench-main", settings.rounds)
    table.limit("suspend, frozen", median(frozen), 0.100)
    table.note("suspend, locally durable", median(local))
    table.note("suspend, in the bucket", median(bucket))
    exec_alone = median([timed(run, "bench-main", "/bin/true") for _ in range(settings.rounds)])
    table.note("exec in a running sprite", exec_alone)
    table.add("wake from suspended, by an exec", median(wake), "floor resume + exec", base["resume + answer"] + exec_alone, 1.3)
    awake, paused = bench_paused_http("bench-main", settings.rounds)
    table.note("HTTP in a running sprite", median(awake))
    table.limit("paused → HTTP byte", median(paused), 0.050)
    destroy("bench-main")
    wait_for_pool()
    seconds = bench_burst(settings.burst)
    cores = os.cpu_count() or 1
    one = median(cpu)
    table.add(f"{settings.burst} created at once", seconds, f"{settings.burst} × {one:.2f} CPU-seconds of one ÷ {cores} cores", settings.burst * one / cores, 1.3)
    print(table.markdown())
    if settings.cluster:
        data, pid = settings.cluster
        wait_for_pool()
        vms, grown, wake = bench_asleep(settings.asleep, data, int(pid))
        print(f"\n{settings.asleep} sprites asleep (cold): {vms} more VM processes, {grown / 1024:.0f} KiB more of sprited's memory each; an exec wakes one in {wake:.2f} s.")
    if settings.json:
        with open(settings.json, "w", encoding="utf-8") as out:
            json.dump(table.rows, out, indent=1)


if __name__ == "__main__":
    main()
