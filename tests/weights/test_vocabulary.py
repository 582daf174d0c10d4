"""Growth of ID vocabulary and REL_PE_LENGTH keeps the predictions for old labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from motip.errors import MotipError
from motip.model.initialisation import init_copy_id_decoder
from motip.weights import load_pretrained
from motip.weights.transfer_report import GROWN
from motip.weights.vocabulary import resize_positions, resize_words
from tests.helpers.weight_cases import identity_inputs, save_published, tiny_model

WORDS, HEAD = "id_decoder.word_to_embed.weight", "id_decoder.embed_to_word_layers.0.weight"


def test_50_to_300_copies_old_columns_and_moves_newborn(tmp_path: Path) -> None:
    parent, child = tiny_model(1, num_id_vocabulary=50), tiny_model(2, num_id_vocabulary=300)
    report = load_pretrained(child, save_published(tmp_path / "a.pth", parent), ["pedestrian"])
    before, after = parent.state_dict(), child.state_dict()
    assert torch.equal(after[WORDS][:, :50], before[WORDS][:, :50])
    assert torch.equal(after[WORDS][:, 300], before[WORDS][:, 50])
    assert torch.equal(after[HEAD][:50], before[HEAD][:50])
    assert torch.equal(after[HEAD][300], before[HEAD][50])
    assert set(report.names(GROWN, "model")) == {WORDS, HEAD, "id_decoder.embed_to_word_layers.1.weight"}
    assert any("from 50 to 300 labels" in note and "newborn moved" in note for note in report.notes)
    unchanged = [key for key in before if key not in report.names(GROWN, "file")]
    assert all(torch.equal(after[key], before[key]) for key in unchanged)


def test_masked_new_labels_leave_all_probabilities_unchanged(tmp_path: Path) -> None:
    parent, child = tiny_model(1, num_id_vocabulary=8), tiny_model(2, num_id_vocabulary=40)
    load_pretrained(child, save_published(tmp_path / "a.pth", parent), ["pedestrian"])
    inputs = identity_inputs(parent, labels=8)
    unused = torch.zeros(41, dtype=torch.bool)
    unused[8:40] = True
    with torch.no_grad():
        before = parent.id_decoder(*inputs).softmax(-1)
        after = child.id_decoder(*inputs, label_mask=unused).softmax(-1)
    assert (after[..., :8] - before[..., :8]).abs().max() < 1e-6
    assert (after[..., 40] - before[..., 8]).abs().max() < 1e-6
    assert after[..., 8:40].abs().max() == 0.0


def test_new_labels_are_usable_without_training(tmp_path: Path) -> None:
    """A decoder that copies labels copies new ones as well; random embeddings and rows would not be classified."""
    torch.manual_seed(0)
    parent, child = tiny_model(1, num_id_vocabulary=50), tiny_model(2, num_id_vocabulary=150)
    init_copy_id_decoder(parent, noise=0.05, sharpness=4.0)
    load_pretrained(child, save_published(tmp_path / "a.pth", parent), ["pedestrian"])
    generator = torch.Generator().manual_seed(1)
    objects = 10
    features = torch.randn(1, 1, 1, objects, 64, generator=generator).expand(1, 1, 4, objects, 64) * 3.0

    def accuracy(first: int, last: int) -> float:
        labels = (first + torch.randperm(last - first, generator=generator)[:objects]).expand(1, 1, 4, objects)
        present = torch.zeros(1, 1, 4, objects, dtype=torch.bool)
        with torch.no_grad():
            logits = child.id_decoder(features, labels, present, range(4), features, present, range(4))
        return (logits[-1, :, :, 1:, :, :150].argmax(-1) == labels[:, :, 1:]).float().mean().item()

    old, new = accuracy(0, 50), accuracy(50, 150)
    assert old > 0.9
    assert new > 0.8


def test_new_embeddings_have_the_statistics_of_old_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(64, 31, generator=generator) + 0.5
    head = torch.randn(31, 64, generator=generator)
    resized, (resized_head,) = resize_words(words, [head], 200)
    assert resized.shape == (64, 201) and resized_head.shape == (201, 64)
    old, new = words[:, :30].norm(dim=0), resized[:, 30:200].norm(dim=0)
    assert abs(new.mean() / old.mean() - 1.0) < 0.05
    unit = (resized[:, :200] - words[:, :30].mean(1, keepdim=True)).T
    unit = unit / unit.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T - torch.eye(200)).abs()
    assert cosine.max() < 0.85 and cosine.mean() < 0.2
    # a linear map from embeddings to rows applies to new ones too
    _, (mapped,) = resize_words(words, [(words * 0.3).T.contiguous()], 200)
    assert torch.allclose(mapped, resized.T * 0.3, atol=1e-5)
    again, _ = resize_words(words, [head], 200)
    assert torch.equal(again, resized)


def test_distinct_label_heads_grow_by_the_same_mixture(tmp_path: Path) -> None:
    options = {"use_aux_loss": True, "use_shared_aux_head": False}
    parent = tiny_model(1, **options)
    parent.id_decoder.embed_to_word_layers[0].weight.data.mul_(2.0)
    child = tiny_model(2, num_id_vocabulary=20, **options)
    report = load_pretrained(child, save_published(tmp_path / "a.pth", parent), ["pedestrian"])
    after = child.state_dict()
    assert torch.allclose(after[HEAD], after[HEAD.replace("0", "1")] * 2.0, atol=1e-6)
    assert len(report.names(GROWN, "file")) == 3


def test_shrinking_vocabulary_is_an_error_unless_allowed(tmp_path: Path) -> None:
    path = save_published(tmp_path / "a.pth", tiny_model(1, num_id_vocabulary=20))
    child = tiny_model(2, num_id_vocabulary=8)
    with pytest.raises(MotipError, match="shrink from 20 to 8") as caught:
        load_pretrained(child, path, ["pedestrian"])
    assert "NUM_ID_VOCABULARY: 20" in str(caught.value.fix)
    report = load_pretrained(child, path, ["pedestrian"], allow=[WORDS])
    parent = tiny_model(1, num_id_vocabulary=20).state_dict()
    assert torch.equal(child.state_dict()[WORDS][:, 8], parent[WORDS][:, 20])
    assert torch.equal(child.state_dict()[HEAD][:8], parent[HEAD][:8])
    assert any("SHRANK" in note for note in report.notes)


def test_a_vocabulary_of_two_cannot_grow(tmp_path: Path) -> None:
    path = save_published(tmp_path / "a.pth", tiny_model(1, num_id_vocabulary=2))
    with pytest.raises(MotipError, match="cannot grow"):
        load_pretrained(tiny_model(2), path, ["pedestrian"])


def test_relative_positions_grow_by_their_last_row(tmp_path: Path) -> None:
    parent, child = tiny_model(1), tiny_model(2, rel_pe_length=10)
    report = load_pretrained(child, save_published(tmp_path / "a.pth", parent), ["pedestrian"])
    before, after = parent.id_decoder.rel_pos_embeds, child.id_decoder.rel_pos_embeds
    assert torch.equal(after[:, :6], before)
    assert all(torch.equal(after[:, row], before[:, 5]) for row in range(6, 10))
    assert report.names(GROWN, "model") == ["id_decoder.rel_pos_embeds"]
    assert any("REL_PE_LENGTH 6 -> 10" in note for note in report.notes)


def test_shrinking_relative_positions_is_an_error_unless_allowed(tmp_path: Path) -> None:
    path = save_published(tmp_path / "a.pth", tiny_model(1))
    child = tiny_model(2, rel_pe_length=4)
    with pytest.raises(MotipError, match="shrink from 6 to 4"):
        load_pretrained(child, path, ["pedestrian"])
    load_pretrained(child, path, ["pedestrian"], allow=["id_decoder.rel_pos_embeds"])
    assert torch.equal(child.id_decoder.rel_pos_embeds, tiny_model(1).id_decoder.rel_pos_embeds[:, :4])
    assert resize_positions(torch.zeros(2, 6, 4), 6).shape == (2, 6, 4)
