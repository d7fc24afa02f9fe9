#!/usr/bin/env bash
# ./command.sh demo    train a 4-part ResNet-32 with context E on real digits, in a few minutes
# ./command.sh plan    the fewest modules that train in 1 GiB, for three depths; some minutes
# ./command.sh speed   training steps of ResNet-32 against plain modules; some minutes
# ./command.sh test    run the test suite
# What stands after the target goes to train.py, bench.py or pytest. PYTHON=... names another interpreter.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    sed -n '2,6s/^# //p' "$0"
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
    plan)
        shift
        prepare
        echo "| depth | end to end, MiB | modules that fit 1 GiB | their peak, MiB |"
        echo "|---|---|---|---|"
        for layers in 32 110 1202; do
            .venv/bin/python train.py --dataset cifar10 --context_mode E --batch_size 256 \
                --memory_budget 1 --layers "$layers" --dry_run --json "$@" |
                .venv/bin/python -c '
import json, sys
plan = json.load(sys.stdin)
whole, modules, peak = plan["end_to_end_peak_bytes"], len(plan["modules"]), plan["peak_bytes"]
print(f"| {sys.argv[1]} | {whole / 2**20:,.0f} | {modules} | {peak / 2**20:,.0f} |")
' "$layers"
        done
        ;;
    speed)
        shift
        prepare
        for run in "1 R0" "16 R0" "16 E" "16 R1E"; do
            echo "ResNet-32, K=${run% *}, ${run#* }"
            .venv/bin/python bench.py --dataset cifar10 --layers 32 --batch_size 128 \
                --local_module_num "${run% *}" --context_mode "${run#* }" \
                --versus="--amp bf16" --versus="--amp bf16 --compile" "$@"
        done
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
