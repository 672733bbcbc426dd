#!/usr/bin/env bash
# Builds dist/*.whl, installs it into an empty virtual environment and uses it from another folder.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${VENV:-.venv}/bin/python

rm -rf build dist
"$python" -m build --outdir dist
wheel=$(ls dist/*.whl)

"$python" - "$wheel" <<'PY'
import sys
import zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
top = {name.split("/")[0] for name in names}
packages = {name for name in top if not name.endswith(".dist-info")}
if packages != {"alignlab"}:
    sys.exit(f"error: the wheel must hold the package alignlab alone, it holds {sorted(packages)}")
needed = ["alignlab/py.typed", "alignlab/assets/", "alignlab/losses/", "alignlab/kernels/",
          "alignlab/experiments/recipes/tiny.yaml", "alignlab/experiments/recipes/demo.yaml",
          "alignlab/experiments/recipes/findings/push.yaml", "alignlab/experiments/results/"]
missing = [path for path in needed if not any(name.startswith(path) for name in names)]
if missing:
    sys.exit(f"error: the wheel lacks {', '.join(missing)}")
if "alignlab/kernels/__init__.py" in names:
    sys.exit("error: kernels/ must have no __init__.py")
print(f"{sys.argv[1]}: {len(names)} files, package alignlab alone")
PY

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet -c constraints.txt "$root/$wheel"

cd "$scratch"
venv/bin/alignlab --help >/dev/null
venv/bin/alignlab demo --help >/dev/null
venv/bin/alignlab train tiny --print-config >/dev/null
venv/bin/python - "$root" <<'PY'
import importlib
import pathlib
import pkgutil
import sys

import alignlab

root = pathlib.Path(sys.argv[1])
home = pathlib.Path(alignlab.__file__).parent
if root in home.parents:
    sys.exit(f"error: {home} is the checkout, not the installed wheel")
seen = 0
for room in ("alignlab", "alignlab.losses", "alignlab.kernels", "alignlab.experiments"):
    for module in pkgutil.walk_packages(importlib.import_module(room).__path__, f"{room}."):
        if module.name.endswith("_triton"):
            continue
        importlib.import_module(module.name)
        seen += 1
print(f"{seen} modules import from the installed wheel")
PY
echo "wheel check passed"
