#!/bin/sh
# One wheel, several torch versions: builds the wheel without torch, tests that one file under each version in an
# environment of its own, and writes bench/results/two_torch.json.
#   tools/check_two_torch.sh [WORKDIR] [TORCH_VERSION...]      (default: a temporary folder; 2.10.0 and 2.13.0)
# PyPI's Linux torch brings CUDA along: some GB per version. Environments in WORKDIR are used again. PYTHON picks the
# interpreter.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
work=${1:-$(mktemp -d)}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- 2.10.0 2.13.0
python=${PYTHON:-python3}
pip="-m pip --disable-pip-version-check --quiet"

"$python" -m venv "$work/build"
"$work/build/bin/python" $pip install build
if "$work/build/bin/python" -c 'import torch' 2> /dev/null; then
  echo "the environment that builds the wheel has torch in it" >&2
  exit 1
fi
rm -rf "${work:?}/dist" "$work/tests" "$work"/found-*.json
"$work/build/bin/python" -m build --wheel --outdir "$work/dist" . > "$work/build.log" 2>&1 || {
  tail -n 20 "$work/build.log" >&2
  exit 1
}
wheel=$(ls "$work"/dist/*.whl)
# Tests of the kernels and solvers, away from the sources, so that only the wheel can be imported.
mkdir "$work/tests"
cp -r tests/conftest.py tests/cases.py tests/ops tests/test_ops.py tests/test_registry.py tests/test_formats.py \
  tests/test_solvers_native.py "$work/tests"

for version in "$@"; do
  venv="$work/torch-$version"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" $pip install "torch==$version" numpy safetensors packaging pytest
  "$venv/bin/python" $pip install --force-reinstall --no-deps "$wheel"
  (cd "$work/tests" && "$venv/bin/python" -m pytest -q -p no:cacheprovider > "$work/tests-$version.log" 2>&1) || {
    tail -n 20 "$work/tests-$version.log" >&2
    exit 1
  }
  (cd "$work" && "$venv/bin/python" - "$wheel" "found-$version.json" "$work/tests-$version.log" <<'PYTHON'
import hashlib
import json
import re
import sys
from pathlib import Path

import torch

import llmkern
from llmkern import _C
from llmkern_cli import _selftest

runnable = [row for row in llmkern.kernels() if row.runnable]
native = [row for row in runnable if row.kernel != "reference"]
assert native, "the native module did not load"
for row in runnable:
    assert (found := _selftest.check(row.op, row.kernel)) == "ok", f"{row.op} {row.kernel}: {found}"
for op, args in _selftest.cases().items():
    torch.compiler.reset()
    x = args[0].clone().requires_grad_(op.endswith("linear"))
    run = torch.compile(getattr(torch.ops.llmkern, op).default, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x, *args[1:]), getattr(torch.ops.llmkern, op)(*args))
    if x.requires_grad:
        getattr(torch.ops.llmkern, op)(x, *args[1:]).sum().backward()
        assert torch.isfinite(x.grad).all()
wheel, out, log = map(Path, sys.argv[1:])
found = {
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "wheel": wheel.name,
    "module": Path(_C.__file__).name,
    "module_sha256": hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest(),
    "native_rows": len(native),
    "compiled_ops": len(_selftest.cases()),
    "tests": re.sub(r" in .*", "", log.read_text().strip().splitlines()[-1]).strip("= "),
}
out.write_text(json.dumps(found))
print(f"torch {found['torch']}: {len(native)} native rows agree with the reference; tests: {found['tests']}")
PYTHON
  )
done

# Any of the environments will do: it says the machine and the commit.
PYTHONPATH=$root "$venv/bin/python" - "$work" <<'PYTHON'
import json
import sys
from pathlib import Path

from bench.results import write

runs = [json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("found-*.json"))]
assert len({run["module_sha256"] for run in runs}) == 1, "not the same module"
write("two_torch", {"runs": runs})
PYTHON
