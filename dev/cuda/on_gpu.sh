#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one; results in $OUT if set, else in build/on_gpu.
#
#     dev/cuda/on_gpu.sh                                      everything, at most twenty minutes
#     dev/cuda/on_gpu.sh build tests sanitize repeat profile  in two calls of at most ten minutes
#     dev/cuda/on_gpu.sh build bench
#
#   build      make cuda, in both precisions, the emulation's self-test of mma and ldmatrix, products of ones
#   tests      dev/test/test_gpu.py on the real GPU
#   sanitize   compute-sanitizer's memcheck, racecheck and synccheck over references and steps of training
#   repeat     three runs of ten steps of a small model: the same bytes
#   profile    time of each kernel of a step against its bound, at 124M and B 64 and 4, by dev/cuda/profile.cu
#   bench      tokens/s, MFU, memory, beside PyTorch where python3 has it
#
# Each part has a time limit and writes NAME.txt. The summary has a line for each; the status is 1 if one
# failed. Nothing is installed.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-build/on_gpu}
parts=${*:-build tests sanitize repeat profile bench}
mkdir -p "$out"

if ! nvidia-smi -L >/dev/null 2>&1; then
    echo "on_gpu.sh: nvidia-smi finds no GPU; without one, run make emulated and dev/test/test_gpu.py"
    exit 1
fi
nvidia-smi -L | tee "$out/gpu.txt"
export PATH=$PATH:/usr/local/cuda/bin

# cuBLASLt: the toolkit's, or that of a Python package (nvidia-cublas, which comes with PyTorch).
if [ -z "${CUBLAS:-}" ] && [ ! -e "$(dirname "$(command -v nvcc)")/../include/cublasLt.h" ]; then
    CUBLAS=$(python3 - <<'PYTHON'
import glob, os, sys
for path in sys.path:
    for header in glob.glob(os.path.join(path, "nvidia", "*", "include", "cublasLt.h")):
        print(os.path.dirname(os.path.dirname(header)))
        sys.exit()
PYTHON
)
fi
CUBLAS=${CUBLAS:-}
cublas=${CUBLAS:+CUBLAS=$CUBLAS}
libraries=${CUBLAS:+$CUBLAS/lib}
export LD_LIBRARY_PATH=${libraries:+$libraries:}${LD_LIBRARY_PATH:-}

summary=()
part() {       # part NAME SECONDS FUNCTION: runs it if it was selected
    [[ " $parts " == *" $1 "* ]] || return 0
    local begin=$SECONDS status=0
    export -f "$3"
    timeout "$2" bash -c "set -uo pipefail; $3" >"$out/$1.txt" 2>&1 || status=$?
    case $status in
        0) summary+=("ok      $1, $((SECONDS - begin)) s") ;;
        124) summary+=("late    $1: stopped after $2 s") ;;
        *) summary+=("FAILED  $1, status $status, $((SECONDS - begin)) s: see $out/$1.txt") ;;
    esac
    echo "== ${summary[-1]}"
    tail -n 45 "$out/$1.txt"
}
export out cublas CUBLAS

build() {
    make $cublas && make cuda $cublas || exit 1
    (make cuda FP32=1 $cublas) &
    (make build/cuda/profile $cublas) &
    make build/cuda/selftest $cublas || exit 1
    wait
    [ -e libgpt2cu_fp32.so ] && build/cuda/selftest results && build/cuda/selftest products
}

python() {     # one that has pytest, if there is one
    for candidate in .venv/bin/python python3; do
        if $candidate -c "import pytest" 2>/dev/null; then
            $candidate "$@"
            return
        fi
    done
    echo "no pytest here"
    return 1
}
export -f python

shards() {     # two shards of random tokens below 200 in build/on_gpu_data
    python3 - <<'PYTHON'
import os, random, struct
draw = random.Random(1)
os.makedirs("build/on_gpu_data", exist_ok=True)
for name, n in (("train", 200000), ("val", 20000)):
    with open(f"build/on_gpu_data/{name}_0.bin", "wb") as file:
        file.write(struct.pack("<256i", 20240520, 1, n, *[0] * 253))
        file.write(struct.pack(f"<{n}H", *(draw.randrange(200) for _ in range(n))))
PYTHON
}
export -f shards

tests() {
    if python3 -c "import pytest" 2>/dev/null || [ -x .venv/bin/python ]; then
        GPT2_GPU_BUILD=$PWD python -m pytest -q dev/test/test_gpu.py || exit 1
    else
        echo "no pytest here: the references alone"
    fi
    for model in dev/reference/*_model.bin; do
        ./train_gpt2cu_fp32 -e "$model" --check "${model/_model/_reference}" || exit 1
        ./train_gpt2cu -e "$model" --check "${model/_model/_reference}"       # for its errors; it is bf16
    done
    # Samples between steps evict the plans of products; cuBLASLt logs what it rejects.
    shards && CUBLASLT_LOG_LEVEL=2 ./train_gpt2cu -e d2 -i 'build/on_gpu_data/train_*.bin' \
        -b 2 -t 192 -d 384 -x 3 -v 0 -s 1 -g 70 |
        grep -a "cublasLt\|loss" | cut -c1-160 | sort | uniq -c | sort -rn | head -n 12
}

sanitized() {  # sanitized TOOL COMMAND...: fails on its errors; races within cuBLASLt's kernels do not count
    local output status=0
    output=$(compute-sanitizer --tool "$1" --error-exitcode 9 "${@:2}" 2>&1) || status=$?
    echo "$output" | tail -n 4
    if [ "$1" = racecheck ] && [ $status = 9 ] && ! grep -q "access at .*_kernel" <<<"$output"; then
        status=0
    fi
    return $status
}
export -f sanitized

sanitize() {   # any status but 0 is a failure: compute-sanitizer's 9, the program's, or that there is none
    shards || exit 1
    local run=(./train_gpt2cu -e d2 -i 'build/on_gpu_data/train_*.bin' -b 1 -x 2 -v 0 -s 0 -g 0)
    local check=(-e dev/reference/head64_model.bin --check dev/reference/head64_reference.bin)
    for tool in memcheck racecheck synccheck; do
        sanitized $tool ./train_gpt2cu_fp32 "${check[@]}" || exit 1
        sanitized $tool ./train_gpt2cu "${check[@]}" --tolerance 0.1 || exit 1
        for T in 1 65 129 192; do     # tiles are of 64, blocks of 64 or 128
            sanitized $tool "${run[@]}" -t $T -d $T || exit 1
        done
    done
}

repeat() {
    shards
    for i in 1 2 3; do
        rm -rf "build/on_gpu_run$i"
        ./train_gpt2cu -e d6 -i 'build/on_gpu_data/train_*.bin' -b 8 -t 512 -d 4096 -x 10 -v 0 -s 0 -g 0 \
            -n 10 -o "build/on_gpu_run$i" >/dev/null || exit 1
        sha256sum "build/on_gpu_run$i"/*.bin
    done
    for file in build/on_gpu_run1/*.bin; do
        cmp "$file" "build/on_gpu_run2/${file##*/}" && cmp "$file" "build/on_gpu_run3/${file##*/}" || exit 1
    done
    echo "the same bytes, three times"
}

profile() {    # the small batch too: it has the gaps between short kernels
    build/cuda/profile d12 64 1024 && build/cuda/profile d12 4 1024
}

bench() {
    python3 dev/cuda/bench_cuda.py --seconds 440
}

part build 150 build
part tests 200 tests
part sanitize 150 sanitize
part repeat 30 repeat
part profile 60 profile
part bench 445 bench

echo
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
! grep -q FAILED "$out/summary.txt"
