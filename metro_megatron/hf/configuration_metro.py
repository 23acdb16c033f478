"""Configuration of METRO-LM encoders for transformers."""

from typing import Any

from transformers import PretrainedConfig


class MetroConfig(PretrainedConfig):
    """Sizes of the pair: the main encoder, and the shallower auxiliary encoder it was pretrained with.

    num_auxiliary_layers 0 means that there is no auxiliary. objectives are what main was pretrained with, "rtd", "clm",
    "cloze", "scl" or "mlm", as the trainer names them; None means METRO's, ["rtd", "clm"].
    relative_bucket is "coco" or "t5"; scaled_init_targets is "ffn", "ffn_out", "residual_out" or "none",
    relative_bias_init "normal" or "decay"; both matter only where weights start at random. classifier_dropout
    None means hidden_dropout_prob. Dropout belongs to the main encoder; the auxiliary has none. Raises ValueError
    when heads do not divide the width or a choice is unknown.
    """

    model_type = "metro"

    def __init__(
        self,
        vocab_size: int = 128000,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_auxiliary_layers: int = 4,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 512,
        relative_attention_num_buckets: int = 64,
        relative_attention_max_distance: int = 128,
        relative_bucket: str = "coco",
        layer_norm_eps: float = 1e-5,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        classifier_dropout: float | None = None,
        initializer_range: float = 0.02,
        scaled_init_targets: str = "ffn",
        relative_bias_init: str = "normal",
        objectives: list[str] | None = None,
        mask_token_id: int = 4,
        bos_token_id: int = 0,
        pad_token_id: int = 1,
        eos_token_id: int = 2,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}"
            )
        if relative_bucket not in ("coco", "t5"):
            raise ValueError(f"relative_bucket is {relative_bucket!r}; choose 'coco' or 't5'")
        if scaled_init_targets not in ("ffn", "ffn_out", "residual_out", "none"):
            raise ValueError(
                f"scaled_init_targets is {scaled_init_targets!r}; choose 'ffn', 'ffn_out', 'residual_out' or 'none'"
            )
        if relative_bias_init not in ("normal", "decay"):
            raise ValueError(f"relative_bias_init is {relative_bias_init!r}; choose 'normal' or 'decay'")
        objectives = ["rtd", "clm"] if objectives is None else objectives
        unknown = set(objectives) - {"rtd", "clm", "cloze", "scl", "mlm"}
        if unknown:
            raise ValueError(f"objectives has {sorted(unknown)}; choose among 'rtd', 'clm', 'cloze', 'scl' and 'mlm'")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_auxiliary_layers = num_auxiliary_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.relative_attention_num_buckets = relative_attention_num_buckets
        self.relative_attention_max_distance = relative_attention_max_distance
        self.relative_bucket = relative_bucket
        self.layer_norm_eps = layer_norm_eps
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.initializer_range = initializer_range
        self.scaled_init_targets = scaled_init_targets
        self.relative_bias_init = relative_bias_init
        self.objectives = objectives
        self.mask_token_id = mask_token_id
        kwargs["bos_token_id"] = bos_token_id
        kwargs["pad_token_id"] = pad_token_id
        kwargs["eos_token_id"] = eos_token_id
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)
