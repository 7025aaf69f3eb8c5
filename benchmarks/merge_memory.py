"""The peak memory of merging a model of Llama 7B's shape, with random weights, in a process of its own.

    python benchmarks/merge_memory.py [--layers 32] [--shard-gb 4] [--folder FOLDER]

Needs twice the size of the model on the disk: 27 GB for all 32 layers in bf16. Fewer layers have the same largest layer, so
the peak is that of the whole. The limit that the project sets itself is one shard, one layer and 20 % above the process at rest.

Seen on 2026-11-27 (two busy hardware threads; one layer, shards of 0.3 GB): 0.75 GB above rest, 0.97 allowed.
"""

# ruff: noqa: E501
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import json, resource, sys, time
import torch
from finetune_nb.merge import merge_adapter
rest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.perf_counter()
merged = merge_adapter(sys.argv[1])
print(json.dumps({"rest": rest * 1024, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "seconds": time.perf_counter() - begun, "bytes": merged.bytes, "layers": merged.layers}))
"""


def make_run(folder: Path, layers: int, shard_bytes: float) -> tuple[Path, int, int]:
    "A base model in shards and a run with an adapter for it, both of random weights; returns the run, the largest shard and the largest layer in bytes."
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    from finetune_nb.config import FinetuneConfig, save_config
    from finetune_nb.merge import write_shard
    from finetune_nb.models import base_mark, load_tokenizer

    tokenizer = load_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=32, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes, shards, size = {name: tuple(p.shape) for name, p in model.state_dict().items()}, [[]], 0
    for name, shape in shapes.items():
        if size and size + 2 * torch.Size(shape).numel() > shard_bytes:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += 2 * torch.Size(shape).numel()
    base = folder / "base"
    base.mkdir()
    index, random = {}, (torch.randn(2**20 + 7) * 0.02).bfloat16()
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(base / file, {name: (torch.bfloat16, shapes[name]) for name in names}, (random.repeat(-(-torch.Size(shapes[name]).numel() // len(random)))[: torch.Size(shapes[name]).numel()].view(shapes[name]) for name in names))
        index |= dict.fromkeys(names, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    run = folder / "run"
    with torch.device("meta"):
        tuned = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    from safetensors.torch import save_file

    (run / "adapter").mkdir(parents=True)
    tuned.peft_config["default"].save_pretrained(run / "adapter")
    weights = {name.replace(".default", ""): torch.randn(p.shape) * 0.01 for name, p in tuned.named_parameters() if "lora_" in name}
    save_file(weights, run / "adapter" / "adapter_model.safetensors")
    save_config(FinetuneConfig(model_name_or_path=str(base)), run / "config.yaml")
    (run / "run.json").write_text(json.dumps({"marks": {"base": base_mark(str(base))}, "data": {}, "parameters": "", "ended_by": "the plan", "steps": 1, "seconds": 1, "hardware": ""}))
    largest = max(2 * torch.Size(shape).numel() for shape in shapes.values())
    return run, max(path.stat().st_size for path in base.glob("*.safetensors")), largest


def main() -> None:
    "Makes the model, merges it in another process, and prints what that took."
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--shard-gb", type=float, default=4)
    options.add_argument("--folder")
    given = options.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        begun = time.perf_counter()
        run, shard, layer = make_run(folder, given.layers, given.shard_gb * 1e9)
        print(f"made in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        done = subprocess.run([sys.executable, "-c", CHILD, str(run)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        said = json.loads(done.stdout.splitlines()[-1])
        above, limit = said["peak"] - said["rest"], 1.2 * (shard + layer)
        print(f"{given.layers} layers of Llama 7B's shape, {said['bytes'] / 1e9:.1f} GB merged in {said['seconds']:.0f} s ({said['layers']} layers with an adapter)")
        print(f"largest shard {shard / 1e9:.2f} GB, largest weight {layer / 1e9:.2f} GB: at most {limit / 1e9:.2f} GB above rest")
        print(f"peak {said['peak'] / 1e9:.2f} GB, {above / 1e9:.2f} GB above rest ({said['rest'] / 1e9:.2f} GB): {'kept' if above <= limit else 'NOT KEPT'}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
