"""Healthy runs of other seeds, rates, sizes, vocabularies, texts and objectives: nothing may be said of them."""

from __future__ import annotations

from metro_megatron.config.phases import Phase
from tests.zoo.lives import Concerns


def from_step(start: int, steps: int, **changed: float) -> Concerns:
    """A phase that changes figures by plan."""
    return {"train": {"train_steps": steps, "phases": [Phase(start=start, **changed)]}}  # type: ignore[arg-type]


HEALTHY: dict[str, Concerns] = {
    "seed 2": {"train": {"seed": 2}},
    "seed 3": {"train": {"seed": 3}},
    "seed 4, steps of tokens": {"train": {"seed": 4, "global_batch_size": 0, "global_batch_tokens": 700}},
    "rate 3e-3": {"optimizer": {"lr": 3e-3}},
    "rate 2e-3, small start": {"optimizer": {"lr": 2e-3}, "model": {"init_method_std": 0.06}},
    "rate 5e-4 of 2000 steps": {"optimizer": {"lr": 5e-4}, "train": {"train_steps": 2000}},
    "warm-up of 200 steps": {"optimizer": {"lr_warmup_steps": 200}, "train": {"train_steps": 2000}},
    "no clipping": {"optimizer": {"clip_grad": 0.0}},
    "128 words": {"model": {"vocab_size": 128}},
    "512 words": {"model": {"vocab_size": 512}},
    "2,048 words": {"model": {"vocab_size": 2048}, "train": {"train_steps": 2000}},
    "width 48": {"model": {"hidden_size": 48, "ffn_hidden_size": 96}},
    "width 64": {"model": {"hidden_size": 64, "ffn_hidden_size": 128}, "optimizer": {"lr": 4e-3}},
    "deeper": {"model": {"num_layers": 4, "auxiliary_num_layers": 2}, "train": {"train_steps": 2000}},
    "steps of 8 samples": {"train": {"global_batch_size": 8, "train_steps": 2000}},
    "steps of 48 samples": {"train": {"global_batch_size": 48}},
    "padded rows, a line a step": {"data": {"row_format": "padded"}, "train": {"log_interval": 1, "train_steps": 2000}},
    "dropout": {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}},
    "pre-LN": {"model": {"norm_first": True}, "optimizer": {"lr": 3e-3}},
    "lambda 50": {"objective": {"rtd_weight": 50.0}, "train": {"train_steps": 2000}},
    "mask rate 0.3": {"objective": {"mask_probability": 0.3}},
    "plain masked language model": {"corruption": {"source": "none"}, "objective": {"main": ["mlm"]}},
    "bf16": {"train": {"precision": "bf16"}},
    "fp16": {"train": {"precision": "fp16"}},
    "fp16 from 2^32": {"train": {"precision": "fp16"}, "optimizer": {"initial_loss_scale": 2.0**32}},
    "early exit": {"early_exit": {"layers": [1]}, "train": {"train_steps": 2000}},
    "unigram replacements": {"corruption": {"source": "unigram"}},
    "a phase of more masks": from_step(60, 240, mask_probability=0.5),
    "a phase of fewer masks": from_step(60, 2000, mask_probability=0.05),
    "a phase of short samples": from_step(60, 240, seq_length=12),
    "a temperature that falls": {"corruption": {"temperature": 4.0, "temperature_schedule": "exponential"}},
    "a temperature that falls in a line": {"corruption": {"temperature": 2.0, "temperature_schedule": "linear"}},
    "cosine": {"optimizer": {"lr_decay_style": "cosine"}},
    "WSD": {"optimizer": {"lr_decay_style": "1-sqrt", "lr_decay_steps": "20%"}},
    "Muon for both": {
        "optimizer": {"matrices": "muon", "muon_lr": 0.005, "auxiliary_matrices": "muon", "auxiliary_muon_lr": 0.02},
        "train": {"train_steps": 2000},
    },
    "a schedule for the auxiliary": {
        "optimizer": {"auxiliary_lr": 2e-3, "auxiliary_lr_schedule": "0 -> 1 at 10% -> 0 at 60%"}
    },
    "rate 1e-4 of 2000 steps": {"optimizer": {"lr": 1e-4}, "train": {"train_steps": 2000}},
    "many micro batches": {"data": {"micro_batch_tokens": 128}},
    "no wrong word is passed over": {"corruption": {"disallow_correct": True}, "train": {"train_steps": 2000}},
    "main corrupts": {"corruption": {"source": "main", "main_layer": 1}},
    "detection alone": {"objective": {"main": ["rtd"]}},
    "correction alone": {"objective": {"main": ["clm"]}},
    "three phases": {
        "train": {
            "phases": [
                Phase(start=50, mask_probability=0.4),
                Phase(start=110, seq_length=20, lr_factor=0.5),
                Phase(start=160, mask_probability=0.15),
            ]
        }
    },
    "untied positions": {"model": {"relative_bucket": "t5", "untied_positions": True}},
    "nothing shared": {"model": {"shared_embeddings": "none"}},
    "steps passed over": {"train": {"skip_steps": ["20-25"]}},
    "40 words": {"model": {"vocab_size": 40}},
    "COCO-LM's losses": {"objective": {"main": ["rtd", "clm", "scl"], "clm": "mixture"}},
}
