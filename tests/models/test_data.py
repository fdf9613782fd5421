"""The easy-vqa data set as tensors, and augmentation that keeps the answers right."""

import pytest
import torch

from fastfusion.applications.training import learning_rate
from fastfusion.applications.vqa.train import Batches, Settings
from fastfusion.data import easy_vqa as data


@pytest.fixture(scope="module")
def split() -> data.Split:
    return data.load("train", 200)


def test_whole_data_set() -> None:
    for name, images, questions in (("train", 4000, 38575), ("test", 1000, 9673)):
        split = data.load(name)  # type: ignore[arg-type]
        assert split.images.shape == (images, 3, 64, 64) and split.images.dtype == torch.uint8
        assert len(split) == questions and len(split.texts) == 107
        assert (split.image_index.diff() >= 0).all()
    assert len(data.answers()) == 13


def test_questions_match_the_package(split: data.Split) -> None:
    import easy_vqa

    ours = {
        (int(i), split.texts[t], data.answers()[a])
        for i, t, a in zip(split.image_index, split.text_index, split.answer, strict=True)
    }
    assert ours == {
        (i, t, a) for t, a, i in zip(*easy_vqa.get_train_questions(), strict=True) if i < 200
    }


def test_no_question_speaks_of_a_place() -> None:
    # What makes mirrored and shifted images legal.
    vocabulary = set(data.Vocabulary.of(data.load("train", 1).texts).entries)
    assert not vocabulary & {
        "left",
        "right",
        "top",
        "bottom",
        "above",
        "below",
        "corner",
        "middle",
        "center",
    }


def test_vocabulary() -> None:
    vocabulary = data.Vocabulary.of(["Is it red?", "red, not blue"])
    assert vocabulary.entries == ["<padding>", "<unknown>", "blue", "is", "it", "not", "red"]
    assert vocabulary.encode(["is it GREEN?", "red"]).tolist() == [[3, 4, 1], [6, 0, 0]]
    assert vocabulary.encode(["red"], length=3).tolist() == [[6, 0, 0]]
    with pytest.raises(ValueError, match="1 to 2 words, got 3: 'is it red'"):
        vocabulary.encode(["is it red"], length=2)
    with pytest.raises(ValueError, match="got 0: '!'"):
        vocabulary.encode(["!"], length=2)
    with pytest.raises(ValueError, match="starts with"):
        data.Vocabulary(["red"])


def test_boxes_hold_the_shape_and_nothing_else(split: data.Split) -> None:
    for image, (left, right, top, bottom) in zip(
        split.images, data.shape_boxes(split.images).tolist(), strict=True
    ):
        outside = torch.ones(64, 64, dtype=torch.bool)
        outside[top:bottom, left:right] = False
        assert (image[:, outside] == image[:, outside][:, :1]).all(), "a single colour"
        drawn = (image != image[:, outside][:, :1, None]).any(0)
        assert all(drawn[side].any() for side in (top, bottom - 1))
        assert all(drawn[:, side].any() for side in (left, right - 1))


def test_shift_and_mirror_keep_every_pixel_of_the_shape(split: data.Split) -> None:
    boxes = data.shape_boxes(split.images)
    generator = torch.Generator().manual_seed(0)
    moved, same = data.augment(split.images, boxes, generator, brightness=0.0, noise=0.0)
    torch.testing.assert_close(moved, same / 255)
    after = data.shape_boxes((moved * 255).round().to(torch.uint8))
    size = torch.stack([boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]])
    assert torch.equal(size, torch.stack([after[:, 1] - after[:, 0], after[:, 3] - after[:, 2]]))
    mirrored = 0
    for image, new, box, place in zip(
        split.images, moved, boxes.tolist(), after.tolist(), strict=True
    ):
        shape = image[:, box[2] : box[3], box[0] : box[1]] / 255
        there = new[:, place[2] : place[3], place[0] : place[1]]
        same = torch.equal(shape, there)
        assert same or torch.equal(shape.flip(2), there)
        mirrored += not same
        assert abs(box[2] - place[2]) <= 8
        assert torch.equal(image.flatten(1).sort(1).values / 255, new.flatten(1).sort(1).values)
    assert mirrored > 20, "shapes that look different in a mirror were mirrored"
    assert (boxes != after).any(dim=1).float().mean() > 0.8


def test_colour_noise_is_small(split: data.Split) -> None:
    boxes = data.shape_boxes(split.images)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    quiet, _ = data.augment(split.images, boxes, generators[0], brightness=0, noise=0)
    noisy, _ = data.augment(split.images, boxes, generators[1])
    difference = (noisy - quiet).flatten(1)
    assert 0 < difference.std() < 0.05
    assert difference.mean(dim=1).abs().max() <= 0.05 + 0.001


def test_batches_hold_each_image_once_with_some_of_its_questions(split: data.Split) -> None:
    seen, asked = [], []
    tokens = data.Vocabulary.of(split.texts).encode(split.texts)
    all_of_it = Batches(split, tokens, Settings())
    for images, questions, image_index in all_of_it.draw(torch.Generator().manual_seed(0)):
        assert len(images) == 32
        assert torch.equal(images[image_index], split.image_index[questions])
        available = torch.tensor([int((split.image_index == i).sum()) for i in images])
        assert torch.equal(torch.bincount(image_index), available.clamp(max=4))
        seen.append(images)
        asked.append(questions)
    assert len(seen) == 6 and len(torch.cat(seen).unique()) == 192
    assert len(torch.cat(asked).unique()) == len(torch.cat(asked)) > 700

    others = next(all_of_it.draw(torch.Generator().manual_seed(1)))[1]
    assert not set(others.tolist()) <= set(asked[0].tolist())
    few = list(
        Batches(split.head(5), tokens, Settings(questions_per_image=99)).draw(torch.Generator())
    )
    assert len(few) == 1 and len(few[0][1]) == len(split.head(5)), "fewer images than a batch"


def test_learning_rate() -> None:
    settings = Settings(lr=1e-3, warmup_steps=10)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[0] < rates[5] < rates[9] > rates[50] > rates[99] > 0
    assert max(rates) <= 1e-3 and rates[99] < 1e-5
