"""Configurations whose plan is compared with what is really built: one line each, changes of small_config."""

from __future__ import annotations

from typing import Any

Changes = dict[str, dict[str, Any]]

BUILDS: dict[str, Changes] = {
    "METRO": {},
    "another width": {"model": {"ffn_hidden_size": 96, "num_layers": 2, "vocab_size": 384}},
    "t5 buckets": {"model": {"relative_bucket": "t5", "relative_attention_num_buckets": 8}},
    "pre-LN": {"model": {"norm_first": True}},
    "no buckets": {"model": {"relative_bucket": "none"}},
    "no reset": {"model": {"reset_cls": False}},
    "full TUPE": {"model": {"untied_positions": True}},
    "full TUPE alone": {"model": {"untied_positions": True, "relative_bucket": "none", "reset_cls": False}},
    "nothing shared": {"model": {"shared_embeddings": "none"}},
    "shared positions": {"model": {"shared_embeddings": "token_position"}},
    "shared norm": {"model": {"shared_embeddings": "token_position_norm"}},
    "shared bias": {"model": {"shared_lm_bias": True}},
    "narrow auxiliary": {
        "model": {
            "embedding_size": 32,
            "auxiliary_hidden_size": 32,
            "auxiliary_num_attention_heads": 2,
            "auxiliary_ffn_hidden_size": 48,
            "lm_head": "dense",
        }
    },
    "dense heads": {"model": {"rtd_head": "dense", "lm_head": "dense"}},
    "ELECTRA": {
        "model": {
            "embedding_size": 32,
            "rtd_head": "dense",
            "relative_bucket": "none",
            "reset_cls": False,
            "shared_embeddings": "token_position_norm",
        },
        "objective": {"main": ["rtd"]},
    },
    "cloze": {"objective": {"main": ["cloze"]}},
    "replace MLM": {"objective": {"main": ["clm"]}},
    "contrast": {"objective": {"main": ["rtd", "scl"], "scl_crop": 1.0}},
    "plain MLM": {"objective": {"main": ["mlm"]}, "corruption": {"source": "none"}},
    "uniform": {"corruption": {"source": "uniform"}},
    "main proposes": {"corruption": {"source": "main"}},
    "two passes": {"model": {"auxiliary_dropout": "eval"}},
}
