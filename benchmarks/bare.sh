#!/bin/sh
# bench_gpu on a machine without a package index, whose python3 has what docs/benchmarks.md lists:
#   make wheels                                             where there is an index
#   sh benchmarks/bare.sh --output FOLDER --commit COMMIT   there, with wheels/ copied along
# Options are bench_gpu's. Bring back FOLDER.tar.gz.
set -eu
cd "$(dirname "$0")/.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if ! ls wheels/*.whl > /dev/null 2>&1; then
    echo "error: wheels/ is empty or missing; run 'make wheels' where there is a package index and copy it along" >&2
    exit 2
fi
# Not installed: what the machine has itself stays as it is.
for wheel in wheels/*.whl; do
    python3 -m zipfile -e "$wheel" "$site"
done
PYTHONPATH=$PWD:$site python3 -m benchmarks.bench_gpu "$@"
