"""Many clients at once against `fullrank serve`: what they get, how long it takes, memory.

    python benchmarks/serve_load.py [FOLDER] [--clients 200] [--seconds 60]

FOLDER is an index or the folder of a demo; without one, the Cranfield-sized corpus of this script
(1,400 made-up documents, BM25 only) is indexed first. Server and clients share this machine, so
latencies are those of an overloaded computer; what is claimed is that nobody gets a 5xx and that
memory stays where it was.
"""

import argparse
import asyncio
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import psutil

from fullrank.core import Table

TEXT = """
    matrix sparse solver linear distance random sample graph shortest path fourier transform
    filter signal optimise gradient least squares interpolate spline cluster tree test mean
"""
WORDS = TEXT.split()


@dataclass
class Tally:
    statuses: Counter = field(default_factory=Counter)
    latencies: dict[int, list[float]] = field(default_factory=dict)
    without_retry_after: int = 0
    broken: Counter = field(default_factory=Counter)


async def client(
    http: httpx.AsyncClient, until: float, systems: list[str], tally: Tally, seed: int
) -> None:
    """Ask without a pause; when told to wait, wait as long as told."""
    draw = random.Random(seed)
    while time.monotonic() < until:
        query = " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))
        params = {"q": query, "k": 10, "system": draw.choice(systems)}
        began = time.perf_counter()
        try:
            response = await http.get("/search", params=params)
        except httpx.HTTPError as error:
            tally.broken[type(error).__name__] += 1
            continue
        elapsed = time.perf_counter() - began
        tally.statuses[response.status_code] += 1
        tally.latencies.setdefault(response.status_code, []).append(elapsed * 1e3)
        if response.status_code == 429:
            tally.without_retry_after += "retry-after" not in response.headers
            wait = float(response.headers.get("retry-after", 1))
            await asyncio.sleep(max(0.0, min(wait, until - time.monotonic())))


async def load(url: str, clients: int, seconds: float) -> Tally:
    """Run the clients, a connection each, and count what they get."""
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    tally = Tally()
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120, verify=False) as http:
        systems = [s["name"] for s in (await http.get("/systems")).json()["systems"]]
        for system in systems:  # models load on first use; that memory is not growth
            for query in WORDS[:8]:
                await http.get("/search", params={"q": query, "system": system})
        until = time.monotonic() + seconds
        work = (client(http, until, systems, tally, seed) for seed in range(clients))
        await asyncio.gather(*work)
    return tally


def warm(url: str) -> None:
    """A short burst: threads, allocator arenas and connections exist before memory is measured."""
    asyncio.run(load(url, 50, 2))


def percentile(values: list[float], percent: int) -> float:
    cuts = statistics.quantiles(values * 2, n=100)  # twice, as one value has no quantiles
    return cuts[percent - 1]


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def report(tally: Tally, before: float, after: float, peak: float, cpu: float) -> Table:
    rows = []
    for status, count in sorted(tally.statuses.items()):
        times = tally.latencies[status]
        rows.append([str(status), count, percentile(times, 50), percentile(times, 99)])
    title = (
        f"broken connections {sum(tally.broken.values())}, 429 without Retry-After "
        f"{tally.without_retry_after}, resident memory {before:.0f} -> {after:.0f} MiB "
        f"({after - before:+.1f}, peak {peak - before:+.1f}), "
        f"{cpu * 1e3 / max(1, sum(tally.statuses.values())):.1f} ms of CPU an answer"
    )
    spec = dict.fromkeys(["p50 ms", "p99 ms"], ".1f")
    return Table(["status", "answers", "p50 ms", "p99 ms"], rows, title, {"answers": ",d", **spec})


async def watched(process: psutil.Process, work: asyncio.Future) -> tuple[Tally, float]:
    """Await the load and note the highest resident memory meanwhile, in MiB."""
    task, peak = asyncio.ensure_future(work), 0.0
    while not task.done():
        peak = max(peak, process.memory_info().rss / 2**20)
        await asyncio.wait([task], timeout=0.25)
    return task.result(), peak


def made_up_index(folder: str) -> None:
    from fullrank.core import Corpus
    from fullrank.retrieval import Index

    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=80)) for _ in range(1400)]
    Index.create(folder, Corpus([f"d{i}" for i in range(1400)], texts), {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    folder = options.folder
    if folder is None:
        import tempfile

        folder = f"{tempfile.mkdtemp()}/index"
        made_up_index(folder)
    program = "import sys, fullrank.serve; fullrank.serve.serve(sys.argv[1], port=0)"
    command = [sys.executable, "-c", program, folder]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        found = re.search(r"http://[0-9.:]+", server.stdout.readline())
        if not found:
            return 1
        warm(found[0])
        process = psutil.Process(server.pid)
        before, cpu = process.memory_info().rss / 2**20, cpu_seconds(process)
        work = load(found[0], options.clients, options.seconds)
        tally, peak = asyncio.run(watched(process, work))
        after, cpu = process.memory_info().rss / 2**20, cpu_seconds(process) - cpu
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
    print(f"{options.clients} clients, {options.seconds:g} s, server exit code {server.returncode}")
    print(report(tally, before, after, peak, cpu))
    return 0 if set(tally.statuses) <= {200, 429} and not tally.broken else 1


if __name__ == "__main__":
    sys.exit(main())
