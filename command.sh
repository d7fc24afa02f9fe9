#!/usr/bin/env bash
# ./command.sh demo    train a 4-part ResNet-32 with context E on real digits, in a few minutes
# ./command.sh plan    the fewest modules that train in 1 GiB, for three depths; some minutes
# ./command.sh speed   training steps of ResNet-32 against plain modules; some minutes
# ./command.sh test    run the test suite
# ./command.sh list    the paper's experiments and how many runs each has
# ./command.sh table1 | table2 | table3 | figure4 | figure5 | table4 | all
#                      train the runs of an experiment, then python -m report runs
# ./command.sh evidence DATA_DIR   fifteen short runs on images of your own, then python -m report
# What stands after the target goes to train.py, bench.py or pytest. With an experiment, --list
# prints its commands and --dry_run plans their memory without training; SEEDS="0 1 2" (default 0;
# of evidence 0 1 2), EPOCHS=160 and DATASET=cifar10 change its runs. A finished run is skipped, one
# that was cut off is continued. Paths are seen from this script's folder, where runs/ and results/
# are too. PYTHON=... names another interpreter.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
    sed -n '2,14s/^# //p' "$0"
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

# ---------------------------------------------------------------------------------------------
# The paper's experiments. Each line that starts with `run` is a call of train.py.

PUBLISHED=(--model resnet --droprate 0.0 --cos_lr --aux_net_widen 1 --aux_net_feature_dim 128
    --aux_net_config 1c2f --epochs "${EPOCHS:-160}")
CIFAR10=(--dataset "${DATASET:-cifar10}")

# Table 1: the context modes
table1() {
    for mode in R0 E R1 R1E; do
        run "${CIFAR10[@]}" --layers 32 --local_module_num 16 --context_mode $mode \
            --local_loss_mode cross_entropy
    done
}

# Table 2: two modes and both losses
table2() {
    for mode in E R1E; do
        for loss in contrast cross_entropy; do
            for K in 2 4 8 16; do
                run "${CIFAR10[@]}" --layers 32 --local_module_num $K --context_mode $mode \
                    --local_loss_mode $loss
            done
        done
    done
}

# Table 3: ResNet-110 with decoders on three data sets
table3() {
    for data in ${DATASET:-cifar10 stl10 svhn}; do
        for loss in contrast cross_entropy; do
            for K in 2 4 8 16; do
                run --dataset "$data" --layers 110 --local_module_num $K --context_mode R1E \
                    --local_loss_mode $loss --h_reconstruct
            done
        done
    done
}

# Figure 4: error against peak memory, with memory-balanced cuts
figure4() {
    for K in 2 4 8 16; do
        run "${CIFAR10[@]}" --layers 32 --local_module_num $K --context_mode E \
            --local_loss_mode contrast --balanced_memory
    done
    for K in 2 3 4; do
        run "${CIFAR10[@]}" --layers 110 --local_module_num $K --context_mode E \
            --local_loss_mode contrast --balanced_memory
    done
}

# Figure 5: error against K, by mode and loss
figure5() {
    for K in 2 4 8 16; do
        for mode in R0 E R1 R1E; do
            run "${CIFAR10[@]}" --layers 32 --local_module_num $K --context_mode $mode \
                --local_loss_mode cross_entropy
            run "${CIFAR10[@]}" --layers 32 --local_module_num $K --context_mode $mode \
                --local_loss_mode cross_entropy --h_reconstruct
        done
        for mode in E R1 R1E; do
            run "${CIFAR10[@]}" --layers 32 --local_module_num $K --context_mode $mode \
                --local_loss_mode contrast
        done
    done
}

# Table 4: how many earlier features; n of Rn may not exceed K
table4() {
    for mode in R0 E R1 R2 R4 R8; do
        run "${CIFAR10[@]}" --layers 32 --local_module_num 8 --context_mode $mode \
            --local_loss_mode cross_entropy
    done
    for mode in R0 E R1 R2 R4 R8 R16; do
        run "${CIFAR10[@]}" --layers 32 --local_module_num 16 --context_mode $mode \
            --local_loss_mode cross_entropy
    done
}

# All: each run once; K=16 of Figure 4 is Table 2's too, its balanced cuts being the equal ones
all() {
    table1
    table2
    table3
    figure4
    figure5
    table4
}

# Not of the paper: does context supply help? A short schedule on a part of any images.
evidence() {
    PUBLISHED=(--dataset folder --data_dir "$DATA_DIR" --layers 32 --limit_per_class 1000
        --epochs "${EPOCHS:-8}" --batch_size 128 --lr 0.1 --amp bf16 --compile
        --local_loss_mode cross_entropy)
    run --local_module_num 1 --context_mode R0
    for mode in R0 R1 E R1E; do
        run --local_module_num 16 --context_mode $mode
    done
}

# ---------------------------------------------------------------------------------------------
# Running them

# Remember a call of train.py, but once.
run() {
    local call
    call=$(printf '%q ' "$@" "${PUBLISHED[@]}")
    case "${CALLS-}" in
        *"$call"$'\n'*) ;;
        *) CALLS+=$call$'\n' ;;
    esac
}

# experiment NAME [option of train.py ...]: all its runs with all seeds, then the report.
experiment() {
    local name=$1 list="" dry="" extra=() CALLS="" calls=() option call seed count=0 status
    local failed=() seeds
    shift
    for option in "$@"; do
        case $option in
            -h | --help)
                usage
                exit
                ;;
            --list) list=1 ;;
            --dry_run) dry=1 ;;
            --list=* | --dry_run=*)
                echo "command.sh: error: ${option%%=*} takes nothing here" >&2
                exit 2
                ;;
            --output_dir* | --resume* | --evaluate* | --seed*)
                echo "command.sh: error: $name has many runs, so leave ${option%%=*} out" \
                    "(seeds: SEEDS=\"0 1 2\")" >&2
                exit 2
                ;;
            *) extra+=("$option") ;;
        esac
    done
    read -r -d '' -a seeds <<< "${SEEDS:-0}" || true # which says that the text has ended
    if [[ ! "${seeds[*]-}" =~ ^[0-9]+(\ [0-9]+)*$ ]]; then
        echo "command.sh: error: SEEDS='$SEEDS' are not whole numbers between spaces" >&2
        exit 2
    fi
    if [ -n "$dry" ]; then
        extra+=(--dry_run --save_plan)
        seeds=("${seeds[0]}") # memory is the same for every seed
    else
        extra+=(--resume auto)
    fi
    "$name"
    for seed in "${seeds[@]}"; do
        while IFS= read -r call; do
            calls+=("train.py ${call}--seed $seed$(printf ' %q' "${extra[@]}")")
        done <<< "${CALLS%$'\n'}"
    done
    if [ -n "$list" ]; then
        printf '.venv/bin/python %s\n' "${calls[@]}"
        return
    fi
    prepare
    check "${calls[0]}"
    for call in "${calls[@]}"; do
        count=$((count + 1))
        echo "[$count/${#calls[@]}] $call"
        status=0
        eval "in_reach .venv/bin/python $call" || status=$?
        case $status in
            0) ;;
            130 | 143) exit $status ;; # Ctrl-C or SIGTERM: the rest is not wanted either
            *) failed+=("status $status: $call") ;;
        esac
    done
    status=0
    .venv/bin/python -m report runs || status=1
    if [ ${#failed[@]} -gt 0 ]; then
        status=1
        echo "command.sh: ${#failed[@]} of ${#calls[@]} runs failed:" >&2
        printf '  %s\n' "${failed[@]}" >&2
    fi
    exit $status
}

# Run a command in reach of what this script is told to stop by, and then stop; else its status.
# It is in the background, where bash would have it deaf to Ctrl-C, since a shell acts on a signal
# only when what it runs in the foreground has ended: a run may take days.
in_reach() {
    local child="" status stopped=""
    trap 'stopped=130; hand_on INT "$child"' INT
    trap 'stopped=143; hand_on TERM "$child"' TERM HUP
    (trap - INT QUIT; exec "$@") <&0 &
    child=$!
    [ -z "$stopped" ] || hand_on TERM "$child"
    while true; do
        status=0
        wait "$child" || status=$?
        # A signal ends the wait; the command has a step to finish, and a checkpoint to write.
        { [ -n "$stopped" ] && kill -0 "$child" 2> /dev/null; } || break
    done
    trap - INT TERM HUP
    [ -z "$stopped" ] || exit "$stopped"
    return "$status"
}

hand_on() {
    [ -z "$2" ] || kill "-$1" "$2" 2> /dev/null || true
}

# Ends with status 2 and one line where the options of a call can't be read: nor could any call's.
check() {
    eval "set -- $1"
    .venv/bin/python -c '
import sys
from engine.signals import INTERRUPTS
INTERRUPTS.install()
from configs import InputError
from engine.options import read_options
sys.argv.pop(0)
try:
    read_options(sys.argv[1:])
except InputError as error:
    sys.exit(f"train.py: error: {error}")
' "$@" || exit $(($? == 1 ? 2 : $?))
}

# A line for each experiment: its name, its number of runs a seed, and what its function says.
list() {
    local name CALLS lines
    for name in table1 table2 table3 figure4 figure5 table4 all; do
        CALLS=""
        "$name"
        mapfile -t lines <<< "${CALLS%$'\n'}"
        printf '%-8s %3d runs  %s\n' "$name" "${#lines[@]}" \
            "$(grep -B 1 "^$name()" command.sh | sed -n 's/^# [^:]*: //p')" # its comment
    done
}

case "${1:-}" in
    demo)
        shift
        prepare
        in_reach .venv/bin/python train.py --dataset digits --layers 32 --local_module_num 4 \
            --context_mode E --local_loss_mode cross_entropy --epochs 9 --batch_size 64 \
            --output_dir "runs/demo-$(date +%Y%m%d-%H%M%S)" "$@"
        ;;
    plan)
        shift
        prepare
        echo "| depth | end to end, MiB | modules that fit 1 GiB | their peak, MiB |"
        echo "|---|---|---|---|"
        for layers in 32 110 1202; do
            .venv/bin/python train.py --dataset cifar10 --context_mode E --batch_size 256 \
                --local_loss_mode cross_entropy --memory_budget 1 --layers "$layers" --dry_run --json "$@" |
                .venv/bin/python -c '
import json, sys
from engine.signals import INTERRUPTS
INTERRUPTS.install()
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
            .venv/bin/python -m planning.bench --dataset cifar10 --layers 32 --batch_size 128 \
                --local_module_num "${run% *}" --context_mode "${run#* }" \
                --local_loss_mode cross_entropy \
                --versus="--amp bf16" --versus="--amp bf16 --compile" "$@"
        done
        ;;
    test)
        shift
        prepare
        .venv/bin/python -m pytest "$@"
        ;;
    list)
        list
        ;;
    table1 | table2 | table3 | figure4 | figure5 | table4 | all)
        experiment "$@"
        ;;
    evidence)
        case "${2:-}" in
            "" | -*)
                echo "command.sh: error: say where the images are: ./command.sh evidence DATA_DIR" \
                    "(it holds train/<class>/* and test/<class>/*)" >&2
                exit 2
                ;;
        esac
        DATA_DIR=$2
        if [[ ! " ${*:3} " == *" --list "* && ! -d $DATA_DIR/train ]]; then
            echo "command.sh: error: there is no folder $DATA_DIR/train, seen from $PWD" >&2
            exit 2
        fi
        SEEDS=${SEEDS:-0 1 2}
        experiment evidence "${@:3}"
        ;;
    -h | --help)
        usage
        ;;
    *)
        { echo "command.sh: unknown target '${1:-}'; there are"; usage; } >&2
        exit 2
        ;;
esac
