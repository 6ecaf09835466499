#!/usr/bin/env bash
# Builds Horovod for the TensorFlow of a Python environment, keeps the wheel, and installs it. What is there already stays.
#
#     horovod_scripts/install_horovod.sh [--python PYTHON] [--mpi] [--nccl] [--force]
#
#     --python PYTHON   the environment's interpreter (default: python3)
#     --mpi             also speak MPI (needs an MPI installation with mpicxx); without it Horovod speaks Gloo only
#     --nccl            reduce on NVIDIA GPUs with NCCL (needs CUDA and NCCL; TensorFlow for GPUs)
#     --force           build anew
#
# Takes about three minutes on two cores, and needs a C++ compiler and cmake. The wheel is kept in $HOROVOD_WHEELS, or in
# ~/.cache/keras_ngd/horovod.
set -euo pipefail

VERSION=0.28.1
PYTHON=python3 MPI=0 NCCL=0 FORCE=0
while [ $# -gt 0 ]; do
  case "$1" in
    --python) PYTHON="$2"; shift ;;
    --mpi) MPI=1 ;;
    --nccl) NCCL=1 ;;
    --force) FORCE=1 ;;
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "unknown argument $1; see $0 --help" >&2; exit 2 ;;
  esac
  shift
done

PYTHON=$(command -v "$PYTHON") || { echo "there is no Python $PYTHON" >&2; exit 1; }
TENSORFLOW=$("$PYTHON" -c 'from importlib.metadata import version; print(version("tensorflow"))' 2>/dev/null) ||
  { echo "install TensorFlow for $PYTHON first: Horovod is built against it" >&2; exit 1; }
TAG=$("$PYTHON" -c 'import sys; print(f"cp{sys.version_info.major}{sys.version_info.minor}")')
KIND=gloo$([ $MPI = 1 ] && echo -mpi || true)$([ $NCCL = 1 ] && echo -nccl || true)
WHEELS=${HOROVOD_WHEELS:-$HOME/.cache/keras_ngd/horovod}/$VERSION-tensorflow$TENSORFLOW-$TAG-$KIND
INSTALL=("$PYTHON" -m pip install --quiet --disable-pip-version-check)

works() { "$PYTHON" -c 'import horovod.tensorflow' >/dev/null 2>&1; }

check() {
  local report
  report=$("$(dirname "$PYTHON")/horovodrun" --check-build)
  echo "$report"
  grep -q '\[X\] TensorFlow' <<<"$report" && grep -q '\[X\] Gloo' <<<"$report" || return 1
  [ $MPI = 0 ] || grep -q '\[X\] MPI' <<<"$report" || return 1
  [ $NCCL = 0 ] || grep -q '\[X\] NCCL' <<<"$report"
}

if [ $FORCE = 0 ] && works && check; then
  exit 0
fi

if [ $FORCE = 1 ] || ! ls "$WHEELS"/horovod-*.whl >/dev/null 2>&1; then
  for tool in cmake g++; do
    command -v $tool >/dev/null || { echo "Horovod is built with $tool, which is not installed" >&2; exit 1; }
  done
  [ $MPI = 0 ] || command -v mpicxx >/dev/null || { echo "--mpi needs an MPI installation: there is no mpicxx" >&2; exit 1; }
  # Its build looks into the environment: for TensorFlow's headers, and for these.
  "${INSTALL[@]}" 'setuptools<81' wheel cloudpickle psutil pyyaml packaging cffi
  BUILD=$(mktemp -d)
  trap 'rm -rf "$BUILD"' EXIT
  # One source file includes headers that TensorFlow no longer ships; nothing of it is compiled without XLA operations.
  for header in tensorflow/compiler/tf2xla/{xla_op_kernel,xla_op_registry}.h \
    tensorflow/compiler/xla/client/xla_builder.h \
    tensorflow/compiler/xla/service/{custom_call_target_registry.h,hlo.pb.h} \
    tensorflow/compiler/xla/{shape.h,xla_data.pb.h} \
    tensorflow/core/platform/human_readable_json.h; do
    mkdir -p "$BUILD/include/$(dirname "$header")"
    echo '#pragma once' >"$BUILD/include/$header"
  done
  mkdir -p "$WHEELS"
  SETTINGS=(HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1)
  [ $MPI = 1 ] && SETTINGS+=(HOROVOD_WITH_MPI=1) || SETTINGS+=(HOROVOD_WITHOUT_MPI=1)
  [ $NCCL = 0 ] || SETTINGS+=(HOROVOD_GPU_OPERATIONS=NCCL)
  env CXXFLAGS="-I$BUILD/include ${CXXFLAGS:-}" "${SETTINGS[@]}" \
    PATH="$(dirname "$PYTHON"):$PATH" \
    "$PYTHON" -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps --no-cache-dir \
    --wheel-dir "$BUILD/wheels" "horovod==$VERSION" >"$BUILD/log" 2>&1 ||
    { tail -n 60 "$BUILD/log" >&2; echo "Horovod was not built; the end of the log is above" >&2; exit 1; }
  mv -f "$BUILD"/wheels/horovod-*.whl "$WHEELS/"
fi

"${INSTALL[@]}" --force-reinstall --no-deps "$WHEELS"/horovod-*.whl
"${INSTALL[@]}" cloudpickle psutil pyyaml packaging cffi
check
