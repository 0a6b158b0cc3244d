#!/usr/bin/env bash
# PEFT 0.21.0: two adapter_config.json of one configuration differ in their bytes.
#
# LoraConfig keeps `target_modules` as a Python set, and save_pretrained writes it in the set's order, which follows
# from the hash seed of the process. So the same adapter, saved by two processes, has two digests: whatever tells
# artifacts apart by the hash of their files takes equal adapters for different ones. Sorting the list when the file is
# written ends it. Seen with torch 2.13.0, transformers 5.23.0:
#
#   seed 1: ['gate_proj', 'down_proj', ...]   seed 2: another order   the same names in both
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.0
cat > "$folder/save.py" <<'PY'
import sys

from peft import LoraConfig

names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LoraConfig(r=4, target_modules=names).save_pretrained(sys.argv[1])
PY
for seed in 1 2 3; do
  PYTHONHASHSEED=$seed "$folder/venv/bin/python" "$folder/save.py" "$folder/$seed"
done
"$folder/venv/bin/python" - "$folder" <<'PY'
import json
import sys
from pathlib import Path

lists = [json.loads((Path(sys.argv[1]) / seed / "adapter_config.json").read_text())["target_modules"] for seed in "123"]
for seed, names in zip("123", lists):
    print(f"seed {seed}: {names}")
assert len({tuple(sorted(names)) for names in lists}) == 1, "the names themselves differ"
if len({tuple(names) for names in lists}) == 1:
    sys.exit("The order no longer depends on the process: the finding is out of date.")
print("The same configuration, written in different orders.")
PY
