"""Every intermediate result of DINO against stored outputs of the official code."""

import pytest
import torch
from torch import Tensor

from focalnet_det.checkpoint import load_initial_weights
from focalnet_det.heads.dino import DINO, dino
from focalnet_det.heads.dino.dino_transformer import Selection, box_proposals
from focalnet_det.heads.set_prediction.levels import EncodedLevels
from tests.helpers import official_dino as case
from tests.helpers import stored_outputs


@pytest.fixture(scope="module")
def model() -> DINO:
    return case.official_model()


@pytest.fixture(scope="module")
def memory(model: DINO) -> EncodedLevels:
    with torch.no_grad():
        return model.encode(case.features(), case.padding())


@pytest.fixture(scope="module")
def selection(model: DINO, memory: EncodedLevels) -> Selection:
    with torch.no_grad():
        return model.transformer.select(memory)


def assert_stored(name: str, value: Tensor) -> None:
    expected = case.case()[1][f"s4/{name}"].flatten()
    actual = stored_outputs.sampled(f"s4/{name}", value, expected)
    assert (actual - expected).abs().max() <= max(20 * case.noise(f"s4/{name}"), 1e-6), name


def test_encoder(memory: EncodedLevels) -> None:
    assert memory.tokens.shape == (2, 1020, 256)
    assert_stored("memory", memory.tokens)


def test_selection(model: DINO, memory: EncodedLevels, selection: Selection) -> None:
    assert torch.equal(selection.tokens, case.case()[1]["s4/topk_index"].long())
    assert_stored("topk_score", selection.prediction.logits.max(-1).values)
    assert_stored("interm_boxes", selection.prediction.boxes)
    proposals, usable = box_proposals(memory)
    chosen = selection.tokens[..., None].expand(-1, -1, 4)
    assert_stored("init_box_proposal", proposals.sigmoid().gather(1, chosen))
    # The classes of all tokens, those that cannot be used included.
    with torch.no_grad():
        tokens = model.transformer.enc_output(memory.tokens * usable[..., None])
        tokens = model.transformer.enc_output_norm(tokens)
        assert_stored("enc_class_all", model.transformer.enc_out_class_embed(tokens))


def test_every_layer(model: DINO, memory: EncodedLevels, selection: Selection) -> None:
    with torch.no_grad():
        heads = [model.bbox_embed[0]] * 6
        decoded = model.transformer.decode(selection, memory, heads)
        predictions = model.decode(selection, memory, None)
    for i, content in enumerate(decoded.content):
        assert_stored(f"hs{i}", content)
    for i, reference in enumerate(decoded.references):
        assert_stored(f"reference{i}", reference)
    for i, prediction in enumerate(predictions):
        assert_stored(f"layer{i}/logits", prediction.logits)
        assert_stored(f"layer{i}/boxes", prediction.boxes)


def test_detections(model: DINO) -> None:
    numbers, arrays = case.case()
    records = [
        {"image": torch.zeros(3, *size), "height": output[0], "width": output[1]}
        for size, output in zip(numbers["valid"], numbers["target_sizes"], strict=True)
    ]
    with torch.no_grad():
        results = model(records)
    for i, result in enumerate(results):
        found = result["instances"]
        assert len(found) == 300
        scores = arrays[f"s4/det{i}/scores"]
        assert (found.scores - scores).abs().max() <= 20 * case.noise(f"s4/det{i}/scores")
        boxes, labels = arrays[f"s4/det{i}/boxes"], arrays[f"s4/det{i}/labels"]
        # Equal scores may change places.
        near = (found.scores[:, None] - scores).abs() < 1e-5
        same = near & (found.pred_classes[:, None] == labels)
        gap = (found.pred_boxes.tensor[:, None] - boxes).abs().amax(-1)
        assert (same & (gap < 0.02)).any(0).sum() >= 298


def test_names_of_detrex_give_equal_outputs_with_its_conventions() -> None:
    """The weights under detrex's names, in a model that follows its file."""
    numbers, _ = stored_outputs.stored("dino")
    ours, names = case.official_weights(), numbers["detrex_name_map"]
    weights = {}
    for name, shape in numbers["detrex_keys"].items():
        weights[name] = torch.zeros(shape)
    for name, theirs in names.items():
        weights[theirs] = ours[name]
    for i in range(6):
        # detrex's layers have heads of their own; these are equal.
        for part in ("weight", "bias"):
            weights[f"class_embed.{i}.{part}"] = ours[f"class_embed.0.{part}"]
            for k in range(3):
                head = f"bbox_embed.{{}}.layers.{k}.{part}"
                weights[head.format(i)] = ours[head.format(0)]
    for part in ("weight", "bias"):
        weights[f"class_embed.6.{part}"] = ours[f"transformer.enc_out_class_embed.{part}"]
        for k in range(3):
            name = f"transformer.enc_out_bbox_embed.layers.{k}.{part}"
            weights[f"bbox_embed.6.layers.{k}.{part}"] = ours[name]
    weights["label_enc.weight"] = ours["label_enc.weight"][:80]
    for name in [n for n in weights if n.startswith(("class_embed", "bbox_embed"))]:
        weights[f"transformer.decoder.{name}"] = weights[name]
    model = dino(backbone=case.StoredFeatures(), num_classes=80, queries=100)
    report = load_initial_weights(model, {"model": weights}, new_classes=False)
    assert report.layout == "detrex"
    assert not report.missing
    assert model.conventions == "detrex"
    assert len(model.class_embed) == 6
    expected = case.official_model()
    expected.position.temperature, expected.position.offset = 10_000.0, -0.5
    with torch.no_grad():
        found = model.eval().predict(case.features(), case.padding())
        wanted = expected.predict(case.features(), case.padding())
        shifted = case.official_model().predict(case.features(), case.padding())
    for a, b in zip(found.layers, wanted.layers, strict=True):
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.boxes, b.boxes, rtol=0, atol=1e-5)
    # The other temperature gives other boxes.
    assert (found.layers[-1].boxes - shifted.layers[-1].boxes).abs().max() > 0.1
