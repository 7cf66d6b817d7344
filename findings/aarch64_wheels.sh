#!/usr/bin/env bash
# Which of PyPI's torch wheels for aarch64 are for CPUs cannot be told from their names: 2.10.0 is (its CUDA packages are
# marked for x86_64), 2.11.0 depends on the CUDA toolkit there as on x86-64 (Requires-Dist of each wheel). And pip evaluates
# those marks for the machine it runs on: asked on x86-64 for the aarch64 wheel of 2.10.0, it adds x86-64's CUDA packages.
# It hurts Arm containers, which grow by gigabytes with one minor version, and wheels collected on another machine.
set -euo pipefail
[[ $(uname -m) == x86_64 ]] || { echo "needs x86-64" >&2; exit 2; }
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m pip install -qq --disable-pip-version-check --target "$tmp/site" packaging==25.0
report() { # the CUDA packages of a version for aarch64, as marked and as pip resolves it here; downloads metadata only
  python3 -m pip install -qq --disable-pip-version-check --dry-run --ignore-installed --only-binary :all: --no-deps \
    --platform manylinux_2_28_aarch64 --python-version 3.12 --target "$tmp/none" --report "$tmp/$1.json" "torch==$1"
}
for version in 2.10.0 2.11.0; do report "$version"; done
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
print("as recorded: 2.10.0 is for CPUs, 2.11.0 for CUDA")
PY
PYTHONPATH="$tmp/site" python3 "$tmp/run.py" "$tmp/2.10.0.json" "$tmp/2.11.0.json"
