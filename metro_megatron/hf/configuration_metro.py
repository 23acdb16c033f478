"""Configuration of METRO-LM encoders for transformers."""

from typing import Any, NamedTuple

from transformers import PretrainedConfig


class EncoderSizes(NamedTuple):
    """The sizes of one encoder of the pair."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int


MODELS = {
    "AutoModel": "MetroModel",
    "AutoModelForPreTraining": "MetroForPreTraining",
    "AutoModelForMaskedLM": "MetroForMaskedLM",
    "AutoModelForSequenceClassification": "MetroForSequenceClassification",
    "AutoModelForTokenClassification": "MetroForTokenClassification",
    "AutoModelForMultipleChoice": "MetroForMultipleChoice",
    "AutoModelForQuestionAnswering": "MetroForQuestionAnswering",
    "MetroForAuxiliaryMaskedLM": "MetroForAuxiliaryMaskedLM",
    "MetroForReplacedTokenDetection": "MetroForReplacedTokenDetection",
}
"""Class of modeling_metro.py by what asks for it: an Auto class, or the name of one that no Auto class stands for."""


class MetroConfig(PretrainedConfig):
    """Sizes of the pair: the main encoder, and the auxiliary encoder, shallower in METRO, it was pretrained with.

    num_auxiliary_layers 0 means that there is no auxiliary. objectives are what main was pretrained with, "rtd", "clm",
    "cloze", "scl" or "mlm", as the trainer names them; None means METRO's, ["rtd", "clm"].
    The auxiliary's sizes are main's where they are 0; embedding_size is the width of the token and position
    embeddings, 0 for hidden_size. rtd_head and lm_head are "linear", or "dense" with a layer and GELU before it.
    relative_bucket is "coco", "t5" or "none"; untied_positions: scores have a term of absolute positions, the input
    has none (TUPE); reset_cls: <s> has position biases of its own. norm_first: pre-LN and a last norm.
    shared_embeddings is "none", "token", "token_position" or "token_position_norm"; shared_lm_bias: both language
    modeling heads have one bias. scaled_init_targets is "ffn", "ffn_out", "residual_out" or "none", relative_bias_init
    "normal" or "decay", position_init "normal" or "zero"; they matter only where weights start at random.
    rtd_weight and clm_weight are those of the losses in a pair's whole loss (METRO eq. 9), mask_probability is the
    share of masked tokens that it was pretrained with.
    other_special_ids: of tokens that are no words either, such as <unk>; [3] if None.
    classifier_dropout None means hidden_dropout_prob. Dropout belongs to the main encoder; the auxiliary has none.
    Raises ValueError when heads do not divide a width, a choice is unknown, or positions shall be shared that the input
    does not have.
    """

    model_type = "metro"
    _auto_class = "AutoConfig"

    def __init__(
        self,
        vocab_size: int = 128000,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_auxiliary_layers: int = 4,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        embedding_size: int = 0,
        auxiliary_hidden_size: int = 0,
        auxiliary_num_attention_heads: int = 0,
        auxiliary_ffn_hidden_size: int = 0,
        rtd_head: str = "linear",
        lm_head: str = "linear",
        max_position_embeddings: int = 512,
        relative_attention_num_buckets: int = 64,
        relative_attention_max_distance: int = 128,
        relative_bucket: str = "coco",
        untied_positions: bool = False,
        reset_cls: bool = True,
        norm_first: bool = False,
        shared_embeddings: str = "token",
        shared_lm_bias: bool = False,
        layer_norm_eps: float = 1e-5,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        classifier_dropout: float | None = None,
        initializer_range: float = 0.02,
        scaled_init_targets: str = "ffn",
        relative_bias_init: str = "normal",
        position_init: str = "normal",
        objectives: list[str] | None = None,
        rtd_weight: float = 50.0,
        clm_weight: float = 1.0,
        mask_probability: float = 0.15,
        mask_token_id: int = 4,
        bos_token_id: int = 0,
        pad_token_id: int = 1,
        eos_token_id: int = 2,
        other_special_ids: list[int] | None = None,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        if relative_bucket not in ("coco", "t5", "none"):
            raise ValueError(f"relative_bucket is {relative_bucket!r}; choose 'coco', 't5' or 'none'")
        if shared_embeddings not in ("none", "token", "token_position", "token_position_norm"):
            raise ValueError(
                f"shared_embeddings is {shared_embeddings!r}; choose 'none', 'token', 'token_position' or "
                "'token_position_norm'"
            )
        if untied_positions and shared_embeddings not in ("none", "token"):
            raise ValueError(
                f"shared_embeddings is {shared_embeddings!r}, but with untied_positions the input has no positions; "
                "choose 'none' or 'token'"
            )
        if scaled_init_targets not in ("ffn", "ffn_out", "residual_out", "none"):
            raise ValueError(
                f"scaled_init_targets is {scaled_init_targets!r}; choose 'ffn', 'ffn_out', 'residual_out' or 'none'"
            )
        if relative_bias_init not in ("normal", "decay"):
            raise ValueError(f"relative_bias_init is {relative_bias_init!r}; choose 'normal' or 'decay'")
        if position_init not in ("normal", "zero"):
            raise ValueError(f"position_init is {position_init!r}; choose 'normal' or 'zero'")
        objectives = ["rtd", "clm"] if objectives is None else objectives
        unknown = set(objectives) - {"rtd", "clm", "cloze", "scl", "mlm"}
        if unknown:
            raise ValueError(f"objectives has {sorted(unknown)}; choose among 'rtd', 'clm', 'cloze', 'scl' and 'mlm'")
        for name, head in (("rtd_head", rtd_head), ("lm_head", lm_head)):
            if head not in ("linear", "dense"):
                raise ValueError(f"{name} is {head!r}; choose 'linear' or 'dense'")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_auxiliary_layers = num_auxiliary_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.embedding_size = embedding_size
        self.auxiliary_hidden_size = auxiliary_hidden_size
        self.auxiliary_num_attention_heads = auxiliary_num_attention_heads
        self.auxiliary_ffn_hidden_size = auxiliary_ffn_hidden_size
        self.rtd_head = rtd_head
        self.lm_head = lm_head
        self.max_position_embeddings = max_position_embeddings
        self.relative_attention_num_buckets = relative_attention_num_buckets
        self.relative_attention_max_distance = relative_attention_max_distance
        self.relative_bucket = relative_bucket
        self.untied_positions = untied_positions
        self.reset_cls = reset_cls
        self.norm_first = norm_first
        self.shared_embeddings = shared_embeddings
        self.shared_lm_bias = shared_lm_bias
        self.layer_norm_eps = layer_norm_eps
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.initializer_range = initializer_range
        self.scaled_init_targets = scaled_init_targets
        self.relative_bias_init = relative_bias_init
        self.position_init = position_init
        self.objectives = objectives
        self.rtd_weight = rtd_weight
        self.clm_weight = clm_weight
        self.mask_probability = mask_probability
        self.mask_token_id = mask_token_id
        self.other_special_ids = [3] if other_special_ids is None else other_special_ids
        for prefix, sizes in (("", self.main), ("auxiliary_", self.auxiliary)):
            if sizes.hidden_size % sizes.num_attention_heads:
                raise ValueError(
                    f"{prefix}hidden_size {sizes.hidden_size} is not a multiple of {prefix}num_attention_heads "
                    f"{sizes.num_attention_heads}"
                )
        # A class that was saved says itself what its folder loads as; the code stands in that folder, whatever the
        # repository that it came from.
        given = {name: target.rpartition("--")[2] for name, target in kwargs.pop("auto_map", {}).items()}
        kwargs["auto_map"] = self._auto_map() | given
        # Never None: where an Auto class stands for two of ours, transformers goes through them.
        kwargs["architectures"] = kwargs.get("architectures") or []
        kwargs["bos_token_id"] = bos_token_id
        kwargs["pad_token_id"] = pad_token_id
        kwargs["eos_token_id"] = eos_token_id
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)

    def _auto_map(self) -> dict[str, str]:
        """What transformers and users load, by whose request, of the files beside config.json."""
        models = dict(MODELS)
        if not self.num_auxiliary_layers:
            del models["MetroForAuxiliaryMaskedLM"]
        if not {"clm", "mlm"} & set(self.objectives):
            del models["AutoModelForMaskedLM"]
        if "rtd" not in self.objectives:
            del models["MetroForReplacedTokenDetection"]
        return {"AutoConfig": "configuration_metro.MetroConfig"} | {
            name: f"modeling_metro.{model}" for name, model in models.items()
        }

    @property
    def unsampled_ids(self) -> list[int]:
        """Ids of tokens that are no words, which never replace one."""
        return [self.bos_token_id, self.pad_token_id, self.eos_token_id, self.mask_token_id, *self.other_special_ids]

    @property
    def main(self) -> EncoderSizes:
        """Of the main encoder."""
        return EncoderSizes(self.num_hidden_layers, self.hidden_size, self.num_attention_heads, self.intermediate_size)

    @property
    def auxiliary(self) -> EncoderSizes:
        """Of the auxiliary encoder."""
        return EncoderSizes(
            self.num_auxiliary_layers,
            self.auxiliary_hidden_size or self.hidden_size,
            self.auxiliary_num_attention_heads or self.num_attention_heads,
            self.auxiliary_ffn_hidden_size or self.intermediate_size,
        )

    @property
    def table_width(self) -> int:
        """D, columns of the token table and of the position tables."""
        return self.embedding_size or self.hidden_size
