#!/usr/bin/env bash
# ./command.sh demo    train a 4-part ResNet-32 with context E on real digits, in a few minutes
# ./command.sh test    run the test suite
# What stands after the target goes to train.py or pytest. PYTHON=... names another interpreter.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    sed -n '2,4s/^# //p' "$0"
}

# .venv with what requirements.txt asks for; nothing is done where that is so already.
prepare() {
    local python=${PYTHON:-python3.11}
    command -v "$python" > /dev/null || python=python3
    if [ ! -x .venv/bin/python ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
            echo "command.sh: Python 3.11 is needed; name it with PYTHON=/path/to/python3.11" >&2
            exit 2
        }
        "$python" -m venv .venv
    fi
    if ! cmp -s requirements.txt .venv/requirements.txt; then
        echo "installing requirements.txt into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/requirements.txt
    fi
}

case "${1:-}" in
    demo)
        shift
        prepare
        .venv/bin/python train.py --dataset digits --layers 32 --local_module_num 4 \
            --context_mode E --epochs 9 --batch_size 64 \
            --output_dir "runs/demo-$(date +%Y%m%d-%H%M%S)" "$@"
        ;;
    test)
        shift
        prepare
        .venv/bin/python -m pytest "$@"
        ;;
    -h | --help)
        usage
        ;;
    *)
        { echo "command.sh: unknown target '${1:-}'; there are"; usage; } >&2
        exit 2
        ;;
esac
