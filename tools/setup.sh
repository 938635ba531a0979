#!/bin/sh
# Makes .venv from the lock files, and does nothing (quickly) when it is up to date.
#
#   tools/setup.sh        what the service needs
#   tools/setup.sh dev    and what its tests and checks need
#
# PYTHON=/path/to/python chooses the interpreter; INSTALLER=pip does without uv.
set -eu
cd "$(dirname "$0")/.."
here=$(pwd -P)
kind=${1:-product}
began=$(date +%s)
python=.venv/bin/python
output=$(mktemp)
trap 'rm -f "$output"' EXIT
trap 'echo; exit 130' INT
trap 'exit 143' TERM HUP

lock_file() { [ "$1" = dev ] && echo requirements-dev.lock || echo requirements.lock; }

# A moved checkout or another Python changes the stamp as a new lock file does.
stamp() { { echo "$here"; "$python" -V; cat setup.cfg "$(lock_file "$1")"; } 2>&1 | cksum; }

ready() { [ "$(cat ".venv/$1.stamp" 2>/dev/null)" = "$(stamp "$1")" ]; }

say() { printf '[%3d s] %s' $(($(date +%s) - began)) "$1"; }

die() {
    printf '%s\n' "$@" >&2
    exit 1
}

# step WHAT COMMAND...: says what is done and for how long; shows the command's output if it fails.
step() {
    what=$1
    shift
    say "$what"
    [ -t 1 ] || echo
    # Its own shell, so that Ctrl-C reaches the command, and it ends with this script whatever happens.
    (
        while sleep 1 && kill -0 $$ 2>/dev/null; do
            now=$(date +%s)
            if [ -t 1 ]; then
                printf '\r' && say "$what"
            elif [ $(((now - began) % 10)) -eq 0 ]; then
                say "still $what" && echo
            fi
        done
    ) 9<&- &
    ticker=$!
    status=0
    # It keeps the lock of the checkout, so that the next set-up waits for what a kill -9 orphaned.
    "$@" >"$output" 2>&1 || status=$?
    kill $ticker 2>/dev/null || :
    wait $ticker 2>/dev/null || :
    [ ! -t 1 ] || echo
    [ $status -eq 0 ] || tail -n 25 "$output" | sed 's/^/        /' >&2
    return $status
}

# can INTERPRETER [MODULE]: it runs (a pyenv shim may not), is new enough, and has the module.
can() { "$1" -c "import sys, ${2:-sys}; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; }

choose_python() {
    interpreter=
    for candidate in ${PYTHON:-python3.14 python3.13 python3.12 python3.11 python3}; do
        can "$candidate" || continue
        [ -n "$interpreter" ] || interpreter=$candidate
        # Debian splits ensurepip off: one that has it, though older, spares an installation.
        if can "$candidate" ensurepip; then
            interpreter=$candidate
            return
        fi
    done
    [ -n "$interpreter" ] ||
        die "Python 3.11 or newer is needed, and none was found (looked at: ${PYTHON:-python3.11 to python3.14, python3})." \
            "Install one, or name one with PYTHON=/path/to/python."
}

make_venv() {
    rm -rf .venv
    version=$("$interpreter" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! can "$interpreter" ensurepip && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        step "updating the list of packages" apt-get update || :
        step "installing python$version-venv" \
            apt-get install -y --no-install-recommends "python$version-venv" || :
    fi
    if can "$interpreter" ensurepip; then
        step "making .venv with Python $version" "$interpreter" -m venv .venv
    elif can "$interpreter" pip; then
        # Away from the user's and the system's packages, and gone afterwards.
        virtualenv=$(mktemp -d)
        step "fetching virtualenv, as this Python lacks ensurepip" \
            "$interpreter" -m pip install --target "$virtualenv" virtualenv &&
            PYTHONPATH=$virtualenv step "making .venv with Python $version" \
                "$interpreter" -m virtualenv --no-download .venv || status=$?
        rm -rf "$virtualenv"
        return $status
    else
        die "This Python ($interpreter, $version) can make no virtual environment: it has neither ensurepip nor pip." \
            "As root, 'apt-get install python$version-venv' (Debian, Ubuntu) mends that; or name another with PYTHON=..."
    fi
}

# What the user told pip holds for uv too.
pip_setting() { "$python" -m pip config list 2>/dev/null | sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" | tail -n 1; }

with_uv() {
    [ "${INSTALLER:-uv}" = uv ] || return 1
    step "fetching uv" "$python" -m pip install --require-hashes -r tools/uv.lock || return 1
    index=${UV_DEFAULT_INDEX:-$(pip_setting index-url)}
    [ -z "$index" ] || export UV_DEFAULT_INDEX="$index"
    certificates=${SSL_CERT_FILE:-$(pip_setting cert)}
    [ -z "$certificates" ] || export SSL_CERT_FILE="$certificates"
    step "installing $packages packages with uv" \
        .venv/bin/uv pip install --python "$python" --require-hashes --compile-bytecode -r "$lock"
}

with_pip() {
    step "installing $packages packages with pip" "$python" -m pip install --require-hashes -r "$lock"
}

ready "$kind" && exit
[ "$kind" = dev ] || ! ready dev || exit 0

# One at a time in a checkout; the lock goes with the process. (Systems without flock do without.)
if command -v flock >/dev/null; then
    exec 9<.
    flock -n 9 || { say "waiting for another set-up" && echo && flock 9; }
    ready "$kind" && exit
fi

lock=$(lock_file "$kind")
packages=$(grep -c '^[a-z].*==' "$lock")
if [ -e .venv/unfinished ] || ! can "$python" pip || ! grep -qsF "$here/.venv" .venv/bin/activate; then
    choose_python
    make_venv || die "The virtual environment could not be made."
fi
# An installation cut short may look complete to pip: as long as this file is there, start again.
: >.venv/unfinished
with_uv || with_pip || die "The packages of $lock could not be installed."
step "adding this checkout" \
    "$python" -m pip install --no-index --no-deps --no-build-isolation --editable .
stamp "$kind" >".venv/$kind.stamp"
rm .venv/unfinished
say "ready" && echo
