#!/usr/bin/env bash
# Installs the light distribution into a fresh virtual environment and runs an exported model there.
# Usage: scripts/check_light_install.sh EXPORTED_FOLDER [PYTHON]
set -euo pipefail

exported=$(realpath "${1:?give a folder that alembert export wrote}")
python=${2:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "$root/packaging/runtime"
cd "$work"
venv/bin/python - <<'PYTHON'
import importlib.metadata
import importlib.util

for name in ("torch", "transformers", "datasets", "scipy", "sklearn"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed, so this proves nothing"
import alembert

assert importlib.metadata.version("alembert-runtime") == alembert.__version__
print("alembert-runtime", alembert.__version__)
PYTHON

printf 'a short text\nanother text, a little longer than the first\n' > texts.txt
for speed in 0 0.5 1; do
    venv/bin/alembert predict "$exported" --input texts.txt --output "labels-$speed.jsonl" --speed "$speed"
    test "$(wc -l < "labels-$speed.jsonl")" = 2
done
cat labels-0.5.jsonl
if venv/bin/alembert finetune --model x --data y --output z 2> message.txt; then
    echo "finetune ran without torch" >&2
    exit 1
fi
grep --quiet "pip install alembert" message.txt
printf 'import and first prediction, seconds: '
venv/bin/python - "$exported" <<'PYTHON'
import sys
import time

start = time.perf_counter()
from alembert import AdaptiveClassifier

AdaptiveClassifier.from_pretrained(sys.argv[1]).predict("a short text")
print(round(time.perf_counter() - start, 2))
PYTHON
du --summarize --human-readable venv | sed 's/\t.*/ installed in all/'
echo "light install: passed"
