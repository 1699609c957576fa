"""Sizes of the container images.

    python benchmarks/images.py [--tag dev] [--out FILE]

Builds the images of compose.yaml that this machine can build and asks the Docker engine for their sizes, uncompressed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

import docker
from measure import Table, machine

SERVICES = ("server", "client")
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Build the images and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", default="dev", help="tag of the images")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    environment = {**os.environ, "LORABBIT_TAG": arguments.tag}
    subprocess.run(["docker", "compose", "build", "--quiet"], check=True, cwd=ROOT, env=environment)  # noqa: S607
    engine = docker.from_env()
    rows = []
    for service in SERVICES:
        image = engine.images.get(f"lorabbit-{service}:{arguments.tag}")
        rows.append({"image": f"lorabbit-{service}", "MB": image.attrs["Size"] / 1e6})
    Table("Container images", rows, machine()).show(arguments.out)


if __name__ == "__main__":
    main()
