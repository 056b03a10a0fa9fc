"""How time and memory grow with N and K: ``python -m benchmarks.scaling``.

Clustering from 1,000 images to 200,000 (a million on CUDA) at d = 256, in three regimes: separate
identities, a hub in every list, crowded identities. The loss up to a million proxies at B = 256. A
line ends before the size that would take longer than ``--limit`` seconds or more memory than is
free; the results file says which it was. The exponents are the slopes of log time and log memory
over the larger half of the sizes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.nn import functional

import dhcl_ops
from benchmarks.contrastive import Step, our_loss
from benchmarks.harness import Bench, Row, Variant, add_arguments
from benchmarks.inputs import identities, similarities, with_hub
from benchmarks.results import Ceilings, Results
from dhcl_ops.defaults import SPCL

WIDTH = 256
BATCH = 256
PER_IDENTITY = 20.0
SIZES = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000)
CUDA_SIZES = (*SIZES, 500_000, 1_000_000)
QUICK_SIZES = (500, 1_000, 2_000)
PROXIES = (1_000, 10_000, 100_000, 1_000_000)
QUICK_PROXIES = (500, 2_000, 8_000)
REGIMES = ("identities", "a hub in every list", "crowded identities")
# Memory that is never planned for: a machine that swaps measures its disk.
SPARE = 0.2


def slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Exponent p of values ~ sizes^p by least squares in logarithms; None below two points."""
    if len(sizes) < 2 or min(values) <= 0:
        return None
    x, y = (torch.tensor([math.log(v) for v in part]) for part in (sizes, values))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


def exponents(rows: Sequence[Row], name: str) -> tuple[float | None, float | None]:
    """Exponents of time and of peak memory in the parameter ``name``, over the larger half."""
    rows = sorted(rows, key=lambda row: row.params[name])
    rows = rows[min(len(rows) // 2, max(len(rows) - 3, 0)) :]
    known = [row for row in rows if row.peak_extra_bytes]
    return (
        slope([row.params[name] for row in rows], [row.seconds for row in rows]),
        slope([r.params[name] for r in known], [float(r.peak_extra_bytes or 0) for r in known]),
    )


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be taken now, in bytes; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


class Line:
    """The cases of one op as its size grows, and why they stop."""

    def __init__(self, bench: Bench, label: str, name: str, limit: float) -> None:
        self.bench, self.label, self.name, self.limit = bench, label, name, limit
        self.rows: list[Row] = []
        self.stopped = False

    def allows(self, size: int, inputs: int) -> bool:
        """Whether a case of this size, with inputs of so many bytes, is within both limits."""
        if self.stopped:
            return False
        free, why = free_bytes(self.bench.device), ""
        memory = inputs + self._expected(size, [float(r.peak_extra_bytes or 0) for r in self.rows])
        seconds = self._expected(size, [row.seconds for row in self.rows])
        if free is not None and memory > (1 - SPARE) * free:
            why = f"memory: {memory / 2**30:.1f} GiB expected, {free / 2**30:.1f} GiB free"
        elif seconds > self.limit:
            why = f"time: {seconds:.0f} s expected, the limit is {self.limit:.0f} s"
        if why:
            self.stop(size, why)
        return not why

    def stop(self, size: int, why: str) -> None:
        """End the line and write down why."""
        self.stopped = True
        self.bench.results.skipped.append(f"{self.label}: stops before {self.name}={size:,}, {why}")

    def _expected(self, size: int, values: list[float]) -> float:
        """The next value on the line through the last two; at least as steep as linear."""
        sizes = [row.params[self.name] for row in self.rows]
        known = [(s, v) for s, v in zip(sizes, values, strict=True) if v > 0]
        if not known:
            return 0.0
        power = slope(*zip(*known[-2:], strict=True)) if len(known) > 1 else None  # type: ignore[arg-type]
        value: float = known[-1][1] * (size / known[-1][0]) ** max(power or 1.0, 1.0)
        return value

    def finish(self) -> None:
        """Print the exponents."""
        if len(self.rows) < 2:
            return
        time, memory = exponents(self.rows, self.name)
        texts = [f"time ~ {self.name}^{time:.2f}"] if time is not None else []
        texts += [f"memory ~ {self.name}^{memory:.2f}"] if memory is not None else []
        sizes = [row.params[self.name] for row in self.rows]
        print(f"{self.label}: {', '.join(texts)} up to {self.name}={max(sizes):,}")


def measure(line: Line, size: int, op: str, params: Mapping[str, object], **how: object) -> None:
    """Add one case to the line; running out of memory ends it."""
    call: Callable[[], object] = how.pop("call")  # type: ignore[assignment]
    try:
        rows = line.bench.run_case(op, params, [Variant("dhcl", call)], baseline="dhcl", **how)  # type: ignore[arg-type]
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        rows = []
    line.rows += rows
    if not rows:
        line.stop(size, "out of memory")


def clustering(bench: Bench, regime: str, sizes: Sequence[int], limit: float) -> list[int]:
    """Neighbours, and everything after them, for one regime; returns the sizes searched."""
    searched = []
    search = Line(bench, f"neighbours, {regime}", "N", limit)
    after = Line(bench, f"Jaccard and DBSCAN, {regime}", "N", limit)
    for n in sizes:
        params = {"N": n, "d": WIDTH, "data": regime}
        wanted = [bench.wanted(op, params) for op in ("scaling knn", "scaling cluster")]
        if not any(wanted) or not search.allows(n, 2 * 4 * n * WIDTH):
            continue
        searched.append(n)
        features = identities(n, WIDTH, PER_IDENTITY, crowded=regime.startswith("crowded"))
        features = features.to(bench.device)
        # A hub is forged into the lists, so that searching them is the same as without it.
        if wanted[0] and "hub" not in regime:
            measure(
                search,
                n,
                "scaling knn",
                params,
                call=lambda rows=features: tuple(dhcl_ops.knn(rows, SPCL.k1)),
                flop=n * n * WIDTH,
                bytes_read=4 * n * WIDTH,
            )
        if not wanted[1] or search.stopped or not after.allows(n, 0):
            continue
        found = dhcl_ops.knn(features, SPCL.k1)
        if "hub" in regime:
            found = with_hub(found)
            found = found._replace(similarities=similarities(features, found.indices))

        def call(rows: torch.Tensor = features, ranks: dhcl_ops.Neighbours = found) -> torch.Tensor:
            result = dhcl_ops.cluster(rows, k1=SPCL.k1, k2=SPCL.k2, eps=SPCL.eps, ranks=ranks)
            labels: torch.Tensor = result.labels
            return labels

        measure(after, n, "scaling cluster", params, call=call)
    search.finish()
    after.finish()
    return searched


def loss(bench: Bench, sizes: Sequence[int], limit: float) -> None:
    """The loss and its gradient against more and more proxies."""
    line = Line(bench, f"loss and gradient, B={BATCH}", "K", limit)
    for k in sizes:
        params = {"B": BATCH, "K": k, "d": WIDTH}
        if not bench.wanted("scaling loss", params) or not line.allows(k, 4 * k * WIDTH):
            continue
        generator = torch.Generator().manual_seed(0)
        proxies = functional.normalize(torch.randn(k, WIDTH, generator=generator))
        labels = torch.randint(k, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, WIDTH, generator=generator)
        features = functional.normalize(proxies[labels] + noise / WIDTH**0.5)
        tensors = [t.to(bench.device) for t in (features, proxies, labels)]
        measure(
            line,
            k,
            "scaling loss",
            params,
            call=Step(our_loss("exact"), "both", *tensors),
            flop=4 * BATCH * k * WIDTH,
            bytes_read=2 * 4 * k * WIDTH,
        )
    line.finish()


def main(words: Sequence[str] | None = None, ceilings: Ceilings | None = None) -> Results:
    """Run the cases the command line asks for; ceilings that are known are not measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of images N")
    parser.add_argument("--proxies", type=int, nargs="+", help="numbers of proxies K")
    parser.add_argument(
        "--limit", type=float, help="seconds one call may take (default: 300, with --quick 2)"
    )
    options = parser.parse_args(words)
    bench = Bench(options, ceilings)
    print(dhcl_ops.status().line)
    full = CUDA_SIZES if bench.device.type == "cuda" else SIZES
    sizes = sorted(options.sizes or (QUICK_SIZES if bench.quick else full))
    proxies = sorted(options.proxies or (QUICK_PROXIES if bench.quick else PROXIES))
    limit = options.limit or (2.0 if bench.quick else 300.0)
    for regime in REGIMES:
        # The search takes as long in every regime: what the first one left out, all do.
        sizes = clustering(bench, regime, sizes, limit) or sizes
    loss(bench, proxies, limit)
    return bench.finish()


if __name__ == "__main__":
    main()
