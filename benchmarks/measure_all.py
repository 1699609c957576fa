"""Measure everything again that README and docs report, and store it in benchmarks/results and benchmarks/stress.

    python benchmarks/measure_all.py [--only NAME ...] [--list]

Runs one benchmark after another on an otherwise idle machine, for several hours in total. `make docs` writes the new
figures into the pages. The benchmarks whose name ends in `-images` use RabbitMQ and Redis from the images of
compose.yaml; the others use the installed programs. The sweeps of the papers have commands of their own (papers/).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass

from measure import REPOSITORY, stamp

IMAGES = {"LORABBIT_TEST_RABBITMQ_IMAGE": "rabbitmq:4-management", "LORABBIT_TEST_REDIS_IMAGE": "redis:8"}


@dataclass(frozen=True)
class Benchmark:
    """A command, and the variables that it needs."""

    command: str
    images: bool = False


def script(arguments: str, name: str = "", *, images: bool = False) -> Benchmark:
    """A script of this folder that stores its result as results/NAME; the script's name when NAME is empty."""
    file = arguments.split(maxsplit=1)[0]
    return Benchmark(
        f"python benchmarks/{arguments} --out benchmarks/results/{name or file.removesuffix('.py')}", images
    )


def stress(options: str, name: str) -> Benchmark:
    """A stress test that stores its result in stress/NAME."""
    return Benchmark(f"lorabbit stress {options} --out benchmarks/stress/{name}")


ALL = {
    "simulation": script("simulation.py"),
    "transport": script("transport.py"),
    "transport-images": script("transport.py", "transport-images", images=True),
    "overhead": script("overhead.py --repeat 3"),
    "overhead-images": script("overhead.py --repeat 3", "overhead-images", images=True),
    "sizes": script("sizes.py"),
    "sizes-clients": script("sizes.py --clients 8 --sizes 200MB --chunks 1048576", "sizes-clients"),
    "sizes-images": script("sizes.py --sizes 4MB 64MB 1GB --chunks 1048576", "sizes-images", images=True),
    "stress": stress("--clients 10,50,100,300,1000 --payload 0.3,4,16MB --rounds 5 --time-limit 75", "processes"),
    "stress-500": stress("--clients 500,700 --payload 0.3MB --rounds 3 --time-limit 75", "processes-500"),
    "images": script("images.py"),
    "quickstart": script("quickstart.py"),
    "codecs": script("codecs.py --rounds 12"),
    "codecs-digits": script("codecs.py --job examples/digits-cnn.yaml --seeds 0 1 2", "codecs-digits"),
    "attacks": script("attacks.py"),
    "fuzz": script("fuzz.py"),
    "examples": script("examples.py"),
    "soak": script("soak.py --minutes 60"),
}


def run(benchmark: Benchmark) -> None:
    """Run one benchmark, and add commit and date to what a stress test stored; raises CalledProcessError."""
    words = shlex.split(benchmark.command)
    programs = {"python": [sys.executable], "lorabbit": [sys.executable, "-m", "lorabbit_cli"]}
    environment = {**os.environ, **(IMAGES if benchmark.images else {})}
    load = os.getloadavg()[0]
    subprocess.run([*programs[words[0]], *words[1:]], check=True, cwd=REPOSITORY, env=environment)  # noqa: S603
    if words[0] == "lorabbit":
        file = REPOSITORY / words[-1] / "stress.json"
        content = json.loads(file.read_bytes())
        content["machine"]["load before"] = f"{load:.1f}"
        file.write_text(json.dumps({**stamp(), **content}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the benchmarks that are asked for; a failure does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ALL), default=list(ALL), metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    arguments = parser.parse_args()
    failed = []
    for name in arguments.only:
        print(f"== {name}: {ALL[name].command}", flush=True)
        if arguments.list:
            continue
        began = time.monotonic()
        try:
            run(ALL[name])
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"   failed with exit code {error.returncode}", flush=True)
        print(f"   {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
