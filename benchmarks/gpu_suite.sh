#!/usr/bin/env bash
# The GPU checks and measurements of this project on one CUDA machine without network, in four parts of less than 9 minutes each:
#
#   benchmarks/gpu/wheels.sh .wheels                                                     # once, where there is network
#   WHEELS=.wheels benchmarks/gpu_suite.sh tests OUT_DIR                                 # there: the tests that are marked gpu
#   for part in kernels relatives model; do WHEELS=.wheels benchmarks/gpu_suite.sh $part OUT_DIR; done
#
# kernels: of the expert layers. relatives: of PEER, PKM, top-k attention and shift mixing. model: layers and training runs.
#
# OUT_DIR gets <part>.log and the results as *.md. A step has a time limit; one that fails does not stop the next; the last lines say how
# each ended, and the status is 1 if one failed. Written are OUT_DIR and Triton's cache, nothing else.
#
#   PYTHON               the interpreter that has torch (python3)
#   WHEELS               folder of wheels for what it lacks (none)
#   SWITCHYARD_COMMIT    the commit, where there is no .git (else WHEELS/COMMIT)
#   SMOKE=1              the same on a CPU in tiny form, kernels in Triton's interpreter; nothing is measured, limits are 4 times as long
#   STEPS                steps of a training run (300)
#   SPEEDS               of a GPU that the benchmarks do not know: "--peak-tflops N --bandwidth-gb N"
set -uo pipefail

part=${1-}
if [ $# -ne 2 ] || [[ ! $part =~ ^(tests|kernels|relatives|model)$ ]]; then
	echo "usage: benchmarks/gpu_suite.sh tests|kernels|relatives|model OUT_DIR" >&2
	exit 2
fi
wheels=${WHEELS:+$(cd "$WHEELS" && pwd)} || exit 2
mkdir -p "$2" && out=$(cd "$2" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
log=$out/$part.log
scratch=$out/scratch.$part
rm -rf "$scratch"
mkdir -p "$scratch/tmp" "$scratch/site"
trap 'rm -rf "$scratch"' EXIT

smoke=() slack=1
read -ra speeds <<<"${SPEEDS-}"
if [ "${SMOKE:-0}" = 1 ]; then
	smoke=(--smoke) slack=4
	export TRITON_INTERPRET=1 SWITCHYARD_GPU_SMOKE=1 CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
fi
if [ -n "$wheels" ]; then
	for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" "$scratch/site"; done
	[ -z "${SWITCHYARD_COMMIT-}" ] && [ -f "$wheels/COMMIT" ] && SWITCHYARD_COMMIT=$(cat "$wheels/COMMIT")
fi
if [ -z "${SWITCHYARD_COMMIT-}" ]; then
	SWITCHYARD_COMMIT=$(git describe --always --dirty 2>/dev/null || echo unknown)
fi
export SWITCHYARD_COMMIT PYTHONPATH=$scratch/site:$PWD PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TMPDIR=$scratch/tmp XDG_CACHE_HOME=$scratch/cache TORCHINDUCTOR_CACHE_DIR=$scratch/inductor CUDA_CACHE_PATH=$scratch/cuda
export TORCH_EXTENSIONS_DIR=$scratch/extensions MPLCONFIGDIR=$scratch/matplotlib HYPOTHESIS_STORAGE_DIRECTORY=$scratch/hypothesis
export CUBLAS_WORKSPACE_CONFIG=:4096:8

: >"$log"
summary=()
failed=0

# step NAME SECONDS RESULT COMMAND...: RESULT gets what the command prints ("-": the log does), the log the rest.
step() {
	local name=$1 limit=$(($2 * slack)) result=$3 began=$SECONDS status
	shift 3
	echo "== $name: $*" | tee -a "$log"
	if [ "$result" = - ]; then
		timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1
	else
		timeout --kill-after=10 "$limit" "$@" >"$out/$result" 2>>"$log"
	fi
	status=$?
	local word=ok
	if [ $status -ne 0 ]; then
		failed=1
		word="FAILED with status $status"
		[ $status -eq 124 ] && word="FAILED: out of time ($limit s)"
		tail -n 20 "$log"
	fi
	summary+=("$name: $word, $((SECONDS - began)) s")
	return $status
}

module() { # NAME SECONDS RESULT MODULE ARGUMENTS...
	local name=$1 limit=$2 result=$3
	shift 3
	step "$name" "$limit" "$result" "$python" -m "$@" "${smoke[@]}"
}

# Memory of a crashed step is gone with its process, so nothing is carried from one to the next.
step machine 30 - "$python" -m benchmarks.gpu.timing
case $part in
tests)
	several=() # each kernel is compiled in many forms: a minute on 12 cores, 20 on one
	[ ${#smoke[@]} -eq 0 ] && "$python" -c 'import xdist' 2>/dev/null && several=(-n "$(nproc)" --dist worksteal)
	step pytest 470 - "$python" -m pytest -m gpu -p no:cacheprovider --override-ini timeout=$((300 * slack)) -rs "${several[@]}" tests/gpu
	;;
kernels)
	rm -f "$out/kernel_profiles.md"
	module compile 170 - benchmarks.gpu.warm kernels
	for op in expert_mlp grouped_matmul switchhead_project; do
		module $op 100 $op.md "benchmarks.kernels.bench_$op" --profile "$out/kernel_profiles.md" "${speeds[@]}"
	done
	;;
relatives)
	rm -f "$out/relatives_profiles.md"
	module compile 130 - benchmarks.gpu.warm relatives
	for op in peer_experts embedding_bag product_key_topk top_k_attention shift_mix; do
		module $op 75 $op.md "benchmarks.kernels.bench_$op" --profile "$out/relatives_profiles.md" "${speeds[@]}"
	done
	;;
model)
	rm -f "$out/layer_profiles.md"
	sources=(--tokenizer bpe --vocab-size 8000)
	[ ${#smoke[@]} -gt 0 ] && sources=(--source model --tokenizer bytes --workers 1)
	module compile 100 - benchmarks.gpu.warm model
	step shards 40 - "$python" -m data.prepare --out "$scratch/shards" "${sources[@]}"
	shards=$?
	module layers 160 layers.md benchmarks.gpu.layers --profile "$out/layer_profiles.md"
	if [ $shards -eq 0 ]; then # twice 85 s, and 30 s for its imports and the models whose FLOPs it counts
		module training 200 training.md benchmarks.gpu.training --shards "$scratch/shards" --runs "$scratch/runs" \
			--seconds $((85 * slack)) --steps "${STEPS:-300}" "${speeds[@]}"
	else
		failed=1
		summary+=("training: FAILED: not run, no shards")
	fi
	for run in "$scratch"/runs/*/; do
		[ -f "$run/metrics.jsonl" ] && cp "$run/metrics.jsonl" "$out/$(basename "$run").jsonl"
	done
	;;
esac
printf '%s\n' "== $part" "${summary[@]}" | tee -a "$log"
exit $failed
