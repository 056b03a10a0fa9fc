"""Coverage-guided fuzzing of the C++ half, on plain arrays: libFuzzer with sanitizers.

    python -m tests.cpp_host.fuzz                      # 1,000,000 runs of each target, ASan + UBSan
    python -m tests.cpp_host.fuzz --threads            # 20,000 random ones, ThreadSanitizer
    python -m tests.cpp_host.fuzz --runs 5000 ranking  # one target

It needs clang with its runtime libraries (Debian: clang, libclang-rt-14-dev). A target checks what
it gets against a plain computation. What fails is kept as an input in the folder .build beside
this file, and `.build/TARGET INPUT` runs it again.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE / ".build"
SOURCES = HERE.parents[1] / "csrc"
FLAGS = [
    "-std=c++17",
    "-g",
    "-ffp-contract=off",
    "-fno-sanitize-recover=all",
    "-Wno-unused-function",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


def targets() -> list[str]:
    """The families that have a fuzz target."""
    return sorted(path.name.removesuffix("_fuzz.cpp") for path in HERE.glob("*_fuzz.cpp"))


def missing() -> str | None:
    """Why nothing can be fuzzed here; None if all is there."""
    if shutil.which("clang++") is None:
        return "clang++ is not on PATH"
    BUILD.mkdir(exist_ok=True)
    probe = BUILD / "probe.cpp"
    probe.write_text(
        "#include <cstddef>\n#include <cstdint>\n"
        'extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t) { return 0; }\n'
    )
    command = ["clang++", "-fsanitize=fuzzer,address", str(probe), "-o", str(BUILD / "probe")]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        return "clang++ comes without libFuzzer (Debian: libclang-rt-14-dev)"
    return None


def build(target: str, threads: bool, quick: bool = False) -> Path:
    """Compile a target, quickly or to run quickly; returns its program.

    Raises CalledProcessError if that fails.
    """
    import torch

    torch_include = Path(torch.__file__).parent / "include"
    sanitizers = "thread" if threads else "fuzzer,address,undefined"
    program = BUILD / f"{target}{'-threads' if threads else ''}"
    BUILD.mkdir(exist_ok=True)
    command = ["clang++", *FLAGS, "-O0" if quick else "-O1", f"-fsanitize={sanitizers}"]
    command += [f"-I{SOURCES}", f"-I{HERE}"]
    if threads:
        command += ["-DDHCL_PARALLEL_ELEMENTS=0", str(HERE / "random_main.cpp")]
    for folder in (torch_include, torch_include / "torch/csrc/api/include"):
        command += ["-isystem", str(folder)]
    command += [str(HERE / f"{target}_fuzz.cpp"), str(HERE / "torch_c.cpp")]
    subprocess.run([*command, "-pthread", "-o", str(program)], check=True)
    return program


def run(target: str, runs: int, threads: bool, quick: bool = False) -> bool:
    """Run a target from its corpus, and say what was run; False if something was found.

    ``quick`` as of :func:`build`, for few runs.
    """
    program = build(target, threads, quick)
    command = [str(program), str(runs)]
    if not threads:
        grown = BUILD / f"corpus-{target}"
        grown.mkdir(exist_ok=True)
        command = [str(program), f"-runs={runs}", "-max_len=4096", "-len_control=0"]
        command += ["-rss_limit_mb=4096", "-timeout=60", f"-artifact_prefix={program}-"]
        command += [str(grown), str(HERE / "corpus" / target)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - started
    count = re.search(r"Done (\d+) runs", done.stderr)
    if done.returncode != 0 or count is None:
        # Lines that begin with # count the inputs that were new.
        said = [line for line in done.stderr.splitlines() if not line.startswith("#")]
        print("\n".join(said)[:8000])
        print(f"{program.name}: failed after {seconds:.0f} s")
        return False
    edges = "".join(f", {found} edges" for found in re.findall(r"cov: (\d+)", done.stderr)[-1:])
    print(f"{program.name}: {int(count[1]):,} runs{edges}, {seconds:.0f} s", flush=True)
    return True


def main() -> int:
    """The exit status: 0 if nothing was found."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", choices=[[], *targets()], default=[])
    parser.add_argument("--runs", type=int, help="inputs for each target")
    parser.add_argument("--threads", action="store_true", help="ThreadSanitizer, four threads")
    options = parser.parse_args()
    reason = missing()
    if reason is not None:
        print(f"fuzz: {reason}")
        return 2
    runs = options.runs or (20_000 if options.threads else 1_000_000)
    results = [run(target, runs, options.threads) for target in options.targets or targets()]
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
