#!/usr/bin/env bash
# Peers for a GPU machine without a network (Linux on x86-64, Python 3.12): wheels for benchmarks/gpu.sh, in the versions
# of constraints-cuda.txt, without what such a machine has anyway (torch, transformers, accelerate, peft, pyarrow, ...).
#   benchmarks/carry.sh [FOLDER]    default: .carry
# At most 60 MiB travel at once, the repository included. NVIDIA's CUTLASS DSL, which Liger's Hopper kernels need, is
# larger, so it goes in two halves: FOLDER/peers and FOLDER/dsl.1 first, FOLDER/dsl.2 next. `peers` alone works too.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.carry}
room=$((60 << 20))
log=$(mktemp) && trap 'rm -f "$log"' EXIT

bytes() { du -cb "$@" | tail -1 | cut -f1; }
mib() { awk -v n="$1" 'BEGIN { printf "%5.1f MiB", n / 1048576 }'; }
pin() { grep -m 1 "^$1==" constraints-cuda.txt || { echo "constraints-cuda.txt does not pin $1" >&2; exit 1; }; }
wheel() { # NAME==VERSION FOLDER
  local tags=(--python-version 3.12 --implementation cp --platform manylinux2014_x86_64)
  for glibc in 17 24 27 28; do tags+=(--platform "manylinux_2_${glibc}_x86_64"); done
  "${PYTHON:-python3}" -m pip download --no-deps --only-binary=:all: "${tags[@]}" -d "$2" "$1" >"$log" 2>&1 && return
  echo "left out  $1: $(grep -m 1 ERROR "$log")"
  return 1
}

rm -rf "$folder/peers" "$folder/dsl.1" "$folder/dsl.2"
mkdir -p "$folder/peers"
tree=$(git ls-files -z --cached --others --exclude-standard | { du -cb --files0-from=- 2>/dev/null || true; } | tail -1 | cut -f1)

# dill and multiprocess: what `datasets` needs and the machine lacks.
for name in liger-kernel cut-cross-entropy trl datasets dill multiprocess; do
  wheel "$(pin "$name")" "$folder/peers" || true
done

dsl=$(pin nvidia-cutlass-dsl)
mkdir "$folder/dsl.1" "$folder/dsl.2"
for part in "" -libs-base -libs-core -libs-cu12; do # cu12 is the flavour that pip takes; a newer driver runs it
  wheel "${dsl/==/$part==}" "$folder/dsl.1" || { rm -r "$folder/dsl.1" "$folder/dsl.2"; break; }
done
for large in "$folder"/dsl.1/*_cu12-*.whl; do
  [ -e "$large" ] || continue
  split -n 2 --numeric-suffixes=1 -a 1 "$large" "$large."
  mv "$large.2" "$folder/dsl.2/" && rm "$large"
done

find "$folder" -type f | sort | while read -r file; do echo "took $(mib "$(bytes "$file")")  ${file#"$folder"/}"; done
echo "left out  quack-kernels: 0.6.5 does not import with $dsl, 0.6.0 is tied to another version of it"
echo "left out  verl: importing it needs ray, tensordict, hydra-core and transformers below 5.11"
echo "left out  flash-attn: its package has no wheel"
for call in "$folder/peers $folder/dsl.1" "$folder/dsl.2"; do
  read -ra paths <<<"$call"
  [ -e "${paths[-1]}" ] || paths=("${paths[@]::${#paths[@]}-1}")
  [ ${#paths[@]} -gt 0 ] || continue
  total=$((tree + $(bytes "${paths[@]}")))
  echo "carry $(mib "$total")  ${paths[*]} and the repository"
  [ "$total" -le "$room" ] || { echo "that is more than $(mib "$room")" >&2; exit 1; }
done
