#!/usr/bin/env python3
"""Packs a pure Python project as a wheel, and a simple index around it, with the standard library only.

usage: wheel.py PROJECT_DIR INDEX_DIR        INDEX_DIR is then served as it is: /simple/<name>/<wheel>
"""

import base64
import hashlib
import pathlib
import re
import sys
import tomllib
import zipfile

source, index = map(pathlib.Path, sys.argv[1:])
settings = tomllib.loads((source / "pyproject.toml").read_text())
project = settings["project"]
name, version = project["name"], project["version"]
escaped = re.sub(r"[-_.]+", "_", name)
info = f"{escaped}-{version}.dist-info"
files = {str(path.relative_to(source)): path.read_bytes() for package in settings["tool"]["setuptools"]["packages"] for path in (source / package).rglob("*.py")}
scripts = "".join(f"{command} = {function}\n" for command, function in project.get("scripts", {}).items())
files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: e2e\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
files[f"{info}/entry_points.txt"] = f"[console_scripts]\n{scripts}".encode()


def digest(content):
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


record = "".join(f"{path},{digest(content)},{len(content)}\n" for path, content in files.items())
files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
folder = index / "simple" / re.sub(r"[-_.]+", "-", name).lower()
folder.mkdir(parents=True)
wheel = f"{escaped}-{version}-py3-none-any.whl"
with zipfile.ZipFile(folder / wheel, "w", zipfile.ZIP_DEFLATED) as archive:
    for path, content in files.items():
        archive.writestr(path, content)
(folder / "index.html").write_text(f'<!doctype html><a href="{wheel}">{wheel}</a>\n')
