#!/usr/bin/env python3
"""Checkpoint pause with the disk as the image makes it and with 50 GB on it: is it the same?

Starts two clusters, one after the other, with private data folders. The second one's bucket is seeded with a base image that is filled up in the ranges
the file system does not use (`blockstore/examples/filled_base.rs`), so that the manifest is that of a large disk. In a sprite of each, a loop writes and
fsyncs 4 KiB and reports its longest gap while a checkpoint is taken, and its longest one without.

usage: volume.py [--rounds N] [--gigabytes N] [--json FILE]
environment: SPRITES_IMAGE, the guest image (`./dev image` prints it); SPRITES_BIN, the folder with sprited and examples/filled_base
"""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = pathlib.Path(os.environ["SPRITES_BIN"])
IMAGE = pathlib.Path(os.environ["SPRITES_IMAGE"])
PORT = int(os.environ.get("SPRITES_BENCH_PORT", "8563"))
INSTANCE = "bnvl"
START_DEADLINE_S = 900
FREE_BLOCKS = re.compile(r"^  Free blocks: (.+)$", re.M)


def free_ranges(image):
    """Byte ranges of the file system in the image that hold nothing, as lines."""
    out = subprocess.run(["dumpe2fs", image], check=True, capture_output=True, text=True).stdout
    block = int(re.search(r"^Block size:\s+(\d+)$", out, re.M)[1])
    lines = []
    for found in FREE_BLOCKS.findall(out):
        for part in found.split(", "):
            first, _, last = part.strip().partition("-")
            if first:
                lines.append(f"{int(first) * block} {(int(last or first) + 1) * block}")
    return "\n".join(lines)


def seed(bucket, size_bytes):
    image = IMAGE / "rootfs.ext4"
    digest = (IMAGE / "rootfs.digest").read_text().strip()
    command = [BIN / "examples/filled_base", f"dir:{bucket}", image, digest, str(size_bytes)]
    subprocess.run(command, input=free_ranges(image), check=True, text=True)
    there = sum(file.stat().st_size for file in bucket.rglob("*") if file.is_file())
    print(f"# {size_bytes / 1e9:.0f} GB filled, {there / 1e6:.0f} MB in the bucket", flush=True)


@contextlib.contextmanager
def cluster(size_bytes):
    """A running cluster whose sprites begin with so many bytes besides the image's; yields the client module of vm.py for it."""
    data = pathlib.Path(tempfile.mkdtemp(prefix="sprites-bench-", dir="/var/tmp"))
    bucket = data / "bucket"
    bucket.mkdir()
    sprited = None
    try:
        if size_bytes:
            seed(bucket, size_bytes)
        log = open(data / "sprited.log", "w", encoding="utf-8")
        command = [BIN / "sprited", "dev", "--data", data, "--image", IMAGE, "--port", str(PORT), "--instance", INSTANCE, "--bucket", f"dir:{bucket}"]
        sprited = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        ready = data / "run/ready"
        end = time.monotonic() + START_DEADLINE_S
        while not ready.exists():
            if sprited.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the cluster does not start:\n" + (data / "sprited.log").read_text()[-3000:])
            # A state of another process, which nobody announces.
            time.sleep(0.2)
        facts = json.loads(ready.read_text())
        os.environ["SPRITES_API_URL"] = facts["api_url"]
        os.environ["SPRITE_TOKEN"] = pathlib.Path(facts["token_file"]).read_text().strip()
        os.environ["SSL_CERT_FILE"] = facts["ca_file"]
        spec = importlib.util.spec_from_file_location("vm", ROOT / "bench/vm.py")
        client = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(client)
        yield client
    finally:
        if sprited is not None and sprited.poll() is None:
            sprited.send_signal(signal.SIGTERM)
            sprited.wait()
        subprocess.run(["bash", ROOT / "e2e/reaper.sh", data, INSTANCE], stdin=subprocess.DEVNULL, check=False)
        shutil.rmtree(data, ignore_errors=True)


def pauses(client, rounds):
    """Seconds, as medians: a writer's longest gap with a checkpoint and without, and what the guest's agent reports."""
    client.create("pause")
    client.run("pause", "/bin/sh", "-c", f"cat > /tmp/w.py <<'E'\n{client.WRITER}\nE")

    def gap():
        return float(client.run("pause", "/usr/bin/python3", "/tmp/w.py", "4").split()[-1]) / 1000

    alone = [gap() for _ in range(rounds)]
    gaps, reported = [], []
    with concurrent.futures.ThreadPoolExecutor() as threads:
        for _ in range(rounds):
            writer = threads.submit(gap)
            time.sleep(2)
            reported.append(client.checkpoint("pause")["pause_us"] / 1e6)
            gaps.append(writer.result())
    client.destroy("pause")
    return {"gap": statistics.median(gaps), "gap_alone": statistics.median(alone), "reported": statistics.median(reported), "all_reported": reported, "all_gaps": gaps}


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--gigabytes", type=int, default=50)
    arguments.add_argument("--json")
    settings = arguments.parse_args()
    found = {}
    print("| disk | pause, as the guest's agent measures it | longest gap of a writer with a checkpoint | and without |\n|---|---|---|---|", flush=True)
    for name, size_bytes in (("the image's own", 0), (f"{settings.gigabytes} GB more", settings.gigabytes * 10**9)):
        with cluster(size_bytes) as client:
            found[name] = pauses(client, settings.rounds)
        row = found[name]
        print(f"| {name} | {row['reported'] * 1000:.1f} ms | {row['gap'] * 1000:.1f} ms | {row['gap_alone'] * 1000:.1f} ms |", flush=True)
    small, large = found.values()
    print(f"\npause of the large one / of the small one: {large['reported'] / small['reported']:.2f} (goal ≤ 1.2), median of the worse: {max(large['reported'], small['reported']) * 1000:.1f} ms (goal ≤ 30 ms)")
    if settings.json:
        pathlib.Path(settings.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
