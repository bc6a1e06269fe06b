#!/usr/bin/env bash
# Installs the light distribution into a fresh virtual environment, runs an exported model there, and fails where
# import and first prediction take more than 1.5 s.
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
venv/bin/python - "$exported" <<'PYTHON'
import statistics
import subprocess
import sys

MOST = 1.5
FIRST_ANSWER = """
import sys, time
start = time.perf_counter()
from alembert import AdaptiveClassifier
AdaptiveClassifier.from_pretrained(sys.argv[1]).predict("a short text")
print(time.perf_counter() - start)
"""
command = [sys.executable, "-c", FIRST_ANSWER, sys.argv[1]]
starts = [float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout) for _ in range(5)]
median = statistics.median(starts)
print(f"import and first prediction: {median:.2f} s, median of {len(starts)} fresh processes")
if median > MOST:
    sys.exit(f"that is more than {MOST} s: is the machine busy, or the model much larger than MiniLM?")
PYTHON
du --summarize --human-readable venv | sed 's/\t.*/ installed in all/'
echo "light install: passed"
