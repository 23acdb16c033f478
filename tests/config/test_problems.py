from dataclasses import replace
from typing import Any

import pytest

from metro_megatron.cli.options import options_of
from metro_megatron.config.phases import Phase
from metro_megatron.config.problems import problems
from metro_megatron.config.schema import Config


def configured(**changes: Any) -> Config:
    """A sound configuration with changes by the leaf's name, `data__train=[...]`."""
    config = Config()
    for name, value in {"data__train": ["x"], "train__output": "out", **changes}.items():
        section, _, leaf = name.partition("__")
        config = replace(config, **{section: replace(getattr(config, section), **{leaf: value})})
    return config


TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
COOLING = {"corruption__temperature_schedule": "exponential", "corruption__temperature": 2.0}
FP8 = {"train__fp8_recipe": "tensorwise"}
SELECTIVE, MODULES = {"parallel__recompute": "selective"}, "parallel__recompute_modules"
VPP, LAYOUT = "parallel__virtual_pipeline_model_parallel_size", "parallel__pipeline_model_parallel_layout"


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (64, {}),
        (1, {"optimizer__auxiliary_lr_schedule": "0 -> 1 at 5% -> 0 at 60%"}),
        (2048, {"train__global_batch_size": 2048}),
        (8, {TP: 4, PP: 2, "parallel__sequence_parallel": True}),
        (6, {TP: 3, "model__vocab_size": 3 * 128 - 1, "train__global_batch_size": 7}),
        (8, {PP: 2, VPP: 3}),
        (5, {PP: 5}),
        (1, SELECTIVE),
        (1, {**SELECTIVE, MODULES: ["core_attn", "layernorm", "mlp"], "model__norm_first": True}),
        (2, {PP: 2, VPP: 4}),
        (2, {PP: 2, LAYOUT: "Et*7|t*5L"}),
        (3, {}),
        (3, {"data__row_format": "padded"}),
        (32, {PP: 4, VPP: 3, "train__global_batch_tokens": 1 << 14}),
        (8, {"data__row_format": "padded", "data__micro_batch_size": 256}),
        (1, {"data__row_format": "padded", "data__micro_batch_tokens": 1}),
        (1, {"data__seq_length": 4, "model__max_position_embeddings": 4, "data__micro_batch_tokens": 4}),
        (1, {"optimizer__lr_warmup_steps": 125000, "optimizer__clip_grad": 0.0, "train__eval_interval": 0}),
        (1, {"train__precision": "bf16", "train__device": "cpu"}),
        (1, {"optimizer__auxiliary_matrices": "muon", "optimizer__muon_momentum": 0.9}),
        (1, {"train__precision": "fp16"}),
        (1, {"model__embedding_size": 128, "model__lm_head": "dense", "model__rtd_head": "dense"}),
        (2, {TP: 2, "model__auxiliary_hidden_size": 256, "model__auxiliary_num_attention_heads": 4}),
        (1, {"objective__keep_probability": 0.1, "objective__random_probability": 0.9}),
        (1, {"model__relative_bucket": "t5", "model__relative_attention_max_distance": 17}),
        (1, {"model__untied_positions": True, "model__relative_bucket": "none", "model__reset_cls": False}),
        (1, {"model__relative_bucket": "none", "model__relative_attention_num_buckets": 33}),
        (1, {"model__shared_embeddings": "token_position_norm", "model__shared_lm_bias": True}),
        (1, {"model__shared_embeddings": "token_position", "corruption__source": "uniform"}),
        (1, {"data__validation_fraction": 0.5}),
        (1, {"data__validation": ["y"]}),
        (1, {"objective__main": ["scl", "rtd"], "objective__scl_negatives": "all_ranks"}),
        (1, {"objective__main": ["mlm"], "corruption__source": "none", "objective__mask_probability": 0.4}),
        (1, {"objective__main": ["clm", "rtd"], "objective__clm": "mixture"}),
        (1, {"corruption__source": "uniform", "corruption__disallow_correct": True}),
        (1, {"corruption__source": "unigram", "corruption__unigram_power": 0.5}),
        (1, {"corruption__temperature": 1.5, "model__auxiliary_dropout": "eval"}),
        (2, {TP: 2, "parallel__sequence_parallel": True, "train__fp8_recipe": "tensorwise"}),
        (1, {"corruption__source": "frozen", "corruption__frozen_model": "x", **COOLING}),
        (1, {"corruption__source": "cached", "corruption__cache": "x", "corruption__frozen_model": "y", **COOLING}),
        (2, {TP: 2, "early_exit__layers": [4, 8], "parallel__recompute": "full"}),
        (2, {PP: 2, "early_exit__share": "nonsense"}),  # read by nobody without early_exit.layers
    ],
)
def test_sound_configurations_have_no_problems(world_size, changes):
    assert problems(configured(**changes), world_size) == []


@pytest.mark.parametrize(
    ("world_size", "changes", "expected"),
    [
        (1, {"objective__main": []}, ["objective.main is empty; name what main learns"]),
        (1, {"objective__main": ["rtd", "rtd"]}, ["main is rtd rtd, which names a loss twice"]),
        (1, {"objective__main": ["mlm"]}, ["source is auxiliary, but objective.main mlm reads masked text"]),
        (1, {"objective__clm": "mixture", "objective__main": ["clm"]}, ["clm is mixture, which weighs clm"]),
        (1, {"objective__main": ["rtd"], "corruption__source": "none"}, ["source is none, but objective.main rtd"]),
        (1, {"objective__main": ["cloze"], "corruption__source": "uniform"}, ["uniform, but the candidates of"]),
        (1, {"objective__main": ["cloze"], "model__vocab_size": 7}, ["vocab_size is 7", "three words; use 8 or more"]),
        (1, {"model__num_attention_heads": 7}, ["num_attention_heads is 7, must divide model.hidden_size 768: 1, 2"]),
        (
            1,
            {"model__auxiliary_hidden_size": 256},
            ["auxiliary_num_attention_heads is 12, must divide model.auxiliary_hidden_size 256: 1, 2, 4"],
        ),
        (1, {"model__embedding_size": 128}, ["lm_head is linear", "128 is not model.hidden_size 768", "lm_head dense"]),
        (
            2,
            {TP: 2, "model__auxiliary_hidden_size": 64, "model__auxiliary_num_attention_heads": 1},
            ["size is 2, must divide model.auxiliary_num_attention_heads 1: 1"],
        ),
        (1, {"objective__keep_probability": 0.7, "objective__random_probability": 0.6}, ["0.7", "0.6", "sum 1.3"]),
        (3, {TP: 3, "model__ffn_hidden_size": 1024}, ["must divide model.ffn_hidden_size 1024", "128, 128000: 1, 2"]),
        (8, {TP: 8}, ["size is 8, must divide model.num_attention_heads 12: 1, 2, 3, 4, 6 or 12"]),
        (13, {PP: 13}, ["num_layers is 12, less than one layer for each of 13 chunks", "use fewer"]),
        (2, {PP: 2, VPP: 7}, ["num_layers is 12, less than one layer for each of 14 chunks"]),
        (2, {PP: 2, LAYOUT: "ttt|tttL"}, ["pipeline_model_parallel_layout: ttt|tttL is no layout", "Ettt|tL gives"]),
        (2, {PP: 2, LAYOUT: "Et*6|t*3|t*3L"}, ["pipeline_model_parallel_layout has 3 chunks, but there are 2 chunks"]),
        (2, {PP: 2, LAYOUT: "Et*6|t*5L"}, ["pipeline_model_parallel_layout has 11 layers, but model.num_layers is 12"]),
        (1, {MODULES: ["mlp"]}, ["recompute_modules is mlp, which parallel.recompute none does not", "leave it out"]),
        (1, {**SELECTIVE, MODULES: []}, ["recompute_modules is empty; name what is recomputed", "recompute none"]),
        (1, {**SELECTIVE, MODULES: ["mlp", "mlp_act"]}, ["has mlp and mlp_act, which is a part of it"]),
        (1, {**SELECTIVE, MODULES: ["layernorm"]}, ["has layernorm, but model.norm_first is false", "leave it out"]),
        (1, {VPP: 2}, ["virtual_pipeline_model_parallel_size is 2, but there is one pipeline stage; use 1"]),
        (6, {TP: 2, PP: 2}, ["6 processes, must be a multiple of 4", "start 8"]),
        (1, {PP: 2}, ["1 processes, must be a multiple of 2", "start 2"]),
        (1, {"parallel__sequence_parallel": True}, ["sequence_parallel needs", "sequence_parallel false"]),
        (
            4,
            {**FP8, TP: 4, "parallel__sequence_parallel": True, "data__micro_batch_tokens": 16400},
            ["micro_batch_tokens is 16400, with train.fp8_recipe tensorwise", "must be a multiple of 64; use 16384"],
        ),
        (
            4,
            {**FP8, TP: 4, "model__ffn_hidden_size": 3088},
            ["tensorwise, but model.ffn_hidden_size is 3088, must be a multiple of 64: 16 x parallel.tensor"],
        ),
        (
            1,
            {**FP8, "parallel__transformer_impl": "local"},
            ["parallel.transformer_impl is local, whose layers compute nothing in FP8"],
        ),
        (1, {**FP8, "train__precision": "fp16"}, ["fp8_recipe is tensorwise, but train.precision is fp16"]),
        (1, {**FP8, "corruption__source": "main"}, ["fp8_recipe is tensorwise, but with corruption.source main"]),
        (1, {**FP8, "early_exit__layers": [6]}, ["fp8_recipe is tensorwise, but behind early exits"]),
        (
            2,
            {TP: 2, "parallel__sequence_parallel": True, "data__micro_batch_tokens": 16383},
            ["micro_batch_tokens is 16383", "multiple of parallel.tensor_model_parallel_size 2; use 16384"],
        ),
        (
            4,
            {
                TP: 4,
                "parallel__sequence_parallel": True,
                "data__seq_length": 510,
                "data__row_format": "padded",
            },
            ["data.seq_length is 510", "use 512"],
        ),
        (1, {"data__seq_length": 513}, ["seq_length is 513, model.max_position_embeddings only 512"]),
        (1, {"data__micro_batch_tokens": 256}, ["micro_batch_tokens is 256", "data.seq_length 512"]),
        (
            3,
            {"data__row_format": "padded", "train__global_batch_size": 2048},
            ["global_batch_size is 2048, must be divisible by 96", "3 data-parallel ranks; use 2016"],
        ),
        (
            4096,
            {},
            ["global_batch_tokens is 1048576, less than one sample of data.seq_length 512 for each of 4096 data-"],
        ),
        (
            32,
            {PP: 4, VPP: 3, "train__global_batch_tokens": 1 << 13},
            ["global_batch_tokens is 8192", "4 micro batches, one for each pipeline stage, on each of 8", "use 16384"],
        ),
        (
            32,
            {PP: 4, VPP: 3, "train__global_batch_size": 31},
            ["global_batch_size is 31, less than", "use 32 or more (192 are enough for full rows), or start fewer"],
        ),
        (1, {"train__global_batch_size": -1}, ["global_batch_size is -1, must be at least 0"]),
        (4, {"train__global_batch_size": 3}, ["global_batch_size is 3, less than one sample for each of 4"]),
        (1, {"model__relative_attention_num_buckets": 33}, ["num_buckets is 33, must be even; use 34"]),
        (1, {"model__relative_attention_max_distance": 17}, ["max_distance is 17, must be greater than 17"]),
        (
            1,
            {"model__relative_bucket": "none", "model__relative_bias_init": "decay"},
            ["relative_bias_init is decay, but model.relative_bucket none leaves no biases to start; use normal"],
        ),
        (
            1,
            {"model__untied_positions": True, "model__position_init": "zero"},
            ["position_init is zero, but with model.untied_positions a norm reads the positions", "use normal"],
        ),
        (
            1,
            {"model__untied_positions": True, "model__shared_embeddings": "token_position"},
            ["shared_embeddings is token_position, but with model.untied_positions the", "use token or none"],
        ),
        (
            1,
            {"objective__main": ["scl"], "data__row_format": "padded", "data__micro_batch_size": 1},
            ["data.micro_batch_size is 1, but objective.main scl compares a sample with others of its micro batch;"],
        ),
        (
            1,
            {"objective__main": ["rtd", "scl"], "objective__rtd_weight": 0.0, "objective__scl_weight": 0.0},
            ["objective.rtd_weight is 0, and main learns nothing else; give it a weight"],
        ),
        (
            1,
            {"model__shared_lm_bias": True, "objective__main": ["rtd", "scl"]},
            ["shared_lm_bias needs a language modelling head on main, objective.main is rtd, scl; add clm, or set"],
        ),
        (
            1,
            {"model__shared_lm_bias": True, "objective__main": ["rtd", "clm", "cloze"]},
            ["is for two language models, objective.main rtd, clm, cloze has cloze, whose bias is its own; leave"],
        ),
        (
            1,
            {"model__shared_lm_bias": True, "corruption__source": "uniform"},
            ["shared_lm_bias needs an auxiliary model that trains, corruption.source is uniform; set"],
        ),
        (
            1,
            {"optimizer__auxiliary_lr": 1e-3, "corruption__source": "uniform"},
            ["auxiliary_lr is 0.001, but with corruption.source uniform no auxiliary is trained; leave"],
        ),
        (1, {"optimizer__auxiliary_lr_schedule": "0 -> 2 at 10%"}, ["optimizer.auxiliary_lr_schedule"]),
        (1, {"optimizer__auxiliary_lr_schedule": "often"}, ["auxiliary_lr_schedule: 'often' is not a point of"]),
        (1, {"optimizer__muon_lr": 1e-2}, ["muon_lr is 0.01, which adam does not read", "set optimizer.matrices muon"]),
        (
            1,
            {"optimizer__auxiliary_muon_lr": 1e-2, "optimizer__matrices": "muon"},
            ["optimizer.auxiliary_muon_lr is 0.01, which adam does not read", "optimizer.auxiliary_matrices muon"],
        ),
        (
            1,
            {
                "optimizer__matrices": "muon",
                "train__precision": "fp16",
                "parallel__grad_reduce_in_fp32": False,
            },
            ["grad_reduce_in_fp32 is false, but Muon's directions", "train.precision fp16; set it true, or use bf16"],
        ),
        (1, {"train__train_steps": 9999}, ["lr_warmup_steps is 10000, more than train.train_steps 9999"]),
        (1, {"optimizer__min_loss_scale": 2.0**17}, ["initial_loss_scale is 65536, less than"]),
        (1, {"train__precision": "fp16", "train__device": "cpu"}, ["fp16, which needs a GPU; on the cpu use"]),
        (1, {"data__train": []}, ["data.train is empty", "--data.train PREFIX"]),
        (1, {"train__output": ""}, ["train.output is empty", "--train.output DIR"]),
        (1, {"corruption__source": "frozen"}, ["source is frozen, but corruption.frozen_model is empty; name"]),
        (1, {"corruption__source": "cached"}, ["source is cached, but corruption.cache is empty; name"]),
        (1, {"corruption__frozen_model": "x"}, ["frozen_model is x, which corruption.source auxiliary does not read"]),
        (1, {"corruption__cache": "x"}, ["cache is x, which corruption.source auxiliary", "set the source to cached"]),
        (1, {"corruption__unigram_power": 2.0}, ["unigram_power is 2.0, which", "set the source to unigram"]),
        (1, {"corruption__main_layer": 3}, ["main_layer is 3, which corruption.source auxiliary", "to main"]),
        (
            1,
            {"corruption__source": "uniform", "corruption__temperature": 2.0},
            ["temperature is 2.0, which corruption.source uniform does not read; leave it out"],
        ),
        (
            1,
            {"objective__main": ["mlm"], "corruption__source": "none", "corruption__disallow_correct": True},
            ["disallow_correct is True, which"],
        ),
        (
            1,
            {"corruption__disallow_correct": True, "model__vocab_size": 6},
            ["model.vocab_size 6 has no second word", "of 7 or more"],
        ),
        (1, {"corruption__temperature_tau": 0.2}, ["temperature_tau is 0.2, which", "constant does not read"]),
        (1, {**COOLING, "corruption__temperature_power": 3.0}, ["temperature_power is 3, which", "to polynomial"]),
        (1, {"corruption__final_temperature": 0.5}, ["final_temperature is 0.5, but", "schedule is constant"]),
        (
            1,
            {**COOLING, "corruption__final_temperature": 2.5},
            ["temperature is 2, must be greater than corruption.final_temperature 2.5", "exponential schedule falls"],
        ),
        (
            1,
            {"model__auxiliary_dropout": "train", "corruption__source": "uniform"},
            ["auxiliary_dropout is train, but with corruption.source uniform no auxiliary is trained"],
        ),
        (1, {"corruption__source": "main", "corruption__main_layer": 13}, ["main_layer is 13, but main has 12 layers"]),
        (2, {"corruption__source": "main", PP: 2}, ["source is main, but parallel.pipeline_model_parallel_size is 2"]),
        (1, {"data__validation": ["y"], "data__validation_fraction": 0.1}, ["validation_fraction is 0.1; use one"]),
        (1, {"train__probe_interval": 5}, ["train.probe_interval is 5, but train.probe_tasks is empty; give a folder"]),
        (1, {"train__probe_tasks": "tasks"}, ["probe_tasks is tasks, but train.probe_interval is 0", "or leave"]),
        (1, {"model__hidden_size": 0}, ["model.hidden_size is 0, must be at least 1"]),
        (1, {TP: 0}, ["tensor_model_parallel_size is 0, must be at least 1"]),
        (1, {"data__seq_length": 2}, ["data.seq_length is 2, must be at least 3"]),
        (1, {"objective__mask_probability": 0.0}, ["mask_probability is 0.0, must be greater than 0 and less than 1"]),
        (1, {"model__hidden_dropout": 1.0}, ["hidden_dropout is 1.0, must be at least 0 and less than 1"]),
        (1, {"optimizer__lr": float("nan")}, ["optimizer.lr is nan, must be finite and greater than 0"]),
        (1, {"optimizer__lr": float("inf")}, ["optimizer.lr is inf, must be finite and greater than 0"]),
        (1, {"train__seed": -1}, ["train.seed is -1, must be at least 0"]),
        (1, {"train__log_interval": 0}, ["train.log_interval is 0, must be at least 1"]),
        (1, {"early_exit__layers": [4, 12]}, ["early_exit.layers has 12, must be at least 1", "num_layers 12, behind"]),
        (1, {"early_exit__layers": [8, 4, 8]}, ["early_exit.layers is 8 4 8, must ascend, each once: 4 8"]),
        (1, {"early_exit__layers": [4], "objective__main": ["clm"]}, ["objective.main is clm", "add rtd, or leave"]),
        (1, {"early_exit__layers": [4], "early_exit__share": 1.0}, ["share is 1, must be at least 0 and less than 1"]),
        (1, {"early_exit__layers": [4], "early_exit__share": "0 0.5"}, ["early_exit.share: '0 0.5' is not a point"]),
        (1, {"early_exit__layers": [4], "early_exit__weight": -1.0}, ["early_exit.weight is -1.0, must be at least 0"]),
        (2, {"early_exit__layers": [4], PP: 2}, ["pipeline_model_parallel_size is 2, with early_exit.layers", "stage"]),
        (
            2,
            {"early_exit__layers": [4], TP: 2, "parallel__sequence_parallel": True},
            ["sequence_parallel is true, with early_exit.layers it must be false", "set it false, or leave"],
        ),
    ],
)  # fmt: skip
def test_each_mistake_is_named_with_value_limit_and_remedy(world_size, changes, expected):
    found = problems(configured(**changes), world_size)
    assert len(found) == 1 or TP in changes, found
    for part in expected:
        assert any(part in problem for problem in found), (part, found)


def test_a_resolved_device_counts():
    assert problems(configured(train__precision="fp16"), 1, device="cuda") == []
    assert "fp16" in problems(configured(train__precision="fp16"), 1, device="cpu")[0]
    assert "finds no GPU" in problems(configured(train__precision="bf16"), 1, device="cpu")[0]
    assert problems(configured(train__precision="bf16", train__device="cpu"), 1, device="cpu") == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__num_attention_heads": 16}, "is 48, the attention kernels have 32, 64, 128; change model.num_att"),
        ({"model__auxiliary_hidden_size": 192}, "is 16, the attention kernels have 32, 64, 128; change model.aux"),
        ({"model__hidden_size": 32768, "model__num_attention_heads": 256}, "LayerNorm kernels take at most 16384"),
        ({"model__embedding_size": 32768, "model__lm_head": "dense"}, "model.embedding_size is 32768, the LayerNorm"),
        (
            {"data__seq_length": 40000, "model__max_position_embeddings": 40000, "data__micro_batch_tokens": 131072},
            "data.seq_length is 40000, the attention kernels take at most 32768",
        ),
    ],
)
def test_what_the_kernels_cannot_do_is_said_before_a_gpu_is_touched(changes, message):
    found = problems(configured(**changes), 1, device="cuda")
    assert len(found) == 1 and message in found[0] and "set train.fused to reference" in found[0]
    assert problems(configured(train__device="cpu", **changes), 1, device="cpu") == []
    assert problems(configured(train__fused="reference", **changes), 1, device="cuda") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__transformer_impl": "transformer_engine"}, "on the cpu use auto or local"),
        (FP8, "train.fp8_recipe is tensorwise, which needs a GPU; on the cpu set it none"),
        ({"optimizer__adam_impl": "apex"}, "optimizer.adam_impl is apex, which needs a GPU; on the cpu use torch"),
    ],
)
def test_libraries_for_gpus_are_refused_on_the_cpu(changes, message):
    config = configured(**changes)
    assert problems(config, 1, "cuda") == []
    assert any(message in found for found in problems(config, 1, "cpu"))


def test_everything_wrong_is_said_together():
    config = configured(
        corruption__source="frozen",
        corruption__unigram_power=2.0,
        model__auxiliary_dropout="train",
        model__num_attention_heads=7,
        data__train=[],
        train__output="",
        optimizer__lr_warmup_steps=10**6,
        data__seq_length=1024,
        parallel__sequence_parallel=True,
        train__precision="fp16",
        train__device="cpu",
    )
    assert len(problems(config, 1)) == 10
    exits = configured(
        early_exit__layers=[0, 12, 9],
        early_exit__share="0.2 -> 1.5 at 10%",
        objective__main=["clm"],
        parallel__pipeline_model_parallel_size=2,
        parallel__sequence_parallel=True,
    )
    assert len([problem for problem in problems(exits, 2) if "early_exit" in problem]) == 7


def test_every_number_has_a_range():
    for option in options_of(Config):
        assert (option.range is not None) == (option.annotation in (int, float)), option.name
        assert option.range is None or option.default in option.range, option.name


def test_contradictory_objectives_are_all_named():
    changes = {"objective__main": ["mlm", "rtd", "mlm"], "objective__clm": "weighted", "corruption__source": "none"}
    twice, alone, copies = problems(configured(**changes), 1)
    assert "main is mlm rtd mlm, which names a loss twice" in twice
    assert "mlm reads masked text and the others corrupted text; use mlm alone" in alone
    assert "clm is weighted, which weighs clm by what rtd says" in copies


def test_phases_are_checked_in_one_go() -> None:
    phases = [
        Phase("90%", seq_length=1024, lr_factor=-1.0),
        Phase("50%", mask_probability=1.0),
        Phase("60%", seq_length=1024),
        Phase("soon", seq_length=2),
        Phase(125000, weights=[-1.0]),
    ]
    config = configured(train__phases=phases, optimizer__lr_decay_steps="many", data__micro_batch_tokens=600)
    longer = "data.seq_length is 1024, model.max_position_embeddings only 512; lower the first or raise the second"
    row = (
        "data.micro_batch_tokens is 600, but a row must hold one sample of data.seq_length 1024; raise the first to "
        "1024 or more, or lower the second"
    )
    limit = "must be above 112,500, where what is before it begins, and below train.train_steps 125,000"
    assert problems(config, 1) == [
        "optimizer.lr_decay_steps: 'many' is neither a number of steps nor a share of the run; write 5000 or 10%",
        "phase 1 of train.phases: lr_factor is -1.0, must be at least 0",
        "phase 2 of train.phases: mask_probability is 1.0, must be at least 0 and less than 1",
        f"phase 2 of train.phases: start is 50%, step 62,500; {limit}",
        f"phase 3 of train.phases: {longer}",
        f"phase 3 of train.phases: {row}",
        f"phase 3 of train.phases: start is 60%, step 75,000; {limit}",
        "phase 4 of train.phases: data.seq_length is 2, must be at least 3",
        "phase 4 of train.phases: start: 'soon' is neither a number of steps nor a share of the run; write 5000 or 10%",
        f"phase 5 of train.phases: start is 125000, step 125,000; {limit}",
    ]
    decay = problems(configured(optimizer__lr_decay_steps=125001), 1)
    assert decay == [
        "optimizer.lr_decay_steps is 125001, more than train.train_steps 125000; lower it, or give a share such as 10%"
    ]
    cached = configured(train__phases=[Phase(5)], corruption__source="cached", corruption__cache="x")
    assert any("caches are of runs without phases" in one for one in problems(cached, 1))
