#!/usr/bin/env bash
# Builds the package with its CUDA kernels, in the repository's root, into a folder for another machine:
#   benchmarks/gpu/build.sh [FOLDER [CMAKE_OPTION...]]
# FOLDER (build/gpu-package) then holds rnnfast/ with both extensions. PYTHONPATH=FOLDER imports it there. Objects stay in
# FOLDER.objects, so a second build is short. The variables, and their defaults:
#   PYTHON=python3          an interpreter of the version that will import the package; it needs its headers, no packages
#   ARCHITECTURE=90-real    CMAKE_CUDA_ARCHITECTURES; 90-real is compute capability 9.0 alone, the shortest build
#   JOBS=all processors     files that are compiled at a time
# It needs nvcc 12.0, CMake 3.20, ninja, a C++20 compiler, and pybind11 in PYTHON, .venv or python3.
set -euo pipefail
folder=${1:-build/gpu-package}
objects=$folder.objects
python=$(command -v "${PYTHON:-python3}") || { echo "$PYTHON is no interpreter" >&2; exit 1; }
architecture=${ARCHITECTURE:-90-real}
jobs=${JOBS:-$(nproc)}

pybind11=
for each in "$python" .venv/bin/python python3; do
  pybind11=$("$each" -m pybind11 --cmakedir 2> /dev/null) && break
done
[ -n "$pybind11" ] || { echo "no pybind11 in $python, .venv or python3" >&2; exit 1; }

cmake -G Ninja -S . -B "$objects" -DCMAKE_BUILD_TYPE=Release -DRNNFAST_CUDA=ON \
  "-DCMAKE_CUDA_ARCHITECTURES=$architecture" "-DPython_EXECUTABLE=$python" \
  "-Dpybind11_DIR=$pybind11" "${@:2}"
cmake --build "$objects" --parallel "$jobs"

rm -rf "$folder/rnnfast" # of an earlier build
mkdir -p "$folder"
find rnnfast -name __pycache__ -prune -o -type f ! -name '*.so' -exec cp --parents -t "$folder" {} +
cmake --install "$objects" --prefix "$folder"

# Of another version, or without a symbol, it would not load there either. Neither extension needs a GPU for this.
"$python" - "$folder"/rnnfast/*.so <<'END'
import importlib.util, pathlib, sys

for file in map(pathlib.Path, sys.argv[1:]):
    spec = importlib.util.spec_from_file_location(file.name.partition(".")[0], file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB, loads in Python {sys.version.split()[0]}")
END
du -sh "$folder"
