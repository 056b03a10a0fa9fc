#!/usr/bin/env python3
"""Known vulnerabilities and licences of what dhcl and its extras have installed here.

    python scripts/audit.py                    # everything that is installed of all extras
    python scripts/audit.py --extras train     # of one

Vulnerabilities come from the Python Packaging Advisory Database by pip-audit (extra `audit`), which
asks pypi.org; licences are read off the installed packages, without a network.

Exit status: 0 if nothing is wrong; 1 for a package with a known vulnerability, or with a licence
that is not among those known to be compatible with Apache-2.0; 2 if vulnerabilities could not be
asked for, so that nothing is known of them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

# Words of licences under which a package may be used beside one of Apache-2.0, and whose packages
# PyTorch for CUDA stands on, under terms of their own.
GOOD = r"apache|bsd|mit|isc|psf|python software|mpl|mozilla|unlicense|public domain|zlib|hpnd|cmu"
OTHERS = r"nvidia|lgpl|lesser general public|0bsd|cc0|boost"
OF_CUDA = ("nvidia-", "cuda-")


def installed(extras: set[str] | None) -> dict[str, importlib.metadata.Distribution]:
    """What is installed of dhcl's requirements and theirs, by name; None for all extras."""
    found: dict[str, importlib.metadata.Distribution] = {}
    rest = [("dhcl", extras)]
    seen = set()
    while rest:
        name, chosen = rest.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if (name, str(chosen)) in seen:
            continue
        seen.add((name, str(chosen)))
        try:
            one = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = one
        if chosen is None:
            chosen = set(one.metadata.get_all("Provides-Extra") or [])
        for line in one.requires or []:
            needed = Requirement(line)
            contexts = [{"extra": extra} for extra in ("", *chosen)]
            if needed.marker is None or any(map(needed.marker.evaluate, contexts)):
                rest.append((needed.name, set(needed.extras)))
    found.pop("dhcl", None)
    return found


def licence(package: importlib.metadata.Distribution) -> str:
    """What the package says of its licence, in a line."""
    about = package.metadata
    named = about.get("License-Expression") or ""
    kinds = [line for line in about.get_all("Classifier") or [] if line.startswith("License")]
    texts = [named, *(kind.rpartition("::")[2].strip() for kind in kinds)]
    said = (about.get("License") or "").strip().splitlines()
    return "; ".join(filter(None, texts)) or (said[0][:80] if said else "")


def vulnerabilities(packages: dict[str, importlib.metadata.Distribution]) -> list[str] | None:
    """A line for each that is known; None if it could not be asked for, which is said."""
    if importlib.util.find_spec("pip_audit") is None:
        print("vulnerabilities: not looked for, pip-audit is not installed (pip install pip-audit)")
        return None
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "installed.txt")
        # A version of one's own, 2.9+cu130, is that of the index without the part after the plus.
        lines = [f"{n}=={p.version.partition('+')[0]}\n" for n, p in sorted(packages.items())]
        pins.write_text("".join(lines))
        command = [sys.executable, "-m", "pip_audit", "-r", str(pins), "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off"]
        done = subprocess.run(command, capture_output=True, text=True)
    try:
        answer = json.loads(done.stdout)["dependencies"]
    except (ValueError, LookupError):
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"vulnerabilities: not known, the database could not be asked ({last})")
        return None
    skipped = [one["name"] for one in answer if "skip_reason" in one]
    if len(skipped) == len(answer):
        print("vulnerabilities: not known, the index that pip-audit asks says nothing of them")
        return None
    if skipped:
        print(f"vulnerabilities: not known of {', '.join(skipped)}, which the index does not have")
    return [
        f"{one['name']} {one['version']}: {each['id']}"
        + (f", mended in {', '.join(each['fix_versions'])}" if each["fix_versions"] else "")
        for one in answer
        for each in one.get("vulns", [])
    ]


def main() -> int:
    """The exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--extras", nargs="*", help="of these alone")
    options = parser.parse_args()
    packages = installed(None if options.extras is None else set(options.extras))
    if not packages:
        parser.error("dhcl is not installed in this Python")
    strange = {}
    for name, one in sorted(packages.items()):
        text = licence(one)
        known = re.search(rf"\b({GOOD}|{OTHERS})", text, re.IGNORECASE)
        if not known and not name.startswith(OF_CUDA):
            strange[name] = text or "none named"
    print(f"licences: {len(packages)} packages, {len(strange)} to look at")
    for name, text in strange.items():
        print(f"  {name} {packages[name].version}: {text}")
    found = vulnerabilities(packages)
    if found is None:
        return 2
    print(f"vulnerabilities: {len(found)} known in {len(packages)} packages")
    print("".join(f"  {line}\n" for line in found), end="")
    return int(bool(found or strange))


if __name__ == "__main__":
    sys.exit(main())
