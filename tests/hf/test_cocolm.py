"""A checkpoint of COCO-LM's layout, written by a model of plain torch, is the same model here.

The model is written after github.com/microsoft/COCO-LM (fairseq/fairseq/models/cocolm/model.py and
fairseq/fairseq/modules/transformer_sentence_encoder.py): names of parameters and what is computed of them.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn import functional

from metro_megatron.config.position import CocoBuckets
from metro_megatron.config.schema import Config
from metro_megatron.errors import UserError
from metro_megatron.hf.cocolm import open_cocolm
from metro_megatron.hf.export import metro_config
from metro_megatron.hf.modeling_metro import MetroForPreTraining
from metro_megatron.hf.token_ids import tokens_of
from metro_megatron.hf.weights import hf_state_dict
from metro_megatron.train.initial_weights import InitialWeights
from tests.hf.pair import VOCAB_SIZE, write_tokenizer
from tests.parity.small_run import small_config

HIDDEN, HEADS, INNER, POSITIONS, BINS, REACH = 64, 4, 128, 64, 16, 32
ROWS = VOCAB_SIZE + 4
"""Its dictionary is filled up to a multiple of 8."""


class SelfMultiheadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in self.in_proj(x).chunk(3, dim=-1))
        scores = q * (HIDDEN // HEADS) ** -0.5 @ k.transpose(-1, -2) + bias
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = SelfMultiheadAttention()
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.fc1, self.fc2 = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(x + self.self_attn(x, bias))
        return self.final_layer_norm(x + self.fc2(functional.gelu(self.fc1(x))))


def relative_position_bucket(relative: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    num_buckets //= 2
    distance, exact = relative.abs(), num_buckets // 2
    large = torch.log(distance.float() / exact) / math.log((max_distance - 1) / exact) * (num_buckets - 1 - exact)
    large = (exact + large.ceil().long()).clamp(max=num_buckets - 1)
    return torch.where(distance < exact, distance, large) * relative.sign()


class SentenceEncoder(nn.Module):
    def __init__(self, num_layers: int, shared: SentenceEncoder | None = None):
        super().__init__()
        self.embed_tokens = shared.embed_tokens if shared else nn.Embedding(ROWS, HIDDEN, padding_idx=1)
        self.embed_positions = shared.embed_positions if shared else nn.Embedding(POSITIONS, HIDDEN)
        self.emb_layer_norm = shared.emb_layer_norm if shared else nn.LayerNorm(HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))
        self.relative_attention_bias = nn.Embedding(BINS, HEADS)

    def forward(self, tokens: Tensor) -> Tensor:
        position = torch.arange(POSITIONS)
        buckets = relative_position_bucket(position[None, :] - position[:, None], BINS, REACH)
        buckets = (buckets - buckets.min())[: tokens.size(1), : tokens.size(1)]
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1)[None]
        x = self.emb_layer_norm(self.embed_tokens(tokens) + self.embed_positions.weight[: tokens.size(1)])
        for layer in self.layers:
            x = layer(x, bias)
        return x


class LMHead(nn.Module):
    def __init__(self, weight: nn.Parameter, is_dense: bool):
        super().__init__()
        if is_dense:
            self.dense, self.layer_norm = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN)
        self.weight, self.bias = weight, nn.Parameter(torch.zeros(ROWS))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "dense"):
            x = self.layer_norm(functional.gelu(self.dense(x)))
        return functional.linear(x, self.weight, self.bias)


class BinaryHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out_proj = nn.Linear(HIDDEN, 1)


class SCLHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.layer_norm = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN)


class Encoder(nn.Module):
    def __init__(self, num_layers: int, main: Encoder | None = None):
        super().__init__()
        self.sentence_encoder = SentenceEncoder(num_layers, main.sentence_encoder if main else None)
        self.lm_head = LMHead(self.sentence_encoder.embed_tokens.weight, is_dense=main is not None)
        if main is None:
            self.binary_head, self.seq_head = BinaryHead(), SCLHead()


class CocoLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(4)
        self.auxiliary = Encoder(2, self.encoder)

    @torch.no_grad()
    def forward(self, masked: Tensor, corrupted: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder.sentence_encoder(corrupted)
        return {
            "mlm": self.auxiliary.lm_head(self.auxiliary.sentence_encoder(masked)),
            "rtd": self.encoder.binary_head.out_proj(hidden).squeeze(-1),
            "clm": self.encoder.lm_head(hidden),
        }


def random_model() -> CocoLM:
    torch.manual_seed(2)
    model = CocoLM()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


ARGS = argparse.Namespace(arch="cocolm_base", activation_fn="gelu", rel_pos=1, rel_pos_bins=BINS, max_rel_pos=REACH)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def save(folder: Path, tokenizer: Path, **more: Any) -> Path:
    """Its file and dict.txt: pieces from the last to the first, filled up, and no specials."""
    words = [*tokens_of(tokenizer, VOCAB_SIZE)[:4:-1], *(f"madeupword{number:04d}" for number in range(4))]
    (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    state = random_model().state_dict()
    torch.save({"args": ARGS, "model": state, "extra_state": {"epoch": 3}, **more}, folder / "model.pt")
    return folder / "model.pt"


def cocolm_run(path: Path, **train: Any) -> Config:
    model = {"reset_cls": False, "shared_embeddings": "token_position_norm"}
    return small_config(model=model, train={"initialize_from": [str(path)], **train})


def initial(config: Config, tokenizer: Path) -> InitialWeights:
    return InitialWeights.open(config, tokenizer)


def test_the_same_model_with_other_ids(tmp_path: Path, tokenizer: Path) -> None:
    config = cocolm_run(save(tmp_path, tokenizer))
    weights = initial(config, tokenizer)
    weights.refuse_misfits()
    assert set(weights.tensors) == weights.tensors.origins.keys()
    assert weights.tensors.unread == [
        f"scl_head.{module}.{kind}" for module in ("dense", "norm") for kind in ("weight", "bias")
    ]
    model = MetroForPreTraining(metro_config(config.model)).eval()
    model.load_state_dict(hf_state_dict(dict(weights.tensors), config.model))
    row_of = torch.tensor([0, 1, 2, 3, ROWS - 1, *range(VOCAB_SIZE - 2, 3, -1)])
    assert len(set(row_of.tolist())) == VOCAB_SIZE
    masked, corrupted = torch.randint(0, VOCAB_SIZE, (2, 3, POSITIONS), generator=torch.Generator().manual_seed(1))
    expected = random_model()(row_of[masked], row_of[corrupted])
    found = model(masked, noised_input_ids=corrupted)
    for name, theirs in expected.items():
        theirs = theirs if name == "rtd" else theirs[..., row_of]
        torch.testing.assert_close(found[f"{name}_logits"], theirs, rtol=0, atol=1e-5)
    with_contrast = small_config(model=vars(config.model), objective={"main": ["rtd", "scl"]}, train=vars(config.train))
    assert {"main.scl_head.dense.weight", "main.scl_head.norm.bias"} < set(initial(with_contrast, tokenizer).tensors)


def test_special_tokens_are_known_by_what_they_are_for(tmp_path: Path) -> None:
    """Its own names, on ids elsewhere: rows 0 to 3 and the last one of the file."""
    specials = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": VOCAB_SIZE - 1}
    others = iter(sorted(set(range(VOCAB_SIZE)) - set(specials.values())))
    words = {f"\u2581w{number}": number for number in others}
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    Tokenizer(models.WordLevel({**words, **specials}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    lines = [*words, *(f"madeupword{number:04d}" for number in range(4))]
    (tmp_path / "dict.txt").write_text("".join(f"{line} 1\n" for line in lines))
    torch.save({"args": ARGS, "model": random_model().state_dict()}, tmp_path / "model.pt")
    ids = {"bos_token_id": 101, "pad_token_id": 0, "eos_token_id": 102, "mask_token_id": VOCAB_SIZE - 1}
    base = cocolm_run(tmp_path / "model.pt")
    config = replace(base, model=replace(base.model, **ids, other_special_ids=[100]))
    weights = initial(config, folder)
    weights.refuse_misfits()
    table = random_model().state_dict()["encoder.sentence_encoder.embed_tokens.weight"]
    found = weights.tensors["tied.word.weight"]
    rows = {"[CLS]": 0, "[PAD]": 1, "[SEP]": 2, "[UNK]": 3, "[MASK]": ROWS - 1}
    for token, row in {**rows, "\u2581w1": 4, f"\u2581w{VOCAB_SIZE - 2}": ROWS - 6}.items():
        assert found[{**words, **specials}[token]].equal(table[row]), token


def test_buckets_of_its_sizes_are_ours() -> None:
    """Its logarithm is in single precision."""
    for bins, reach in ((32, 128), (64, 128), (128, 256)):
        theirs = relative_position_bucket(torch.arange(-511, 512), bins, reach)
        ours = [CocoBuckets(bins, reach).row(relative, 512) for relative in range(-511, 512)]
        assert ours == (theirs - theirs.min()).tolist()


def test_what_does_not_fit_is_named(tmp_path: Path, tokenizer: Path) -> None:
    path = save(tmp_path, tokenizer)
    lines = (tmp_path / "dict.txt").read_text().splitlines()
    (tmp_path / "dict.txt").write_text("\n".join(["another 1", *lines[1:]]))
    config = small_config(train={"initialize_from": [str(path)]})
    with pytest.raises(UserError) as caught:
        initial(config, tokenizer).refuse_misfits()
    found = [one.removeprefix(f"train.initialize_from {path}: ") for one in caught.value.problems]
    assert found[:2] == [f"model.reset_cls is true, {path} has false", "give --model.reset_cls false"]
    assert "has no row for" in found[-1] and "give a model whose vocabulary has them all" in found[-1]
    (tmp_path / "dict.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(UserError, match=f"{ROWS} rows of the vocabulary, dict.txt makes {ROWS - 1}"):
        open_cocolm(path)
    (tmp_path / "dict.txt").unlink()
    with pytest.raises(UserError, match="dict.txt: not readable .*; put COCO-LM's dictionary beside the checkpoint"):
        open_cocolm(path)


def test_a_file_of_more_than_tensors_and_options_is_not_run(tmp_path: Path, tokenizer: Path) -> None:
    path = save(tmp_path, tokenizer, hook=print)
    with pytest.raises(UserError, match="refers to .*print, which could run code, and is not loaded"):
        open_cocolm(path)
    older = random_model().state_dict() | {"encoder.binary_head.dense.weight": torch.zeros(HIDDEN, HIDDEN)}
    torch.save({"cfg": {"model": ARGS}, "model": older}, path)
    with pytest.raises(UserError, match="binary_head.dense.weight is no part of COCO-LM's model"):
        open_cocolm(path)
    torch.save({"model": {"other": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match="no checkpoint of COCO-LM"):
        open_cocolm(path)
