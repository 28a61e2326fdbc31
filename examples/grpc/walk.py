#!/usr/bin/env python3
"""The public gRPC API from a stock client: create, run, checkpoint, restore, fork, sync, sleep, wake, destroy.

Needs grpcio and protobuf (Debian: python3-grpcio python3-protobuf protobuf-compiler) and the environment that `./dev env` prints:

    protoc -I proto/proto --python_out=/tmp/stubs sprites.proto
    PYTHONPATH=/tmp/stubs python3 examples/grpc/walk.py my-sprite
"""

import os
import sys
import urllib.parse
import uuid

# gRPC's own resolver does not ask the system, which alone knows that *.localhost is this machine. Read when the module is loaded.
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")

import grpc  # noqa: E402
import sprites_pb2 as api  # noqa: E402

SERVICE = "/sprites.v1.Sprites/"
DEADLINE_S = 120


class Client:
    """Calls by method name; what `protoc --grpc_python_out` would generate, without its plugin."""

    def __init__(self, url, token, ca_file):
        address = urllib.parse.urlsplit(url)
        with open(ca_file, "rb") as file:
            credentials = grpc.ssl_channel_credentials(file.read())
        self.channel = grpc.secure_channel(f"{address.hostname}:{address.port or 443}", credentials)
        self.metadata = [("authorization", f"Bearer {token}")]

    def call(self, method, request, answer):
        stub = self.channel.unary_unary(SERVICE + method, type(request).SerializeToString, answer.FromString)
        return stub(request, metadata=self.metadata, timeout=DEADLINE_S)

    def stream(self, method, request, answer):
        stub = self.channel.unary_stream(SERVICE + method, type(request).SerializeToString, answer.FromString)
        return stub(request, metadata=self.metadata, timeout=DEADLINE_S)

    def exec(self, name, *argv, stdin=b""):
        """Runs a command; its exit code, stdout and stderr."""
        start = api.ExecStart(name=name, argv=argv, stdin=True)
        requests = [api.ExecRequest(start=start), api.ExecRequest(stdin=stdin), api.ExecRequest(stdin_eof=True)]
        stub = self.channel.stream_stream(SERVICE + "Exec", api.ExecRequest.SerializeToString, api.ExecResponse.FromString)
        out, err, code = b"", b"", None
        for answer in stub(iter(requests), metadata=self.metadata, timeout=DEADLINE_S):
            kind = answer.WhichOneof("output")
            out += answer.stdout if kind == "stdout" else b""
            err += answer.stderr if kind == "stderr" else b""
            code = answer.exit if kind == "exit" else code
        return code, out, err


def walk(client, name):
    request = api.CreateSpriteRequest(name=name, request_id=str(uuid.uuid4()))
    sprite = client.call("CreateSprite", request, api.Sprite)
    print("created", sprite.name, sprite.status, sprite.url)
    try:
        # As after a lost answer: the same request id gives the same sprite.
        print("repeated", client.call("CreateSprite", request, api.Sprite).id == sprite.id)
        use(client, name)
    finally:
        client.call("DestroySprite", api.DestroySpriteRequest(name=name), api.DestroySpriteResponse)
    print("destroyed")


def fork(client, name, checkpoint):
    source = api.ForkSource(sprite=name, checkpoint=checkpoint)
    copy = client.call("CreateSprite", api.CreateSpriteRequest(name=name + "-fork", **{"from": source}), api.Sprite)
    try:
        came_from = getattr(copy, "from")
        print("forked", came_from.checkpoint, client.exec(copy.name, "sh", "-c", "cat ~/file")[1])
    finally:
        client.call("DestroySprite", api.DestroySpriteRequest(name=copy.name), api.DestroySpriteResponse)


def use(client, name):
    print("exec", client.exec(name, "sh", "-c", "cat > ~/file; echo kept; echo warned >&2; exit 3", stdin=b"one"))
    events = list(client.stream("CreateCheckpoint", api.CreateCheckpointRequest(name=name, comment="grpc"), api.CheckpointEvent))
    checkpoint = events[-1].checkpoint
    print("checkpoint", checkpoint.id, checkpoint.comment, events[-1].kind)
    client.exec(name, "sh", "-c", "echo two > ~/file")
    restore = api.RestoreCheckpointRequest(name=name, checkpoint=checkpoint.id)
    print("restore", list(client.stream("RestoreCheckpoint", restore, api.CheckpointEvent))[-1].kind)
    print("file", client.exec(name, "sh", "-c", "cat ~/file")[1])
    fork(client, name, checkpoint.id)
    synced = client.call("SyncSprite", api.SyncSpriteRequest(name=name), api.SyncSpriteResponse)
    print("synced", synced.watermark_at > "2026", synced.generation)
    asleep = client.call("SleepSprite", api.SleepSpriteRequest(name=name), api.SleepSpriteResponse)
    print("asleep", asleep.sprite.status)
    woken = client.call("WakeSprite", api.WakeSpriteRequest(name=name), api.WakeSpriteResponse)
    print("woken", woken.sprite.status, woken.resumed)
    listed = client.call("ListSprites", api.ListSpritesRequest(prefix=name), api.ListSpritesResponse)
    print("listed", [sprite.name for sprite in listed.sprites])
    first = next(iter(client.stream("WatchSprites", api.WatchSpritesRequest(prefix=name), api.Sprite)))
    print("watched", first.name, first.status)
    try:
        client.call("CreateSprite", api.CreateSpriteRequest(name=name), api.Sprite)
    except grpc.RpcError as error:
        print("taken", error.code().name)


if __name__ == "__main__":
    walk(Client(os.environ["SPRITES_API_URL"], os.environ["SPRITE_TOKEN"], os.environ["SSL_CERT_FILE"]), sys.argv[1])
