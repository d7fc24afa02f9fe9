#!/usr/bin/env bash
# ./command.sh demo    train a 4-module ResNet-32 with context E on real digits
# ./command.sh plan    the fewest modules that train in 1 GiB, for three depths; some minutes
# ./command.sh speed   training steps of ResNet-32 against plain modules; some minutes
# ./command.sh gpu     checks and measures on a CUDA device, at most 9 minutes: docs/gpu/<device>.md
# ./command.sh test    the fast tests, in two processes; all tests with --slow; with --matrix the
#                      fast ones on the oldest and the newest Python and torch, and one between
# ./command.sh list    the paper's experiments and how many runs each has
# ./command.sh table1 | table2 | table3 | figure4 | figure5 | table4 | all
#                      train the runs of an experiment, then python -m report runs
# ./command.sh methods             other published methods beside ContSup, each without and with E
# ./command.sh evidence DATA_DIR   fifteen short runs on images of your own, then python -m report
# ./command.sh methods DATA_DIR    the methods with the short schedule of evidence
# Options after the target go to train.py, planning/bench.py or pytest. With an experiment, --list
# prints its commands and --dry_run plans their memory without training; SEEDS="0 1 2" (default 0;
# with DATA_DIR 0 1 2), EPOCHS=160 and DATASET=cifar10 change its runs; of methods also KS="4 8"
# (default 16) and METHODS="dgl infopro" (default: all). A finished run is skipped, and one
# that was cut off continues. Paths are relative to this script's folder, where runs/ and results/
# are too. An active virtual environment that has torch is used as it is. Else .venv is: it is
# made with the first Python 3.10 or later, or that of PYTHON=..., and what requirements.txt asks
# for, or REQUIREMENTS=requirements-lock.txt (the versions that results here were made with).
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"

usage() {
    sed -n '2,21s/^# //p' command.sh
}

fail() {
    echo "command.sh: error: $*" >&2
    exit 2
}

PYTHONS=(python3 python3.13 python3.12 python3.11 python3.10 python)
python=.venv/bin/python # or another that has torch, as `prepare` finds

# has_torch PYTHON: whether it has versions that this code runs with.
has_torch() {
    "$1" -c 'import sys
from importlib.metadata import version
from importlib.util import find_spec
torch = tuple(map(int, version("torch").split(".")[:2]))
sys.exit(sys.version_info < (3, 10) or torch < (2, 6) or not find_spec("torchvision"))' 2> /dev/null
}

# Use the active virtual environment if torch 2.6 is in it: nothing is installed there.
use_active_environment() {
    local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    [ -z "${PYTHON:-}" ] && [ -n "$active" ] || return 0
    if has_torch "$active/bin/python"; then
        python=$active/bin/python
    else
        echo "command.sh: note: the active environment lacks torch 2.6 or later, or torchvision" >&2
    fi
}

# find_python AT_LEAST [NAME ...]: print the first interpreter of that version or later.
find_python() {
    local name
    for name in "${@:2}"; do
        if "$name" -c "import sys; sys.exit(sys.version_info < tuple(map(int, '$1'.split('.'))))" \
            2> /dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

# Choose the interpreter. Where no active environment has torch, make or complete .venv.
prepare() {
    use_active_environment
    [ "$python" = .venv/bin/python ] || return 0
    local wanted=${REQUIREMENTS:-requirements.txt} from
    if ! .venv/bin/python -c 'import pip' 2> /dev/null && ! has_torch .venv/bin/python; then
        if [ -n "${PYTHON:-}" ]; then
            from=$(find_python 3.10 "$PYTHON") || fail "PYTHON=$PYTHON is no Python 3.10 or later"
        else
            from=$(find_python 3.10 "${PYTHONS[@]}") ||
                fail "Python 3.10 or later is needed; name it with PYTHON=/path/to/python3"
        fi
        # It also completes a .venv that was left half made.
        "$from" -m venv .venv ||
            fail "could not make .venv; Debian and Ubuntu have venv in a package, python3-venv"
    fi
    if ! cmp -s "$wanted" .venv/requirements.txt; then
        echo "installing $wanted into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$wanted"
        cp "$wanted" .venv/requirements.txt
    fi
}

# matrix [NAME ...]: run the fast tests on the oldest versions, some between, and the newest.
matrix() {
    local names=("$@") name version pins from failed=""
    [ $# -gt 0 ] || names=(oldest between newest)
    for name in "${names[@]}"; do
        case $name in
            oldest) version=3.10 pins='s/>=/==/' ;;
            between) version=3.12 pins='s/^torch>=.*/torch==2.11.*/' ;;
            newest) version=3.13 pins='' ;;
            *) fail "--matrix $name is none of oldest, between, newest" ;;
        esac
        from=$(find_python $version python$version \
            "${PYENV_ROOT:-$HOME/.pyenv}"/versions/$version*/bin/python) ||
            fail "the versions '$name' need Python $version, which is not here"
        "$from" -m venv ".matrix/$name"
        sed "$pins" requirements.txt > ".matrix/$name/requirements.txt"
        ".matrix/$name/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade \
            -r ".matrix/$name/requirements.txt"
        ".matrix/$name/bin/python" -c 'import platform, sys, torch
print(f"{sys.argv[1]}: Python {platform.python_version()}, torch {torch.__version__}", flush=True)' \
            "$name"
        ".matrix/$name/bin/python" -m pytest -m "not slow" -n 2 --dist loadfile || failed+=" $name"
    done
    [ -z "$failed" ] || fail "tests failed on:$failed"
}

# ---------------------------------------------------------------------------------------------
# The paper's experiments

PUBLISHED=(--aux_net_config 1c2f --aux_net_widen 1 --aux_net_feature_dim 128 --model resnet
    --droprate 0.0 --cos_lr --epochs "${EPOCHS:-160}")

# What else would make other runs of an experiment's, beside the options that its calls have.
FIXED="--cuts --partition --balanced_memory --memory_budget --h_reconstruct --no-cos_lr"
FIXED+=" --loss_scale --ixx_1 --ixy_1 --ixx_2 --ixy_2 --loss_scale_rule --patch_decoder --method"
FIXED+=" --aux_net_depth --aux_net_taper --momentum_aux --momentum_aux_mix --overlap"
FIXED+=" --overlap_weight --consistency"

# add_runs DATA LAYERS MODES LOSSES KS [option ...]: add a call of train.py for each combination.
add_runs() {
    local data mode loss K
    for data in $1; do for mode in $3; do for loss in $4; do for K in $5; do
        add_run --dataset "$data" --layers "$2" --local_module_num "$K" --context_mode "$mode" \
            --local_loss_mode "$loss" "${@:6}" "${PUBLISHED[@]}"
    done; done; done; done
}

# Add a call of train.py to CALLS, but only once.
add_run() {
    local call
    call=$(printf '%q ' "$@")
    [[ $CALLS == *"$call"$'\n'* ]] || CALLS+=$call$'\n'
}

# Replace the published schedule by a short one on images of the user's own.
shorten() {
    PUBLISHED=(--data_dir "$DATA_DIR" --limit_per_class 1000 --epochs "${EPOCHS:-8}"
        --batch_size 128 --lr 0.1 --amp bf16 --compile)
    DATASET=folder
}

# Add the runs of a method for each number of modules in KS, without context and with the image. Of
# contsup also a control: without context, but as deep as the FLOPs of the image's encoders pay for.
add_method() {
    local K data=${DATASET:-cifar10} options layers
    for K in $KS; do
        options=(--method "$1")
        # Images of the user's own have no published loss scales: they take those of CIFAR-10.
        case $data,$1,$K in
            folder,infopro,2) options+=(--loss_scale 5 1 0 0) ;;
            folder,infopro,4) options+=(--loss_scale 6 0 1 2) ;;
            folder,infopro,8) options+=(--loss_scale 5 0 0 2) ;;
            folder,infopro,16) options+=(--loss_scale 5 0.05 0.2 0.5) ;;
        esac
        add_runs "$data" 32 "R0 E" cross_entropy "$K" "${options[@]}"
        if [ "$1" = contsup ]; then
            if [ -n "$list" ]; then use_active_environment; else prepare >&2; fi
            if ! has_torch "$python"; then
                echo "command.sh: note: the control's --layers need torch to be found" >&2
                continue
            fi
            layers=$("$python" -m planning.equal_flops --layers 32 --local_module_num "$K" \
                --context_mode E) || exit $?
            add_runs "$data" "$layers" R0 cross_entropy "$K" "${options[@]}"
        fi
    done
}

# Add the runs of an experiment. `list` prints the comments.
add_experiment() {
    local data=${DATASET:-cifar10} both="contrast cross_entropy" name
    case $1 in
        table1) # the context modes
            add_runs "$data" 32 "R0 E R1 R1E" cross_entropy 16
            ;;
        table2) # two modes and both losses
            add_runs "$data" 32 "E R1E" "$both" "2 4 8 16"
            ;;
        table3) # ResNet-110 with decoders on three data sets
            add_runs "${DATASET:-cifar10 stl10 svhn}" 110 R1E "$both" "2 4 8 16" --h_reconstruct
            ;;
        figure4) # error against peak memory, with memory-balanced cuts
            add_runs "$data" 32 E contrast "2 4 8 16" --balanced_memory
            add_runs "$data" 110 E contrast "2 3 4" --balanced_memory
            ;;
        figure5) # error against K, by mode and loss
            add_runs "$data" 32 "R0 E R1 R1E" cross_entropy "2 4 8 16"
            add_runs "$data" 32 "R0 E R1 R1E" cross_entropy "2 4 8 16" --h_reconstruct
            add_runs "$data" 32 "E R1 R1E" contrast "2 4 8 16"
            ;;
        table4) # how many earlier features; n of Rn may not exceed K
            add_runs "$data" 32 "R0 E R1 R2 R4 R8" cross_entropy 8
            add_runs "$data" 32 "R0 E R1 R2 R4 R8 R16" cross_entropy 16
            ;;
        all) # each run once; K=16 of Figure 4 is Table 2's too, its balanced cuts being the equal ones
            for name in table1 table2 table3 figure4 figure5 table4; do add_experiment $name; done
            ;;
        methods) # not of the paper: other methods without and with context, by one schedule
            PUBLISHED=("${PUBLISHED[@]:2}") # without the head, which a method has
            FIXED+=" --aux_net_config"
            if [ -n "$DATA_DIR" ]; then shorten; fi
            for name in $METHODS; do add_method "$name"; done
            ;;
        evidence) # not of the paper: does context supply help, with a short schedule on any images?
            shorten
            add_runs "$DATASET" 32 R0 cross_entropy 1
            add_runs "$DATASET" 32 "R0 R1 E R1E" cross_entropy 16
            ;;
    esac
}

# Print a line for each experiment: its name, its number of runs a seed, and its comment.
list() {
    local name CALLS
    for name in table1 table2 table3 figure4 figure5 table4 all; do
        CALLS=""
        add_experiment $name
        printf '%-8s %3d runs  %s\n' $name "$(wc -l <<< "${CALLS%$'\n'}")" \
            "$(sed -n "s/^ *$name) # //p" command.sh)"
    done
}

# ---------------------------------------------------------------------------------------------
# Running them

# experiment NAME [option of train.py ...]: train all runs with all seeds, then make the report.
experiment() {
    local name=$1 list="" how="--resume auto" extra="" CALLS="" calls=() option call seed status count=0
    local failed=() seeds typed=""
    read -r -d '' -a seeds <<< "${SEEDS:-0}" || true # its status is 1 at the end of the text
    [[ "${seeds[*]-}" =~ ^[0-9]+(\ [0-9]+)*$ ]] ||
        fail "SEEDS='$SEEDS' are not whole numbers between spaces"
    for option in "${@:2}"; do
        case $option in
            -h | --help)
                usage
                exit
                ;;
            --list) list=1 ;;
            --dry_run)
                how="--dry_run --save_plan"
                seeds=("${seeds[0]}") # memory is the same for every seed
                ;;
            --output_dir* | --resume* | --evaluate* | --seed*)
                fail "$name has many runs, so leave ${option%%=*} out (seeds: SEEDS=\"0 1 2\")"
                ;;
            *)
                extra+=$(printf '%q ' "$option")
                typed+=" ${option%%=*}"
                ;;
        esac
    done
    add_experiment "$name"
    for option in $typed; do
        [[ $option != --* || " $FIXED ${CALLS//$'\n'/ }" != *" $option "* ]] ||
            fail "$option is part of what makes $name: leave it out" \
                "(EPOCHS=... and DATASET=... may change it)"
    done
    for seed in "${seeds[@]}"; do
        while IFS= read -r call; do
            calls+=("train.py ${call}--seed $seed $extra$how")
        done <<< "${CALLS%$'\n'}"
    done
    if [ -n "$list" ]; then
        use_active_environment
        for call in "${calls[@]}"; do printf '%q %s\n' "$python" "$call"; done
        return
    fi
    prepare
    check_options "${calls[0]}"
    for call in "${calls[@]}"; do
        count=$((count + 1))
        echo "[$count/${#calls[@]}] $call"
        status=0
        eval "run_until_signal \"\$python\" $call" || status=$?
        case $status in
            0) ;;
            130 | 143) exit $status ;; # Ctrl-C or SIGTERM: the rest is not wanted either
            *) failed+=("status $status: $call") ;;
        esac
    done
    status=0
    "$python" -m report runs || status=1
    if [ ${#failed[@]} -gt 0 ]; then
        status=1
        echo "command.sh: ${#failed[@]} of ${#calls[@]} runs failed:" >&2
        printf '  %s\n' "${failed[@]}" >&2
    fi
    exit $status
}

# End with status 2 and one line if the options of a call are wrong, as those of all calls are then.
check_options() {
    eval "set -- $1"
    "$python" -c 'from engine.errors import run_script
from engine.options import read_options
run_script(read_options)' "${@:2}" || exit $?
}

# Run a command, and return its status. A signal to this script is passed on to the command, and
# ends the script when the command has ended: it has a step to finish and a checkpoint to write.
# The command is in the background, because a shell acts on a signal only when the command in the
# foreground has ended, which may take days. There bash would make it ignore Ctrl-C: hence the trap.
run_until_signal() {
    local child="" status stopped=""
    trap 'stopped=130; pass_on INT "$child"' INT
    trap 'stopped=143; pass_on TERM "$child"' TERM HUP USR1 USR2
    (trap - INT QUIT; exec "$@") <&0 &
    child=$!
    [ -z "$stopped" ] || pass_on TERM "$child"
    while true; do
        status=0
        wait "$child" || status=$? # which a signal ends
        { [ -n "$stopped" ] && kill -0 "$child" 2> /dev/null; } || break
    done
    trap - INT TERM HUP USR1 USR2
    [ -z "$stopped" ] || exit "$stopped"
    return "$status"
}

pass_on() {
    [ -z "$2" ] || kill "-$1" "$2" 2> /dev/null || true
}

case "${1:-}" in
    demo)
        prepare
        run_until_signal "$python" train.py --dataset digits --layers 32 \
            --local_module_num 4 --context_mode E --local_loss_mode cross_entropy --epochs 9 \
            --batch_size 64 --output_dir "runs/demo-$(date +%Y%m%d-%H%M%S)" "${@:2}"
        ;;
    plan)
        prepare
        echo "| depth | end to end, MiB | modules that fit 1 GiB | their peak, MiB |"
        echo "|---|---|---|---|"
        for layers in 32 110 1202; do
            "$python" train.py --dataset cifar10 --layers $layers --context_mode E \
                --local_loss_mode cross_entropy --batch_size 256 --memory_budget 1 \
                --dry_run --json "${@:2}" |
                "$python" -c 'import json, sys
plan = json.load(sys.stdin)
end_to_end, peak = (plan[f"{name}_bytes"] / 2**20 for name in ("end_to_end_peak", "peak"))
modules = len(plan["modules"])
print(f"| {sys.argv[1]} | {end_to_end:,.0f} | {modules} | {peak:,.0f} |")' $layers
        done
        ;;
    speed)
        prepare
        for run in "1 R0" "16 R0" "16 E" "16 R1E"; do
            echo "ResNet-32, K=${run% *}, ${run#* }"
            "$python" -m planning.bench --dataset cifar10 --layers 32 --batch_size 128 \
                --local_module_num "${run% *}" --context_mode "${run#* }" \
                --local_loss_mode cross_entropy \
                --versus="--amp bf16" --versus="--amp bf16 --compile" "${@:2}"
        done
        ;;
    gpu)
        # Without network nothing can be installed: any Python that has torch will do.
        if [ ! -e .venv ] && has_torch "${PYTHON:-python3}"; then
            python=${PYTHON:-python3}
        else
            prepare
        fi
        run_until_signal "$python" -m planning.gpu "${@:2}"
        ;;
    test)
        if [ "${2:-}" = --matrix ]; then
            matrix "${@:3}"
            exit
        fi
        prepare
        if [ "${2:-}" = --slow ]; then
            "$python" -m pytest "${@:3}"
        else
            "$python" -m pytest -m "not slow" -n 2 --dist loadfile "${@:2}"
        fi
        ;;
    list) list ;;
    table1 | table2 | table3 | figure4 | figure5 | table4 | all) experiment "$@" ;;
    evidence | methods)
        target=$1 DATA_DIR=""
        shift
        case ${1:--} in
            -*) [ "$target" = methods ] ||
                fail "say where the images are: ./command.sh evidence DATA_DIR" \
                    "(it has train/<class>/* and test/<class>/*)" ;;
            *)
                DATA_DIR=$1 SEEDS=${SEEDS:-0 1 2}
                shift
                [[ " $* " == *" --list "* || -d $DATA_DIR/train ]] ||
                    fail "there is no folder $DATA_DIR/train, seen from $PWD"
                ;;
        esac
        if [ "$target" = methods ]; then
            any_python=$(find_python 3.10 "$python" "${PYTHONS[@]}") || fail "Python 3.10 is needed"
            all_methods=$("$any_python" -c 'from configs import METHODS; print(*METHODS)')
            KS=${KS:-16} METHODS=${METHODS:-$all_methods}
            [[ "$(echo $KS)" =~ ^[0-9]+(\ [0-9]+)*$ ]] ||
                fail "KS='$KS' are not whole numbers between spaces"
            [[ $METHODS =~ [^[:space:]] ]] || fail "METHODS='$METHODS' names no method"
            for name in $METHODS; do
                [[ " $all_methods " == *" $name "* ]] ||
                    fail "METHODS has '$name', which is none of $all_methods"
            done
        fi
        experiment "$target" "$@"
        ;;
    -h | --help) usage ;;
    *)
        { echo "command.sh: unknown target '${1:-}'; there are"; usage; } >&2
        exit 2
        ;;
esac
