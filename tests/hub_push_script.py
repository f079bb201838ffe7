"""Run against the loopback Hub by test_hub_roundtrip.py.

Assembles a model from its repositories, pushes it in every way, and saves the answers. Arguments: folder of published
parts, folder for the answers.
"""

import sys
from pathlib import Path

import torch
from hub_answers import answers, prompt_logits
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.hub.push import push_folder

published, memory = map(Path, sys.argv[1:])
api = HfApi()
for name in ("sd2", "clip", "llm"):
    api.create_repo(f"tester/{name}")
    card = f"---\nlicense: {'openrail++' if name == 'sd2' else 'mit'}\nlanguage: en\n---\n".encode()
    api.upload_file(repo_id=f"tester/{name}", path_or_fileobj=card, path_in_repo="README.md")
    api.upload_folder(repo_id=f"tester/{name}", folder_path=published / name)

parts = {"diffusion": "tester/sd2", "vision": "tester/clip@main", "language_model": "tester/llm"}
fields = {"taps": ["U-L1-R1-B0-Cross-Q"], "image_size": 64, "grid_size": 4, "fusion_num_attention_heads": 4}
torch.manual_seed(0)
model = SDLlavaForConditionalGeneration.from_component_pretrained(**parts, **fields)
torch.nn.init.normal_(model.model.fusion.out_proj.weight)
processor = SDLlavaProcessor.from_component_pretrained(**parts, **fields)

model.push_to_hub("tester/sharded", max_shard_size="1MB", private=True, tags=["trial"])
processor.push_to_hub("tester/sharded")
processor.push_to_hub("tester/left-out")
model.push_to_hub("tester/left-out", bundle_frozen=False)
model.save_pretrained(memory / "whole")
processor.save_pretrained(memory / "whole")
push_folder(memory / "whole", "tester/whole")
push_folder(memory / "whole", "tester/folder-left-out", bundle_frozen=False)
(memory / "answers.txt").write_text("\n".join(answers(model, processor)))
remembered = {"whole": prompt_logits(model, processor)}

model.name_or_path = model.config._name_or_path = "tester/whole"
targets = r".*language_model.*(q_proj|v_proj)"
lora = LoraConfig(r=2, target_modules=targets, modules_to_save=["multi_modal_projector"], task_type="CAUSAL_LM")
adapted = get_peft_model(model, lora)
for name, parameter in adapted.named_parameters():
    if "lora_B" in name or "modules_to_save" in name:
        torch.nn.init.normal_(parameter, std=0.2)
adapted.eval().save_pretrained(memory / "adapter")
processor.save_pretrained(memory / "adapter")
push_folder(memory / "adapter", "tester/adapter")
remembered["adapter"] = prompt_logits(adapted, processor)
assert not torch.equal(remembered["adapter"], remembered["whole"])
save_file(remembered, memory / "logits.safetensors")
