#!/usr/bin/env bash
# Fills FOLDER with the wheels of the Python packages that a bare CUDA machine lacks, for its Python 3.12, so that they can travel with the
# tree to a machine without network: 13 MB (unpacked 54 MB, so gpu_suite.sh unpacks them there). Run it where pip works:
#
#   benchmarks/gpu/wheels.sh FOLDER          then, there: WHEELS=FOLDER benchmarks/gpu_suite.sh tests OUT_DIR
#
# FOLDER is wiped. Versions are those of requirements.lock. What is taken for granted there: torch and triton, numpy, einops, msgpack, ninja,
# psutil, py-cpuinfo, tqdm, PyYAML, packaging, tokenizers, safetensors, tensorboard, rich, matplotlib, mpi4py, pytest, pytest-timeout,
# hypothesis. PYTHON chooses the interpreter whose pip is used, PIP_ARGS is handed to pip.
set -euo pipefail

if [ $# -ne 1 ]; then
	echo "usage: benchmarks/gpu/wheels.sh FOLDER" >&2
	exit 2
fi
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
folder=$1
packages="deepspeed megatron-core webdataset braceexpand pydantic pydantic_core annotated-types typing-inspection typing_extensions hjson zstandard"

pinned() { # name -> name==version of requirements.lock
	sed -n "s/^\($1==[^ ]*\).*/\1/p" "$root/requirements.lock" | grep . || {
		echo "error: requirements.lock must pin $1, but it does not: add it there" >&2
		return 1
	}
}

rm -rf "$folder"
mkdir -p "$folder"
platforms=()
for version in 2_28 2_27 2_24 2_17 2_12 2_5; do
	platforms+=(--platform "manylinux_${version}_x86_64")
done
platforms+=(--platform manylinux2014_x86_64 --platform linux_x86_64)
for package in $packages; do
	requirement=$(pinned "$package")
	# shellcheck disable=SC2086
	if [ "$package" = deepspeed ]; then # only a source archive; pure Python when nothing is compiled ahead
		DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" ${PIP_ARGS:-} "$requirement"
	else
		"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
			"${platforms[@]}" --dest "$folder" ${PIP_ARGS:-} "$requirement"
	fi
done
git -C "$root" describe --always --dirty >"$folder/COMMIT" 2>/dev/null || echo unknown >"$folder/COMMIT"
echo "$folder: $(find "$folder" -name '*.whl' | wc -l) wheels, $(du -sk "$folder" | cut -f1) KiB"
