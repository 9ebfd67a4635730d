#!/usr/bin/env bash
# Installs this checkout and its stack into NVIDIA's PyTorch image, and checks the result. docker/Dockerfile runs it; so
# can a container that is saved afterwards (docs/cluster.md, step 1).
set -euo pipefail
cd "$(dirname "$0")/.."

# The image constrains every package that it was built with, numpy 2 among them. Only what was compiled for its CUDA
# must stay; pip reads these constraints in place of the image's.
python docker/stack.py compiled >docker/compiled.txt
PIP_CONSTRAINT=$PWD/docker/compiled.txt pip install --no-cache-dir --editable '.[evaluate,test]'
python docker/stack.py check
python -c 'from nemo_tsdkd.checks.probes import check_versions; check_versions()' # what every job asks again
git config --system --add safe.directory "$PWD" # other users' runs record its revision too
