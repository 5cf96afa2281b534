"""Labels and prompts of images by their numbers, and files of prompts that are refused with their line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_quant.accuquant.conditions import class_labels, label_conditioning, prompt_conditioning, read_prompts
from lightning_quant.errors import ConfigurationError, QuantizationError


class Encoder:
    """Embeddings (n, 3, 2) that tell the prompt, and the batches it got."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: list[str]) -> Tensor:
        self.batches.append(texts)
        return torch.stack([torch.full((3, 2), float(sum(map(ord, text)))) for text in texts])


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("classes", [7, [5, 2, 900]])
def test_a_label_depends_on_its_image_alone(balanced: bool, classes: int | list[int]) -> None:
    ids = list(range(40))
    whole = class_labels(ids, classes, seed=3, balanced=balanced)
    assert whole.dtype == torch.int64
    assert set(whole.tolist()) == set(range(7) if classes == 7 else [5, 2, 900])
    assert torch.equal(class_labels([17, 4], classes, seed=3, balanced=balanced), whole[[17, 4]])


def test_balanced_labels_are_and_drawn_ones_change_with_the_seed() -> None:
    assert class_labels(range(30), 10).bincount().tolist() == [3] * 10
    first, second = (class_labels(range(30), 10, seed=seed, balanced=False) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(class_labels(range(30), 10, seed=0), class_labels(range(30), 10, seed=1))


@pytest.mark.parametrize("classes", [0, [], [3, -1]])
def test_no_classes_are_refused(classes: int | list[int]) -> None:
    with pytest.raises(ConfigurationError, match="expected their number, as 1000, or a list"):
        class_labels(range(3), classes)


def test_the_unconditional_label_stands_beside() -> None:
    labels = class_labels(range(3), 10)
    assert label_conditioning(labels).keys() == {"class_labels"}
    assert label_conditioning(labels, 10)["uncond_class_labels"].tolist() == [10, 10, 10]


def test_prompts_are_the_lines_without_comments(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# of COCO\n\n  a cat \r\nzwei Bücher # no comment\n   # one\na\tdog\n猫\u3000犬".encode())
    assert read_prompts(file) == ["a cat", "zwei Bücher # no comment", "a\tdog", "猫\u3000犬"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a cat\n\nB\xfccher\n", r"prompts.txt, line 3, is not UTF-8 \(invalid start byte at byte 2\)"),
        (b"a cat\na\x00dog\n", r"prompts.txt, line 2, has the character '\\x00'"),
        (b"# nothing\n\n", r"prompts.txt has 2 lines and no prompt"),
        (b"", r"prompts.txt has 0 lines and no prompt"),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        read_prompts(tmp_path / "prompts.txt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"There is no file of prompts .*none\.txt"):
        read_prompts(tmp_path / "none.txt")


def test_a_prompt_depends_on_its_image_alone_and_is_encoded_once() -> None:
    prompts, encoder = ["a", "bb", "ccc", "dddd", "bb"], Encoder()
    whole = prompt_conditioning(range(12), prompts, encoder, batch=3)
    assert encoder.batches == [["a", "bb", "ccc"], ["dddd"], [""]]
    hidden = whole["encoder_hidden_states"]
    assert hidden.shape == (12, 3, 2)
    assert torch.equal(hidden[7], Encoder()([prompts[2]])[0])
    some = prompt_conditioning([11, 3], prompts, Encoder(), batch=1)
    assert torch.equal(some["encoder_hidden_states"], hidden[[11, 3]])
    assert whole["uncond_encoder_hidden_states"].shape == hidden.shape
    assert not whole["uncond_encoder_hidden_states"].any()


def test_the_unconditional_prompt_can_be_another_or_none() -> None:
    found = prompt_conditioning(range(2), ["a"], Encoder(), unconditional="ugly")
    assert torch.equal(found["uncond_encoder_hidden_states"], Encoder()(["ugly", "ugly"]))
    assert prompt_conditioning(range(2), ["a"], Encoder(), unconditional=None).keys() == {"encoder_hidden_states"}


def test_embeddings_that_cannot_be_rows_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"encode returned \(2, 4\) for 2 prompts: expected a tensor \(2, L, D\)"
    ):
        prompt_conditioning(range(2), ["a", "b"], lambda texts: torch.zeros(len(texts), 4))
    with pytest.raises(ConfigurationError, match=r"embeddings \(2, 1\) from 'bb' on and \(1, 1\) before: pad"):
        prompt_conditioning(range(2), ["a", "bb"], lambda texts: torch.zeros(1, len(texts[0]), 1), batch=1)
    with pytest.raises(ConfigurationError, match=r"from '' on and \(1, 1\) before: pad"):
        prompt_conditioning(range(2), ["a"], lambda texts: torch.zeros(1, len(texts[0]), 1))
    with pytest.raises(QuantizationError, match="embeddings of prompts from 'a' on have NaN"):
        prompt_conditioning(range(2), ["a"], lambda texts: torch.full((1, 1, 1), torch.nan))
    with pytest.raises(ConfigurationError, match="0 prompts in batches of 16"):
        prompt_conditioning(range(2), [], Encoder())
