#!/bin/sh
# Build the wheel of a commit. The same commit gives the same bytes, whatever the clock, the umask and the folder: only files of the
# commit are packed, with its time, and with modes that no machine chose.
#   deploy/wheel.sh OUT [COMMIT]
set -eu
out=$1
commit=${2:-HEAD}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git archive "$commit" | tar -x -C "$scratch"
chmod -R u=rwX,go=rX "$scratch"
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct "$commit")
export SOURCE_DATE_EPOCH
umask 022
"${PYTHON:-python3}" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$out" "$scratch"
