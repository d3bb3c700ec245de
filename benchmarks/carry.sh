#!/usr/bin/env bash
# For a GPU machine without a network (Linux on x86-64, Python 3.12), what benchmarks/gpu.sh takes: wheels of peers, in
# the versions of constraints.txt, without what such a machine has anyway (torch, transformers, accelerate, peft, ...),
# and in .carry/states the head and states of SmolLM2 (benchmarks/states.py), if its package is installed here.
#   benchmarks/carry.sh [FOLDER]    of the wheels; default: .carry/peers
# At most 60 MiB travel at once, the repository included. After benchmarks/ahead.sh, and last: it notes the commit.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.carry/peers}
room=$((60 << 20))
log=$(mktemp) && trap 'rm -f "$log"' EXIT

bytes() { du -cb "$@" | tail -1 | cut -f1; }
mib() { awk -v n="$1" 'BEGIN { printf "%5.1f MiB", n / 1048576 }'; }
pin() { grep -m 1 "^$1==" constraints.txt || { echo "constraints.txt does not pin $1" >&2; exit 1; }; }
wheel() { # NAME==VERSION
  local tags=(--python-version 3.12 --implementation cp --platform manylinux2014_x86_64)
  for glibc in 17 24 27 28; do tags+=(--platform "manylinux_2_${glibc}_x86_64"); done
  "${PYTHON:-python3}" -m pip download --no-deps --only-binary=:all: "${tags[@]}" -d "$folder" "$1" >"$log" 2>&1 && return
  echo "left out  $1: $(grep -m 1 ERROR "$log")"
}

rm -rf "$folder"
mkdir -p "$folder"
# dill and multiprocess: what `datasets` needs and the machine lacks.
for name in liger-kernel cut-cross-entropy trl datasets dill multiprocess; do
  wheel "$(pin "$name")"
done

find "$folder" -type f | sort | while read -r file; do echo "took $(mib "$(bytes "$file")")  ${file##*/}"; done
echo "left out  $(pin nvidia-cutlass-dsl): 92 MiB with its libraries; Liger's scaled cross-entropy needs it on a Hopper"
echo "left out  quack-kernels: 0.6.5 does not import with that version of it, 0.6.0 is tied to another"
echo "left out  verl: it needs ray (75 MB), tensordict, hydra-core and transformers below 5.11"
echo "left out  flash-attn: no wheel for this torch"
states=.carry/states
rm -rf "$states"
"${PYTHON:-python3}" -m benchmarks.states pack "$states" >"$log" 2>&1 || echo "left out  states of a policy: $(tail -1 "$log")"
mkdir -p "$states"
[ ! -e "$states/states.pt" ] || echo "took $(mib "$(bytes "$states")")  states.pt"
tree=$(git ls-files -z --cached --others --exclude-standard | { du -cb --files0-from=- 2>/dev/null || true; } | tail -1 | cut -f1)
git describe --always --abbrev=12 --dirty >.carry/commit
packed=(.carry/commit)
if [ -e .carry/kernels.tar.xz ]; then packed+=(.carry/kernels.tar.xz); fi
total=$((tree + $(bytes "$folder" "$states" "${packed[@]}")))
echo "carry $(mib "$total")  $folder, $states, ${packed[*]} and the repository"
[ "$total" -le "$room" ] || { echo "that is more than $(mib "$room")" >&2; exit 1; }
