"""vLLM serves the models with the answers of `generate`. `make test-vllm` runs it in an environment of its own."""

import base64
import io
import os

import pytest
import torch

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor, mini_path
from sdllava.scenes.language import sample_question
from sdllava.scenes.render import render

vllm = pytest.importorskip("vllm", reason="the extra vllm is not installed")
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

NEW_TOKENS = 8
SAMPLING = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS)


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def for_vllm(messages):
    """Messages of transformers' format in OpenAI's."""

    def part(block):
        if block["type"] == "text":
            return block
        return {"type": "image_url", "image_url": {"url": data_url(block["image"])}}

    return [{**message, "content": [part(block) for block in message["content"]]} for message in messages]


def user(*content):
    blocks = [
        {"type": "text", "text": block} if isinstance(block, str) else {"type": "image", "image": block}
        for block in content
    ]
    return {"role": "user", "content": blocks}


class Reference:
    """`generate` in transformers."""

    def __init__(self, path):
        self.model = SDLlavaForConditionalGeneration.from_pretrained(path).eval()
        self.processor = SDLlavaProcessor.from_pretrained(path)

    def tokens(self, messages, **kwargs):
        """The tokens of the prompt and of the answer."""
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
        )
        output = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        length = inputs["input_ids"].shape[1]
        return output[0, :length].tolist(), output[0, length:].tolist()


def engine(path, **options):
    return vllm.LLM(
        str(path), enforce_eager=True, dtype="float32", max_model_len=512, limit_mm_per_prompt={"image": 2}, **options
    )


def ask(llm, conversations, **kwargs):
    """Tokens of each prompt and answer; one call, so that requests are batched."""
    outputs = llm.chat([for_vllm(messages) for messages in conversations], SAMPLING, use_tqdm=False, **kwargs)
    return [(list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs]


@pytest.fixture(scope="module")
def miniature():
    return Reference(mini_path())


@pytest.fixture(scope="module")
def served():
    return engine(mini_path())


def scenes(count):
    for seed in range(count):
        scene, question = sample_question("test", seed)
        yield render(scene), question.text


def encodings_counted(llm, monkeypatch):
    """The number of images of each call of `encode_images` in the engine."""
    counts = []

    def count(model):
        encode = model.image_model.encode_images

        def counted(pixel_values, diffusion_pixel_values):
            counts.append(len(pixel_values))
            return encode(pixel_values, diffusion_pixel_values)

        monkeypatch.setattr(model.image_model, "encode_images", counted)

    llm.apply_model(count)
    return counts


def test_a_batch_of_questions_has_the_answers_of_generate(served, miniature):
    conversations = [[user(image, question)] for image, question in scenes(20)]
    assert ask(served, conversations) == [miniature.tokens(messages) for messages in conversations]


def test_questions_about_one_image_do_not_share_features_but_its_encodings(served, miniature, monkeypatch):
    counts = encodings_counted(served, monkeypatch)
    images, questions = zip(*scenes(23), strict=True)
    conversations = [[user(image, question)] for image in images[20:] for question in questions[:7]]
    assert ask(served, conversations) == [miniature.tokens(messages) for messages in conversations]
    assert sum(counts) == 3
    assert ask(served, conversations[:1]) == [miniature.tokens(conversations[0])]


def test_several_images_and_turns_have_the_question_of_the_chat_template(served, miniature):
    (first, one), (second, two) = scenes(2)
    answered = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    conversations = [
        [user(first, second, one)],
        [user(first, one), answered, user(two)],
        [user(first, one), answered, user(second, two)],
        [user(one, first, " Answer the question using a single word or phrase.")],
    ]
    assert ask(served, conversations) == [miniature.tokens(messages) for messages in conversations]


@pytest.mark.parametrize("question", ["How many objects are there?", ""])
def test_a_given_question_conditions_the_diffusion_model(served, miniature, question):
    (image, text), *_ = scenes(1)
    found = ask(served, [[user(image, text)]], mm_processor_kwargs={"question": question})
    assert found == [miniature.tokens([user(image, text)], question=question)]


def test_prompts_of_tokens_are_decoded_for_their_question(served, miniature):
    for image, question in scenes(4):
        prompt, answer = miniature.tokens([user(image, question)])
        config = miniature.model.config
        start = prompt.index(config.image_token_id)
        ids = prompt[: start + 1] + prompt[start + config.num_image_tokens :]
        (output,) = served.generate(
            {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}, SAMPLING, use_tqdm=False
        )
        assert list(output.outputs[0].token_ids) == answer


def test_a_wrong_number_of_questions_raises(served):
    (image, text), *_ = scenes(1)
    with pytest.raises(ValueError, match=r"There are 2 question\(s\) for 1 image"):
        ask(served, [[user(image, text)]], mm_processor_kwargs={"question": ["a", "b"]})


NEW_PARTS = ("model.fusion.", "model.multi_modal_projector.")


def save_variant(folder, new_parts=NEW_PARTS, **fields):
    """The miniature with other fields of its configuration, and new weights in some parts."""
    source = SDLlavaForConditionalGeneration.from_pretrained(mini_path())
    config = type(source.config).from_dict({**source.config.to_dict(), **fields})
    torch.manual_seed(0)
    model = SDLlavaForConditionalGeneration(config)
    model.load_state_dict({k: x for k, x in source.state_dict().items() if not k.startswith(new_parts)}, strict=False)
    model.save_pretrained(folder)
    processor = SDLlavaProcessor.from_pretrained(mini_path())
    processor.num_image_tokens = config.num_image_tokens
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_language_models_of_other_families(tmp_path, family):
    text_config = {
        "model_type": family, "vocab_size": 94, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.2, "sliding_window": None,
    }  # fmt: skip
    new_parts = (*NEW_PARTS, "model.language_model.", "lm_head.")
    path = save_variant(tmp_path, new_parts, text_config=text_config, tie_word_embeddings=False)
    reference = Reference(path)
    conversations = [[user(image, question)] for image, question in scenes(6)]
    assert ask(engine(path), conversations) == [reference.tokens(messages) for messages in conversations]


@pytest.fixture(scope="module")
def concat_tokens(tmp_path_factory):
    """The miniature with a new fusion and projector, whose vision tokens come first."""
    folder = tmp_path_factory.mktemp("concat-tokens")
    return save_variant(folder, fusion="concat_tokens", spatial_merge_size=1)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_follow_up_question_reuses_the_vision_tokens(concat_tokens, monkeypatch, prefix_caching):
    llm = engine(concat_tokens, enable_prefix_caching=prefix_caching, block_size=32)
    reference = Reference(concat_tokens)
    counts = encodings_counted(llm, monkeypatch)
    (image, first), (other, second), (_, third) = scenes(3)
    conversations = [[user(image, first)], [user(image, second)], [user(other, first)], [user(image, other, third)]]
    cached = []
    for messages in conversations:
        (output,) = llm.chat(for_vllm(messages), SAMPLING, use_tqdm=False)
        assert (list(output.prompt_token_ids), list(output.outputs[0].token_ids)) == reference.tokens(messages)
        cached.append(output.num_cached_tokens)
    assert cached == ([0, 64, 0, 64] if prefix_caching else [0, 0, 0, 0])
    assert sum(counts) == 2


def test_parts_have_their_own_dtypes_and_caches_are_bounded(tmp_path):
    """The encoders' is the checkpoint's, the VAE is in float32, the language model's is vLLM's."""
    SDLlavaForConditionalGeneration.from_pretrained(mini_path(), dtype=torch.bfloat16).save_pretrained(tmp_path)
    SDLlavaProcessor.from_pretrained(mini_path()).save_pretrained(tmp_path)
    llm = engine(tmp_path)

    def dtypes(model):
        tower, language_model = model.image_model.diffusion_tower, model.language_model
        parts = (tower.vae, tower.unet, model.image_model.vision_tower, model.image_model.fusion, language_model)
        return [next(part.parameters()).dtype for part in parts]

    assert llm.apply_model(dtypes) == [[torch.float32, *[torch.bfloat16] * 3, torch.float32]]

    def kept(model):
        model._kept.size = min(model._kept.size, 2)
        return len(model._kept)

    llm.apply_model(kept)
    for image, question in scenes(4):
        assert ask(llm, [[user(image, question)]])[0][1]
    assert llm.apply_model(kept) == [2]
