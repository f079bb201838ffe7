"""The performance scripts: their counts are right, their models have the published sizes, and each script that needs no
real weights runs at its small size."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdllava import SDLlavaDiffusionModel


@pytest.fixture(autouse=True)
def perf_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "perf"))


def rows_of(path):
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


@pytest.mark.parametrize(("model", "count"), [("sd15", 859_520_964), ("sd21", 865_910_724), ("sdxl", 2_567_463_684)])
def test_models_have_the_published_sizes(model, count):
    import models

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(models.diffusion_config(model, "full").unet_config))
    assert sum(p.numel() for p in unet.parameters()) == count


@pytest.mark.parametrize(
    ("model", "count", "published"),
    [("if-m", 371_605_830, 400e6), ("if-l", 935_365_830, 900e6), ("if-xl", 4_304_695_110, 4.3e9)],
)
def test_deepfloyd_if_has_about_the_published_parameters(model, count, published):
    """Its repositories are gated; their cards give rounded numbers."""
    import families

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(families.FAMILIES[model]["unet_config"])
    assert sum(p.numel() for p in unet.parameters()) == count
    assert count == pytest.approx(published, rel=0.08)


def test_operations_and_time_of_a_family(monkeypatch, tmp_path):
    """Counts on the meta device are those of the timed calls, which have weights."""
    import families
    import tiny_families

    config = tiny_families.diffusion_config("sd3", taps=["T-B1-Norm"]).to_dict()
    parts = {name: config[name] for name in config if name.endswith("_config") or name.startswith("null_input")}
    parts["transformer_config"]["num_layers"] = 3
    monkeypatch.setattr(families, "FAMILIES", {"sd3-medium": {**parts, "image_size": 64}})
    whole, to_tap, text, image, kept = families.operations("sd3-medium", "T-B1-Norm")
    assert 0 < to_tap < whole
    monkeypatch.setattr("measure.Bench.matrix_peak", lambda self: 1.0)
    families.main(["sd3-medium"], "T-B1-Norm", True, True, "cpu", "float32", 1, tmp_path / "out.json")
    rows = {name: row["gflop"] / 1e3 for name, row in rows_of(tmp_path / "out.json").items()}
    calls = ("one prompt", "one image", "whole pass", "pass to the tap")
    assert rows == pytest.approx(
        dict(zip([f"sd3-medium, {call}" for call in calls], (text, image, whole, to_tap), strict=True))
    )
    with torch.device("meta"):
        cut = SDLlavaDiffusionModel(families.tower_config("sd3-medium", "T-B1-Norm"))
    assert kept == sum(p.numel() for p in cut.unet.parameters()) / 1e9
    with pytest.raises(SystemExit, match=r"--model 'sd4' is not supported\. Use sd3-medium"):
        families.main(["sd4"])


def test_operations_of_products_and_of_fused_attention_are_counted():
    from measure import count_gflop

    x, q = torch.randn(20, 30), torch.randn(2, 3, 50, 8)
    assert count_gflop(lambda: x @ x.T)[0] == pytest.approx(2 * 20 * 30 * 20 / 1e9)
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        assert count_gflop(lambda: attend(q, q, q))[0] == pytest.approx(4 * 2 * 3 * 50 * 50 * 8 / 1e9)


def test_rounds_alternate_and_the_report_has_every_row(tmp_path, capsys):
    from measure import Bench

    bench = Bench("products", "mini", "cpu", "float32", 3, tmp_path / "out" / "out.json", batch=2)
    calls = []
    x = torch.randn(20, 30)
    rows = bench.time({"slow": lambda: calls.append("slow"), "fast": lambda: (calls.append("fast"), x @ x.T)})
    assert calls == ["slow", "fast"] * 4
    rows["slow"].seconds, rows["fast"].seconds = [8.0, 9.0, 1.0], [3.0, 4.0, 5.0]
    rows["fast"].per_call = 2
    bench.remark("both are products")
    bench.report()
    found = json.loads((tmp_path / "out" / "out.json").read_text())
    assert [row["median"] for row in found["rows"]] == [8.0, 4.0]
    assert [row["reference"] for row in found["rows"]] == ["slow", "slow"]
    assert found["rows"][1]["gflop"] == pytest.approx(2 * 20 * 30 * 20 / 1e9)
    assert found["remarks"] == ["both are products"]
    assert found["settings"] == {"size": "mini", "device": "cpu", "dtype": "float32", "repeats": 3, "batch": 2}
    assert found["matrix_peak_gflops"] > 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(" fast"))
    assert line.split()[1:3] == ["4", "2.00x"]
    assert line.split()[-1] == "2"


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cuda", "float32", "--device 'cuda' needs a CUDA GPU, and torch finds none. Use --device cpu."),
        ("cpu", "float12", "--dtype 'float12' is not supported. Use float32, bfloat16 or float16."),
    ],
)
def test_a_missing_device_or_dtype_is_reported(device, dtype, message, monkeypatch):
    import features

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message):
        features.main(device=device, dtype=dtype)


def test_unknown_models_and_stages_are_reported():
    import models
    import training

    with pytest.raises(SystemExit, match=r"--model 'sd3' is not supported. Use sd15, sd21, sdxl."):
        models.diffusion_config("sd3", "mini")
    with pytest.raises(SystemExit, match=r"--stage 'tune' is not a stage. Use align or finetune."):
        training.main(["align", "tune"], size="mini")


def test_batch_sizes_double_up_to_the_largest():
    from measure import batches

    assert batches(None, 32) == [1, 2, 4, 8, 16, 32]
    assert batches(None, 5) == [1, 2, 4]
    assert batches([3], 32) == [3]


@pytest.fixture(scope="module")
def subject():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "perf"))
        import features

        return features.Subject("sd21", "mini", torch.device("cpu"), torch.float32, batch=1)


@pytest.mark.slow
def test_features_are_those_of_stock_diffusers_with_fewer_operations(subject):
    import features
    from measure import count_gflop, difference, tokens_on_grid

    with torch.inference_mode():
        counted = {name: count_gflop(call) for name, call in features.question_calls(subject).items()}
        gflop = {name: operations for name, (operations, _) in counted.items()}
        whole, ours, cached, follow_up = gflop
        expected = tokens_on_grid(counted[whole][1], subject.ours.config.grid_size)
    assert float(difference(counted[ours][1], expected).split()[-1]) < 1e-4  # s = 4 amplifies rounding errors
    assert gflop[follow_up] < gflop[ours] < gflop[whole]
    assert gflop[follow_up] < 0.6 * gflop[cached]


def test_the_small_map_lever_compares_a_unet_that_was_never_converted(subject):
    import features

    plain = subject.plain_copy()
    assert {type(m) for m in plain.backbone.unet.modules() if isinstance(m, torch.nn.Conv2d)} == {torch.nn.Conv2d}
    prompts = features.prompts_of(subject, halves=1)
    with torch.inference_mode():
        expected, found = (tower.extract(subject.latents, prompts) for tower in (plain, subject.ours))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_all_parts_of_features_agree_with_stock_diffusers(tmp_path):
    import features

    parts = [features.Part.guided, features.Part.question, features.Part.exact, features.Part.levers]
    features.main("sd21", parts, [2], "mini", "cpu", "float32", 1, tmp_path / "out.json")
    rows = rows_of(tmp_path / "out.json")
    gflop = {name: row["gflop"] for name, row in rows.items()}
    assert gflop["UNet, both halves, ours, batch 2"] < 0.6 * gflop["UNet, both halves, whole with a hook, batch 2"]
    plain, multiplied = "torch's convolutions", "small maps multiplied"
    assert gflop[f"UNet, to the tap, {plain}, batch 2"] == gflop[f"UNet, to the tap, {multiplied}, batch 2"]
    assert gflop["follow-up question, ours, batch 2"] < gflop["first question, ours, batch 2"]
    assert float(rows["first question, ours, batch 2"]["note"].split()[-1]) < 1e-4
    stock, ours = (float(remark.split()[-3]) for remark in json.loads((tmp_path / "out.json").read_text())["remarks"])
    assert 0 < ours < 2 * stock < 1e-4  # from float64
    assert all(len(row["seconds"]) == 1 for row in rows.values())


@pytest.mark.slow
def test_growth_costs_what_it_computes(tmp_path, monkeypatch):
    import growth

    monkeypatch.setattr(growth, "COUNTS", (1, 2))
    growth.main("sd21", None, "mini", "cpu", "float32", 1, tmp_path / "out.json")
    rows = rows_of(tmp_path / "out.json")
    gflop = {name: row["gflop"] for name, row in rows.items()}
    assert gflop["2 image(s) per batch"] == pytest.approx(2 * gflop["1 image(s) per batch"], rel=1e-3)
    assert rows["2 image(s) per batch"]["reference"] == "1 image(s) per batch"
    assert gflop["2 tap(s)"] == gflop["1 tap(s)"]
    assert gflop["2 scale(s)"] == gflop["1 scale(s)"]
    assert gflop["1 timestep(s)"] < gflop["2 timestep(s)"] < 2 * gflop["1 timestep(s)"]
    one, two = (gflop[f"{n} image(s) per conversation, to the first token"] for n in (1, 2))
    assert 1.9 * one < two


@pytest.mark.slow
def test_a_follow_up_question_costs_what_its_own_tokens_cost(tmp_path):
    import follow_up
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    follow_up.main(str(tmp_path / "llm"), "mini", "cpu", "float32", 1, tmp_path / "out.json")
    first, whole, continued = rows_of(tmp_path / "out.json").values()
    assert continued["gflop"] < 0.35 * first["gflop"] < whole["gflop"]
    assert float(continued["note"].split()[-1]) < 1e-4


def test_tied_layers_share_weights_but_not_their_key_value_caches():
    import models

    tied, plain = (models.build_llava("mini", torch.device("cpu"), torch.float32, tie) for tie in (True, False))
    layers = tied.model.language_model.layers
    assert len(layers) == tied.config.text_config.num_hidden_layers == 4
    assert len({id(p) for p in layers.parameters()}) == len(list(layers[0].parameters()))
    plain.load_state_dict(tied.state_dict())
    ids = torch.randint(3, 2000, (2, 9))
    found, expected = (
        model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for model in (tied, plain)
    )
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_answering_decodes_at_the_same_operations_as_llava(tmp_path):
    import answering

    answering.main([1], 4, True, "mini", "cpu", "float32", 1, tmp_path / "out.json")
    rows = rows_of(tmp_path / "out.json")
    first = {name.removeprefix("first token, "): row["gflop"] for name, row in rows.items() if "first token" in name}
    clip_only, question = first["ours, CLIP only, batch 1"], first["ours, first question, batch 1"]
    assert first["transformers' LLaVA, batch 1"] == pytest.approx(clip_only, rel=1e-3)
    assert clip_only < question
    cached, follow_up = first["ours, CLIP only, cached, batch 1"], first["ours, follow-up question, batch 1"]
    assert cached < clip_only < follow_up < question
    decoding = [row["gflop"] for name, row in rows.items() if name.startswith("decoding")]
    assert len(decoding) == 5
    assert decoding == pytest.approx([decoding[0]] * 5, rel=1e-3)


def test_conversations_hold_the_image_tokens_in_one_piece():
    import answering
    import models

    config = models.model_config("mini")
    inputs = answering.text_inputs(config, 7, 2, torch.device("cpu"))
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, answering.QUESTION_TOKENS + 7)
    places = (inputs["input_ids"] == config.image_token_index).nonzero()
    assert places.tolist() == [[row, place] for row in range(2) for place in range(8, 15)]


@pytest.mark.slow
def test_preparing_ahead_gives_the_same_replies(tmp_path):
    import preprocessing

    preprocessing.main("mini", 2, 5, "cpu", "auto", 1, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["rows"][1]["note"] == "the same replies"
    assert found["clock"] == "seconds"


@pytest.mark.slow
def test_operations_and_memory_need_no_weights(tmp_path, capsys, monkeypatch):
    import memory
    import operations

    monkeypatch.setattr(operations, "PAPER_RATES", {"finetune": 4.6})
    operations.main("mini", ["sd21"])
    memory.main(False, "mini", "cpu", "float32", tmp_path / "memory.json")
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("sd21", "first question", "finetune", "language model"))
    gib = json.loads((tmp_path / "memory.json").read_text())["gib"]
    for column in gib.values():
        total = column.pop("total")
        assert total == pytest.approx(sum(column.values()))
    assert gib["4-bit language model"]["language_model"] < gib["bfloat16"]["language_model"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_training_leaves_frozen_parts_without_gradient_and_optimizer_state(tmp_path):
    import training

    training.main(None, 2, 1, None, "mini", "cpu", "float32", 1, tmp_path / "out.json")
    ways = ["align, batches of 2", "finetune, batches of 2"]
    assert list(rows_of(tmp_path / "out.json")) == [name for way in ways for name in (way, f"{way} by length")]
    align, finetune = json.loads((tmp_path / "out.json").read_text())["remarks"]
    assert align.startswith("align, batches of 2: estimated memory 0.0")
    assert finetune.startswith("finetune, batches of 2: estimated memory 0.1")


def test_frozen_weights_with_a_gradient_are_reported():
    import training

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[1].parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert training.check_frozen(model, optimizer).startswith("moments 0.00 GiB")
    model[0].weight.grad = torch.zeros(4, 4)
    with pytest.raises(SystemExit, match="A frozen weight has a gradient or optimizer state"):
        training.check_frozen(model, optimizer)


def test_text_lengths_follow_the_assumed_or_the_counted_distribution(tmp_path):
    import training

    lengths = training.text_lengths("finetune", 100, None)
    assert lengths == sorted(lengths)
    assert abs(lengths[50] - 220) < 10
    assert lengths[-1] <= training.LONGEST_TEXT
    (tmp_path / "lengths.txt").write_text("30\n10\n20\n9999\n")
    assert training.text_lengths("align", 4, tmp_path / "lengths.txt") == [10, 20, 30, training.LONGEST_TEXT]


def test_the_language_model_has_vicunas_size():
    import memory
    import models

    small = {"vision_config": models.vision_config("mini"), "diffusion_config": models.diffusion_config("sd21", "mini")}
    held = memory.part_bytes(models.model_config("full", **small), torch.bfloat16)
    assert held["language_model"] == 2 * 6_607_605_760
    assert held["cache of 1024 tokens"] == 2 * 2 * 32 * 32 * 128 * 1024


@pytest.mark.slow
def test_the_papers_model_fits_small_gpus():
    import memory
    import models

    config, dtype = models.model_config("full"), torch.bfloat16
    whole, quantized = (memory.part_bytes(config, dtype, four_bit) for four_bit in (False, True))
    results = memory.peak_results(config, dtype)
    assert sum(whole.values()) + results < 24e9
    assert sum(quantized.values()) + results < 12e9


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tap"), [("sd3-medium", None), ("flux-dev", "T-B18-Out")])
def test_a_first_question_fits_24_gb(model, tap):
    """In bfloat16, with T5 and the language model in 4 bits; FLUX does not with the 10 blocks after T-B18."""
    import families

    assert sum(families.first_question(model, tap).values()) * 2**30 < 24e9


@pytest.mark.slow
def test_a_4_bit_language_model_has_the_computed_size():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
    import answering
    import memory

    dtype = torch.bfloat16
    subjects = answering.Subjects("mini", torch.device("cpu"), dtype)
    language_model = subjects.ours.model.language_model
    expected = memory.part_bytes(subjects.ours.config, dtype, four_bit=True)["language_model"]
    memory.quantize(language_model, dtype)
    states = [p.quant_state.absmax for p in language_model.parameters() if hasattr(p, "quant_state")]
    held = sum(x.numel() * x.itemsize for x in [*language_model.parameters(), *states])
    assert len(states) == 7 * 4
    assert held == pytest.approx(expected, rel=1e-3)
    with torch.inference_mode():
        model, inputs = subjects.ways(1)["ours, first question"]
        assert answering.generation(model, inputs, 4)().shape[1] == inputs["input_ids"].shape[1] + 4
