"""The benchmarks: what they count is right, their models have the published sizes, and each that needs no
real weights runs at its small size."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "perf"))


@pytest.mark.parametrize(("model", "count"), [("sd15", 859_520_964), ("sd21", 865_910_724), ("sdxl", 2_567_463_684)])
def test_models_have_the_published_sizes(model, count):
    import models

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(models.diffusion_config(model, "full").unet_config))
    assert sum(p.numel() for p in unet.parameters()) == count


def test_operations_of_products_and_of_fused_attention_are_counted():
    from measure import count_gflop

    x, q = torch.randn(20, 30), torch.randn(2, 3, 50, 8)
    assert count_gflop(lambda: x @ x.T)[0] == pytest.approx(2 * 20 * 30 * 20 / 1e9)
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        assert count_gflop(lambda: attend(q, q, q))[0] == pytest.approx(4 * 2 * 3 * 50 * 50 * 8 / 1e9)


def test_features_are_those_of_stock_diffusers_with_fewer_operations(tmp_path):
    import features

    parts = [features.Part.guided, features.Part.question, features.Part.exact, features.Part.levers]
    features.main("sd21", parts, [2], "mini", "cpu", "float32", 1, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    gflop = {name: row["gflop"] for name, row in rows.items()}
    assert gflop["UNet, both halves, ours, batch 2"] < 0.6 * gflop["UNet, both halves, whole with a hook, batch 2"]
    assert gflop["a follow-up question, ours, batch 2"] < gflop["a question, ours, batch 2"]
    assert float(rows["a question, ours, batch 2"]["note"].split()[-1]) < 1e-4  # s = 4 enlarges what rounding does
    stock, ours = (float(remark.split()[-3]) for remark in found["remarks"])
    assert 0 < ours < 2 * stock < 1e-4  # from float64
    assert found["matrix_peak_gflops"] > 0
    assert all(len(row["seconds"]) == 1 for row in rows.values())


def test_growth_costs_what_it_computes(tmp_path):
    import growth

    growth.main("sd21", None, "mini", "cpu", "float32", 1, tmp_path / "out.json")
    gflop = {row["name"]: row["gflop"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert gflop["4 image(s) at once"] == pytest.approx(4 * gflop["1 image(s) at once"], rel=1e-3)
    assert gflop["4 tap(s)"] == gflop["1 tap(s)"]
    assert gflop["4 scale(s)"] == gflop["1 scale(s)"]
    conversation = [gflop[f"{n} image(s) in a conversation, to the first token"] for n in (1, 2, 4)]
    assert 1.9 * conversation[0] < conversation[1]
    assert 1.9 * conversation[1] < conversation[2]
    assert gflop["1 timestep(s)"] < gflop["2 timestep(s)"] < gflop["4 timestep(s)"] < 4 * gflop["1 timestep(s)"]


def test_tied_layers_are_one_layers_weights_and_remember_each_its_own_keys():
    import models

    tied, plain = (models.build_llava("mini", torch.device("cpu"), torch.float32, tie) for tie in (True, False))
    layers = tied.model.language_model.layers
    assert len(layers) == tied.config.text_config.num_hidden_layers == 4
    assert len({id(p) for p in layers.parameters()}) == len(list(layers[0].parameters()))
    plain.load_state_dict(tied.state_dict())  # the same weights four times over
    ids = torch.randint(3, 2000, (2, 9))
    found, expected = (
        model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for model in (tied, plain)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tie_layers", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_answering_decodes_at_the_same_operations_as_llava(tie_layers, tmp_path):
    import answering

    answering.main([1], 4, tie_layers, "mini", "cpu", "float32", 1, tmp_path / "out.json")
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    first = {name.removeprefix("first token, "): row["gflop"] for name, row in rows.items() if "first token" in name}
    alone, question = first["ours, CLIP alone, batch 1"], first["ours, first question, batch 1"]
    assert first["transformers' LLaVA, batch 1"] == pytest.approx(alone, rel=1e-3)
    assert alone < question
    known, follow_up = first["ours, CLIP alone, image known, batch 1"], first["ours, follow-up question, batch 1"]
    assert known < alone < follow_up < question


def test_preparing_ahead_gives_the_same_replies(tmp_path):
    import preprocessing

    preprocessing.main("mini", 2, 5, "cpu", "auto", 1, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["rows"][1]["note"] == "the same replies"
    assert found["clock"] == "seconds"


def test_operations_and_memory_are_counted_without_weights(tmp_path, capsys):
    import memory
    import operations

    operations.main("mini")
    memory.main(False, "mini", "cpu", "float32", tmp_path / "memory.json")
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("sd15", "sd21", "sdxl", "language model"))
    assert json.loads((tmp_path / "memory.json").read_text())


@pytest.mark.filterwarnings("ignore")
def test_training_leaves_frozen_parts_without_gradient_and_optimizer_state(tmp_path):
    import training

    training.main(None, 2, 1, None, "mini", "cpu", "float32", 1, tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    ways = ["align, batches of 2", "finetune, batches of 2"]
    assert [row["name"] for row in rows] == [name for way in ways for name in (way, f"{way} by length")]
    lengths = training.text_lengths("finetune", 100, None)
    assert lengths == sorted(lengths)
    assert abs(lengths[50] - 220) < 10
    assert lengths[-1] <= training.LONGEST_TEXT


def test_the_papers_model_fits_small_gpus():
    import memory
    import models

    config, dtype = models.model_config("full"), torch.bfloat16
    whole, quantized = (memory.part_bytes(config, dtype, four_bit) for four_bit in (False, True))
    assert whole["language_model"] == 2 * 6_607_605_760
    results = memory.peak_results(config, dtype)
    assert sum(whole.values()) + results < 24e9
    assert sum(quantized.values()) + results < 12e9


def test_a_4_bit_language_model_holds_what_is_computed():
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


def test_a_missing_gpu_gets_one_sentence(monkeypatch):
    import features

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda: this machine has no CUDA GPU that torch can use"):
        features.main(device="cuda")
