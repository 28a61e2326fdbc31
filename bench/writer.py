"""Writes and syncs 4 KiB at a time for so many seconds; prints how often, and the longest time between two, in milliseconds."""
import os
import sys
import time

file = os.open("/home/sprite/w", os.O_WRONLY | os.O_CREAT, 0o600)
end = time.monotonic() + float(sys.argv[1])
last, worst, count = time.monotonic(), 0.0, 0
while time.monotonic() < end:
    os.pwrite(file, b"x" * 4096, (count % 4096) * 4096)
    os.fsync(file)
    count += 1
    now = time.monotonic()
    worst, last = max(worst, now - last), now
print(count, worst * 1000)
