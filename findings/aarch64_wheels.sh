#!/usr/bin/env bash
# Which of PyPI's torch wheels for aarch64 are for CPUs cannot be told from their names: 2.10.0 is (its CUDA packages are
# marked for x86_64), 2.11.0 depends on the CUDA toolkit there as on x86-64 (Requires-Dist of each wheel). And pip evaluates
# those marks for the machine it runs on: on x86-64, asked for 2.10.0 for aarch64, it wants CUDA packages for the CPU wheel.
# It hurts Arm containers, which grow by gigabytes with one minor version, and wheels collected on another machine.
set -euo pipefail
[[ $(uname -m) == x86_64 ]] || { echo "needs x86-64" >&2; exit 2; }
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --target "$tmp/site" packaging==25.0
resolve() { # asks for metadata only
  python3 -m pip install -qq --disable-pip-version-check --dry-run --ignore-installed --only-binary :all: \
    --platform manylinux_2_28_aarch64 --python-version 3.12 --target "$tmp/none" "$@"
}
for version in 2.10.0 2.11.0; do resolve --no-deps --report "$tmp/$version.json" "torch==$version"; done
resolve torch==2.10.0 2> "$tmp/said" && { echo "CHANGED: pip resolves 2.10.0 for aarch64" >&2; exit 1; }
cat > "$tmp/run.py" <<'PY'
import json
import sys

from packaging.requirements import Requirement

found = {}
for name in sys.argv[1:]:
    (wheel,) = json.load(open(name))["install"]
    wanted = [Requirement(line) for line in wheel["metadata"]["requires_dist"]]
    cuda = [r for r in wanted if r.name.startswith(("nvidia-", "cuda-"))]
    print("wheel:", wheel["download_info"]["url"].rsplit("/", 1)[-1])
    machines = ("aarch64", "x86_64")
    here = {"platform_system": "Linux", "python_version": "3.12", "extra": ""}
    found[wheel["metadata"]["version"]] = [
        sum(r.marker is None or r.marker.evaluate(here | {"platform_machine": m}) for r in cuda) for m in machines
    ]
print("expected: every aarch64 wheel on PyPI is for CPUs, or every one for CUDA, and its name says so")
print(f"found, CUDA packages that the aarch64 wheel asks for on (aarch64, x86_64): {found}")
if not (found["2.10.0"][0] == 0 and found["2.10.0"][1] > 0 and found["2.11.0"][0] > 0):
    sys.exit("CHANGED")
PY
python3 -m pip --version | cut -d' ' -f1,2
PYTHONPATH="$tmp/site" python3 "$tmp/run.py" "$tmp/2.10.0.json" "$tmp/2.11.0.json"
echo "found: pip on x86-64, for torch 2.10.0 on aarch64: $(tail -1 "$tmp/said")"
grep -q 'No matching distribution found for nvidia-.*platform_machine == "x86_64"' "$tmp/said" || { echo "CHANGED" >&2; exit 1; }
echo "as recorded: 2.10.0 is for CPUs, 2.11.0 for CUDA, and pip takes the marks for its own machine"
