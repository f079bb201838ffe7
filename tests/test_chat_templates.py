"""Generation markers in the chat templates of language models, found by rendering the published templates."""

import random
from importlib.resources import files
from types import SimpleNamespace

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from sdllava.chat_templates import (
    FLATTEN_IMAGES,
    GENERATION,
    VICUNA_V1_5,
    chat_template_for,
    mark_answers,
    training_template,
    user_turn_markers,
)
from sdllava.questions import questions_in_messages, questions_in_text

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATION = [
    {"role": "user", "content": "What is in {it}?"},
    {"role": "assistant", "content": 'It\'s a \\ "cup".\nTwo, in fact.'},
    {"role": "user", "content": "And the colour?"},
    {"role": "assistant", "content": "Red"},
]
ANSWERS = [CONVERSATION[1]["content"], "Red"]


def published(name: str) -> str:
    """A template as its model was published, from the copies in TRL."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def render(template: str, messages, **options):
    rendered, spans = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **SPECIAL, **options
    )
    return rendered[0], [rendered[0][start:end] for start, end in spans[0]]


TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "mistral": (MISTRAL, "</s>"),
    **dict.fromkeys(("llama3", "llama3_1", "llama3_2"), (None, "<|eot_id|>")),
    **dict.fromkeys(("gemma", "gemma3"), (None, "<end_of_turn>")),
    **dict.fromkeys(("qwen2_5", "qwen3_instruct_2507", "lfm2"), (None, "<|im_end|>")),
    **dict.fromkeys(("phi3", "phi3_5"), (None, "<|end|>")),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_end_tokens_are_marked_and_the_text_stays(name):
    template, end = TEMPLATES[name]
    template = template or published(name)
    marked = mark_answers(template, SPECIAL)
    text, answers = render(marked, CONVERSATION)
    assert answers == [answer + end for answer in ANSWERS]
    assert text == render(template, CONVERSATION)[0]
    for count in (1, 3):
        options = {"add_generation_prompt": True}
        expected, _ = render(template, CONVERSATION[:count], **options)
        assert render(marked, CONVERSATION[:count], **options) == (expected, [a + end for a in ANSWERS][: count // 2])
    if name not in ("mistral", "gemma"):  # these raise for a system message
        with_system = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
        assert render(marked, with_system)[0] == render(template, with_system)[0]


def test_the_thoughts_of_qwen3_belong_to_the_answer_that_the_model_generates():
    text, answers = render(mark_answers(published("qwen3"), SPECIAL), CONVERSATION)
    assert answers == [f"{ANSWERS[0]}<|im_end|>", "<think>\n\n</think>\n\nRed<|im_end|>"]
    assert text == render(published("qwen3"), CONVERSATION)[0]


@pytest.mark.parametrize("name", ["llama3", "gemma", "qwen2_5", "qwen3_instruct_2507"])
def test_the_markers_agree_with_those_that_trl_wrote_by_hand(name):
    _, ours = render(mark_answers(published(name), SPECIAL), CONVERSATION)
    _, theirs = render(published(f"{name}_training"), CONVERSATION)
    assert [answer.strip() for answer in ours] == [answer.strip() for answer in theirs]


def test_images_are_placed_and_answers_marked():
    template = chat_template_for(CHATML, "<image>", SPECIAL, "lm")
    content = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
    text, answers = render(template, [{"role": "user", "content": content}, CONVERSATION[3]])
    assert text.startswith("<|im_start|>user\n<image>\nWhich colour?<|im_end|>\n<|im_start|>assistant\nRed<|im_end|>")
    assert answers == ["Red<|im_end|>"]


def test_templates_with_markers_and_missing_templates_are_not_changed():
    assert mark_answers(VICUNA_V1_5, SPECIAL) == VICUNA_V1_5
    assert chat_template_for(None, "<image>", SPECIAL, "lm") == VICUNA_V1_5
    marked = published("qwen2_5_training")
    assert GENERATION.search(marked)
    assert chat_template_for(marked, "<image>", SPECIAL, "lm") == FLATTEN_IMAGES + marked


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m['content'] }} {% endfor %}", "no text before answers"),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}", "no text before answers"),
        (
            "{% for m in messages %}A: {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}A: {% endif %}",
            "after",
        ),
        ("{{ messages[0]['content'] }}", "does not write each message once"),
        ("{{ raise_exception('no chat') }}", "cannot be rendered"),
        ("{% for m in messages %}", "cannot be rendered"),
    ],
)
def test_a_template_without_visible_answers_raises_and_names_the_file(template, reason):
    with pytest.raises(ValueError, match=reason) as error:
        chat_template_for(template, "<image>", SPECIAL, "my/model")
    assert "'my/model'" in str(error.value)
    assert "chat_template.jinja" in str(error.value)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        pytest.param(LLAVA_HF, VICUNA_V1_5, id="answers as parts, without an end token"),
        pytest.param(CHATML, VICUNA_V1_5, id="text only"),
        pytest.param(FLATTEN_IMAGES + CHATML, mark_answers(FLATTEN_IMAGES + CHATML, SPECIAL), id="not marked"),
        pytest.param(VICUNA_V1_5, VICUNA_V1_5, id="marked"),
    ],
)
def test_a_llava_is_trained_with_a_template_that_marks_the_ends_of_answers(template, expected):
    assert training_template(template, "<image>", SPECIAL) == expected


def random_conversation(rng: random.Random, with_system: bool) -> list[dict]:
    """One to three turns of the user, with a text, images, and another text, in blocks."""

    def block(text):
        return {"type": "text", "text": text}

    messages = [{"role": "system", "content": [block("be brief")]}] if with_system else []
    for turn in range(rng.randint(1, 3)):
        before, after = (rng.choices([[], [block(f"{name} {turn}")]], [1, 2])[0] for name in ("what", "which"))
        images = [{"type": "image"}] * rng.randint(0, 2)
        content = [*before, *images, *after] if images else before or [block("so")]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [block("green")]})
    return messages if rng.random() < 0.5 else messages[:-1]


@pytest.mark.parametrize(
    ("name", "takes_system"),
    [
        ("vicuna", True), ("llava-hf", True), ("llama3", True), ("llama3_2", True), ("qwen2_5", True),
        ("qwen3_instruct_2507", True), ("phi3", True), ("lfm2", True), ("gemma", False), ("gemma3", False),
    ],
)  # fmt: skip
def test_a_rendered_prompt_has_the_questions_of_its_conversation(name, takes_system):
    own = {"vicuna": VICUNA_V1_5, "llava-hf": LLAVA_HF}
    template = own.get(name) or chat_template_for(published(name), "<image>", SPECIAL, name)
    tokenizer = SimpleNamespace(special_tokens_map=SPECIAL)
    markers = user_turn_markers(SimpleNamespace(chat_template=template, tokenizer=tokenizer))
    rng = random.Random(0)
    for number in range(60):
        messages = random_conversation(rng, takes_system and number % 3 == 0)
        text = render(template, messages, add_generation_prompt=messages[-1]["role"] == "user")[0]
        found = [" ".join(question.split()) for question in questions_in_text(text, "<image>", markers)]
        assert found == questions_in_messages(messages), text
