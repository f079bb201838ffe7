"""Answers of a model about a picture, for comparison between processes. Imports nothing of this package."""

import torch
from PIL import Image

QUESTION = "What is left?"


def picture() -> Image.Image:
    return Image.frombytes("RGB", (40, 30), bytes(i * 7 % 251 for i in range(40 * 30 * 3)))


def _inputs(processor):
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def move_weights(model) -> None:
    """Copy the weights to memory that torch allocates: the alignment in a mapped file decides a sum's last bits."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def prompt_logits(model, processor) -> torch.Tensor:
    """Logits of the prompt, `(1, sequence, vocab_size)`, bit for bit a function of the weights."""
    move_weights(model)
    with torch.no_grad():
        return model(**_inputs(processor)).logits.clone()


def answers(model, processor) -> list[str]:
    """A generated answer as token ids."""
    inputs = _inputs(processor)
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return [str(row) for row in generated[:, inputs["input_ids"].shape[1] :].tolist()]
