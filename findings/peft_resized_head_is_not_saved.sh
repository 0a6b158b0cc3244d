#!/usr/bin/env bash
# PEFT 0.21.0: an adapter of a resized embedding is saved without the new rows of the head.
#
# After resize_token_embeddings, save_pretrained of an adapter saves the embedding and the head beside it, as the
# vocabulary is another than the base's. Where the embedding itself is adapted (target_modules has "embed_tokens"), the
# embedding is saved and the head is not, tied or not. Of an untied model the new rows of the head are lost: whoever
# loads the adapter has rows drawn at random there, and other logits. Naming the head in modules_to_save keeps them.
# Seen with torch 2.13.0, transformers 5.23.0:
#
#   q_proj                 embed_tokens.weight, lm_head.weight
#   q_proj, embed_tokens   embed_tokens.base_layer.weight
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.0
cat > "$folder/save.py" <<'PY'
import sys
import warnings

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
folder = sys.argv[1]
shape = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).save_pretrained(f"{folder}/base")
saved = []
for targets in (["q_proj"], ["q_proj", "embed_tokens"]):
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
    model.resize_token_embeddings(60)
    get_peft_model(model, LoraConfig(r=2, target_modules=targets)).save_pretrained(f"{folder}/adapter")
    names = [name for name in load_file(f"{folder}/adapter/adapter_model.safetensors") if "lora_" not in name]
    print(", ".join(targets), "->", names)
    saved.append(any("lm_head" in name for name in names))
if saved != [True, False]:
    sys.exit("The head is saved in both or in neither: the finding is out of date.")
PY
"$folder/venv/bin/python" "$folder/save.py" "$folder"
