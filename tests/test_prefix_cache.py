"""A follow-up question reuses the keys and values of everything that does not depend on it."""

import pytest
import tiny
import torch

from sdllava.modeling_sdllava import SDLlavaForConditionalGeneration
from sdllava.prefix_cache import PrefixCache

GREEDY = {
    "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SDLlavaForConditionalGeneration(
        tiny.config(fusion="concat_tokens", diffusion_fields={"grid_size": 2})
    ).eval()


def prompt(model, images=1, text=(7, 8, 9)):
    """Conversations whose images have 4 x 4 vision and 2 x 2 diffusion tokens."""
    config = model.config
    placeholders = [config.image_token_id] * config.num_image_tokens
    ids = [1, 5] + [x for i in range(images) for x in (*placeholders, 10 + i)] + list(text)
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}


def questions(model, images=1):
    """Two questions about the same images."""
    pixels = tiny.image_inputs(images)
    for seed, text in ((1, (7, 8, 9)), (2, (20, 21))):
        yield {**prompt(model, images, text), **pixels, "diffusion_input_ids": tiny.prompt_ids(images, seed)}


def lengths_of(model, monkeypatch):
    """The sequence length of every call of the language model."""
    lengths, forward = [], model.model.language_model.forward

    def counted(*args, **kwargs):
        lengths.append(kwargs["inputs_embeds"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", counted)
    return lengths


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("given", ["pixels", "encodings"])
def test_logits_equal_a_full_recomputation_and_the_prefix_is_computed_once(model, monkeypatch, images, given):
    prefixes = PrefixCache()
    lengths = lengths_of(model, monkeypatch)
    for inputs in questions(model, images):
        expected = model.generate(**inputs, **GREEDY)
        if given == "encodings":
            names = ("pixel_values", "diffusion_pixel_values")
            inputs["image_encodings"] = model.encode_images(*(inputs.pop(name) for name in names))
        lengths.clear()
        found = model.generate(**inputs, **GREEDY, prefix_cache=prefixes)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.allclose(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-5)
        total, prefix = inputs["input_ids"].shape[1], 2 + 16
        assert lengths == ([] if prefixes.hits else [prefix]) + [total - prefix] + [1] * 4
    assert prefixes.hits == 1


def test_another_image_or_another_text_before_it_is_another_prefix(model):
    prefixes = PrefixCache(size=2)
    inputs = next(questions(model))
    other_image = {**inputs, **{name: x for name, x in tiny.image_inputs(1, seed=5).items() if "pixel" in name}}
    other_text = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other_text["input_ids"][0, 1] = 6
    for each in (inputs, other_image, other_text):
        found = model.generate(**each, **GREEDY, prefix_cache=prefixes)
        assert torch.allclose(found.logits[0], model.generate(**each, **GREEDY).logits[0], atol=1e-5)
    assert (prefixes.hits, len(prefixes)) == (0, 2)
    prefixes.clear()
    assert len(prefixes) == 0


def test_calls_that_cannot_continue_a_prefix_answer_as_without(model):
    prefixes = PrefixCache()
    inputs = next(questions(model))
    expected = model.generate(**inputs, **GREEDY).sequences
    for options in ({"cache_implementation": "static"}, {"use_cache": False}):
        found = model.generate(**inputs, **GREEDY, **options, prefix_cache=prefixes)
        assert torch.equal(found.sequences, expected)
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    found = model.generate(**inputs, **beams, prefix_cache=prefixes)
    assert torch.equal(found.sequences, model.generate(**inputs, **beams).sequences)
    batch = {name: torch.cat([x, x]) for name, x in inputs.items()}
    assert torch.equal(model.generate(**batch, **GREEDY, prefix_cache=prefixes).sequences[1:], expected)
    other = SDLlavaForConditionalGeneration(tiny.config()).eval()
    ids = {**prompt(other), **tiny.image_inputs(1)}
    other.generate(**ids, **GREEDY, prefix_cache=prefixes)
    assert len(prefixes) == 0


def test_only_concat_tokens_has_tokens_that_are_equal_for_every_question():
    assert tiny.config(fusion="concat_tokens").question_independent_tokens == 16
    assert tiny.config().question_independent_tokens == 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, True),
        ({"diffusion": None}, False),
        ({"diffusion_fields": {"conditioning": "none"}}, False),
        ({"diffusion_fields": {"guidance_scales": [0]}}, False),
    ],
)
def test_whether_image_features_depend_on_the_question(config, expected):
    assert tiny.config(**config).depends_on_question is expected
