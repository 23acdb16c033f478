"""Everything a run can be told, one frozen dataclass per concern.

Leaf names are Megatron's where Megatron has one. Defaults are METRO-LM base (METRO Tables 3 and 13). A field says all
there is to know of its option (metro_megatron/cli/options.py); what follows from several fields is a property.
Reading YAML and command lines is `metro_megatron.config.file`, checking what only the combination of fields can
show `metro_megatron.config.problems`.
"""

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from metro_megatron.cli.options import Range, above, at_least
from metro_megatron.config.early_exit import Exits
from metro_megatron.config.phases import Phase
from metro_megatron.config.position import BUCKETS, PositionScheme
from metro_megatron.schedule import Decay, Point, Schedule, Steps, Written, step_window, steps_of
from metro_megatron.vocabulary import BOS_ID, EOS_ID, MASK_ID, PAD_ID, UNK_ID, SpecialIds, padded_vocab_size

SharedPart = Literal["word", "position", "norm", "decoder"]
"""Token table, table of absolute positions and norm of an encoder's embedding, and bias of its decoder."""
Part = Literal["auxiliary", "main", "rtd", "clm", "cloze", "scl", "mlm"]
"""What of a pair may start at random beside weights of others: its encoders, and main's heads."""
MorePositions = Literal["repeat", "interpolate"]
"""How a table of positions gets more rows."""
RecomputeModule = Literal["core_attn", "layernorm", "mlp", "mlp_act"]
"""Of a layer, what backward makes again, in megatron-core's names; it has none for the GELU of a dense MLP."""

MAY_CHANGE = "a resumed run may change it"
"""Marks layout, rows, kernels, reporting, and where shards lie: on resume their contents are compared instead. All else
would make another run of it."""
OVERRIDE_MAY_CHANGE = "a resumed run may change it where train.override names it"
"""Marks what is read anew at each step, and so may be other from a step on."""
BRANCH_MAY_CHANGE = "a run that branches from another's checkpoint may change it"
"""Marks what is planned over the steps, of which a branch has others before it."""


@dataclass(frozen=True)
class EncoderSizes:
    """The sizes of one encoder of the pair."""

    num_layers: int
    hidden_size: int
    """H"""
    num_attention_heads: int
    ffn_hidden_size: int

    @property
    def head_dim(self) -> int:
        """K, width of one head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ModelConfig:
    """The pair of encoders. The auxiliary has its own depth; its width is main's unless given."""

    hidden_size: Annotated[int, at_least(1)] = 768
    """Width H of the main encoder."""
    num_attention_heads: Annotated[int, at_least(1)] = 12
    """Heads per layer; the head dimension is hidden_size / num_attention_heads."""
    ffn_hidden_size: Annotated[int, at_least(1)] = 3072
    """Inner width of the feed-forward layers, 4 H in the paper."""
    num_layers: Annotated[int, at_least(1)] = 12
    """Depth of the main encoder."""
    auxiliary_num_layers: Annotated[int, at_least(1)] = 4
    """Depth of the auxiliary encoder."""
    auxiliary_hidden_size: Annotated[int, at_least(0)] = 0
    """Width of the auxiliary encoder; 0: main's, as in METRO."""
    auxiliary_num_attention_heads: Annotated[int, at_least(0)] = 0
    """Heads per auxiliary layer; 0: main's."""
    auxiliary_ffn_hidden_size: Annotated[int, at_least(0)] = 0
    """Inner width of the auxiliary's feed-forward layers; 0: main's."""
    embedding_size: Annotated[int, at_least(0)] = 0
    """Width D of token and position embeddings; an encoder of another width projects them (ELECTRA). 0: hidden_size."""
    vocab_size: Annotated[int, at_least(6)] = 128000
    """Token ids, specials included; the default becomes what the tokenizer of data.train has, any other must be it."""
    bos_token_id: Annotated[int, at_least(0)] = BOS_ID
    """Before every sample; this and the other ids of special tokens become those of the tokenizer of data.train."""
    pad_token_id: Annotated[int, at_least(0)] = PAD_ID
    """Where there is no token."""
    eos_token_id: Annotated[int, at_least(0)] = EOS_ID
    """Behind every sample."""
    mask_token_id: Annotated[int, at_least(0)] = MASK_ID
    """What is read at masked positions."""
    other_special_ids: list[int] = field(default_factory=lambda: [UNK_ID])
    """Ids that are no words either: masked only where a sample has too few words, and never drawn."""
    max_position_embeddings: Annotated[int, at_least(3)] = 512
    """Rows of the learned absolute position tables: the longest sample, specials included."""
    relative_attention_num_buckets: Annotated[int, at_least(4)] = 64
    """Buckets of the relative-position tables."""
    relative_attention_max_distance: Annotated[int, at_least(1)] = 128
    """Distance in tokens from which all distances share the last bucket."""
    relative_bucket: Literal["coco", "t5", "none"] = "coco"
    """Bucket function: COCO-LM's or T5's; none: no relative positions."""
    untied_positions: bool = False
    """Scores get a term of absolute positions alone, and the input none (full TUPE); each encoder has its own."""
    reset_cls: bool = True
    """[CLS] has position biases of its own, as a query and as a key (TUPE's reset, METRO's choice)."""
    norm_first: bool = False
    """Pre-LN with a last norm, instead of post-LN; the embedding has its norm in both."""
    shared_embeddings: Literal["none", "token", "token_position", "token_position_norm"] = "token"
    """What of the embedding both encoders share, where an auxiliary trains: METRO tokens, its baseline positions
    too."""
    shared_lm_bias: bool = False
    """Both language modelling heads have one bias (METRO's baseline); default: one each."""
    rtd_head: Literal["linear", "dense"] = "linear"
    """linear: one logit of the hidden state (COCO-LM); dense: a dense layer and GELU before it (ELECTRA)."""
    lm_head: Literal["linear", "dense"] = "linear"
    """Main's language modelling head. linear: the tied decoder alone; dense: dense, GELU and norm before it (BERT)."""
    layer_norm_eps: Annotated[float, above(0)] = 1e-5
    """Epsilon of every LayerNorm."""
    hidden_dropout: Annotated[float, Range(0, 1)] = 0.1
    """Dropout of embeddings and sublayer outputs; of the auxiliary as auxiliary_dropout says."""
    attention_dropout: Annotated[float, Range(0, 1)] = 0.1
    """Dropout of attention probabilities; of the auxiliary as auxiliary_dropout says."""
    auxiliary_dropout: Literal["zero", "train", "eval"] = "zero"
    """zero: the auxiliary has none (METRO's zero-dropout). train: main's rates, and samples come from the same pass.
    eval: main's rates, and samples come from another pass without dropout (COCO-LM)."""
    init_method_std: Annotated[float, above(0)] = 0.02
    """Standard deviation of the normal initialization."""
    relative_bias_init: Literal["normal", "decay"] = "normal"
    """normal: as all weights. decay: head h starts at -2^-h times the distance, which lets small models on little text
    leave the plateau of word frequencies early; not METRO's."""
    position_init: Literal["normal", "zero"] = "normal"
    """How tables of absolute positions start. normal: as all weights. zero: the input begins as tokens alone, from
    which small models learn sooner; not METRO's."""
    scaled_init_targets: Literal["ffn", "ffn_out", "residual_out", "none"] = "ffn"
    """Which matrices of layer l (0-based) start divided by sqrt(2 (l + 1)): METRO eq. 10."""

    @property
    def main(self) -> EncoderSizes:
        """Of the main encoder."""
        return EncoderSizes(self.num_layers, self.hidden_size, self.num_attention_heads, self.ffn_hidden_size)

    @property
    def auxiliary(self) -> EncoderSizes:
        """Of the auxiliary encoder."""
        return EncoderSizes(
            self.auxiliary_num_layers,
            self.auxiliary_hidden_size or self.hidden_size,
            self.auxiliary_num_attention_heads or self.num_attention_heads,
            self.auxiliary_ffn_hidden_size or self.ffn_hidden_size,
        )

    @property
    def special_ids(self) -> SpecialIds:
        """Those of the tokenizer."""
        ids = (self.bos_token_id, self.pad_token_id, self.eos_token_id, self.mask_token_id)
        return SpecialIds(*ids, others=tuple(self.other_special_ids))

    @property
    def table_width(self) -> int:
        """D, columns of the token table and of the position tables."""
        return self.embedding_size or self.hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token table, the same under every layout."""
        return padded_vocab_size(self.vocab_size)

    @property
    def position_scheme(self) -> PositionScheme:
        """What the options about positions mean, the same for both encoders."""
        buckets = None
        if self.relative_bucket != "none":
            of_kind = BUCKETS[self.relative_bucket]
            buckets = of_kind(self.relative_attention_num_buckets, self.relative_attention_max_distance)
        return PositionScheme(
            positions=self.max_position_embeddings,
            buckets=buckets,
            resets_cls=self.reset_cls,
            is_untied=self.untied_positions,
            starts_decaying=self.relative_bias_init == "decay",
        )

    @property
    def shared_parts(self) -> tuple[SharedPart, ...]:
        """What both encoders share: each level of shared_embeddings has one part more, then the decoders' bias."""
        parts: tuple[SharedPart, ...] = ("word", "position", "norm")
        level = ("none", "token", "token_position", "token_position_norm").index(self.shared_embeddings)
        return *parts[:level], *(("decoder",) if self.shared_lm_bias else ())


@dataclass(frozen=True)
class ObjectiveConfig:
    """L = MLM(auxiliary) + rtd_weight * RTD + clm_weight * CLM (METRO eq. 9), or another."""

    main: list[Literal["rtd", "clm", "cloze", "scl", "mlm"]] = field(default_factory=lambda: ["rtd", "clm"])
    """What main learns: replaced token detection, correction (alone: Replace MLM), one-choice cloze, sequence
    contrast; or, with corruption.source none and by itself, plain masked language modelling (BERT)."""
    clm: Literal["simplified", "weighted", "mixture"] = "simplified"
    """METRO's simplified CLM, or COCO-LM's with a copy mechanism: as its authors' code weighs it, or as its formula."""
    mask_probability: Annotated[float, Range(0, 1, has_low=False)] = 0.15
    """Share of a sample's tokens that are masked; specials never are."""
    keep_probability: Annotated[float, Range(0, 1)] = 0.0
    """Share of masked positions that keep their token where <mask> is read (BERT 0.1, ELECTRA 0.15)."""
    random_probability: Annotated[float, Range(0, 1)] = 0.0
    """Share of masked positions that get a random token where <mask> is read (BERT 0.1)."""
    whole_word_masking: bool = False
    """Mask all tokens of a word or none (BERT's later models; not COCO-LM, ELECTRA and METRO). Every rank then reads
    all samples of a step to count the masked tokens."""
    rtd_weight: Annotated[float, at_least(0), OVERRIDE_MAY_CHANGE] = 50.0
    """Weight of replaced token detection (lambda)."""
    clm_weight: Annotated[float, at_least(0), OVERRIDE_MAY_CHANGE] = 1.0
    """Weight of the corrective language modelling loss."""
    cloze_weight: Annotated[float, at_least(0), OVERRIDE_MAY_CHANGE] = 50.0
    """Weight of one-choice cloze, whose candidates and weight METRO leaves open: 50 is MC-BERT's, a guess."""
    scl_weight: Annotated[float, at_least(0), OVERRIDE_MAY_CHANGE] = 1.0
    """Weight of sequence contrastive learning."""
    scl_temperature: Annotated[float, above(0)] = 1.0
    """Temperature of sequence contrastive learning."""
    scl_crop: Annotated[float, Range(0, 1, has_low=False)] = 0.9
    """Share of a sample's tokens that its crop keeps, specials included."""
    scl_negatives: Literal["micro_batch", "all_ranks"] = "micro_batch"
    """Against which sequences: of the micro batch (COCO-LM), on which the loss then depends; or of the data-parallel
    ranks' micro batches too, and then it depends on their number."""


@dataclass(frozen=True)
class CorruptionConfig:
    """Where replacements for masked tokens come from."""

    source: Literal["auxiliary", "frozen", "cached", "uniform", "unigram", "main", "none"] = "auxiliary"
    """auxiliary: trained beside main. frozen: an existing model (Fast-ELECTRA). cached: written by
    tools/cache_corruption.py. uniform, unigram: drawn without a model. main: a head on a middle layer of main.
    none: main reads <mask>."""
    frozen_model: Annotated[str, MAY_CHANGE] = ""
    """Run folder, checkpoint, exported folder or folder of a transformers masked language model with the run's
    tokenizer, for source frozen; with source cached, the model that the cache must be of."""
    cache: Annotated[str, MAY_CHANGE] = ""
    """Folder written by tools/cache_corruption.py, for source cached."""
    unigram_power: Annotated[float, at_least(0)] = 1.0
    """Exponent of the token frequencies in the training shards, for source unigram."""
    main_layer: Annotated[int, at_least(0)] = 0
    """Main layer (from 1) whose head proposes, for source main, an interpretation of the early-exit paper's study; 0:
    half of the depth."""
    disallow_correct: bool = False
    """Never draw the token that was masked (ELECTRA's option)."""
    temperature_schedule: Annotated[Literal["constant", "exponential", "linear", "polynomial"], OVERRIDE_MAY_CHANGE] = (
        "constant"
    )
    """How the sampling temperature falls from temperature to final_temperature over the run (Fast-ELECTRA; its
    exponential is known, 2 and tau 0.1 are not verified). Evaluations draw at that of the run's end."""
    temperature: Annotated[float, above(0), OVERRIDE_MAY_CHANGE] = 1.0
    """Sampling temperature T at the start: softmax(logits / T)."""
    final_temperature: Annotated[float, above(0), OVERRIDE_MAY_CHANGE] = 1.0
    """Temperature towards which it falls; a constant one stays at temperature."""
    temperature_tau: Annotated[float, above(0), OVERRIDE_MAY_CHANGE] = 0.1
    """Share of the run in which the exponential's distance falls to 1/e."""
    temperature_power: Annotated[float, above(0), OVERRIDE_MAY_CHANGE] = 2.0
    """Exponent of the polynomial: final + (first - final) (1 - u)^power at share u of the run."""

    @property
    def trains_auxiliary(self) -> bool:
        """Whether an auxiliary model is part of the run and of what it exports."""
        return self.source == "auxiliary"

    @property
    def sampling_temperature(self) -> Schedule | Decay:
        """T over the run; exponential: T(u) = T_end + (T_0 - T_end) exp(-u / tau) (Fast-ELECTRA)."""
        first, final = self.temperature, self.final_temperature
        if self.temperature_schedule == "exponential":
            return Decay(first, final, "exponential", self.temperature_tau)
        if self.temperature_schedule == "polynomial":
            return Decay(first, final, "polynomial", self.temperature_power)
        if self.temperature_schedule == "linear":
            return Schedule(first, (Point(final, 100, is_share=True),))
        return Schedule(first)


@dataclass(frozen=True)
class EarlyExitConfig:
    """Tokens that leave main early: our reading of a paper whose abstract alone is public."""

    layers: list[int] = field(default_factory=list)
    """Main layers (from 1), ascending, behind which tokens may leave; what stays is what the head of replaced token
    detection is least sure of there. Keys and values of tokens that left are still projected in every layer, their
    queries, output projections and MLPs are not. None: every token is read to the top. Evaluation, export and
    fine-tuning always do so."""
    share: Written = "0 -> 0 at 10% -> 0.5 at 30%"
    """Share of a sample's tokens that have left behind the last of these layers, each of which takes as many: a
    schedule. As long as it is 0, no token leaves, masked or not, and the exits' heads learn alone. A guess."""
    rule: Literal["confidence", "random"] = "confidence"
    """Who leaves: the tokens of most confidence, or as a control as many at random."""
    weight: Annotated[float, at_least(0)] = 1.0
    """Weight of each exit's detection loss, which is over the tokens that go on, times objective.rtd_weight; those that
    leave are scored where the others are, at the top. 1 is a guess: all exits alike."""

    def exits_at(self, step: int, train_steps: int) -> Exits | None:
        """Of a step counted from 0; None: there are none."""
        return Exits(tuple(self.layers), Schedule.parse(self.share).at(step, train_steps)) if self.layers else None

    def held(self, step: int, train_steps: int) -> "EarlyExitConfig":
        """With the share of one step at all of them."""
        exits = self.exits_at(step, train_steps)
        return replace(self, share=exits.share) if exits else self

    def average_exits(self, train_steps: int) -> Exits | None:
        """Over a run, from a thousand of its steps."""
        if not self.layers:
            return None
        share = Schedule.parse(self.share)
        steps = range(0, train_steps, max(1, train_steps // 1000)) if share.points else range(1)
        return Exits(tuple(self.layers), sum(share.at(step, train_steps) for step in steps) / len(steps))


@dataclass(frozen=True)
class DataConfig:
    """Which shards are read, and how samples become rows."""

    train: Annotated[list[str], MAY_CHANGE] = field(default_factory=list)
    """Dataset prefixes written by tools/preprocess_data.py; each is a source."""
    weights: list[float] = field(default_factory=list)
    """How often the sources of data.train are drawn from, in any unit; none: in proportion to their samples."""
    index_cache: Annotated[str, MAY_CHANGE] = ""
    """Folder of the sample indices, built on first use; default: sample_index beside the first dataset."""
    validation: Annotated[list[str], MAY_CHANGE] = field(default_factory=list)
    """Dataset prefixes for evaluation; or set validation_fraction."""
    validation_fraction: Annotated[float, Range(0, 1)] = 0.0
    """Share of the training documents held out for evaluation, chosen by a hash."""
    held_out_by: Literal["content", "place"] = "content"
    """What is hashed. content: the document's ids; place: its number and its dataset's in data.train, which runs of
    releases before this option go on with."""
    seq_length: Annotated[int, at_least(3)] = 512
    """Longest sample in tokens, <s> and </s> included."""
    row_format: Annotated[Literal["packed", "padded"], MAY_CHANGE] = "packed"
    """packed: samples side by side in one row; padded: one sample per row."""
    micro_batch_tokens: Annotated[int, at_least(1), MAY_CHANGE] = 16384
    """Most tokens of a packed row, which is one micro batch: the rows of a step are as short as its samples allow."""
    micro_batch_size: Annotated[int, at_least(1), MAY_CHANGE] = 32
    """Rows of a padded micro batch."""
    prefetch_steps: Annotated[int, at_least(0), MAY_CHANGE] = 2
    """Steps of batches prepared ahead in the background."""

    @property
    def is_packed(self) -> bool:
        """Whether samples lie side by side in a row."""
        return self.row_format == "packed"

    @property
    def most_row_places(self) -> int:
        """Most places for tokens in a row; padded rows always have as many."""
        return self.micro_batch_tokens if self.is_packed else self.seq_length

    @property
    def micro_batch_rows(self) -> int:
        """Rows of a micro batch."""
        return 1 if self.is_packed else self.micro_batch_size

    @property
    def micro_batch_slots(self) -> int:
        """Most slots for tokens in a micro batch."""
        return self.micro_batch_rows * self.most_row_places


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam, or Muon for matrices, with decoupled weight decay; a warm-up and a decay to zero."""

    lr: Annotated[float, above(0), OVERRIDE_MAY_CHANGE] = 5e-4
    """Peak learning rate."""
    lr_warmup_steps: Annotated[int, at_least(0), OVERRIDE_MAY_CHANGE] = 10000
    """Steps of linear warm-up."""
    lr_decay_steps: Annotated[Steps, BRANCH_MAY_CHANGE, OVERRIDE_MAY_CHANGE] = "100%"
    """Last steps of the run, or their share, in which the rate falls from lr to 0; between warm-up and them it stays
    (WSD). 100%: all behind the warm-up. 0: it never falls, as is good for a run from which branches decay."""
    lr_decay_style: Annotated[Literal["linear", "cosine", "1-sqrt"], BRANCH_MAY_CHANGE, OVERRIDE_MAY_CHANGE] = "linear"
    """How it falls; 1-sqrt: by 1 - sqrt(x) at share x of the decay (arXiv 2405.18392)."""
    weight_decay: Annotated[float, at_least(0), OVERRIDE_MAY_CHANGE] = 0.01
    """Decoupled weight decay."""
    decay_all: bool = False
    """Decay biases and LayerNorm weights too, as fairseq does; default: matrices only."""
    adam_beta1: Annotated[float, Range(0, 1)] = 0.9
    """First-moment coefficient."""
    adam_beta2: Annotated[float, Range(0, 1)] = 0.98
    """Second-moment coefficient."""
    adam_eps: Annotated[float, above(0)] = 1e-6
    """Adam's epsilon."""
    adam_impl: Annotated[Literal["torch", "transformer_engine", "apex"], MAY_CHANGE] = "torch"
    """Whose kernel computes Adam's update: one rule, equal up to rounding, and one checkpoint for all."""
    matrices: Literal["adam", "muon"] = "adam"
    """What updates the matrices of main's layers. muon: torch.optim.Muon's rule on whole ones, q, k and v each by
    itself, in steps of Adam's usual size, 0.2 of the rate; tables, heads, biases and norms stay Adam's."""
    muon_lr: Annotated[float, at_least(0), OVERRIDE_MAY_CHANGE] = 0.0
    """Peak learning rate of main's matrices under muon; 0: lr."""
    muon_momentum: Annotated[float, Range(0, 1)] = 0.95
    """Muon's Nesterov momentum."""
    auxiliary_lr: Annotated[float, at_least(0), OVERRIDE_MAY_CHANGE] = 0.0
    """Peak learning rate of what the auxiliary alone has; 0: lr. What both encoders share, such as the token table, has
    main's options."""
    auxiliary_lr_schedule: Annotated[Written, BRANCH_MAY_CHANGE, OVERRIDE_MAY_CHANGE] = ""
    """The rates of what the auxiliary alone has, as shares of their peaks: a schedule, such as 0 -> 1 at 5% -> 0 at
    60%. Empty: as lr_warmup_steps and lr_decay_steps have it for all."""
    auxiliary_adam_beta1: Annotated[float, Range(0, 1)] = 0.0
    """First-moment coefficient of what the auxiliary alone has; 0: adam_beta1."""
    auxiliary_adam_beta2: Annotated[float, Range(0, 1)] = 0.0
    """Second-moment coefficient of what the auxiliary alone has; 0: adam_beta2."""
    auxiliary_matrices: Literal["adam", "muon"] = "adam"
    """What updates the matrices of the auxiliary's layers, as `matrices` says of main's."""
    auxiliary_muon_lr: Annotated[float, at_least(0), OVERRIDE_MAY_CHANGE] = 0.0
    """Peak learning rate of the auxiliary's matrices under muon; 0: the auxiliary's."""
    clip_grad: Annotated[float, at_least(0), OVERRIDE_MAY_CHANGE] = 2.0
    """Largest global gradient norm, over all that is trained; 0 switches clipping off."""
    skip_spikes: Annotated[float, at_least(0), OVERRIDE_MAY_CHANGE] = 0.0
    """Steps are skipped whose gradient norm is so many robust standard deviations above that of the last 128, 10 for
    instance; each is noted in journal.jsonl. 0: none."""
    initial_loss_scale: Annotated[float, above(0)] = 65536.0
    """fp16: first loss scale."""
    min_loss_scale: Annotated[float, above(0)] = 1.0
    """fp16: smallest loss scale."""
    loss_scale_window: Annotated[int, at_least(1)] = 1000
    """fp16: steps without overflow before the scale doubles."""
    hysteresis: Annotated[int, at_least(1)] = 2
    """fp16: overflows before the scale is halved."""

    @property
    def auxiliary(self) -> "OptimizerConfig":
        """Of what the auxiliary alone has, by main's names."""
        return replace(
            self,
            lr=self.auxiliary_lr or self.lr,
            adam_beta1=self.auxiliary_adam_beta1 or self.adam_beta1,
            adam_beta2=self.auxiliary_adam_beta2 or self.adam_beta2,
            matrices=self.auxiliary_matrices,
            muon_lr=self.auxiliary_muon_lr,
        )

    @property
    def auxiliary_schedule(self) -> Schedule | None:
        """Share of the peak rates of what the auxiliary alone has; None: they follow main's. Raises UserError."""
        return None if self.auxiliary_lr_schedule == "" else Schedule.parse(self.auxiliary_lr_schedule)

    def learning_rate(self, train_steps: int) -> Schedule:
        """Linear from 0 to lr over the warm-up, lr until the decay begins, then to 0 at train_steps."""
        warm, decay = self.lr_warmup_steps, steps_of(self.lr_decay_steps, train_steps)
        points = [Point(self.lr, warm)] if warm else []
        if train_steps - decay > warm:
            points.append(Point(self.lr, train_steps - decay))
        if decay:
            points.append(Point(0.0, train_steps, shape=self.lr_decay_style))
        return Schedule(0.0 if warm else self.lr, tuple(points))


@dataclass(frozen=True)
class ParallelConfig:
    """How the run is spread; data parallelism is what remains of the processes."""

    tensor_model_parallel_size: Annotated[int, at_least(1)] = 1
    """Ranks that share every matrix."""
    pipeline_model_parallel_size: Annotated[int, at_least(1)] = 1
    """Stages of the main model; every stage holds the whole auxiliary model."""
    virtual_pipeline_model_parallel_size: Annotated[int, at_least(1)] = 1
    """Chunks of main layers per stage (interleaved schedule); 1 is the plain schedule."""
    pipeline_model_parallel_layout: str = ""
    """Main layers of every chunk as Megatron writes them, such as Ettt|tL; empty: no stage has more to multiply than
    it must, heads included."""
    sequence_parallel: bool = False
    """Shard activations between matrices over the tensor-parallel ranks."""
    recompute: Literal["none", "selective", "full"] = "none"
    """full: layers are recomputed in the backward pass; selective: what recompute_modules names of each."""
    recompute_modules: list[RecomputeModule] = field(default_factory=lambda: ["mlp_act"])
    """With recompute selective, in Megatron's names: core_attn, attention between its matrices; layernorm, pre-LN's
    norms; mlp, all of it; and mlp_act, its GELU alone: a quarter of a layer's memory for next to nothing."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Linear layers of the encoders, with the same checkpoints. local: megatron-core's. auto: Transformer Engine's on a
    GPU where it is whole, but in fp32, which it computes in TF32; else local."""
    overlap: bool = True
    """Overlap parameter gathering and gradient reduction with computation; on the CPU nothing overlaps."""
    grad_reduce_in_fp32: bool = True
    """Gradients are kept and summed in fp32; false: in train.precision's format, 2 bytes a parameter less on every rank
    (METRO Table 4)."""
    timeout_minutes: Annotated[int, at_least(1)] = 10
    """A rank that waits longer for others ends the run, and names the one that does nothing."""

    @property
    def model_ranks(self) -> int:
        """Ranks that share one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def is_interleaved(self) -> bool:
        """Whether a stage holds several chunks of layers."""
        return self.virtual_pipeline_model_parallel_size > 1


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is kept."""

    save_interval: Annotated[int, at_least(1)] = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: Annotated[int, at_least(0)] = 3
    """Newest checkpoints kept; 0 keeps all."""
    async_save: bool = True
    """Train on while a checkpoint is written: training waits for a copy in the host's memory, of up to 16 bytes a
    parameter, shared by the ranks that hold the same ones. The last one of a run is waited for."""
    strict: bool = False
    """End the run where its newest checkpoint is damaged or not known, instead of going back to an older one."""
    failed_saves: Annotated[int, at_least(0)] = 2
    """Saves in a row that may fail, for want of room for instance, before the run ends; that of its end never may."""


@dataclass(frozen=True)
class TrainConfig:
    """The run."""

    output: Annotated[str, MAY_CHANGE] = ""
    """Run folder: checkpoints, metrics.jsonl, TensorBoard, resolved configuration. An existing one is resumed."""
    branch_from: Annotated[str, BRANCH_MAY_CHANGE] = ""
    """Checkpoint (iter_...) of another run from which this one begins, with its weights, moments and place in the data.
    It may have another length, learning rate and other phases from there on; the rest must be equal."""
    initialize_from: Annotated[list[str], BRANCH_MAY_CHANGE] = field(default_factory=list)
    """Weights that a new run begins with, in any layout; moments and place in the data start anew. A folder that
    tools/convert_checkpoint.py wrote, a run or checkpoint, transformers' ELECTRA (generator, discriminator, or both
    folders), or COCO-LM's .pt file with its dict.txt beside it."""
    initialize_fresh: Annotated[list[Part], BRANCH_MAY_CHANGE] = field(default_factory=list)
    """Parts that start at random all the same: encoders (the auxiliary with its head) and main's heads. What
    initialize_from does not have must be named here."""
    initialize_positions: Annotated[Literal["same", "repeat", "interpolate"], BRANCH_MAY_CHANGE] = "same"
    """What becomes of initialize_from's tables of absolute positions where model.max_position_embeddings is larger.
    same: it must not be. repeat: their rows begin again behind the last, but for that of <s>. interpolate: they are
    stretched. Distances beyond those learned have the bias of the furthest."""
    train_steps: Annotated[int, at_least(1), BRANCH_MAY_CHANGE, OVERRIDE_MAY_CHANGE] = 125000
    """Optimizer steps of the whole run; of a branch, with those before it."""
    phases: Annotated[list[Phase], BRANCH_MAY_CHANGE] = field(default_factory=list)
    """From some step on, other samples, masks or rates: {start: 90%, seq_length: 512, mask_probability: 0.2, weights:
    [1, 0, 3], lr_factor: 0.5}, of which each may be left out but start (docs/phases.md)."""
    override: Annotated[list[str], MAY_CHANGE] = field(default_factory=list)
    """Options that a resumed run shall have otherwise than before, such as optimizer.lr; noted in journal.jsonl."""
    skip_steps: Annotated[list[str], MAY_CHANGE] = field(default_factory=list)
    """Steps, counted from 1, whose samples are passed over without training, such as 1200-1260: bad data, or a spike
    that comes again. A resumed run may add steps that are not yet done."""
    bad_steps: Annotated[Literal["skip", "stop", "rollback"], OVERRIDE_MAY_CHANGE] = "skip"
    """After a step that was skipped, as its gradients are not finite (in fp16: though the loss scale is at its least)
    or a spike (optimizer.skip_spikes): go on, end the run, or go back to the newest checkpoint and from there pass over
    the samples up to that step (PaLM)."""
    global_batch_tokens: Annotated[int, at_least(1)] = 1 << 20
    """Most tokens of a step over all ranks: as many samples as have no more."""
    global_batch_size: Annotated[int, at_least(0)] = 0
    """Samples per step over all ranks, as in the paper (2048); 0: as global_batch_tokens says."""
    seed: Annotated[int, Range(0, 2**63)] = 1
    """Seed of weights, order, masks, sampling noise and dropout."""
    precision: Annotated[Literal["bf16", "fp16", "fp32"], OVERRIDE_MAY_CHANGE] = "bf16"
    """Format of weights and activations; master weights and moments are always fp32."""
    fp8_recipe: Annotated[Literal["none", "tensorwise"], OVERRIDE_MAY_CHANGE] = "none"
    """tensorwise: products of the linear layers in FP8, scaled by each tensor's own maximum, by Transformer Engine; the
    first and the last layer of each encoder, heads, tables, norms and attention stay in bf16."""
    fused: Annotated[Literal["auto", "reference"], MAY_CHANGE] = "auto"
    """auto: our Triton kernels where they can run; reference: plain torch, the same mathematics."""
    device: Annotated[Literal["auto", "cpu", "cuda"], MAY_CHANGE] = "auto"
    """auto: cuda where there is one."""
    self_check: Annotated[bool, MAY_CHANGE] = True
    """Look at batches, replacements, models and gradients before the first step of every start (docs/health.md)."""
    log_interval: Annotated[int, at_least(1), MAY_CHANGE] = 10
    """Steps between log lines."""
    eval_interval: Annotated[int, at_least(0), MAY_CHANGE] = 1000
    """Steps between evaluations; the last step is always evaluated. 0 switches evaluation off."""
    eval_samples: Annotated[int, at_least(1), MAY_CHANGE] = 2048
    """Held-out samples per evaluation."""
    probe_interval: Annotated[int, at_least(0), MAY_CHANGE] = 0
    """Steps between probes of main's frozen features by train.probe_tasks; after the last step, too. 0: none."""
    probe_tasks: Annotated[str, MAY_CHANGE] = ""
    """Folder of tasks, written by tools/make_tasks.py."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    early_exit: EarlyExitConfig = field(default_factory=EarlyExitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: Annotated[ParallelConfig, MAY_CHANGE] = field(default_factory=ParallelConfig)
    checkpoint: Annotated[CheckpointConfig, MAY_CHANGE] = field(default_factory=CheckpointConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def skipped_steps(self) -> list[range]:
        """Steps, counted from 0, of train.skip_steps. Raises UserError."""
        return [step_window(written) for written in self.train.skip_steps]

    @property
    def proposing_layers(self) -> int:
        """Main layers that the masked text goes through where corruption.source is main."""
        return self.corruption.main_layer or max(1, self.model.num_layers // 2)

    @property
    def phase_starts(self) -> list[int]:
        """Steps done when each phase begins: 0, where the run's own options hold, then those of train.phases.

        Raises UserError.
        """
        return [0, *(steps_of(phase.start, self.train.train_steps) for phase in self.train.phases)]

    def phase_at(self, step: int) -> int:
        """Number of the phase that a step, counted from 0, is of."""
        return bisect_right(self.phase_starts, step) - 1

    @property
    def by_phase(self) -> list["Config"]:
        """Of each phase a run that is all in it, but for the learning rate; the first has the run's own options."""
        alone = replace(self, train=replace(self.train, phases=[]))
        return [alone, *(alone._with_phase(phase) for phase in self.train.phases)]

    def _with_phase(self, phase: Phase) -> "Config":
        length, weights = phase.seq_length or self.data.seq_length, phase.weights or self.data.weights
        rate = phase.mask_probability or self.objective.mask_probability
        return replace(
            self,
            data=replace(self.data, seq_length=length, weights=weights),
            objective=replace(self.objective, mask_probability=rate),
        )

    @property
    def lr_factor(self) -> Schedule:
        """Factor of the learning rate over the run."""
        return Schedule.of_steps([1.0, *(phase.lr_factor for phase in self.train.phases)], self.phase_starts)

    @property
    def schedules(self) -> dict[str, Schedule | Decay]:
        """All that changes over the run, for configuration, training and picture; names are dotted like options."""
        planned: dict[str, Schedule | Decay] = {
            "optimizer.learning_rate": self.optimizer.learning_rate(self.train.train_steps)
        }
        if own := self.optimizer.auxiliary_schedule:
            planned["optimizer.auxiliary_lr_schedule"] = own
        if self.corruption.temperature_schedule != "constant":
            planned["corruption.sampling_temperature"] = self.corruption.sampling_temperature
        if self.early_exit.layers:
            planned["early_exit.share"] = Schedule.parse(self.early_exit.share)
        return planned | {name: one for name, one in self._phased.items() if one.points}

    @property
    def _phased(self) -> dict[str, Schedule]:
        phases, starts = self.by_phase, self.phase_starts
        return {
            "objective.mask_probability": Schedule.of_steps([one.objective.mask_probability for one in phases], starts),
            "data.seq_length": Schedule.of_steps([one.data.seq_length for one in phases], starts),
            "train.lr_factor": self.lr_factor,
        }
