"""`pipeline("visual-question-answering")` as transformers 4 had it, and `pipeline("image-text-to-text")`."""

import base64
import io
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import sdllava
from sdllava.pipeline import NUM_KEPT_IMAGES

sdllava.register()


def picture(seed: int = 0) -> Image.Image:
    colour = torch.randint(0, 255, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    image = Image.new("RGB", (30, 20), tuple(colour))
    image.putpixel((seed % 30, 3), (255, 255, 255))
    return image


@pytest.fixture(scope="module")
def vqa(composed):
    return pipeline("visual-question-answering", model=str(composed), max_new_tokens=4)


def same(first, second) -> bool:
    return [a["answer"] for a in first] == [a["answer"] for a in second] and first[0]["score"] == pytest.approx(
        second[0]["score"], abs=1e-5
    )


def test_every_way_to_give_an_image(vqa, tmp_path):
    picture().save(tmp_path / "p.png")
    expected = vqa(image=picture(), question="What?")
    assert set(expected[0]) == {"answer", "score"}
    assert 0 < expected[0]["score"] < 1
    text = base64.b64encode((tmp_path / "p.png").read_bytes()).decode()
    for way in (str(tmp_path / "p.png"), tmp_path / "p.png", text):
        assert same(vqa(image=way, question="What?"), expected)
    assert same(vqa({"image": picture(), "question": "What?"}), expected)


def test_lists_batches_and_datasets_answer_as_one_by_one(vqa):
    pairs = [(picture(i), q) for i in range(3) for q in ("What?", "Where is the dog?")]
    expected = [vqa(image=image, question=q) for image, q in pairs]
    records = [{"image": image, "question": q} for image, q in pairs]
    for batch_size in (1, 4):
        results = vqa(records, batch_size=batch_size)
        assert all(same(a, b) for a, b in zip(results, expected, strict=True))
    results = list(vqa(record for record in records))
    assert all(same(a, b) for a, b in zip(results, expected, strict=True))
    images = KeyDataset([{"image": picture(i)} for i in range(3)], "image")
    results = list(vqa(image=images, question="What?"))
    assert all(same(a, b) for a, b in zip(results, expected[::2], strict=True))
    crossed = vqa(image=[picture(0), picture(1)], question=["What?", "Where is the dog?"])
    assert all(same(a, b) for a, b in zip(crossed, [expected[0], expected[2], expected[1], expected[3]], strict=True))


def test_top_k_gives_that_many_answers_best_first(vqa):
    answers = vqa(image=picture(), question="What?", top_k=3)
    scores = [answer["score"] for answer in answers]
    assert len(answers) == 3
    assert scores == sorted(scores, reverse=True)
    batched = vqa([{"image": picture(), "question": "What?"}] * 2, top_k=3, batch_size=2)
    assert [len(a) for a in batched] == [3, 3]
    assert same(batched[1], answers)


def test_the_score_is_the_mean_probability_of_the_answers_tokens(vqa):
    inputs = vqa._model_inputs([picture()], ["What?"])
    output = vqa.model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
        output_logits=True)  # fmt: skip
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    probabilities = [step[0].softmax(-1)[token].item() for step, token in zip(output.logits, tokens, strict=False)]
    said = [p for p, token in zip(probabilities, tokens, strict=False) if token not in vqa.tokenizer.all_special_ids]
    assert vqa(image=picture(), question="What?")[0]["score"] == pytest.approx(sum(said) / len(said), abs=1e-6)


def test_a_follow_up_question_costs_one_conditional_pass(vqa):
    counted = []
    tower = vqa.model.model.diffusion_tower
    hook = tower.unet.conv_in.register_forward_pre_hook(lambda module, args: counted.append(len(args[0])))
    vqa(image=picture(91), question="What?")
    vqa(image=picture(91), question="Where?")
    hook.remove()
    assert counted == [1, 1, 1]  # unconditional and conditional, then conditional alone
    for i in range(100, 103 + NUM_KEPT_IMAGES):
        vqa(image=picture(i), question="What?")
    assert len(vqa._kept) == NUM_KEPT_IMAGES


def test_one_pipeline_in_8_threads_gives_what_it_gives_alone(vqa):
    images = [picture(seed) for seed in range(NUM_KEPT_IMAGES + 2)]
    calls = [[{"image": images[i], "question": "What?"}, {"image": images[i - 4], "question": "Where is the dog?"}]
             for i in range(len(images))]  # fmt: skip
    alone = [vqa(call, batch_size=2) for call in calls]
    order = [(7 * turn) % len(calls) for turn in range(len(calls))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns often
    try:
        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(lambda number: vqa(calls[number], batch_size=2), order))
    finally:
        sys.setswitchinterval(interval)
    for found, number in zip(together, order, strict=True):
        assert all(same(a, b) for a, b in zip(found, alone[number], strict=True))
    assert len(vqa._kept) <= NUM_KEPT_IMAGES


def test_a_saved_pipeline_answers_as_before(vqa, tmp_path):
    vqa.save_pretrained(tmp_path)
    loaded = pipeline("visual-question-answering", model=str(tmp_path), max_new_tokens=4)
    assert same(loaded(image=picture(), question="What?"), vqa(image=picture(), question="What?"))


@pytest.mark.parametrize("options", [{"generation_config": GenerationConfig(max_new_tokens=1)}, {"max_length": 200}])
def test_arguments_of_generate_replace_the_defaults(composed, options):
    vqa = pipeline("visual-question-answering", model=str(composed))
    given = []
    generate = vqa.model.generate
    vqa.model.generate = lambda **kwargs: given.append(kwargs) or generate(**kwargs)
    vqa(image=picture(), question="What?", **options)
    assert "max_new_tokens" not in given[0]


def test_encodings_follow_the_configuration(vqa):
    config = vqa.model.config.diffusion_config
    before = config.noise_seed, config.guidance_scales
    vqa(image=picture(), question="What?")
    try:
        config.noise_seed, config.guidance_scales = 7, [0.5]
        found = vqa([{"image": picture(seed), "question": "What?"} for seed in (0, 200)], batch_size=2)
        fresh = pipeline("visual-question-answering", model=vqa.model, processor=vqa.processor, max_new_tokens=4)
        assert same(found[0], fresh(image=picture(), question="What?"))
    finally:
        config.noise_seed, config.guidance_scales = before


def test_guidance_can_be_chosen(vqa):
    free = vqa(image=picture(), question="What?", guidance_scales=[0.0])
    other = vqa(image=picture(), question="Where is it?", guidance_scales=[0.0])
    assert free[0]["score"] != vqa(image=picture(), question="What?")[0]["score"]
    assert len(other) == 1


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"question": ""}, ValueError, "Question '' is empty"),
        ({"question": "  "}, ValueError, "Question '  ' is empty"),
        ({"question": 5}, TypeError, "Question 5 is not a string"),
        ({"question": "What?", "top_k": 0}, ValueError, "top_k=0 is not a number of answers. Use at least 1"),
        ({}, ValueError, "Give image= and question="),
        ({"question": "What \udcff?"}, ValueError, "has a surrogate, which is not a character"),
        ({"question": "What?", "guidance_scales": [float("nan")]}, ValueError, "has a value that is not finite"),
    ],
)
def test_bad_input_raises(vqa, inputs, error, message):
    with pytest.raises(error, match=message):
        vqa(image=picture(), **inputs)


def test_no_images_or_questions_have_no_answers(vqa):
    assert vqa(image=[], question="What?") == vqa(image=picture(), question=[]) == vqa(image=[]) == []


def test_image_text_to_text(composed, tmp_path):
    picture().save(tmp_path / "p.png")
    chat = pipeline("image-text-to-text", model=str(composed))
    content = [{"type": "image", "path": str(tmp_path / "p.png")}, {"type": "text", "text": "What?"}]
    (result,) = chat(text=[{"role": "user", "content": content}], max_new_tokens=4)
    assert result["generated_text"][-1]["role"] == "assistant"


def test_a_photograph_through_every_part(vqa, photographs):
    (answer,) = vqa(image=str(photographs / "dog.jpg"), question="Is the dog facing left?")
    assert isinstance(answer["answer"], str)
    assert 0 < answer["score"] < 1
    buffer = io.BytesIO()
    Image.open(photographs / "horse.png").save(buffer, "PNG")
    assert len(vqa(image=base64.b64encode(buffer.getvalue()).decode(), question="What is this?")) == 1
