#!/usr/bin/env bash
# With pytest 9.2.0, pytest-xdist 3.8.0 spreads the tests of an xdist_group over its workers, and says nothing. Up to
# pytest 9.1.1 they stay on one, as `--dist loadgroup` promises. The worker tells the scheduler the group by appending
# "@group" to a test's private `_nodeid`; pytest 9.2.0 keeps a structured id elsewhere, so the name never arrives
# (pytest-xdist's issue 1386).
# It hurts suites whose groups share something costly or exclusive: processes, ports, a device. They start it once a
# worker, and wait for each other.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cat > "$tmp/test_group.py" <<'PY'
import os
import time

import pytest

pytestmark = pytest.mark.xdist_group("one")


@pytest.mark.parametrize("i", range(8))
def test(i):
    time.sleep(0.2)
    with open(os.environ["SEEN"], "a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\n")
PY
for version in 9.1.1 9.2.0; do
  python3 -m pip install -qq --disable-pip-version-check --target "$tmp/$version" "pytest==$version" pytest-xdist==3.8.0
  (cd "$tmp" && SEEN="$tmp/seen-$version" PYTHONPATH="$tmp/$version" \
    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python3 -m pytest -q -p xdist -p no:cacheprovider -n 2 --dist loadgroup > /dev/null)
done
python3 - "$tmp" <<'PY'
import sys
from pathlib import Path

workers = {v: len(set((Path(sys.argv[1]) / f"seen-{v}").read_text().split())) for v in ("9.1.1", "9.2.0")}
print("pytest-xdist 3.8.0, eight tests of one group, two workers")
print("expected: one worker runs them all, with either pytest")
print("found: workers that ran some of them, by pytest's version:", workers)
sys.exit(workers != {"9.1.1": 1, "9.2.0": 2})
PY
