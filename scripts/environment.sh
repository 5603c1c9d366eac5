#!/bin/sh
# environment.sh NAME: make .venv/NAME afresh, with what requirements/NAME.txt pins.
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
target=.venv/$1
pins=requirements/$1.txt

say() {
    echo "sessionscope: $1" >&2
}

fail() {
    say "$1"
    exit 1
}

new_enough() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

make_with_uv() {
    # uv finds, or fetches, a newer Python where ours is too old.
    if new_enough; then request=$python; else request='>=3.11'; fi
    say "setting up $target with uv, this once ..."
    uv venv --quiet --python "$request" "$target" &&
        uv pip install --quiet --python "$target/bin/python" --require-hashes -r "$pins"
}

make_with_pip() {
    command -v "$python" >/dev/null || fail "$python is not there: install Python 3.11 or newer"
    new_enough || fail "$("$python" -V 2>&1) is too old: needs 3.11 or newer, try PYTHON=python3.13 make"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python has no venv module (Debian, Ubuntu: apt install python3-venv)"
    say "setting up $target with pip, this once ..."
    "$python" -m venv --clear "$target"
    # The pins are complete. Without --no-deps older pips refuse a pinned package that
    # another one asks for with an extra.
    "$target/bin/python" -m pip install --quiet --disable-pip-version-check \
        --no-deps --require-hashes -r "$pins"
}

rm -rf "$target"
if ! command -v uv >/dev/null; then
    make_with_pip
elif ! make_with_uv; then
    say "uv failed; pip may know an index or a certificate that uv does not"
    make_with_pip
fi

# A relative path file instead of an installation: nothing to build, nothing more to download.
"$target/bin/python" - <<'END'
import os
import sysconfig

packages = sysconfig.get_path("purelib")
with open(os.path.join(packages, "sessionscope.pth"), "w") as file:
    print(os.path.relpath("src", packages), file=file)
END
touch "$target/ready"
