#!/bin/sh
# Makes the lock files from setup.cfg, for every platform and every Python from 3.11 on; versions that
# still fit stay, unless --upgrade is given.
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/uv ] || { echo "uv is not in .venv: it could not be fetched when that was made" >&2; exit 1; }

# compile FILE [OPTION...]: hashes for what the options and the names on standard input ask for. No header
# and no index in the file: they would tell the machine it was made on.
compile() {
    file=$1
    shift
    .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
        --no-emit-index-url --no-emit-find-links --output-file "$file" "$@" -
    echo "$file: $(grep -c '^[a-z].*==' "$file") packages"
}

# setuptools: `pip install --editable . --no-build-isolation` builds with what is installed.
echo setuptools | compile requirements.lock setup.cfg --extra embedded --extra flower "$@"
echo setuptools | compile requirements-dev.lock setup.cfg --extra embedded --extra flower --extra dev \
    --constraint requirements.lock "$@"
echo uv | compile tools/uv.lock "$@"
