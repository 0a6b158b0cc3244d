"""Records per second rendered, masked and packed, against TRL's preparation through ``datasets.map``.

    python benchmarks/data.py

Both turn conversations of gsm8k into packed token ids with loss masks, with the same tokenizer and a chat template with
generation marks, in one process. TRL writes an Arrow cache on the way; ours are blocks in memory, made anew in each
epoch. Rounds are interleaved, each on other records, so that no cache serves twice.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

SHARED = Path(os.environ.get("POSTLUDE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
BLOCK, ROUNDS, RECORDS = 1024, 3, 2400
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)


def ours(path: str, tokenizer) -> float:
    from postlude.data.dataset import Dataset
    from postlude.data.document import Unit
    from postlude.data.encode import Encoder
    from postlude.data.encoded_dataset import EncodedDataset
    from postlude.data.formats.messages import Messages
    from postlude.data.loader import Loader
    from postlude.data.sources.path import Path as PathSource
    from postlude.manifest.schema import DatasetConfig

    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        config = DatasetConfig(source=PathSource(path=path), format=Messages())
        dataset = Dataset("chats", config, cache)
        encoder = Encoder(tokenizer, block=BLOCK)
        source = EncodedDataset(dataset, encoder, lambda documents: tuple(Unit((one,)) for one in documents))
        with Loader({"c": source}, {"c": 1.0}, seed=0, block=BLOCK, blocks_per_step=4, window=128, epochs=1) as loader:
            for _ in loader:
                pass
        return time.perf_counter() - begin


def trl(path: str, tokenizer) -> float:
    from datasets import load_dataset
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    shape |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape))
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        SFTTrainer(
            model,
            SFTConfig(
                output_dir=cache,
                max_length=BLOCK,
                packing=True,
                assistant_only_loss=True,
                bf16=False,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=load_dataset("json", data_files=path, split="train", cache_dir=cache),
            processing_class=tokenizer,
        )
        return time.perf_counter() - begin


def main() -> None:
    from postlude.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / "qwen2.5"))
    tokenizer.chat_template = TEMPLATE
    rows = [json.loads(line) for line in (SHARED / "gsm8k" / "train.jsonl").open()]
    seconds: dict[str, list[float]] = {"TRL": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            path = f"{folder}/{number}.jsonl"
            with open(path, "w") as file:
                for row in rows[number * RECORDS : (number + 1) * RECORDS]:
                    said = {"user": row["question"], "assistant": row["answer"]}
                    messages = [{"role": role, "content": text} for role, text in said.items()]
                    file.write(json.dumps({"messages": messages}) + "\n")
            for name, prepare in {"TRL": trl, "ours": ours}.items():
                seconds[name].append(prepare(path, tokenizer))
    table = Table(title=f"{RECORDS} conversations of gsm8k, medians of {ROUNDS}")
    for column in ("", "records/s", "times TRL"):
        table.add_column(column, justify="right")
    base = statistics.median(seconds["TRL"])
    for name, taken in seconds.items():
        median = statistics.median(taken)
        table.add_row(name, f"{RECORDS / median:,.0f}", f"{base / median:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
