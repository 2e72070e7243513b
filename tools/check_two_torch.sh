#!/bin/sh
# One wheel, two torch versions: builds the wheel without torch, then tests that one file under each.
#   tools/check_two_torch.sh [WORKDIR] [TORCH_VERSION...]      (default: a temporary folder; 2.13.0 and 2.10.0)
# PyPI's Linux torch brings CUDA along: some GB of downloads. PYTHON picks the interpreter.
set -eu
cd "$(dirname "$0")/.."
work=${1:-$(mktemp -d)}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- 2.13.0 2.10.0
python=${PYTHON:-python3}
pip="-m pip --disable-pip-version-check --quiet"

"$python" -m venv "$work/build"
"$work/build/bin/python" $pip install build
rm -rf "${work:?}/dist"
"$work/build/bin/python" -m build --wheel --outdir "$work/dist" . > "$work/build.log" 2>&1
"$work/build/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is not None)'
wheel=$(ls "$work"/dist/*.whl)
sha256sum "$wheel"

for version in "$@"; do
  venv="$work/torch-$version"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" $pip install "torch==$version" numpy safetensors packaging
  "$venv/bin/python" $pip install --force-reinstall --no-deps "$wheel"
  # From a folder without the sources, so that only the wheel can be imported.
  (cd "$work" && "$venv/bin/python" - <<'PYTHON')
import torch
import llmkern
from llmkern_cli import _selftest

native = [row for row in llmkern.kernels() if row.kernel.startswith("cpu.") and row.runnable]
assert native, "the native module did not load"
for row in llmkern.kernels():
    if row.runnable:
        assert (found := _selftest.check(row.op, row.kernel)) == "ok", f"{row.op} {row.kernel}: {found}"
for op, args in _selftest.cases().items():
    torch.compiler.reset()
    x = args[0].clone().requires_grad_(op.endswith("linear"))
    run = torch.compile(getattr(torch.ops.llmkern, op).default, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x, *args[1:]), getattr(torch.ops.llmkern, op)(*args))
    if x.requires_grad:
        getattr(torch.ops.llmkern, op)(x, *args[1:]).sum().backward()
        assert torch.isfinite(x.grad).all()
print(f"torch {torch.__version__}: {len(native)} native rows agree with the reference; compile and gradients work")
PYTHON
done
