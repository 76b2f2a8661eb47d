#!/usr/bin/env bash
# What only a GPU can show: whether it computes what it should, how fast, in how much memory. One file for each in OUT.
#
#   benchmarks/agenda.sh OUT timed     # steps, their kernels, and PyTorch's: with nothing else on the GPU
#   benchmarks/agenda.sh OUT beside    # golden values and other tests, memory: side by side, on many cores
#
# Compiling takes most of the time: minutes for a network of 12 layers, where products are tuned by trial. A second run
# with the same OUT finds what was compiled (OUT/cache). Needs PyTorch that sees the GPU (`--extra benchmark`). PYTHON
# names another interpreter, DBLOCKS_GOLDEN the folder of golden values, DEADLINE seconds after which all is ended.
set -uo pipefail
(($# == 2)) && [[ $2 =~ ^(timed|beside)$ ]] || { echo "usage: $0 OUT timed|beside" >&2 && exit 2; }
mkdir -p "$1"
out=$(realpath "$1")
python=$(command -v "${PYTHON:-python}") || { echo "$0: no Python: activate the environment, or set PYTHON" >&2 && exit 2; }
deadline=${DEADLINE:-7200}
cd "$(dirname "$0")/.."
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1 PYTHONPATH=.:${PYTHONPATH:-}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/cache} JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

# into NAME COMMAND...: what it prints into OUT/NAME.txt, and how it ended into this output.
into() {
  local began=$SECONDS
  local left=$((deadline - began))
  ((left > 5)) || { echo "$1: no time left" && return; }
  timeout -k 5 "$left" "${@:2}" >"$out/$1.txt" 2>&1
  echo "$1: ended with $? after $((SECONDS - began)) s"
}

timed() {
  into kernels "$python" benchmarks/kernels.py --keep="$out/profile"
  for parts in 1 2 8; do into "kernels_parts_$parts" "$python" benchmarks/kernels.py --parts=$parts; done
  into kernels_by_jax "$python" benchmarks/kernels.py --by_jax
  into kernels_bfloat16 "$python" benchmarks/kernels.py --dtype=bfloat16
  into step_float32 "$python" benchmarks/against_torch.py --rows=block
  into step_bfloat16 "$python" benchmarks/against_torch.py --dtype=bfloat16 --rows=block
  into dit "$python" benchmarks/dit_against_torch.py --batch=128 --samples=64
  into text "$python" benchmarks/text_against_torch.py --batch=32 --width=768 --layers=4
  into three_float32 "$python" benchmarks/against_torch.py --rows=plain,three_blocks
  into step_compiled "$python" benchmarks/against_torch.py --compile --rows=block
}

# NAME CONFIG FLAGS...
memory() {
  into "memory_$1" "$python" launch.py --mode=memory --config="configs/$2.py" --workdir="$out/$1" \
    --config.idle_blocks=host "${@:3}"
}

beside() {
  JAX_PLATFORMS=cuda into tests "$python" -m pytest -o addopts= -v --tb=short -n 8 --dist=loadfile -m "not long" -p no:cacheprovider \
    tests/test_{golden,dit,dblock_llama,llama,huginn,chunks,models,rotary,augment,rand_augment,noise,diffusion,masking,sampler,step,optimizer}.py &
  memory cifar dblock_cifar100 &
  memory vit_b dblock_cifar100 --config.dataset=tiny_imagenet --config.image_size=224 --config.patch_size=16 \
    --config.hidden_size=768 --config.num_heads=12 --config.intermediate_size=3072 --config.batch_size=32 --config.num_blocks=4 &
  memory mask mask_text8 --config.batch_size=32 --config.block_schedule=chunked &
  wait
}

"$2"
