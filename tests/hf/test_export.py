"""The exported folder as a user of transformers meets it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from torch import Tensor

from metro_megatron.config.schema import ModelConfig
from metro_megatron.errors import UserError
from metro_megatron.hf.configuration_metro import MetroConfig
from metro_megatron.hf.export import hf_state_dict, metro_config, write_hf_folder
from metro_megatron.hf.modeling_metro import (
    MetroForAuxiliaryMaskedLM,
    MetroForMaskedLM,
    MetroForPreTraining,
    MetroForReplacedTokenDetection,
    MetroModel,
)
from metro_megatron.hf.verify import (
    hf_outputs,
    largest_differences,
    random_probe,
    refuse_differences,
)
from metro_megatron.tokenizer.tokenizer import Tokenizer
from tests.hf import reference
from tests.hf.pair import MODEL, VARIANTS, VOCAB_SIZE, trainer_tensors, variant, write_export

HEADS = {
    "AutoModel": set(),
    "AutoModelForPreTraining": set(),
    "AutoModelForMaskedLM": set(),
    "AutoModelForSequenceClassification": {
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    },
    "AutoModelForMultipleChoice": {
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    },
    "AutoModelForTokenClassification": {"classifier.weight", "classifier.bias"},
    "AutoModelForQuestionAnswering": {"qa_outputs.weight", "qa_outputs.bias"},
}


@pytest.mark.parametrize("name", HEADS)
def test_auto_classes_load_everything_but_fresh_heads(export_folder: Path, remote_code: None, name: str) -> None:
    auto = getattr(transformers, name)
    model, report = auto.from_pretrained(export_folder, trust_remote_code=True, output_loading_info=True)
    assert report["missing_keys"] == HEADS[name]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert type(model).__module__.startswith("transformers_modules.")
    state = hf_state_dict(trainer_tensors(), MODEL)
    for key, tensor in model.state_dict().items():
        key = key if name != "AutoModel" else f"metro.{key}"
        if key in state:
            assert torch.equal(tensor, state[key]), key
    assert model.dtype == torch.float32


@pytest.mark.parametrize("name", VARIANTS)
def test_whole_and_in_parts_a_folder_equals_the_recipe_on_the_trainers_tensors(name: str, tmp_path: Path) -> None:
    """The pair, and classes that have a part of it: what encoders share stands in the file once."""
    model = variant(name)
    folder = write_export(tmp_path, model)
    probe = random_probe(model)
    whole = hf_outputs(folder, probe)
    tensors = {name: tensor.double() for name, tensor in trainer_tensors(model).items()}
    expected: dict[str, Tensor] = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    for row, length in enumerate(probe.lengths.tolist()):
        masked, noised = (ids[row, :length].tolist() for ids in (probe.masked_tokens, probe.noised_tokens))
        for output, value in reference.outputs(masked, noised, tensors, model).items():
            expected[output][row, :length] = value
    differences = largest_differences(whole, expected, probe.lengths)
    refuse_differences(differences)
    assert max(differences.values()) < 1e-5
    mask = (torch.arange(40) < probe.lengths[:, None]).long()
    for kind, ids, output in (
        (MetroForAuxiliaryMaskedLM, probe.masked_tokens, "mlm"),
        (MetroForReplacedTokenDetection, probe.noised_tokens, "rtd"),
        (MetroForMaskedLM, probe.noised_tokens, "clm"),
        (MetroModel, probe.noised_tokens, "hidden"),
    ):
        part, report = kind.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
        torch.testing.assert_close(part.eval()(ids, attention_mask=mask)[0], whole[output], rtol=0, atol=1e-5)


def test_a_projected_embedding_loads_in_every_class(tmp_path: Path, remote_code: None) -> None:
    folder = write_export(tmp_path, variant("ELECTRA"))
    ids, words = torch.randint(5, VOCAB_SIZE, (2, 9)), torch.randn(2, 9, 20)
    for name, fresh in HEADS.items():
        auto = getattr(transformers, name)
        model, report = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert report["missing_keys"] == fresh and not report["unexpected_keys"]
        assert model.get_input_embeddings().weight.shape == (VOCAB_SIZE, 20)
        shape = (2, 1, 9) if name == "AutoModelForMultipleChoice" else (2, 9)
        model.eval()(ids.view(shape))
        if name != "AutoModelForPreTraining":
            model(inputs_embeds=words.view(*shape, 20))
    assert "of width 24, the auxiliary model 2 of width 18." in (folder / "README.md").read_text()


def test_a_wrong_weight_is_refused_and_leaves_nothing(export_folder: Path, tmp_path: Path) -> None:
    probe = random_probe(MODEL)
    expected = hf_outputs(export_folder, probe)
    tensors = trainer_tensors()
    tensors["main.block.layers.1.self_attention.linear_qkv.weight"][5] *= 1.01

    def verify(folder: Path) -> dict[str, object]:
        refuse_differences(largest_differences(hf_outputs(folder, probe), expected, probe.lengths))
        return {}

    with pytest.raises(UserError, match="hidden by .* allowed is 1e-04"):
        write_hf_folder(tmp_path / "out", tensors, MODEL, export_folder, {}, verify)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="rtd"):
        refuse_differences({"mlm": 0.0, "rtd": float("nan")})


def test_qkv_rows_by_an_explicit_index() -> None:
    tensors = trainer_tensors()
    state = hf_state_dict(tensors, MODEL)
    width = MODEL.hidden_size // MODEL.num_attention_heads
    for encoder, target in (("main", "metro"), ("aux", "auxiliary")):
        for kind in ("weight", "bias"):
            mixed = tensors[f"{encoder}.block.layers.1.self_attention.linear_qkv.{kind}"]
            for part, name in enumerate(("query", "key", "value")):
                found = state[f"{target}.encoder.layer.1.attention.{name}.{kind}"]
                for row in range(MODEL.hidden_size):
                    head, inside = divmod(row, width)
                    assert torch.equal(found[row], mixed[head * 3 * width + part * width + inside])


@pytest.mark.parametrize("name", VARIANTS)
def test_padded_vocabulary_is_cut_and_nothing_is_lost(name: str) -> None:
    model = variant(name)
    tensors = {name: tensor.bfloat16() for name, tensor in trainer_tensors(model).items()}
    state = hf_state_dict(tensors, model)
    with torch.device("meta"):
        expected = MetroForPreTraining(metro_config(model)).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {n: tuple(t.shape) for n, t in expected.items()}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    bias = tensors["tied.decoder.bias" if model.shared_lm_bias else "main.clm_head.decoder.bias"]
    assert torch.equal(state["clm_head.decoder.bias"], bias[:VOCAB_SIZE].float())


def test_foreign_tensors_are_all_named() -> None:
    tensors = trainer_tensors()
    tensors["main.block.layers.3.mlp.linear_fc1.bias"] = tensors.pop("aux.table.weight")
    tensors["main.rtd_head.bias"] = torch.zeros(2)
    with pytest.raises(UserError) as raised:
        hf_state_dict(tensors, MODEL)
    text = str(raised.value)
    assert "aux.table.weight is missing" in text
    assert "main.block.layers.3.mlp.linear_fc1.bias is not part" in text
    assert "main.rtd_head.bias has shape (2,), the configuration gives (1,)" in text


def test_tokenizer_of_the_folder_gives_the_trainers_ids(export_folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(export_folder)
    own = Tokenizer.from_folder(export_folder)
    text = "the old cat sees a tree"
    ids = own.encode(text)
    encoded = tokenizer(text, text)
    assert encoded["input_ids"] == [0, *ids, 2, 2, *ids, 2]
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert tokenizer.model_max_length == MODEL.max_position_embeddings
    assert len(tokenizer(text * 50, truncation=True)["input_ids"]) == MODEL.max_position_embeddings


def test_saved_again_and_loaded_again(export_folder: Path, tmp_path: Path, remote_code: None) -> None:
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(export_folder, trust_remote_code=True, num_labels=5).eval()
    model.save_pretrained(tmp_path / "classifier")
    ids = torch.randint(5, VOCAB_SIZE, (2, 9))
    again = auto.from_pretrained(tmp_path / "classifier", trust_remote_code=True).eval()
    assert torch.equal(model(ids).logits, again(ids).logits)
    encoder, report = transformers.AutoModel.from_pretrained(
        tmp_path / "classifier", trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"] | report["unexpected_keys"]
    assert torch.equal(encoder.eval()(ids).last_hidden_state, model.metro(ids).last_hidden_state)


def test_card_and_config(export_folder: Path) -> None:
    card = (export_folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["library_name"] == "transformers"
    assert "| steps | 7 |" in card
    config = json.loads((export_folder / "config.json").read_text())
    assert config["architectures"] == ["MetroForPreTraining"]
    for target in config["auto_map"].values():
        module, name = target.split(".")
        assert f"class {name}(" in (export_folder / f"{module}.py").read_text()


def test_configuration_carries_every_field_of_the_model() -> None:
    odd = ModelConfig(
        hidden_size=36, num_attention_heads=4, ffn_hidden_size=50, num_layers=5, auxiliary_num_layers=2, vocab_size=290,
        max_position_embeddings=33, relative_attention_num_buckets=8, relative_attention_max_distance=19,
        relative_bucket="t5", layer_norm_eps=1e-6, hidden_dropout=0.25, attention_dropout=0.15, init_method_std=0.03,
        scaled_init_targets="residual_out", relative_bias_init="decay", position_init="zero", reset_cls=False,
        norm_first=True, shared_embeddings="token_position_norm", shared_lm_bias=True, embedding_size=31,
        auxiliary_hidden_size=24,
        auxiliary_num_attention_heads=3, auxiliary_ffn_hidden_size=51, rtd_head="dense", lm_head="dense",
    )  # fmt: skip
    values = metro_config(odd).to_dict().values()
    for name, value in vars(odd).items():
        # How the auxiliary was trained; whoever loads a pair has it without dropout.
        assert value in values or name == "auxiliary_dropout"


def test_an_older_configuration_is_of_metro(export_folder: Path, tmp_path: Path) -> None:
    """Folders of before the variants say nothing of them."""
    settings = json.loads((export_folder / "config.json").read_text())
    for name in ("untied_positions", "reset_cls", "norm_first", "shared_embeddings", "shared_lm_bias"):
        del settings[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert MetroConfig.from_pretrained(tmp_path).to_dict() == MetroConfig.from_pretrained(export_folder).to_dict()


def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    folder = write_export(tmp_path)
    before = {path.name for path in folder.iterdir()}
    write_hf_folder(folder, trainer_tensors(seed=1), MODEL, tmp_path / "tokenizer", {})
    assert {path.name for path in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"export", "tokenizer"}
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds 'thesis.tex'"):
        write_hf_folder(folder, trainer_tensors(), MODEL, tmp_path / "tokenizer", {})
    assert (folder / "thesis.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="is a file"):
        write_hf_folder(folder / "thesis.tex", trainer_tensors(), MODEL, tmp_path / "tokenizer", {})
