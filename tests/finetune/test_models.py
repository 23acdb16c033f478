"""The model of every head from the folders of several architectures: the encoder is the folder's, the head is fresh."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from metro_megatron.errors import UserError
from metro_megatron.finetune.models import (
    Head,
    build_model,
    read_config,
    read_tokenizer,
    set_task_dropout,
    write_model,
)
from metro_megatron.finetune.recipe import Recipe
from metro_megatron.finetune.tasks.multiple_choice import Choice, MultipleChoice
from metro_megatron.hf.modeling_metro import MetroForMultipleChoice, MetroModel

SIZES = {
    "vocab_size": 320,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
    "pad_token_id": 1,
}
CONFIGS: dict[str, Any] = {
    "bert": transformers.BertConfig(**SIZES),
    "roberta": transformers.RobertaConfig(**SIZES),
    "deberta-v2": transformers.DebertaV2Config(
        **SIZES, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], share_att_key=True
    ),
    "modernbert": transformers.ModernBertConfig(
        **SIZES, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2
    ),
    "electra": transformers.ElectraConfig(**SIZES, embedding_size=16),
}


@pytest.fixture(scope="module")
def folders(export_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random encoder of each architecture with the tokenizer of the export."""
    encoders = {name: write_encoder(name, export_folder, tmp_path_factory.mktemp(name)) for name in CONFIGS}
    return {"metro": export_folder, **encoders}


def write_encoder(name: str, export_folder: Path, folder: Path) -> Path:
    """A random encoder of CONFIGS with the tokenizer of the export."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(CONFIGS[name]).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(export_folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["metro", *CONFIGS])
@pytest.mark.parametrize("head", get_args(Head))
def test_the_encoder_is_the_folders_and_the_head_is_fresh(folders: dict[str, Path], name: str, head: Head) -> None:
    config = read_config(folders[name], {})
    torch.manual_seed(3)
    model = build_model(head, folders[name], config, False)
    auto = MetroModel if name == "metro" else transformers.AutoModel
    encoder = auto.from_pretrained(folders[name]).state_dict()
    own = model.base_model.state_dict()
    assert own and all(torch.equal(encoder[key], value) for key, value in own.items())
    torch.manual_seed(3)
    again = build_model(head, folders[name], config, False)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    torch.manual_seed(4)
    other = build_model(head, folders[name], config, False).state_dict()
    heads = [key for key in other if not key.startswith(model.base_model_prefix) and other[key].std() > 0]
    assert heads and not any(torch.equal(other[key], model.state_dict()[key]) for key in heads if "norm" not in key)


@pytest.mark.parametrize("name", ["metro", *CONFIGS])
def test_dropout_of_the_head_is_the_recipes_and_the_encoders_its_own(folders: dict[str, Path], name: str) -> None:
    assert Recipe().task_dropout == 0.1, "METRO Table 11"
    for head, settings in (("sequence_classification", {"num_labels": 3}), ("token_classification", {})):
        model = build_model(head, folders[name], read_config(folders[name], settings), False)
        encoder = model.base_model
        before = [one.p for one in encoder.modules() if isinstance(one, torch.nn.Dropout)]
        set_task_dropout(model, 0.15)
        assert before == [one.p for one in encoder.modules() if isinstance(one, torch.nn.Dropout)]
        own = [one for one in model.modules() if isinstance(one, torch.nn.Dropout) and one not in {*encoder.modules()}]
        assert own and {one.p for one in own} == {0.15}
        assert getattr(model.config, "classifier_dropout", 0.15) == 0.15  # DeBERTa has another name


def test_a_fine_tuned_folder_gives_its_encoder_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("metro", "bert"):
        config = read_config(folders[name], {"num_labels": 3, "problem_type": "single_label_classification"})
        first = build_model("sequence_classification", folders[name], config, False)
        write_model(first, folders[name], tmp_path / name)
        for head, settings in (("sequence_classification", {"num_labels": 3}), ("question_answering", {})):
            config = read_config(tmp_path / name, settings)
            assert config.problem_type is None
            second = build_model(head, tmp_path / name, config, False).state_dict()
            for key, value in first.state_dict().items():
                is_encoder = key.startswith(first.base_model_prefix)
                if key in second and value.std() > 0:
                    assert torch.equal(second[key], value) == is_encoder, key


def without_half(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(list(tensors.items())[::2]), folder / "model.safetensors", {"format": "pt"})


def with_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "its weights cannot be read(.|\n)*--from_scratch"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 64), "its weights cannot be read"),
        (without_half, r"\d+ weights of the encoder are missing or of another size .*bert\.enc"),
        (with_config(vocab_size=330), r"1 weights of the encoder .*bert.embeddings.word_embeddings.weight"),
        (with_config(vocab_size=299), "has 300 ids, the model 299; give its own tokenizer"),
        (with_config(model_type="mine", auto_map={"AutoConfig": "a.B"}), "no model_type 'mine', and code .* not run"),
        (with_config(model_type=None), "no model_type None"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: unreadable"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: unreadable"),
        (lambda folder: (folder / "config.json").unlink(), "no such file; give a folder that tools/convert_checkpoint"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "no tokenizer.json(.|\n)*--tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer is unreadable"),
    ],
)
def test_what_is_missing_is_named(
    folders: dict[str, Path], tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(folders["bert"], folder)
    change(folder)
    with pytest.raises(UserError, match=message):
        config = read_config(folder, {})
        read_tokenizer(folder, config, 0)
        build_model("sequence_classification", folder, config, False)


def test_the_longest_text_is_the_models_or_the_tokenizers(folders: dict[str, Path], tmp_path: Path) -> None:
    lengths = {name: read_tokenizer(folder, read_config(folder, {}), 0) for name, folder in folders.items()}
    assert {name: tokenizer.model_max_length for name, tokenizer in lengths.items()} == {
        "metro": 40,
        "bert": 40,  # the tokenizer's
        "roberta": 40,
        "deberta-v2": 40,
        "modernbert": 40,
        "electra": 40,
    }
    # Given, it may be longer than the tokenizer says, not than the positions; two of RoBERTa's are no text's.
    for name, longest in (("bert", 48), ("roberta", 46), ("metro", 40)):
        config = read_config(folders[name], {})
        assert read_tokenizer(folders[name], config, longest).model_max_length == longest
        with pytest.raises(UserError, match=f"has {longest} positions; give at most {longest}"):
            read_tokenizer(folders[name], config, longest + 1)
        model = build_model("sequence_classification", folders[name], config, False)
        model(torch.full((1, longest), 7))
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            model(torch.full((1, longest + 1), 7))


def test_a_folder_of_save_pretrained_with_a_tokenizer_of_elsewhere(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("metro", "bert"):
        config = read_config(folders[name], {})
        build_model("token_classification", folders[name], config, False).save_pretrained(tmp_path / name)
        again = read_config(tmp_path / name, {})
        with pytest.raises(UserError, match="has no tokenizer.json"):
            read_tokenizer(tmp_path / name, again, 0)
        assert len(read_tokenizer(folders[name], again, 0)) == 300
        build_model("token_classification", tmp_path / name, again, False)


def test_heads_that_transformers_lacks_are_named(tmp_path: Path) -> None:
    transformers.AutoModel.from_config(transformers.ViTConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no question answering model of type 'vit'"):
        build_model("question_answering", tmp_path, read_config(tmp_path, {}), False)


@pytest.mark.parametrize("name", ["metro", *CONFIGS])
def test_a_batch_may_have_texts_of_fewer_choices(folders: dict[str, Path], name: str) -> None:
    """Whatever the architecture, a choice that is not there changes nothing: not the scores, the loss or a gradient."""
    config = read_config(folders[name], {"num_labels": 1})
    tokenizer = read_tokenizer(folders[name], config, 0)
    model = build_model("multiple_choice", folders[name], config, False).eval()
    examples = [Choice("the cat", ("sees a dog", "finds it", "the old bird"), 2), Choice("a dog", ("is good", "it"), 1)]
    task = MultipleChoice(examples, examples)
    rows = task.encode(tokenizer, examples).rows
    both = model(**task.collator(tokenizer)(rows))
    alone = [model(**task.collator(tokenizer)([row])) for row in rows]
    torch.testing.assert_close(both.logits[0], alone[0].logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both.logits[1, :2], alone[1].logits[0], atol=1e-5, rtol=1e-5)
    assert both.logits[1, 2] == torch.finfo(torch.float32).min
    expected = (alone[0].loss + alone[1].loss) / 2
    torch.testing.assert_close(both.loss, expected)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (both.loss, expected)]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_candidates_are_scored_each_by_itself(export_folder: Path) -> None:
    config = read_config(export_folder, {})
    model = build_model("multiple_choice", export_folder, config, False).eval()
    assert isinstance(model, MetroForMultipleChoice)
    ids, labels = torch.randint(5, 300, (2, 3, 7)), torch.tensor([2, 0])
    mask = torch.ones_like(ids)
    mask[1, 2, 4:] = 0
    out = model(ids, mask, labels=labels)
    for i in range(2):
        for j in range(3):
            state = model.metro(ids[i, j, : int(mask[i, j].sum())][None]).last_hidden_state[0, 0]
            torch.testing.assert_close(model.classifier(state)[0], out.logits[i, j])
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded, attention_mask=mask).logits, out.logits)
